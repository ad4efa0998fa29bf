"""Tokenizers of a model folder: `tokenizer.json` through Hugging Face, `tokenizer.model` through tensorflow-text.

`load_tokenizer` returns a `Tokenizer`. Text from `encode_text` or from a chat message never becomes a control id. Text
without control strings gets exactly the ids of the tokenizer's own library.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jaxsi.runs.errors import InputError
from jaxsi.text.chat_template import (
    DEFAULT_TEMPLATE_NAME,
    AssistantTurn,
    ControlStrings,
    compile_template,
    default_template,
    secret_name,
    written_strings,
)
from jaxsi.text.sentencepiece_model import SentencePieceModel

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SAVED_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)


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


class Tokenizer:
    """A tokenizer with its chat template. Using it does not change it.

    Attributes:
      vocab_size: one more than the largest id.
      bos_id, eos_id: None if the model has no such token.
      pad_id: falls back to eos, then to 0; masks never depend on it.
      chat_template, template_name, template_hash: of the tokenizer's own template, or else of `jaxsi-plain`.
      controls, control_ids: the strings and ids that text from outside can never become.
      stop_ids: eos, the eos list of generation_config.json, and the template's end of turn.
    """

    def __init__(self, library: Library, files: Mapping[str, bytes], generation_eos: Sequence[int] = ()):
        self._library, self._files, self._generation_eos = library, dict(files), tuple(generation_eos)
        vocabulary = library.vocabulary
        self.vocab_size = vocabulary.size
        self.bos_id, self.eos_id = vocabulary.id_of("bos_token"), vocabulary.id_of("eos_token")
        pad_id, unk_id = vocabulary.id_of("pad_token"), vocabulary.id_of("unk_token")
        self.pad_id = next((token for token in (pad_id, self.eos_id) if token is not None), 0)
        self.names = dict(vocabulary.names)
        if vocabulary.chat_template is not None:
            self.template_name, self.chat_template = "tokenizer", vocabulary.chat_template
        else:
            self.template_name, self.chat_template = DEFAULT_TEMPLATE_NAME, default_template(vocabulary.adds_bos)
            self.names = {"bos_token": "", "eos_token": ""} | self.names
        compile_template(self.chat_template)  # a broken template is an error now, not at the first prompt
        # Some fine-tunes add turn markers without declaring them special: those that the template writes are control.
        template_text = written_strings(self.chat_template, self.names)
        markers = {text: token for text, token in vocabulary.added.items() if text in template_text}
        markers |= {text: token for text, token in vocabulary.added.items() if token in self._generation_eos}
        ids = {**vocabulary.special, **markers}
        role_ids = {self.bos_id, self.eos_id, pad_id}
        # Only the string "<unk>" is kept out of texts. Its id is ordinary: it stands for any unknown character.
        self.control_ids = frozenset(token for token in ids.values() if token != unk_id or token in role_ids)
        self.controls = ControlStrings(ids, self.control_ids)
        rule = json.dumps([self.chat_template, sorted(self.names.items()), vocabulary.adds_bos])
        self.template_hash = hashlib.sha256(rule.encode("utf-8")).hexdigest()[:16]

    @functools.cached_property
    def assistant_turn(self) -> AssistantTurn:
        return AssistantTurn(self.chat_template, self.names, self.controls, self.eos_id)

    @functools.cached_property
    def turn_prompt_ids(self) -> list[int]:
        """Ids of `assistant_turn.prompt`."""
        return self.encode_trusted(self.assistant_turn.prompt)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response, each once: eos, then those of generation_config.json, then the end of turn."""
        eos = () if self.eos_id is None else (self.eos_id,)
        return tuple(dict.fromkeys((*eos, *self._generation_eos, self.assistant_turn.end_of_turn)))

    def encode_text(self, text: str) -> list[int]:
        """Ids of text from outside, without BOS and EOS, and without control ids whatever the text says.

        Raises:
          ValueError: if the text contains half a surrogate pair, which no tokenizer can read.
        """
        text.encode("utf-8")
        if not self.controls.pattern.search(text):
            ids = self._library.encode(text)
            if self.control_ids.isdisjoint(ids):
                return ids
        return self.encode_parts([text] if text else [])

    def encode_trusted(self, text: str) -> list[int]:
        """Ids of text that a chat template wrote: control strings become control ids. Not for text from outside."""
        return self._library.encode(text)

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of a text in parts: control ids (`int`), and text (`str`) in which control strings are plain text."""
        ids = self._library.encode_parts(parts, self.controls.ids)
        expected = [part for part in parts if isinstance(part, int) and part in self.control_ids]
        if [token for token in ids if token in self.control_ids] != expected:
            text = "".join(part for part in parts if isinstance(part, str))
            raise ValueError(f"the tokenizer reads a control token in the plain text {text[:80]!r}; remove it there")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The exact text of `ids`, without control tokens.

        Bytes that do not form a whole character become U+FFFD. Ids beyond the vocabulary (a padded embedding has such
        rows) are left out.
        """
        tokens = (int(token) for token in ids)
        return self._library.decode([t for t in tokens if t not in self.control_ids and 0 <= t < self.vocab_size])

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into `folder` as it was loaded, with its chat template.

        `transformers` and `load_tokenizer` then give the same ids. (The model's export writes generation_config.json.)
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = dict(self._files)
        if "tokenizer_config.json" not in files:
            config = json.dumps(self._library.tokenizer_config(), indent=2, ensure_ascii=False)
            files["tokenizer_config.json"] = config.encode("utf-8")
        if self.template_name == DEFAULT_TEMPLATE_NAME:
            files["chat_template.jinja"] = self.chat_template.encode("utf-8")
        for name, content in files.items():
            (folder / name).write_bytes(content)


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
        names = {name: text for name, text in self._model.names.items() if name not in config} | _special_names(config)
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        value = json.loads(content)
    except ValueError as error:
        raise TokenizerError(path, f"not valid JSON ({error})", _COPY_AGAIN) from error
    if not isinstance(value, dict):
        raise TokenizerError(path, f"holds a {type(value).__name__}, not a JSON object", _COPY_AGAIN)
    return value


_COPY_AGAIN = "Copy the file again from where the model came from"


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The text of chat_template.jinja, or else "chat_template" of tokenizer_config.json.

    The latter is one template, or named ones of which "default" is taken.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        if "default" not in template:
            raise TokenizerError(
                folder / "tokenizer_config.json",
                f'has the chat templates {", ".join(map(repr, template))} but not one named "default"',
                'Name the one to use "default"',
            )
        template = template["default"]
    return template


def _eos_list(config: Mapping[str, Any]) -> list[int]:
    eos = config.get("eos_token_id")
    return [token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int)]


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise TokenizerError(path, "the file is empty", _COPY_AGAIN)
    if head.startswith(b"version https://git-lfs"):
        raise TokenizerError(path, "a Git LFS pointer, not the file itself", "Run `git lfs pull` in the folder")


