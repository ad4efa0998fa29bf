"""Tokens of stages: each has its own, without those of the stages inside it."""

import dataclasses

from micro_runs import journal

import tiny
from jaxsi.runs import spent
from jaxsi.runs.run import Run
from jaxsi.sampling.generate import generate
from jaxsi.sampling.scoring import score_continuations, score_ids


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0


def test_the_journal_has_the_tokens_of_each_stage_alone(tmp_path):
    with Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")

        def inner():
            spent.count(sampled=5)
            return 1

        def outer():
            spent.count(scored=3)
            scope.value("inner", inner)
            spent.count(sampled=2)
            return 2

        scope.value("outer", outer)
        scope.value("nothing", lambda: 3)
    tokens = {entry["stage"]: entry["tokens"] for entry in journal(tmp_path / "run") if entry["event"] == "done"}
    assert tokens == {"inner": {"sampled": 5}, "outer": {"sampled": 2, "scored": 3}, "nothing": {}}


def test_sampling_and_scoring_count_their_tokens():
    lm = tiny.make_lm()
    before = spent.now()
    responses = generate(lm, ["a", "bc"], num_samples=2, max_new_tokens=4)
    assert spent.now().less(before).tokens == {"sampled": sum(len(response.token_ids) for response in responses)}
    before = spent.now()
    score_ids(lm, [[1, 2], [3]], [[4], [5, 6, 7]])
    score_continuations(lm, [[1, 2]], [[3, 4]])
    assert spent.now().less(before).tokens == {"scored": 3 + 4 + 4}
