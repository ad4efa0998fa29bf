"""The tokenizer of a GGUF file, as Hugging Face's tokenizer.json. It needs neither `transformers` nor PyTorch.

A GGUF file has the vocabulary and the merges, and says by one word (``tokenizer.ggml.pre``) how a text is split before
them. What this word stands for is in ``SPLITS``: another split gives other tokens, so an unknown word is refused.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_log = logging.getLogger(__name__)

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type, which are those of SentencePiece
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


class Split(NamedTuple):
    """How a byte-level BPE sees a text: what it is split by (None: GPT-2's expression), whether every digit stands
    alone before that, whether the text is normalised to NFC, and whether a piece that is a token is not merged."""

    by: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False


_LLAMA3 = Split(by=rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True)
_QWEN2 = Split(by=rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}", nfc=True)
_TEKKEN = Split(
    by=rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*|\p{{N}}|"
    + _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1),
    ignore_merges=True,
)
SPLITS = {
    "gpt-2": Split(),
    "smollm": Split(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2._replace(nfc=False),
    "tekken": _TEKKEN,
}


class Metadata(Protocol):
    """Looks up a value of a GGUF file's metadata."""

    def __call__(self, key: str, default: Any = None) -> Any: ...


def write_tokenizer(get: Metadata, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, if the file has one, chat_template.jinja.

    Raises: ValueError: if the file has no tokenizer, or one of a kind that is not supported.
    """
    tokens, kind = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.model")
    if not tokens:
        raise ValueError("it has no vocabulary (tokenizer.ggml.tokens)")
    types = get("tokenizer.ggml.token_type") or [1] * len(tokens)
    names = {
        name: tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary, get)
    elif kind == "llama":
        tokenizer = _sentencepiece(vocabulary, names.get("unk"), get)
    else:
        raise ValueError(f"tokenizer.ggml.model is {kind!r}; supported are gpt2 and llama")
    kinds = list(zip(tokens, types, strict=True))
    special = [token for token, type in kinds if type == CONTROL or token in names.values()]
    whole = [token for token, type in kinds if type == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    adds_bos = get("tokenizer.ggml.add_bos_token", kind == "llama")
    if adds_bos and "bos" in names:
        bos = names["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, vocabulary[bos])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{name}_token": token for name, token in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    if template := get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _byte_level(vocabulary: Mapping[str, int], get: Metadata) -> Tokenizer:
    """GPT-2's tokenizer and its descendants, which spell every byte as a character."""
    name = get("tokenizer.ggml.pre")
    if name is None:
        name = "qwen2" if str(get("general.architecture")).startswith("qwen") else "gpt-2"
        _log.warning("the GGUF file does not say how its tokenizer splits a text; it is split as for %s", name)
    if name not in SPLITS:
        raise ValueError(f"it splits texts by {name!r} (tokenizer.ggml.pre); supported are {', '.join(SPLITS)}")
    split = SPLITS[name]
    merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges") or ()]
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=merges, ignore_merges=split.ignore_merges))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    steps += [pre_tokenizers.Split(Regex(split.by), behavior="isolated")] if split.by is not None else []
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.by is None)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.normalizer = normalizers.NFC() if split.nfc else None
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Mapping[str, int], unknown: str | None, get: Metadata) -> Tokenizer:
    """SentencePiece's BPE as in Llama 2 and Mistral: bytes for what is not in the vocabulary."""
    scores = get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(vocabulary):
        raise ValueError("its SentencePiece vocabulary has not one score for each token (tokenizer.ggml.scores)")
    merges = _merges(vocabulary, scores)
    model = models.BPE(vocab=dict(vocabulary), merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    first = "first" if get("tokenizer.ggml.add_space_prefix", True) else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=first, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if first == "first" else []))
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary stands for: first those into the piece of the highest score."""
    found = []
    for piece, number in vocabulary.items():
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((scores[number], left, right))
    return [(left, right) for _, left, right in sorted(found, key=lambda merge: -merge[0])]
