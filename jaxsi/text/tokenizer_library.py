"""The libraries below a tokenizer: Hugging Face's `tokenizers` for `tokenizer.json`, tensorflow-text for
`tokenizer.model`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jaxsi.runs.errors import InputError
from jaxsi.text.chat_template import ControlStrings, secret_name
from jaxsi.text.sentencepiece_model import SentencePieceModel

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
COPY_AGAIN = "Copy the file again from where the model came from"


class TokenizerError(InputError, ValueError):
    """A tokenizer cannot be loaded or used; names the path, the fault and the fix."""

    def __init__(self, path: Path, reason: str, fix: str):
        super().__init__(f"{path}: {reason}. {fix}")
        self.path, self.reason, self.fix = path, reason, fix


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The contents of a tokenizer's files, whichever library reads them.

    Attributes:
      special: string -> id of the tokens declared special.
      added: string -> id of the other added tokens.
      names: the variables of the chat template, such as {"bos_token": "<s>"}.
      adds_bos: whether plain encoding with special tokens starts with BOS.
    """

    size: int
    special: Mapping[str, int]
    added: Mapping[str, int]
    names: Mapping[str, str]
    adds_bos: bool
    chat_template: str | None

    def id_of(self, name: str) -> int | None:
        return self.special.get(self.names[name]) if name in self.names else None


