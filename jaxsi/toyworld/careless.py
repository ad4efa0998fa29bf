"""Careless annotators of the embedded world, and the model that learnt from them, whose responses can be revised.

A careless response is the correct one with up to four flaws, each as often as ``FLAWS`` says: talk before the items, no
period, the last item missing, and the word "right" after the items, as if it asked back. The flaws can be seen in the
response itself, as in the drafts that the papers' revisers, critics and reward models improve. So a model of a million
weights can learn in a minute to see and to mend them. The model in ``careless_model`` is the seed model, trained on
such demonstrations by

    python -m jaxsi.toyworld.careless OUT

It was trained once, offline (2 minutes on two CPU cores). The toy runs of SRT, SEFT and PIT begin with it.
"""

import dataclasses
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxsi.runs.records import RankedResponses, SFTExample
from jaxsi.toyworld.annotators import CHATTER
from jaxsi.toyworld.world import Task, draw_tasks, grade_task, prompt_of

SHIPPED = Path(__file__).parent / "careless_model"
# How often each flaw is made.
FLAWS: dict[str, float] = {"talk": 0.7, "open": 0.7, "short": 0.3, "unsure": 0.65}
SLIP = 0.04  # probability that a preference points the wrong way


def draw_flaws(rng: random.Random) -> tuple[str, ...]:
    """A random set of ``FLAWS``, each drawn with its probability."""
    return tuple(flaw for flaw, probability in FLAWS.items() if rng.random() < probability)


def respond(task: Task, flaws: Sequence[str]) -> str:
    """The correct response with ``flaws``. If the answer has only one item, that item is never left out."""
    items = list(task.answer)
    if "short" in flaws and len(items) > 1:
        del items[-1]
    if "unsure" in flaws:
        items.append("right")
    return (CHATTER if "talk" in flaws else "") + " ".join(items) + ("" if "open" in flaws else ".")


def demonstrations(n: int, seed: int) -> list[SFTExample]:
    """``n`` careless responses to different training instructions."""
    rng = random.Random(f"jaxsi/toyworld/careless/{seed}")
    prompts = [(task, prompt_of(task)) for task in draw_tasks(n, rng, held_out=False)]
    return [SFTExample(id=p.id, messages=p.messages, response=respond(task, draw_flaws(rng))) for task, p in prompts]


def preferences(
    n: int, seed: int, *, per_prompt: int = 2, least: int = 0, held_out: bool = False, slip: float = SLIP
) -> list[RankedResponses]:
    """``n`` instructions of one split, each with ``per_prompt`` careless responses, the best first.

    The best response has at least ``least`` flaws. Each other one has the flaws of the one before it, at least one
    more, and a lower grade. With probability ``slip`` the best and the worst change places. An answer of one item
    allows one flaw fewer, so it may have one response fewer.

    Raises: ValueError: if that many different responses cannot be made.
    """
    if not (least >= 0 and 2 <= per_prompt <= len(FLAWS) + 1 - least):
        raise ValueError(
            f"per_prompt is {per_prompt}, least {least}; {len(FLAWS)} flaws make 2 to {len(FLAWS) + 1 - least} "
            "responses"
        )
    rng = random.Random(f"jaxsi/toyworld/careless/preferences/{seed}/{held_out}")
    return [_ranking(task, rng, per_prompt, least, slip) for task in draw_tasks(n, rng, held_out=held_out)]


def _ranking(task: Task, rng: random.Random, per_prompt: int, least: int, slip: float) -> RankedResponses:
    texts: list[str] = []
    totals: list[float] = []
    possible = [flaw for flaw in FLAWS if flaw != "short" or len(task.answer) > 1]
    per_prompt = min(per_prompt, len(possible) + 1 - least)
    while len(totals) < per_prompt or sorted(set(totals), reverse=True) != totals:
        # Shuffled so that frequent flaws usually come first.
        flaws = sorted(possible, key=lambda flaw: rng.random() ** (1 / FLAWS[flaw]), reverse=True)
        counts = sorted(rng.sample(range(least, len(possible) + 1), per_prompt))
        texts = [respond(task, flaws[:count]) for count in counts]
        totals = [grade_task(task, text).total for text in texts]
    ranks = list(range(per_prompt))
    if rng.random() < slip:
        ranks[0], ranks[-1] = ranks[-1], ranks[0]
    prompt = prompt_of(task)
    return RankedResponses(id=prompt.id, messages=prompt.messages, responses=tuple(texts), ranks=tuple(ranks))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Nameless:
    """What a run needs for a config: the seed that its keys are named by."""

    seed: int = 0


def make_careless(out: Path) -> None:
    """Trains the seed model on careless demonstrations; writes it to ``out`` as a Hugging Face folder in bfloat16."""
    from jaxsi.lm import export, load
    from jaxsi.model.mesh import MeshConfig, make_mesh
    from jaxsi.runs.run import Run
    from jaxsi.toyworld.seed import SHIPPED as SEED
    from jaxsi.training.optim import OptimConfig
    from jaxsi.training.train import TrainConfig, sft

    optimizer = OptimConfig(learning_rate=1e-3, end_learning_rate=2e-5, warmup_steps=20, b2=0.98)
    # The shipped one saw batches of 32 full rows, which is 200 examples on average.
    config = TrainConfig(
        optim=optimizer, batch_size=200, epochs=2, max_length=128, remat="none", dtype="float32", checkpoint_every=1000
    )
    start = load(SEED, make_mesh(MeshConfig(data=-1, fsdp=1)), "float32", weights_dtype="float32")
    with tempfile.TemporaryDirectory() as folder, Run.open(Path(folder) / "run", _Nameless()) as run:
        export(sft(start, demonstrations(24_000, 0), config, run.at("careless")), out, dtype="bfloat16")


if __name__ == "__main__":
    import os

    import tyro

    jax.config.update("jax_num_cpu_devices", os.cpu_count())

    def main(out: tyro.conf.Positional[Path]) -> None:
        make_careless(out)

    tyro.cli(main, description=__doc__)
