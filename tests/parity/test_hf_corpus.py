"""Real configs and chat templates of public repositories, against `transformers`: the same, or a right refusal.

The corpus is not part of this repository; without it the tests are skipped.
"""

import copy
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the comparison needs PyTorch")
transformers = pytest.importorskip("transformers")

from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402
from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402

from jaxsi.hf.config import FAMILIES, HFError, parse_config  # noqa: E402
from jaxsi.model.decoder import ModelConfig, rope_frequencies  # noqa: E402
from jaxsi.text import chat  # noqa: E402
from jaxsi.text.chat_template import ChatTemplateError, render_text  # noqa: E402
from jaxsi.text.tokenizer import Tokenizer  # noqa: E402
from jaxsi.text.tokenizer_library import Vocabulary  # noqa: E402

CORPUS = Path(__file__).parents[3] / "shared" / "data" / "hf_configs"
needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of real configs is not here")
# What this decoder cannot run, or what does not say enough.
RIGHTLY_REFUSED = ("quantization", "peft_config", "draft_vocab_size", "mlp_bias", "intermediate_size = None")
RIGHTLY_REFUSED += ("num_attention_heads = None", "architectures = ")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CORPUS / name).read_text(encoding="utf-8").splitlines()]


def numbers_of(raw: dict[str, Any]) -> dict[str, Any]:
    """What AutoConfig makes of a config.json."""
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = LlamaRotaryEmbedding(config)
    windows = None
    if raw["model_type"] == "mistral" and config.sliding_window is not None:
        windows = (config.sliding_window,) * config.num_hidden_layers
    elif raw["model_type"].startswith("qwen") and "sliding_attention" in config.layer_types:
        windows = tuple(config.sliding_window if t == "sliding_attention" else None for t in config.layer_types)
    return {
        "vocab_size": config.vocab_size,
        "embed_dim": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": head_dim,
        "mlp_dim": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        "tie_embeddings": config.tie_word_embeddings,
        "windows": windows,
        "frequencies": rotary.inv_freq.numpy(),
        "factor": rotary.attention_scaling,
    }


def ours(config: ModelConfig) -> dict[str, Any]:
    frequencies, factor = rope_frequencies(config)
    return vars(config) | {"frequencies": np.asarray(frequencies, np.float32), "factor": factor}


@needs_corpus
def test_real_configs_have_the_numbers_of_transformers_or_are_refused_rightly():
    outcomes, wrong = Counter(), []
    for row in rows("configs.jsonl"):
        if row["model_type"] not in FAMILIES:
            continue
        try:
            config = ours(parse_config(row["config"]))
        except HFError as error:
            rightly = any(reason in str(error) for reason in RIGHTLY_REFUSED)
            outcomes["refused rightly" if rightly else "refused wrongly"] += 1
            wrong += [] if rightly else [f"{row['n']}: {error}"]
            continue
        outcomes["accepted"] += 1
        for name, value in numbers_of(row["config"]).items():
            equal = np.allclose(config[name], value, rtol=1e-6) if name == "frequencies" else config[name] == value
            wrong += [] if equal else [f"{row['n']}: {name} is {config[name]}, in transformers {value}"]
    print(f"\n{dict(outcomes)}")
    assert wrong == []
    assert outcomes["accepted"] >= 120


# ---- templates -------------------------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
THOUGHT = {"role": "assistant", "content": "<think>\nHm, one < two.\n</think>\n\nYes."}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "three": [USER, ANSWER, USER],
    "thoughts": [USER, THOUGHT, USER],
    "two thoughts": [SYSTEM, USER, THOUGHT, USER, THOUGHT, USER],
    "finished": [USER, ANSWER],
    "finished with a thought": [USER, THOUGHT],
    "tag in the question": [{"role": "user", "content": "What does <think> mean, and </think>?"}],
    "space": [{"role": "user", "content": "  two\n\nlines  "}, {"role": "assistant", "content": "\n\nYes.\n"}, USER],
}


class Words:
    """A library of a tokenizer for tests of templates: it has the tokens that a template writes, and reads no text."""

    def __init__(self, row: dict[str, Any]):
        names = {name: row[key] for name, key in (("bos_token", "bos"), ("eos_token", "eos")) if row[key] is not None}
        found = re.findall(r"<\|[^|<>\s]+\|>|<[^<>\s]*(?:turn|end|start)[^<>\s]*>", row["template"])
        special = list(dict.fromkeys([*names.values(), *found]))
        tags = [tag for tag in ("<think>", "</think>") if tag not in special]
        ids = {text: number for number, text in enumerate([*special, *tags])}
        self.vocabulary = Vocabulary(
            size=len(ids), special={text: ids[text] for text in special}, added={text: ids[text] for text in tags},
            names=names, adds_bos=False, chat_template=row["template"],
        )  # fmt: skip


def our_text(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """What is encoded: control tokens that the template wrote, and text."""
    safe, hidden = chat._hide(tokenizer, chat._checked(messages))
    rendered = render_text(
        tokenizer.chat_template, safe, tokenizer.variables, add_generation_prompt=add_generation_prompt
    )
    strings = {number: text for text, number in tokenizer.controls.ids.items()}
    parts = tokenizer.controls.parts(rendered, hidden)
    return "".join(part if isinstance(part, str) else strings[part] for part in parts)


@needs_corpus
def test_real_templates_render_as_in_transformers_or_are_refused_by_both():
    outcomes, wrong = Counter(), []
    for row in rows("templates.jsonl"):
        try:
            tokenizer = Tokenizer(Words(row), {})
        except ChatTemplateError as error:
            outcomes["does not parse"] += 1
            wrong += [] if not row["loads_today"] else [f"{row['id']}: {error}"]
            continue
        variables = {name: value for name, value in tokenizer.variables.items() if name != "strftime_now"}
        for name, messages in CONVERSATIONS.items():
            ask = messages[-1]["role"] == "user"
            try:
                ours = our_text(tokenizer, messages, ask)
            except ChatTemplateError:
                ours = None
            try:
                theirs = render_jinja_template(
                    [copy.deepcopy(messages)], chat_template=row["template"], add_generation_prompt=ask,
                    **variables,
                )[0][0]  # fmt: skip
            except Exception:  # a template is a program
                theirs = None
            outcome = "equal" if ours == theirs else "unequal"
            outcomes["refused by both" if ours is None and theirs is None else outcome] += 1
            wrong += [] if ours == theirs else [f"{row['id']}, {name}: {ours!r:.300} against {theirs!r:.300}"]
    print(f"\n{dict(outcomes)}")
    assert wrong == []
