"""The embedded world's tokenizer folder, read back through transformers."""

import random

import pytest
from hypothesis import given, strategies as st
from transformers import AutoTokenizer

from jaxsi.toyworld.corpus import demonstration_document, new_instruction_document, verdict_document
from jaxsi.toyworld.vocabulary import ENTRIES, SPECIAL_TOKENS, build_tokenizer
from jaxsi.toyworld.world import RESPONSE_NUMBERS, WORDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_tokenizer_has_the_same_bytes_every_time(folder, tmp_path):
    build_tokenizer(tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_all_entries_are_used(tokenizer):
    assert len(tokenizer) == ENTRIES and ENTRIES % 64 == 0
    assert tokenizer.convert_ids_to_tokens(list(range(6))) == list(SPECIAL_TOKENS)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "<|end|>", "<pad>")
    assert set(tokenizer.all_special_ids) == set(range(6))
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


@pytest.mark.parametrize("item", [*WORDS, *RESPONSE_NUMBERS])
def test_each_item_is_one_token_anywhere(tokenizer, item):
    token = f"▁{item}"
    assert tokenizer.tokenize(item) == [token]
    assert tokenizer.tokenize(f"{item} {item}.") == [token, token, "."]
    assert tokenizer.tokenize(f"Reverse: {item}\n") == ["▁Reverse", ":", token, "<0x0A>"]


@pytest.mark.parametrize(
    ("document", "most_prompt", "most_response"),
    [(demonstration_document, 18, 12), (verdict_document, 90, 20), (new_instruction_document, 130, 13)],
)
def test_documents_are_short_and_decode_to_themselves(tokenizer, document, most_prompt, most_response):
    rng = random.Random(0)
    for _ in range(100):
        messages, response = document(rng)
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert len(ids) <= most_prompt
        response_ids = tokenizer.encode(response, add_special_tokens=False)
        assert len(response_ids) + 1 <= most_response
        assert tokenizer.decode(response_ids) == response
        content = messages[0]["content"]
        assert ids[2:-2] == tokenizer.encode(content, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == content
        assert tokenizer.unk_token_id is None


def test_chat_template_writes_control_tokens(tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Reverse: cat red axe"},
        {"role": "assistant", "content": "axe red cat."},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<s><|system|>Be brief.<|end|><|user|>Reverse: cat red axe<|end|><|assistant|>axe red cat.<|end|>"
    )
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    prompt = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True, return_dict=False)
    response = tokenizer.encode(chat[2]["content"], add_special_tokens=False)
    assert whole == [*prompt, *response, tokenizer.eos_token_id]


def test_encoding_a_text_adds_no_control_token(tokenizer):
    assert not set(tokenizer.encode("cat red.")) & set(tokenizer.all_special_ids)
    assert tokenizer("cat red.")["input_ids"] == tokenizer.encode("cat red.", add_special_tokens=False)


@pytest.mark.parametrize(
    "text", ["two  spaces ", " before", "tab\tand\nlines\n\n", "don't , stop .", "naïve 漢字 🎉", "a" * 50]
)
def test_usual_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


# Unassigned and control characters too, but not "▁", which stands for a space, or "<", which may begin a control token.
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="▁<"), max_size=30))
def test_any_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
