"""Temporal Self-Rewarding's own part: which models write and judge, and what M_f and M_t are trained from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tiny
from jaxsi import lm as lmlib
from jaxsi.lm import LM
from jaxsi.methods import temporal
from jaxsi.methods.lifecycle import keep
from jaxsi.methods.seeded import PairConfig
from jaxsi.methods.temporal import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.judge import scored
from jaxsi.training.train import DPOConfig

SAMPLING = SamplingConfig(num_samples=2, temperature=1.0, top_p=1.0, max_new_tokens=4, batch_size=8, dtype="float32")
TASKS = ("cat red", "dog", "axe pie saw", "blue owl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    seed: int = 0


def made(t: int) -> LM:
    """M_1 (given), M_2 and M_3; 12 and 13 are their future models."""
    return tiny.make_lm("1x8x1", seed=t)


NAMES = {made(t).fingerprint: t for t in (1, 2, 3, 12, 13)}


def test_past_and_future_models_write_and_the_present_one_judges(tmp_path: Path, monkeypatch: Any) -> None:
    judges: list[tuple[int, tuple[int, ...]]] = []
    trained: list[tuple[str, int, int | None, list[tuple[int, int]]]] = []

    def judging(lm: LM, prompts: Any, responses: Any, *_: object) -> Any:
        writers = sorted({NAMES[response.fingerprint] for response in responses})
        judges.append((NAMES[lm.fingerprint], tuple(writers)))
        # The past is worst, the future best: both rules take hold. At t = 2 the present is the past.
        rank = {1: 0, 2: 10, 12: 20, 13: 20}
        return scored(responses, [float(rank[NAMES[r.fingerprint]] + r.sample) for r in responses], lm)

    def training(lm: LM, pairs: Any, config: Any, it: Scope, *, reference: LM | None, **_: object) -> LM:
        sides = [(NAMES[pair.chosen.fingerprint], NAMES[pair.rejected.fingerprint]) for pair in pairs]
        of = None if reference is None else NAMES[reference.fingerprint]
        trained.append((it.name, NAMES[lm.fingerprint], of, sorted(set(sides))))
        kind, t = it.name.split("_")
        return keep(made(int(t) + 10 * (kind == "future")), it)

    monkeypatch.setattr(temporal, "dpo", training)
    lmlib.export(tiny.make_lm(seed=1), tmp_path / "model", dtype="float32")
    cfg = Config(
        model=str(tmp_path / "model"),
        prompts=TASKS,
        sampling=SAMPLING,
        judging=judging,
        pairs=PairConfig(cut_off=True),
        dpo=DPOConfig(reference="first"),
        mesh=MeshConfig(data=1, fsdp=8),
        iterations=3,
    )
    with Run.open(tmp_path / "run", Plain()) as run:
        assert temporal.temporal(cfg, run).fingerprint == made(3).fingerprint
    assert judges == [(1, (1,)), (1, (1,)), (1, (12,)), (2, (2,)), (2, (1,)), (2, (13,))]
    assert trained == [
        ("future_2", 1, 1, [(1, 1)]),
        ("iter_2", 1, 1, [(12, 1)]),
        ("future_3", 2, 1, [(2, 1)]),
        ("iter_3", 2, 1, [(13, 1)]),
    ]
    counts = json.loads((tmp_path / "run" / "iter_3" / "anchored_pairs_counts.json").read_text())
    assert (counts["prompts"], counts["pairs"], counts["past"]) == (2, 2, 2) and counts["judge"]["judged"] == 4
