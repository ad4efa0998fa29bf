"""Self-Rewarding with each kind of judge: whole, and stopped after the judgments and taken up again."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from endpoint_server import KEY, replied, serving
from micro_runs import artefacts, run_method

import jaxsi
from jaxsi.cli.command import UsageError
from jaxsi.cli.judges import judge_of, with_judges
from jaxsi.lm import export, load
from jaxsi.methods import self_rewarding
from jaxsi.methods.preflight import PreflightError, check
from jaxsi.methods.self_rewarding import Config
from jaxsi.runs.config_file import load_config
from jaxsi.runs.config_snapshot import RunConfigError
from jaxsi.runs.run import Run
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.judges import GapsBy, ScoringBy, TargetsBy
from jaxsi.toyworld import annotators
from jaxsi.training.reward import with_scalar_head

ROOT = Path(__file__).parents[2]
SEED_MODEL, CARELESS = (str(ROOT / "jaxsi" / "toyworld" / name) for name in ("seed_model", "careless_model"))
EXAMPLES = annotators.ift(8, 3)
FUNCTION = "def shortest(prompt: str, response: str) -> float:\n    return -len(response)\n"


class Stop(BaseException):
    """In place of a kill."""


def config(**changes) -> Config:
    train = jaxsi.TrainConfig(batch_size=8, max_length=128, dtype="float32")
    return Config(
        model=SEED_MODEL,
        prompts=[example.messages[-1]["content"] for example in EXAMPLES],
        sampling=jaxsi.SamplingConfig(
            num_samples=3, temperature=1.5, top_p=1.0, max_new_tokens=16, batch_size=32, dtype="float32"
        ),
        judge=JudgeConfig(num_samples=1, max_new_tokens=16, batch_size=32, min_parse_rate=0.0),
        dpo=jaxsi.DPOConfig(train=train),
        iterations=2,
        **changes,
    )


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """What the judges need: a reward model, a function, known answers."""
    folder = tmp_path_factory.mktemp("given")
    lm = with_scalar_head(load(SEED_MODEL, dtype="float32"))
    score = jnp.asarray(np.random.default_rng(0).normal(size=lm.weights["score"].shape), jnp.float32)
    export(dataclasses.replace(lm, weights=lm.weights | {"score": score}), folder / "reward", dtype="float32")
    (folder / "mine.py").write_text(FUNCTION)
    rows = [{"prompt": example.messages[-1]["content"], "answer": example.response} for example in EXAMPLES]
    (folder / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


KINDS = {
    "self in pairs": ("self", "pairwise"),
    "another model": (f"model:{CARELESS}", None),
    "a reward model": ("reward:{given}/reward", None),
    "a function": ("function:{given}/mine.py:shortest", None),
    "known answers": ("verifier:{given}/known.jsonl", None),
    "an endpoint": ("endpoint:m,base_url={url},api_key_variable=A_KEY,concurrency=2", None),
    "an endpoint that ranks": ("endpoint:m,base_url={url},api_key_variable=A_KEY", "ranking_judge"),
}


def pairwise_file(folder: Path) -> str:
    file = folder / "pairwise.txt"
    file.write_text("Task: {prompt}\nA: {response_a}\nB: {response_b}\nVerdict:")
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_run_that_stops_after_its_judgments_goes_on_to_the_same_end(kind, given, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    word, rubric = KINDS[kind]

    def reply(name, before):
        digits = sum(map(ord, name)) % 6
        return replied(f"Score: {digits}" if rubric is None else "Ranking: 2 > 1 > 3")

    with serving(reply) as server:
        judging = word.format(given=given, url=server.url)
        rubric = pairwise_file(tmp_path) if rubric == "pairwise" else rubric
        start = config()
        if kind in ("self in pairs", "another model"):  # the toy's models write no verdicts
            start = dataclasses.replace(start, judge=dataclasses.replace(start.judge, expected=True, max_new_tokens=1))

        def made(name: str) -> Path:
            cfg = with_judges(start, tmp_path / name, judging=judging, rubric=rubric, critic=None)
            return run_method(cfg, tmp_path / name)

        whole = made("whole")
        asked = len(server.bodies)
        with monkeypatch.context() as patch:
            patch.setattr(self_rewarding, "paired", stop)
            with pytest.raises(Stop):
                made("stopped")
        asked_again = len(server.bodies)
        stopped = made("stopped")
        made_by_both = [artefacts(folder) for folder in (stopped, whole)]
        for files in made_by_both:
            files.pop("judge_answers.jsonl", None)  # answers come in any order
        assert made_by_both[0] == made_by_both[1]
        assert asked_again == len(server.bodies) == 2 * asked, "an answer was paid for twice"
    pairs = [json.loads(line) for line in (whole / "iter_2" / "pairs.jsonl").read_text().splitlines()]
    assert pairs and all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    changed = dataclasses.replace(start, judging=judge_of(f"model:{SEED_MODEL}", Path()))
    with pytest.raises(RunConfigError, match="judging"):
        Run.open(stopped, changed)


def stop(*args):
    raise Stop


def test_judges_find_their_places_in_every_method(tmp_path):
    word = f"model:{CARELESS}"
    places = {"self_rewarding": lambda c: c.judging, "srt": lambda c: c.scoring.judging,
              "seft": lambda c: c.internal.target.judging, "pit": lambda c: c.rewarding.judging}  # fmt: skip
    for name, place in places.items():
        cfg = load_config(ROOT / "configs" / name / "toy.py")
        if name == "self_rewarding":
            cfg = dataclasses.replace(cfg, seed_data=dataclasses.replace(cfg.seed_data, rankings=None))
        cfg = with_judges(cfg, tmp_path, judging=word, rubric="pairwise_judge", critic=None)
        assert place(cfg).model == CARELESS
        check(cfg, tmp_path)
    kinds = [type(with_judges(load_config(ROOT / "configs" / name / "toy.py"), tmp_path, judging=word, rubric=None,
                              critic=None)) for name in ("srt", "seft", "pit")]  # fmt: skip
    assert len(kinds) == len({ScoringBy, TargetsBy, GapsBy})
    srt = load_config(ROOT / "configs" / "srt" / "toy.py")
    critic = with_judges(srt, tmp_path, judging=None, rubric=None, critic="endpoint:m,temperature=1").critic
    assert (critic.model, critic.temperature, critic.cache) == ("m", 1.0, str(tmp_path / "critic_answers.jsonl"))


def test_what_a_judge_cannot_do_is_refused_before_the_run(given, tmp_path):
    expected = JudgeConfig(expected=True, max_new_tokens=16)
    for word, judge, fault in [
        ("endpoint:m", expected, r"judge\.expected is on, but m at an endpoint gives no expected scores"),
        (f"reward:{CARELESS}", JudgeConfig(max_new_tokens=16), "has no scalar head; give a reward model"),
        (f"model:{given}/reward", JudgeConfig(max_new_tokens=16), "writes no (judgments|text)"),
        (f"model:{CARELESS}", JudgeConfig(max_new_tokens=4096), "leaves no room"),
    ]:
        cfg = dataclasses.replace(config(judging=judge_of(word, tmp_path)), judge=judge)
        with pytest.raises(PreflightError, match=fault):
            check(cfg, tmp_path / "run")
    toy = load_config(ROOT / "configs" / "self_rewarding" / "toy.py")
    with pytest.raises(UsageError, match="ranks; EFT needs one that grades"):
        with_judges(toy, tmp_path, judging=None, rubric="ranking_judge", critic=None)
