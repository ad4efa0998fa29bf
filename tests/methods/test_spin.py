"""SPIN's pairs: people's responses against the model's own, and which make no pair."""

import dataclasses

import pytest

import tiny
from jaxsi.methods.spin import Config, against_demonstrations
from jaxsi.runs.records import Prompt, Response, SFTExample
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.text.chat import render_response, written_response
from jaxsi.training.batches import encode_pair
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import DPOConfig, TrainConfig

WORDS = ["cat", "dog", "cow", "pig"]
EXAMPLES = [SFTExample(id=f"p{i}", messages=Prompt.of("", f"Reverse: {word} red axe").messages,
                       response=f"axe red {word}.") for i, word in enumerate(WORDS)]  # fmt: skip


def sampled(example: SFTExample, text: str, finish: str = "stop") -> Response:
    ids = render_response(tiny.tokenizer(), text)
    prompt = Prompt(id=example.id, messages=example.messages)
    return dataclasses.replace(
        tiny.response(prompt, 0, ids if finish == "stop" else ids[:-1]), finish_reason=finish, text=text
    )


def test_demonstration_is_chosen_and_equal_or_cut_off_responses_are_left_out():
    responses = [
        sampled(EXAMPLES[0], "cat red axe."),
        sampled(EXAMPLES[1], "axe red dog."),  # what the person wrote
        sampled(EXAMPLES[2], "cow red", "length"),
        sampled(EXAMPLES[3], "axe red pig"),  # all but the period
    ]
    pairs = against_demonstrations(tiny.make_lm(), EXAMPLES, responses[::-1])
    assert [(p.id, p.chosen.text, p.rejected) for p in pairs] == [
        ("p0", "axe red cat.", responses[0]), ("p3", "axe red pig.", responses[3])
    ]  # fmt: skip
    for pair, example in zip(pairs, (EXAMPLES[0], EXAMPLES[3]), strict=True):
        assert pair.messages == example.messages and pair.chosen_score > pair.rejected_score
        assert (pair.chosen.id, pair.chosen.prompt_id) == (f"{example.id}#demonstration", example.id)
        for side in encode_pair(tiny.tokenizer(), pair):  # both sides stop, or DPO would teach when to
            assert side.tokens[-1] in tiny.tokenizer().stop_ids and side.loss_mask[-1]


def test_no_pair_at_all_is_told_with_its_reason():
    responses = [sampled(EXAMPLES[0], "cat red", "length"), sampled(EXAMPLES[1], "axe red dog.")]
    with pytest.raises(ValueError, match=r"2 responses: the token limit cut off 1, .* raise sampling.max_new_tokens"):
        against_demonstrations(tiny.make_lm(), EXAMPLES[:2], responses)


def test_written_response_is_the_tokens_of_its_text_and_an_end():
    made = written_response(tiny.tokenizer(), "a", "p", "axe red.")
    assert list(made.token_ids) == render_response(tiny.tokenizer(), "axe red.")
    assert tiny.tokenizer().decode(list(made.token_ids)) == "axe red." and made.logps == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"iterations": 0}, "iterations is 0"), ({"sampling": SamplingConfig(num_samples=2)}, "num_samples 2")],
)
def test_configs_that_cannot_work(changes, message):
    train = TrainConfig(optim=OptimConfig(learning_rate=1e-3), batch_size=8)
    with pytest.raises(ValueError, match=message):
        Config(model="m", demonstrations=list, dpo=DPOConfig(train=train), **changes)
