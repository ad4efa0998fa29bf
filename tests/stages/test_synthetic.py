"""Preferences of a stronger model's answers over a weaker one's."""

import dataclasses
from pathlib import Path

import pytest

import tiny
from jaxsi.runs.config_file import load_config
from jaxsi.runs.config_snapshot import check_config, describe_config, parts_of
from jaxsi.runs.records import Prompt
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages import synthetic
from jaxsi.stages.pairs import preferences
from jaxsi.stages.synthetic import StrongOverWeak

PIT = Path(__file__).parents[2] / "configs" / "pit" / "toy.py"
PROMPTS = [Prompt.of(f"p{i}", f"Reverse: cat red {word}") for i, word in enumerate(("axe", "pie", "egg", "saw", "bat"))]
SAMPLING = SamplingConfig(num_samples=1, temperature=1.0, top_p=1.0, max_new_tokens=8, batch_size=4, dtype="float32")


def prompts() -> list[Prompt]:
    return PROMPTS


def synthetic_set(**changes) -> StrongOverWeak:
    return StrongOverWeak(**{"strong": "STRONG", "weak": "WEAK", "prompts": prompts, "sampling": SAMPLING} | changes)


@pytest.fixture
def models(monkeypatch):
    """The two models under their names."""
    lms = {"STRONG": tiny.make_lm(), "WEAK": tiny.make_lm(seed=1)}
    monkeypatch.setattr(synthetic, "borrowed", lambda name, dtype: lms[name])
    return lms


def planted(monkeypatch, models, answers: dict[str, dict[str, tuple[str, str]]]) -> None:
    """Answers (text, finish reason) by model and prompt, in place of samples."""
    names = {lm.fingerprint: name for name, lm in models.items()}

    def generate(lm, asked, *, key, **settings):
        assert settings == SAMPLING.settings
        found = answers[names[lm.fingerprint]]
        return [
            dataclasses.replace(tiny.response(p, 0, [5]), text=found[p.id][0], finish_reason=found[p.id][1])
            for p in asked
        ]

    monkeypatch.setattr(synthetic, "generate", generate)


def test_strong_answer_is_preferred_and_unusable_ones_are_left_out(models, monkeypatch, caplog):
    texts = {p.id: (f" strong {p.id}.", "stop") for p in PROMPTS}
    answers = {
        "STRONG": texts | {"p1": ("never ends", "length")},
        "WEAK": {id: (f"weak {id}.", "stop") for id in texts} | {"p2": (" ", "stop"), "p3": ("strong p3.", "stop")},
    }
    planted(monkeypatch, models, answers)
    ranked = synthetic_set()()
    assert [(r.id, r.responses, r.ranks) for r in ranked] == [
        ("p0", ("strong p0.", "weak p0."), (0, 1)), ("p4", ("strong p4.", "weak p4."), (0, 1))
    ]  # fmt: skip
    assert ranked[0].messages == PROMPTS[0].messages
    assert "2 of 5 prompts became preferences of STRONG over WEAK" in caplog.text
    pairs, counts = preferences(ranked)
    assert counts["preferences"] == 2 and pairs[0].chosen == "strong p0."
    planted(monkeypatch, models, {"STRONG": texts, "WEAK": texts})
    with pytest.raises(ValueError, match="none of 5 prompts has two finished, different answers of STRONG and WEAK"):
        synthetic_set()()


def test_same_preferences_after_a_kill(models, monkeypatch):
    """The answers to a prompt depend on its id and the seed, not on the prompts beside it."""
    written = []
    sample = synthetic.generate

    def spied(lm, asked, **settings):
        answers = sample(lm, asked, **settings)
        written.append({r.prompt_id: r.token_ids for r in answers})
        return [dataclasses.replace(r, finish_reason="stop") for r in answers]

    monkeypatch.setattr(synthetic, "generate", spied)
    whole = {r.id: r for r in synthetic_set()()}
    again = {r.id: r for r in synthetic_set(prompts=lambda: PROMPTS[::-2])()}
    assert again and all(whole[id] == r for id, r in again.items())
    other = {r.id: r for r in synthetic_set(seed=1)()}
    assert other != whole
    strong, weak = written[:2]
    assert set(strong) == set(weak) == {p.id for p in PROMPTS} and strong != weak


def test_set_can_be_the_preferences_of_a_config():
    cfg = dataclasses.replace(load_config(PIT), preferences=synthetic_set())
    described = describe_config(cfg)
    assert described["preferences"]["__type__"] == "synthetic.StrongOverWeak"
    assert "preferences.sampling" in dict(parts_of(cfg)), "a dtype in it is decided when the run begins"
    moved = dataclasses.replace(cfg, preferences=synthetic_set(strong="/elsewhere/STRONG"))
    check_config(Path("run"), described, moved)


def test_impossible_sets_are_refused(models):
    with pytest.raises(ValueError, match="num_samples is 4; a preference has 1 answer"):
        synthetic_set(sampling=SamplingConfig())
    with pytest.raises(ValueError, match="two of the 2 prompts have the same id"):
        synthetic_set(prompts=lambda: PROMPTS[:1] * 2)()
