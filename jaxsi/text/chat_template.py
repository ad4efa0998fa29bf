"""Chat templates: compiled, rendered, and kept apart from the text of the messages.

A chat template is a Jinja program that writes control strings (`<|im_start|>`, `</s>`) around the messages. Tokenising
its output would turn the same strings inside a *message* into control ids too. So control strings inside a message are
replaced by sentinels before rendering. Afterwards the rendered text is split into parts: an `int` is a control id that
the template wrote, a `str` is plain text whatever it says. A conversation without such strings takes the direct way,
so its ids are exactly those of `transformers`' `apply_chat_template`.
"""

import datetime
import functools
import importlib.resources
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from jaxsi.runs.errors import InputError

DEFAULT_TEMPLATE_NAME = "jaxsi-plain"
FIRST_RENDER_SECONDS = 10.0
MAX_REPEATED_CHARACTERS = 1_000_000
PROBE = "xyzzy"  # the content of a trial message, unlikely to stand in a template
# The secret keeps a message from forging a marker; the private-use characters keep templates from touching one.
_OPEN, _CLOSE = f"\ue000{secrets.token_hex(8)}:", "\ue001"


def secret_name(number: int) -> str:
    """A string that text from outside cannot contain."""
    return f"{_OPEN}c{number}{_CLOSE}"


class ChatTemplateError(InputError, ValueError):
    """A chat template, or a conversation passed to it, cannot be rendered."""


def default_template(adds_bos: bool) -> str:
    """The template `jaxsi-plain`, for base models without one; it starts with a BOS if the tokenizer adds one.

    Role names stand on lines of their own. If the prompt ended in a space instead, its last token would differ from the
    one that starts every word in running text.
    """
    body = importlib.resources.files("jaxsi.text").joinpath("plain_chat.jinja").read_text(encoding="utf-8")
    return ("{{- bos_token -}}\n" if adds_bos else "") + body.rstrip("\n")


class ControlStrings:
    """The strings a tokenizer reads as control tokens, and how to keep them out of text from outside.

    Args:
        ids: control string -> token id.
        control_ids: the ids that count as control. The string `<unk>` is kept out of texts, but its id is not control.
    """

    def __init__(self, ids: Mapping[str, int], control_ids: frozenset[int]):
        self.ids = dict(ids)
        self.control_ids = control_ids
        longest_first = sorted(self.ids, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first)) or "(?!)"
        self.pattern = re.compile(alternatives)
        self._marked = re.compile(f"{_OPEN}(\\d+){_CLOSE}|({alternatives})")
        self._heads = {s[:n] for s in self.ids for n in range(1, len(s)) if s[:n].strip()}
        self._tails = {s[-n:] for s in self.ids for n in range(1, len(s)) if s[-n:].strip()}
        self._longest = max(map(len, self.ids), default=1)
        self._joined = "\0".join(self.ids)

    def count(self, text: str) -> int:
        """Number of control ids that the control strings in `text` stand for."""
        return sum(self.ids[match.group()] in self.control_ids for match in self.pattern.finditer(text))

    def hide(self, text: str, hidden: list[str]) -> str:
        """`text` with its control strings replaced by sentinels; the replaced strings are appended to `hidden`.

        A piece of a control string at an edge of the text (or as the whole text) is hidden too: the template's text
        beside it could complete it.
        """

        def sentinel(piece: str) -> str:
            hidden.append(piece)
            return f"{_OPEN}{len(hidden) - 1}{_CLOSE}"

        if len(text) < self._longest and text in self._joined and text.strip():
            return sentinel(text)
        spans = [match.span() for match in self.pattern.finditer(text)]
        if start := self._edge(text, self._tails, front=True):
            spans.insert(0, (0, start))
        if end := self._edge(text, self._heads, front=False):
            spans.append((len(text) - end, len(text)))
        if not spans:
            return text
        safe_text, position = "", 0
        for start, end in sorted(spans):
            if end <= position:  # inside the previous span
                continue
            start = max(start, position)
            safe_text += text[position:start] + sentinel(text[start:end])
            position = end
        return safe_text + text[position:]

    def _edge(self, text: str, pieces: set[str], *, front: bool) -> int:
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            if (text[:n] if front else text[-n:]) in pieces:
                return n
        return 0

    def parts(self, rendered: str, hidden: Sequence[str]) -> list[str | int]:
        """A rendered text as control ids (`int`) and plain text (`str`, sentinels resolved)."""
        parts: list[str | int] = []
        text, position = "", 0
        for match in self._marked.finditer(rendered):
            text += rendered[position : match.start()]
            position = match.end()
            if match.group(1) is not None:
                text += hidden[int(match.group(1))]
                continue
            parts += [text] if text else []
            parts.append(self.ids[match.group(2)])
            text = ""
        text += rendered[position:]
        parts += [text] if text else []
        if any(isinstance(part, str) and (_OPEN in part) for part in parts):
            raise ChatTemplateError(
                "the chat template cut a message in the middle of a control string that it contains; remove the "
                "control string from the message, or use a template that does not slice message contents"
            )
        return parts


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, which some templates put around the assistant's text. Has no effect."""

    tags = {"generation"}  # noqa: RUF012 - the set Jinja asks for

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.exceptions.SecurityError("** is not allowed in a chat template")
        for sequence, times in ((left, right), (right, left)):
            repeats = isinstance(sequence, (str, list, tuple)) and isinstance(times, int)
            if repeats and len(sequence) * times > MAX_REPEATED_CHARACTERS:
                raise jinja2.exceptions.SecurityError(f"repeats a text beyond {MAX_REPEATED_CHARACTERS} characters")
        return left * right


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def today() -> str:
    """The date, once per process: two prompts must not differ because midnight passed between them."""
    return datetime.date.today().isoformat()


