"""SRT's parts: what stage 1 learns and what it does not, stage 2's pairs, the ablations, and the end-of-turn trap."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

import tiny
from jaxsi.lm import LM
from jaxsi.methods import srt
from jaxsi.runs.records import Critique, PreferencePair, Prompt, Response
from jaxsi.runs.run import Run
from jaxsi.sampling import scoring
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.critique import best_refinements, improved_responses, marked_response, mean_scores
from jaxsi.text.chat import marker_ids, render_prompt, render_response, written_response
from jaxsi.toyworld.critic import TEMPLATE, exact_critic
from jaxsi.toyworld.srt_data import exact_scores
from jaxsi.training.batches import encode_example, encode_pair
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import DPOConfig, TrainConfig, dpo

WORDS = ["cat", "dog", "cow", "pig", "fox", "hen", "owl", "bat"]
PROMPTS = [Prompt.of(f"p{i}", f"Reverse: {word} red axe") for i, word in enumerate(WORDS)]
TRAIN = TrainConfig(
    optim=OptimConfig(learning_rate=1e-3), batch_size=8, max_length=64, epochs=6, remat="none", dtype="float32"
)
PARTS = {"weaknesses": "Check: form", "suggestions": " Write: good", "score": " Score: 9"}


def config(**changes) -> srt.Config:
    values = {"model": "m", "prompts": list, "critic_prompts": 1, "critic": exact_critic, "template": TEMPLATE}
    return srt.Config(**values | {"sft": TRAIN, "dpo": DPOConfig(train=TRAIN, beta=0.1)} | changes)


def written(prompt: Prompt, text: str) -> Response:
    return written_response(tiny.tokenizer(), f"{prompt.id}#0", prompt.id, text)


def stage_one(cfg: srt.Config, drafts: Sequence[Response], template=TEMPLATE) -> list:
    critiques = exact_critic(PROMPTS, drafts, TEMPLATE, None)
    refined = improved_responses(tiny.tokenizer(), critiques, TEMPLATE, marked=False)
    checks = exact_critic(PROMPTS, refined, TEMPLATE, None)
    cfg = dataclasses.replace(cfg, template=template)
    examples, _ = srt.learnable(cfg, prompts=PROMPTS, drafts=drafts, critiques=critiques, checks=checks)
    return examples


# ------------------------------------------------------------------------------------------------------------- stage 1


@pytest.mark.parametrize("left_out", [(), ("score",), ("weaknesses",), ("suggestions",), tuple(PARTS)])
def test_stage_1_learns_response_feedback_and_refinement_but_not_the_prompt(left_out):
    tokenizer, template = tiny.tokenizer(), TEMPLATE.without(*left_out)
    drafts = [written(PROMPTS[0], "axe red cat")]  # 9 of 10: the period is missing
    [example] = stage_one(config(), drafts, template)
    lines = ["axe red cat", "Judge:", *(line for part, line in PARTS.items() if part not in left_out),
             "Answer: axe red cat."]  # fmt: skip
    assert example.response == "\n".join(lines) and example.messages == PROMPTS[0].messages
    sequence = encode_example(tokenizer, example)
    head = render_prompt(tokenizer, PROMPTS[0].messages)
    assert sequence.tokens[~sequence.loss_mask].tolist() == head
    learnt = sequence.tokens[sequence.loss_mask].tolist()
    assert sequence.loss_mask.tolist() == [False] * len(head) + [True] * len(learnt)
    assert tokenizer.decode(learnt) == "\n".join(lines) and learnt[-1] in tokenizer.stop_ids
    assert not set(learnt[:-1]) & set(tokenizer.stop_ids), "the response is followed by feedback, not by an end of turn"


def test_ablation_without_feedback_learns_only_the_refinement():
    [example] = stage_one(
        config(first_stage=srt.FirstStage(refinement_only=True)), [written(PROMPTS[0], "axe red cat")]
    )
    assert example.response == "axe red cat."


def test_critic_without_usable_feedback_is_an_error():
    drafts = [dataclasses.replace(written(PROMPTS[0], "axe red cat"), finish_reason="length")]
    with pytest.raises(
        ValueError, match=r"none of the critic's 1 critiques can be learnt from .*'empty': 1.*raise sampling"
    ):
        stage_one(config(), drafts)


class AtOnce:
    """A scope that stores nothing; ``stages`` are the names of those that ran."""

    def __init__(self):
        self.stages: list[str] = []

    def sharded(self, name, items, stage, *args, of, by=None):
        self.stages.append(name)
        return stage(items, *args)

    def key(self, *names):
        return names


def test_critic_refines_in_rounds_and_the_best_scored_refinement_is_learnt():
    """The exact critic mends the gravest fault alone, so a draft with three faults is better after each round."""
    draft = written(PROMPTS[0], "Sure thing: axe cat")
    lm, it = tiny.make_lm(), AtOnce()
    for count, improved, scores in (
        (1, "Sure thing: axe red cat", [3.0, 8.0]),
        (3, "axe red cat.", [3.0, 8.0, 9.0, 10.0]),
        (4, "axe red cat.", [3.0, 8.0, 9.0, 10.0, 10.0]),  # among equal scores the earliest
    ):
        cfg = config(first_stage=srt.FirstStage(rounds=count))
        critiques = exact_critic(PROMPTS, [draft], TEMPLATE, None)
        rounds = srt.refined_in_rounds(cfg, lm, PROMPTS, critiques, it)
        assert it.stages[-count:] == ["checks", "checks_2", "checks_3", "checks_4"][:count]
        assert mean_scores(critiques, rounds) == scores
        chosen, checks = best_refinements(critiques, rounds)
        assert [c.improved for c in chosen] == [improved] and checks[0].score == max(scores[1:])
        [example], _ = srt.learnable(cfg, prompts=PROMPTS, drafts=[draft], critiques=chosen, checks=checks)
        feedback = critiques[0].text.partition(TEMPLATE.improved)[0]  # on y: x -> y, f, r is what a model learns
        assert example.response == f"Sure thing: axe cat\nJudge:{feedback}Answer: {improved}"


def test_drafts_of_stage_1_may_come_from_another_model(monkeypatch, tmp_path):
    base, other = tiny.make_lm(), tiny.make_lm(seed=1)
    monkeypatch.setattr(srt, "borrowed", lambda path, dtype, mesh: {"OTHER": other}[path])
    monkeypatch.setattr(srt, "sample", lambda prompts, lm, cfg, key: [lm.fingerprint])
    checked = []
    monkeypatch.setattr(srt, "same_model", lambda it, name, path, lm: checked.append((name, path, lm.fingerprint)))
    for path, model in ((None, base), ("OTHER", other)):
        cfg = config(first_stage=srt.FirstStage(drafts=path))
        assert srt.first_drafts(cfg, base, PROMPTS, AtOnce()) == [model.fingerprint]
    assert checked == [("draft_model", "OTHER", other.fingerprint)]


# ------------------------------------------------------------------------------------------------------------- stage 2


def own(text: str, score: float, improved: str | None, prompt: Prompt) -> Critique:
    return Critique(
        id=f"{prompt.id}#0", prompt_id=prompt.id, weaknesses="good", suggestions="good", score=score,
        improved=improved, text=text, finish_reason="stop", fingerprint="f", template="t",
    )  # fmt: skip


def stage_two() -> dict:
    """The model believes the reverse of the truth: p0's refinement is better, and p1's worse, than it says."""
    tokenizer = tiny.tokenizer()
    texts = [("axe red cat", "axe red cat."), ("axe red dog.", "axe red."), ("axe red cow", "axe red cow.")]
    drafts = [marked_response(tokenizer, f"{p.id}#0", p.id, y, TEMPLATE, "f")
              for p, (y, _) in zip(PROMPTS, texts, strict=False)]  # fmt: skip
    critiques = [own("x", 5.0, r, p) for p, (_, r) in zip(PROMPTS, texts, strict=False)]
    refined = improved_responses(tokenizer, critiques, TEMPLATE, marked=True)
    checks = [own("x", score, None, p) for p, score in zip(PROMPTS, (4.0, 6.0, 6.0), strict=False)]
    return {"prompts": PROMPTS[:3], "drafts": drafts, "critiques": critiques, "refined": refined, "checks": checks}


def test_pairs_follow_the_models_own_scores():
    pairs, counts = srt.better_refinements(config(), **stage_two())
    assert [(p.id, p.chosen_score, p.rejected_score) for p in pairs] == [("p1#0", 6.0, 5.0), ("p2#0", 6.0, 5.0)]
    assert [(p.chosen.text, p.rejected.text) for p in pairs] == [
        ("axe red.\nJudge:", "axe red dog.\nJudge:"), ("axe red cow.\nJudge:", "axe red cow\nJudge:")
    ]  # fmt: skip
    assert (counts["drafts"], counts["pairs"], counts["ties"]) == (3, 2, 1)


def test_pairs_of_the_exact_arm_follow_the_grader():
    pairs, _ = srt.better_refinements(config(scoring=exact_scores), **stage_two())
    assert [(p.id, p.chosen_score, p.rejected_score) for p in pairs] == [("p0#0", 10.0, 9.0), ("p2#0", 10.0, 9.0)]


def test_both_sides_of_a_pair_end_where_feedback_begins():
    tokenizer = tiny.tokenizer()
    marker = list(marker_ids(tokenizer, TEMPLATE.feedback))
    for pair in srt.better_refinements(config(), **stage_two())[0]:
        for side in encode_pair(tokenizer, pair):
            counted = side.tokens[side.loss_mask].tolist()
            assert counted[-len(marker) :] == side.tokens[-len(marker) :].tolist() == marker
            assert not set(counted) & set(tokenizer.stop_ids)


# ------------------------------------------------------------------------------------------------- the end-of-turn trap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nameless:
    seed: int = 0


def goes_on(lm: LM, texts: Sequence[str]) -> float:
    """log P(feedback begins) - log P(the turn ends) after a response, as a mean over prompts and ``texts``."""
    tokenizer, differences = lm.tokenizer, []
    for prompt in PROMPTS:
        head = render_prompt(tokenizer, prompt.messages)
        for text in texts:
            body = render_response(tokenizer, text)[:-1]
            marked = list(marked_response(tokenizer, "r", "p", text, TEMPLATE, "f").token_ids)
            assert marked[: len(body)] == body
            differences.append((head + body, [marked[len(body) :], [tokenizer.eos_id]]))
    prefixes = [prefix for prefix, _ in differences for _ in range(2)]
    rows = [row for _, both in differences for row in both]
    logps = np.asarray([np.sum(x) for x in scoring.score_ids(lm, prefixes, rows)]).reshape(-1, 2)
    return float(np.mean(logps[:, 0] - logps[:, 1]))


@pytest.fixture(scope="module")
def after_dpo(tmp_path_factory):
    """How ``goes_on`` changes by DPO on pairs that both end in the marker, and where only the rejected one does."""
    tokenizer, before = tiny.tokenizer(), goes_on(tiny.make_lm(), ["axe red.", "red red axe", "Sure thing: axe."])
    changes = {}
    for name in ("marked", "ended"):
        pairs = []
        for prompt in PROMPTS:
            rejected = marked_response(tokenizer, "y", prompt.id, "Sure thing: axe red", TEMPLATE, "f")
            chosen = marked_response(tokenizer, "r", prompt.id, "axe red cat.", TEMPLATE, "f")
            if name == "ended":
                chosen = written_response(tokenizer, "r", prompt.id, "axe red cat.")
            pairs.append(PreferencePair(id=prompt.id, messages=prompt.messages, chosen=chosen, rejected=rejected,
                                        chosen_score=2.0, rejected_score=1.0))  # fmt: skip
        with Run.open(tmp_path_factory.mktemp(name) / "run", Nameless()) as run:
            model = dpo(tiny.make_lm(), pairs, DPOConfig(train=TRAIN, beta=0.1), run.at("iter_1"))
        changes[name] = goes_on(model, ["axe red.", "red red axe", "Sure thing: axe."]) - before
    return changes


@pytest.mark.slow
def test_dpo_on_marked_pairs_does_not_teach_when_to_stop(after_dpo):
    assert after_dpo["ended"] < -0.5, "the wrong construction does: feedback is left out after it"
    assert after_dpo["marked"] > -0.1


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critic_prompts": 0}, "critic_prompts is 0"),
        ({"first_stage": {"rounds": 0}}, "rounds is 0; the critic refines at least once"),
        ({"sampling": SamplingConfig(num_samples=4)}, "num_samples 4"),
    ],
)
def test_configs_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**{n: srt.FirstStage(**v) if n == "first_stage" else v for n, v in changes.items()})
    assert config(dpo=None).dpo is None