class Library(Protocol):
    """The library below a Tokenizer."""

    vocabulary: Vocabulary

    def encode(self, text: str) -> list[int]: ...
    def encode_parts(self, parts: Sequence[str | int], controls: Mapping[str, int]) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def tokenizer_config(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class _SecretTokenizer:
    """A copy of a Hugging Face tokenizer whose control tokens have secret names, so that no text can spell one."""

    backend: Any
    names: dict[int, str]
    original: dict[int, int]

    @classmethod
    def of(cls, backend: Any, controls: Mapping[str, int]) -> "_SecretTokenizer":
        import tokenizers

        spec = json.loads(backend.to_str())
        renamed = {text: secret_name(number) for number, text in enumerate(controls)}
        original: dict[str, int] = {}
        for token in spec["added_tokens"]:
            token["content"] = renamed.get(token["content"], token["content"])
            original[token["content"]] = token["id"]
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {renamed.get(text, text): token for text, token in model["vocab"].items()}
        else:  # Unigram: [[piece, score], …]
            model["vocab"] = [[renamed.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
        spec["post_processor"] = None  # it names control tokens, and all it does is add BOS and EOS
        copy = tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
        # Loading gives new numbers to tokens outside the vocabulary.
        numbered = {text: copy.token_to_id(text) for text in original}
        numbers = {number: original[text] for text, number in numbered.items() if number is not None}
        return cls(copy, {token: renamed[text] for text, token in controls.items()}, numbers)

    def encode(self, parts: Sequence[str | int]) -> list[int]:
        text = "".join(part if isinstance(part, str) else self.names[part] for part in parts)
        return [self.original.get(token, token) for token in self.backend.encode(text, add_special_tokens=False).ids]


class HuggingFaceLibrary:
    """A tokenizer.json, read by `transformers` (its class may adjust the file's rules) and run by `tokenizers`."""

    def __init__(self, tokenizer: Any, folder: Path, template: str | None):
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may still hold the padding and truncation of its last training. This copy is ours to change.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = False
        self._secret: _SecretTokenizer | None = None
        named = tokenizer.special_tokens_map
        names = {name: str(named[name]) for name in SPECIAL_NAMES if named.get(name) is not None}
        tokens = tokenizer.added_tokens_decoder
        special = {token.content: number for number, token in tokens.items() if token.special}
        special |= {text: self._backend.token_to_id(text) for text in names.values()}
        if missing := [text for text, number in special.items() if number is None]:
            raise TokenizerError(
                folder / "tokenizer_config.json",
                f"special token {missing[0]!r} is not in the vocabulary",
                "Add it to tokenizer.json or correct its name",
            )
        with_special = self._backend.encode("a", add_special_tokens=True).ids
        self.vocabulary = Vocabulary(
            size=max([self._backend.get_vocab_size(with_added_tokens=True) - 1, *tokens]) + 1,
            special=special,
            added={token.content: number for number, token in tokens.items() if token.content not in special},
            names=names,
            adds_bos="bos_token" in names and with_special[:1] == [special[names["bos_token"]]],
            chat_template=template,
        )

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_parts(self, parts: Sequence[str | int], controls: Mapping[str, int]) -> list[int]:
        if self._secret is None:
            self._secret = _SecretTokenizer.of(self._backend, controls)
        return self._secret.encode(parts)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def tokenizer_config(self) -> dict[str, Any]:
        return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | dict(
            self.vocabulary.names
        )


class SentencePieceLibrary:
    """A tokenizer.model, through tensorflow_text.

    SentencePiece puts a space before its text. If control tokens divide a text, only its first part gets one, as in
    `transformers` (or every part, if tokenizer_config.json says `"legacy": true`).
    """

    def __init__(self, model: bytes, config: Mapping[str, Any], path: Path, template: str | None):
        self._legacy = config.get("legacy") is True
        try:
            self._model = SentencePieceModel(model)
        except (ValueError, UnicodeDecodeError) as error:
            raise TokenizerError(
                path, f"not a SentencePiece model ({error})", "Copy the file again, or bring the model's tokenizer.json"
            ) from error
        self._size = len(self._model.pieces)
        ids = {piece: number for number, piece in enumerate(self._model.pieces)}
        # tokenizer_config.json overrules the model, also if it says null.
        names = {name: text for name, text in self._model.names.items() if name not in config} | special_names(config)
        special = {piece: ids[piece] for piece in self._model.control}
        self._extra: dict[str, int] = {}
        specials = list(config.get("additional_special_tokens") or []) + list(config.get("extra_special_tokens") or [])
        for number, token in (config.get("added_tokens_decoder") or {}).items():
            if token.get("lstrip") or token.get("rstrip"):
                raise TokenizerError(
                    path.with_name("tokenizer_config.json"),
                    f"added token {token['content']!r} takes the spaces beside it, which a tokenizer.model cannot do",
                    "Save the tokenizer with transformers, so that the folder has a tokenizer.json",
                )
            if ids.setdefault(token["content"], int(number)) >= self._size:
                self._extra[token["content"]] = int(number)
            specials += [token["content"]] if token.get("special") else []
        for token in [*(t["content"] if isinstance(t, dict) else t for t in specials), *names.values()]:
            if token not in ids:
                raise TokenizerError(
                    path, f"has no piece {token!r}, which tokenizer_config.json names", "Correct the name there"
                )
            special[token] = ids[token]
        self.vocabulary = Vocabulary(
            size=max([self._size - 1, *self._extra.values()]) + 1,
            special=special,
            added={text: ids[text] for text in (*self._model.user_defined, *self._extra) if text not in special},
            names=names,
            adds_bos="bos_token" in names and config.get("add_bos_token", True) is not False,
            chat_template=template,
        )
        self._matched = ControlStrings({**special, **self._extra}, frozenset())

    def _encode(self, parts: Sequence[str | int], unread: frozenset[int]) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
                continue
            processor = self._model.processor(index == 0 or self._legacy, unread)
            ids += processor.tokenize(part).numpy().tolist()
        return ids

    def _split(self, text: str, matched: ControlStrings) -> list[str | int]:
        return matched.parts(text, ())

    def encode(self, text: str) -> list[int]:
        return self._encode(self._split(text, self._matched), frozenset())

    def encode_parts(self, parts: Sequence[str | int], controls: Mapping[str, int]) -> list[int]:
        # In text, added tokens keep their meaning unless they are control tokens; control pieces lose theirs.
        extra = ControlStrings({t: n for t, n in self._extra.items() if t not in controls}, frozenset())
        split: list[str | int] = []
        for part in parts:
            split += [part] if isinstance(part, int) else self._split(part, extra)
        return self._encode(split, frozenset(n for n in controls.values() if n < self._size))

    def decode(self, ids: Sequence[int]) -> str:
        text, pieces = "", []
        names = {number: token for token, number in self._extra.items()}
        for token in [*ids, None]:
            if token is not None and token < self._size:
                pieces.append(token)
                continue
            if pieces:
                processor = self._model.processor(not text, frozenset())
                text += processor.detokenize(pieces).numpy().decode("utf-8", errors="replace")
                pieces = []
            text += names.get(token, "") if token is not None else ""
        return text

    def tokenizer_config(self) -> dict[str, Any]:
        kind = "LlamaTokenizer" if self._model.is_bpe else "PreTrainedTokenizerFast"
        return {"tokenizer_class": kind, "legacy": self._legacy, **self.vocabulary.names}


def special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; the config has a string or an object with "content" for each."""
    named = {name: config[name] for name in SPECIAL_NAMES if config.get(name) is not None}
    return {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