def clock(date: str) -> Callable[[str], str]:
    """`strftime_now` of a template, on a fixed date at noon."""
    noon = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time(12))
    return noon.strftime


_GLOBALS: dict[str, Any] = {
    "raise_exception": _raise_exception,
    "strftime_now": lambda pattern: clock(today())(pattern),
}


@functools.lru_cache(maxsize=32)
def compile_template(template: str) -> "_TimedTemplate":
    """The compiled template, in the environment that `transformers` uses, with tighter limits."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(_GLOBALS)
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"the chat template does not parse: line {error.lineno}: {error.message}; fix it in chat_template.jinja or "
            'in "chat_template" of tokenizer_config.json'
        ) from error
    return _TimedTemplate(compiled)


@functools.lru_cache(maxsize=32)
def template_reads(template: str) -> frozenset[str]:
    """The variables that a template reads and does not set itself, `strftime_now` among them."""
    environment = _Sandbox(extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)))


class _TimedTemplate:
    """A template whose first rendering is stopped after `FIRST_RENDER_SECONDS`: nested loops can run for ever."""

    def __init__(self, template: jinja2.Template):
        self._template = template
        self._proven = False

    def render(self, **variables: Any) -> str:
        if self._proven:
            return self._template.render(**variables)
        outcome: list[Any] = []

        def first() -> None:
            try:
                outcome.append(self._template.render(**variables))
            except BaseException as error:  # handed to the caller's thread
                outcome.append(error)

        thread = threading.Thread(target=first, daemon=True)
        thread.start()
        thread.join(FIRST_RENDER_SECONDS)
        if not outcome:
            raise ChatTemplateError(
                f"the chat template did not finish within {FIRST_RENDER_SECONDS:g} s (limit on its first rendering); "
                "take the template from a source you trust"
            )
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        self._proven = True
        return outcome[0]


def render_text(
    template: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, Any], *, add_generation_prompt: bool
) -> str:
    """The text that the template writes for `messages`; `names` are its other variables, such as `bos_token`.

    Raises:
      ChatTemplateError: if the template refuses a message; names the first such message and the template's own error.
    """
    compiled = compile_template(template)
    variables = {**names, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    try:
        return compiled.render(messages=messages, **variables)
    except ChatTemplateError:
        raise
    except Exception as error:  # a template is a program: any exception is a refusal
        index = _first_refused(compiled, messages, variables)
        role, content = messages[index]["role"], re.sub(f"{_OPEN}\\d+{_CLOSE}", "…", messages[index]["content"])
        fix = "Put the text of the system message into the user's" if role == "system" else "Change the messages"
        raise ChatTemplateError(
            f"the chat template refuses the conversation at message {index} of {len(messages)} ({role}: "
            f"{content[:60]!r}): {error}; the roles are {', '.join(message['role'] for message in messages)}. "
            f"{fix}, or change the model's chat template"
        ) from error


def _first_refused(compiled: _TimedTemplate, messages: Sequence[Mapping[str, str]], variables: dict[str, Any]) -> int:
    for end in range(1, len(messages)):
        try:
            compiled.render(messages=messages[:end], **variables)
        except Exception:  # the shorter conversation is refused too: the fault is in it
            return end - 1
    return len(messages) - 1


def written_strings(template: str, names: Mapping[str, Any]) -> str:
    """The text that the template writes for a plain exchange, or "" if it refuses: shows which tokens mark turns."""
    exchange = [{"role": role, "content": PROBE} for role in ("user", "assistant", "user")]
    try:
        return render_text(template, exchange, names, add_generation_prompt=False)
    except ChatTemplateError:
        return ""


class AssistantTurn:
    """How a template closes the assistant's turn, found by rendering one exchange.

    Attributes:
      prompt: the rendered prompt of the exchange.
      end_of_turn: the id that ends a response.
      closing: the text from the end of the response through the end of the turn.
      controls: the number of control strings after the response. If it is 0, the tokenizer's eos is appended.
    """

    def __init__(self, template: str, names: Mapping[str, Any], controls: ControlStrings, eos_id: int | None):
        question = [{"role": "user", "content": PROBE}]
        answered = [*question, {"role": "assistant", "content": PROBE}]
        self.prompt = render_text(template, question, names, add_generation_prompt=True)
        whole = render_text(template, answered, names, add_generation_prompt=False)
        _check_effect(template, question, names, self.prompt, whole)
        if PROBE not in whole[whole.find(PROBE) + len(PROBE) :]:
            raise ChatTemplateError(
                "the chat template leaves out the assistant's message, so it cannot be trained with; use another one"
            )
        tail = whole[whole.rfind(PROBE) + len(PROBE) :]
        matches = [m for m in controls.pattern.finditer(tail) if controls.ids[m.group()] in controls.control_ids]
        self.controls = len(matches)
        if matches:
            self.end_of_turn = controls.ids[matches[0].group()]
            self.closing = tail[: matches[0].end()]
            return
        if eos_id is None:
            raise ChatTemplateError(
                "the chat template ends the assistant's turn without a special token and the tokenizer has no "
                'eos_token, so a response could never stop; set "eos_token" in tokenizer_config.json'
            )
        self.end_of_turn, self.closing = eos_id, ""


def _check_effect(
    template: str, question: Sequence[Mapping[str, str]], names: Mapping[str, Any], prompt: str, whole: str
) -> None:
    """Raises: ChatTemplateError if the template writes a header before the assistant's message, but not at the end of a
    prompt: the model would end its turn at once. Llama 2's template has no such header, so it passes."""
    if render_text(template, question, names, add_generation_prompt=False) != prompt or not whole.startswith(prompt):
        return
    header = whole[len(prompt) : whole.rfind(PROBE)].strip()
    if header:
        raise ChatTemplateError(
            f"the chat template ignores add_generation_prompt: it writes {header[:40]!r} before the assistant's "
            "message, but not at the end of a prompt; add it there, or use another template"
        )
