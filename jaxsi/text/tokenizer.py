"""Tokenizers of a model folder: `tokenizer.json` through Hugging Face, `tokenizer.model` through tensorflow-text.

`load_tokenizer` returns a `Tokenizer`. Text from `encode_text` or from a chat message never becomes a control id. Text
without control strings gets exactly the ids of the tokenizer's own library.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsi.text.chat_config import CLOSING, OPENING, SWITCHES, ChatConfig, opens_thought
from jaxsi.text.chat_template import (
    DEFAULT_TEMPLATE_NAME,
    AssistantTurn,
    ChatTemplateError,
    ControlStrings,
    clock,
    compile_template,
    default_template,
    template_reads,
    today,
    written_strings,
)
from jaxsi.text.tokenizer_library import (
    COPY_AGAIN,
    HuggingFaceLibrary,
    Library,
    SentencePieceLibrary,
    TokenizerError,
    special_names,
)

_SAVED_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
_PANGRAM = "Sphinx of black quartz, judge my vow: 1,234.5 €\n\n\tif x == 'ü': return [\"日本語\", 67890]  # Ω"


class Tokenizer:
    """A tokenizer with its chat template. Using it does not change it.

    Attributes:
      vocab_size: one more than the largest id.
      bos_id, eos_id: None if the model has no such token.
      adds_bos: whether its own library puts BOS in front of a plain text.
      pad_id: falls back to eos, then to 0; masks never depend on it.
      chat_template, template_name, template_hash: of the tokenizer's own template, or else of `jaxsi-plain`.
      controls, control_ids: the strings and ids that text from outside can never become.
      stop_ids: eos, the eos list of generation_config.json, and the template's end of turn.
    """

    def __init__(
        self,
        library: Library,
        files: Mapping[str, bytes],
        generation_eos: Sequence[int] = (),
        chat: ChatConfig | None = None,
    ):
        self._library, self._files, self._generation_eos = library, dict(files), tuple(generation_eos)
        self.chat = ChatConfig() if chat is None else chat
        vocabulary = library.vocabulary
        self.vocab_size, self.adds_bos = vocabulary.size, vocabulary.adds_bos
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
        self.variables = self.names | self._chat_variables()
        # Some fine-tunes add turn markers without declaring them special: those that the template writes are control.
        # Line breaks and the tags around a thought are written by templates too, but they are part of texts.
        template_text = written_strings(self.chat_template, self.variables)
        added = {text: token for text, token in vocabulary.added.items() if text.strip()}
        written = (text for text in added if text in template_text and text.strip() not in (OPENING, CLOSING))
        markers = {text: added[text] for text in written}
        markers |= {text: token for text, token in added.items() if token in self._generation_eos}
        ids = {**vocabulary.special, **markers}
        role_ids = {self.bos_id, self.eos_id, pad_id}
        # Only the string "<unk>" is kept out of texts. Its id is ordinary: it stands for any unknown character.
        self.control_ids = frozenset(token for token in ids.values() if token != unk_id or token in role_ids)
        self.controls = ControlStrings(ids, self.control_ids)
        rule: list[Any] = [self.chat_template, sorted(self.names.items()), vocabulary.adds_bos]
        told = {name: value for name, value in self._chat_variables().items() if name != "strftime_now"}
        if told or self.reads_date:
            rule.append([sorted(told.items()), self._date() if self.reads_date else None])
        self.template_hash = hashlib.sha256(json.dumps(rule).encode("utf-8")).hexdigest()[:16]

    def with_chat(self, chat: ChatConfig) -> "Tokenizer":
        """The same tokenizer, whose template is told ``chat``."""
        return Tokenizer(self._library, self._files, self._generation_eos, chat)

    @property
    def reads_date(self) -> bool:
        """Whether the chat template writes the date."""
        return "strftime_now" in template_reads(self.chat_template)

    def _date(self) -> str:
        return self.chat.date or today()

    def _chat_variables(self) -> dict[str, Any]:
        """What ``chat`` tells the template, as far as the template reads it."""
        reads, variables = template_reads(self.chat_template), self.chat.variables()
        if unread := variables.keys() - reads:
            raise ChatTemplateError(
                f"the chat template does not read {', '.join(sorted(unread))} of chat.template_kwargs; it reads "
                f"{', '.join(sorted(reads - self.names.keys()))}"
            )
        switches = {name: self.chat.thinking != "off" for name in SWITCHES if name in reads}
        date = {"strftime_now": clock(self._date())} if "strftime_now" in reads else {}
        return switches | date | variables

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the ids of texts, of control strings and of the ends of a response."""
        ids = [self.vocab_size, sorted(self.controls.ids.items()), self.stop_ids, self.encode_text(_PANGRAM)]
        return hashlib.sha256(json.dumps(ids).encode("utf-8")).hexdigest()[:16]

    @functools.cached_property
    def opens_thought(self) -> bool:
        """Whether every prompt ends at the beginning of a thought."""
        return opens_thought(self.assistant_turn.prompt)

    @functools.cached_property
    def closes_thought(self) -> bool:
        """Whether every prompt ends with a thought that is closed already: the template was told to leave it out."""
        return self.assistant_turn.prompt.rstrip().endswith(CLOSING)

    @functools.cached_property
    def answering(self) -> "Tokenizer":
        """The same tokenizer, whose template is asked for answers without thoughts."""
        return self.with_chat(dataclasses.replace(self.chat, thinking="off"))

    @functools.cached_property
    def thought_end(self) -> int | None:
        """The id of `</think>`, if it is one token."""
        vocabulary = self._library.vocabulary
        return {**vocabulary.added, **vocabulary.special}.get(CLOSING)

    @functools.cached_property
    def assistant_turn(self) -> AssistantTurn:
        return AssistantTurn(self.chat_template, self.variables, self.controls, self.eos_id)

    @functools.cached_property
    def needed_size(self) -> int:
        """One more than the largest id that can occur in a prompt or end a response. Special tokens that neither the
        template nor a text writes, such as an added <pad>, do not count."""
        written = self.encode_trusted(written_strings(self.chat_template, self.variables))
        used = {*written, *self.stop_ids, *([] if self.bos_id is None else [self.bos_id])}
        size = self.vocab_size
        while size - 1 in self.control_ids - used:
            size -= 1
        return size

    @functools.cached_property
    def turn_prompt_ids(self) -> list[int]:
        """Ids of `assistant_turn.prompt`."""
        return self.encode_trusted(self.assistant_turn.prompt)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response, each once: eos, then those of generation_config.json, then the end of turn."""
        eos = () if self.eos_id is None else (self.eos_id,)
        return tuple(dict.fromkeys((*eos, *self._generation_eos, self.assistant_turn.end_of_turn)))

    @functools.cached_property
    def classifier_pad(self) -> tuple[str, int] | None:
        """The token, and its id, that a classifier of `transformers` pads with. It takes the last token that is not
        padding as the end of a text. So a pad token that also ends turns will not do: then another control token is
        taken, at best one that the template does not write. None if there is none."""
        template_text = written_strings(self.chat_template, self.variables)
        usable = {text: token for text, token in self.controls.ids.items() if token not in self.stop_ids}

        def preference(item: tuple[str, int]) -> tuple[bool, bool, int]:
            text, token = item
            return token != self.pad_id, text in template_text or token == self.bos_id, token

        return min(usable.items(), key=preference, default=None)

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

    def save(self, folder: str | Path, *, pad: str | None = None) -> None:
        """Writes the tokenizer into `folder` as it was loaded, with its chat template.

        `transformers` and `load_tokenizer` then give the same ids. (The model's export writes generation_config.json.)

        Args:
          pad: another pad token, by default the tokenizer's own.
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
            if pad is not None and name in ("tokenizer_config.json", "special_tokens_map.json"):
                content = json.dumps(json.loads(content) | {"pad_token": pad}, indent=2, ensure_ascii=False).encode()
            (folder / name).write_bytes(content)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        value = json.loads(content)
    except ValueError as error:
        raise TokenizerError(path, f"not valid JSON ({error})", COPY_AGAIN) from error
    if not isinstance(value, dict):
        raise TokenizerError(path, f"holds a {type(value).__name__}, not a JSON object", COPY_AGAIN)
    return value


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
        raise TokenizerError(path, "the file is empty", COPY_AGAIN)
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
            options = _names_by_id(folder, _read_json(path)) | special_names(config)
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_file=str(path), clean_up_tokenization_spaces=False, **options
            )
    except TokenizerError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
        _read_json(path)  # its error says more if the file is not JSON; only now, or big files were parsed twice
        raise TokenizerError(path, f"cannot be read ({type(error).__name__}: {error})", COPY_AGAIN) from error
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
    return names | special_names(_read_json(folder / "special_tokens_map.json"))


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
    # As in transformers: generation_config.json if there is one, else config.json.
    generation = folder / "generation_config.json"
    ends = _eos_list(_read_json(generation if generation.is_file() else folder / "config.json"))
    return Tokenizer(library, files, ends)
