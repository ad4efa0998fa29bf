"""A tokenizer whose tokens are bytes, with a chat template; and a model that says given texts."""

import dataclasses
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer as Backend, decoders, models, pre_tokenizers

import tiny
from jaxsi.lm import LM
from jaxsi.sampling import generate as generation
from jaxsi.text.tokenizer import Tokenizer, load_tokenizer

MARKS = ("<|im_start|>", "<|im_end|>")


def tokenizer_of(folder: Path, template: str, *, special_tags: bool = False) -> Tokenizer:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    backend.add_tokens([AddedToken(tag, special=special_tags) for tag in ("<think>", "</think>")])
    backend.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer._library._backend.decode(list(ids), skip_special_tokens=False)


def speaking(monkeypatch, tokenizer: Tokenizer, texts: list[str], *, stopped: bool = True) -> LM:
    """A model that answers with these texts, one after the other."""
    lm, left = dataclasses.replace(tiny.make_lm(), tokenizer=tokenizer), list(texts)

    def generate_ids(lm, prompts, keys, *, num_samples=1, **_):
        def one():
            ids = tokenizer._library.encode(left.pop(0))
            return ids, [-1.0] * len(ids), stopped

        return [[one() for _ in range(num_samples)] for _ in prompts]

    monkeypatch.setattr(generation, "generate_ids", generate_ids)
    return lm