def _load_hugging_face(folder: Path, config: Mapping[str, Any], template: str | None) -> HuggingFaceLibrary:
    import transformers

    path = folder / "tokenizer.json"
    try:
        kind = (config.get("tokenizer_class"), _read_json(folder / "config.json").get("model_type"))
        if kind == ("PreTrainedTokenizerFast", "llama"):
            # AutoTokenizer chooses this class, too, but also imports PyTorch if that is installed.
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        elif config.get("tokenizer_class") is not None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        else:
            # If tokenizer_config.json names no class, the file is read as it is. A class guessed from the model's type
            # would rebuild a byte-level file by SentencePiece rules.
            options = _names_by_id(folder, _read_json(path)) | _special_names(config)
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_file=str(path), clean_up_tokenization_spaces=False, **options
            )
    except TokenizerError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
        _read_json(path)  # its error says more if the file is not JSON; only now, or big files were parsed twice
        raise TokenizerError(path, f"cannot be read ({type(error).__name__}: {error})", _COPY_AGAIN) from error
    return HuggingFaceLibrary(tokenizer, folder, template)


def _names_by_id(folder: Path, file: Mapping[str, Any]) -> dict[str, str]:
    """{"eos_token": "</s>"} and so on, from special_tokens_map.json and the ids in the model's own configs."""
    texts = {token["id"]: token["content"] for token in file.get("added_tokens") or []}
    names = {}
    model = {**_read_json(folder / "config.json"), **_read_json(folder / "generation_config.json")}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = model.get(f"{name}_id")
        token = token[0] if isinstance(token, list) and token else token
        if token in texts:
            names[name] = texts[token]
    return names | _special_names(_read_json(folder / "special_tokens_map.json"))


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; the config has a string or an object with "content" for each."""
    named = {name: config[name] for name in SPECIAL_NAMES if config.get(name) is not None}
    return {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: its tokenizer.json, or else SentencePiece's tokenizer.model.

    Code that the folder contains is never run.

    Raises:
      TokenizerError: if a file is missing or corrupt; names the path, the fault and the fix.
      ChatTemplateError: if the chat template does not parse.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TokenizerError(folder, "no such folder", "Give the folder that holds the model's tokenizer.json")
    config = _read_json(folder / "tokenizer_config.json")
    auto_map = config.get("auto_map")
    if isinstance(auto_map, list) or (isinstance(auto_map, dict) and "AutoTokenizer" in auto_map):
        raise TokenizerError(
            folder / "tokenizer_config.json",
            'wants the folder\'s own Python code to be run ("auto_map"), which jaxsi never does',
            'If tokenizer.json alone describes the tokenizer, remove "auto_map" and set "tokenizer_class" to '
            '"PreTrainedTokenizerFast"',
        )
    template = _chat_template(folder, config)
    json_path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_path.is_file():
        _refuse_pointer(json_path)
        library: Library = _load_hugging_face(folder, config, template)
    elif model_path.is_file():
        _refuse_pointer(model_path)
        library = SentencePieceLibrary(model_path.read_bytes(), config, model_path, template)
    else:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        raise TokenizerError(
            folder,
            f"has neither tokenizer.json nor tokenizer.model (it holds {names})",
            "Copy the file from where the model came from. To convert a tokenizer of another format to tokenizer.json, "
            "use transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    files = {name: (folder / name).read_bytes() for name in _SAVED_FILES if (folder / name).is_file()}
    return Tokenizer(library, files, _eos_list(_read_json(folder / "generation_config.json")))
