"""Conversations to token ids, by a tokenizer and its chat template; text from outside never becomes a control id."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

from jaxsi.runs.records import Prompt, Response
from jaxsi.text.chat_config import CLOSING, OPENING, Thought, split_thought, written_thought
from jaxsi.text.chat_template import PROBE, ChatTemplateError, render_text
from jaxsi.text.tokenizer import Tokenizer

_ROLE = re.compile(r"[A-Za-z0-9_-]+")


def _checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if not messages:
        raise ChatTemplateError("the conversation has no message; give at least one user message")
    checked = []
    for index, message in enumerate(messages):
        if set(message) != {"role", "content"} or not all(isinstance(value, str) for value in message.values()):
            raise ChatTemplateError(
                f'message {index} is {str(dict(message))[:80]}; a message has exactly the texts "role" and "content"'
            )
        role, content = message["role"], message["content"]
        if not _ROLE.fullmatch(role):
            raise ChatTemplateError(
                f"message {index} has the role {role[:40]!r}; a role consists of letters, digits, _ and -"
            )
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ChatTemplateError(
                f"message {index} ({role}) is not valid Unicode: half a surrogate pair at character {error.start}; "
                "remove or replace it"
            ) from error
        checked.append({"role": role, "content": content})
    return checked


def _encode(tokenizer: Tokenizer, rendered: str, hidden: Sequence[str]) -> list[int]:
    controls = tokenizer.controls
    if not hidden:
        ids = tokenizer.encode_trusted(rendered)
        # A normaliser may turn harmless text (full-width brackets) into a control string. Then encode by parts.
        if sum(token in controls.control_ids for token in ids) == controls.count(rendered):
            return ids
    return tokenizer.encode_parts(controls.parts(rendered, hidden))


def _hide(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[str]]:
    hidden: list[str] = []
    safe = [{"role": m["role"], "content": tokenizer.controls.hide(m["content"], hidden)} for m in messages]
    return safe, hidden


@contextlib.contextmanager
def naming(row: str) -> Iterator[None]:
    """Adds the name of a row of the user's data to the errors of its rendering."""
    try:
        yield
    except ChatTemplateError as error:
        raise ChatTemplateError(f"{row}: {error}") from error


def render_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation.

    They equal `apply_chat_template(tokenize=True)`, except that a control string inside a message is plain text.

    Raises:
      ChatTemplateError: if a message is malformed, or the template refuses it.
    """
    safe, hidden = _hide(tokenizer, _checked(messages))
    rendered = render_text(
        tokenizer.chat_template, safe, tokenizer.variables, add_generation_prompt=add_generation_prompt
    )
    return _encode(tokenizer, rendered, hidden)


def prompt_length(tokenizer: Tokenizer, prompt: Prompt) -> int:
    """The number of tokens of a prompt; an error names the prompt."""
    with naming(f"prompt {prompt.id!r}"):
        return len(render_prompt(tokenizer, prompt.messages))


def render_response(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of an assistant turn after its generation prompt, ending in exactly one end-of-turn id.

    `render_prompt(messages) + render_response(text)` equals `apply_chat_template` of the whole conversation, cut after
    the end of the turn. The exception is a token that spans the border between prompt and response (the text starts
    with a newline): then the prompt keeps its own tokens, as it does when the model samples. For sampled text use the
    sampled ids, never this function.

    If the prompt has a closed thought already, a thought in the text is left out: there the model writes answers alone.
    If the prompt begins a thought, the text goes on from there; for a text without a thought see `render_request`.

    Raises:
      ChatTemplateError: if nothing would be left of the text, because its thought has no end.
    """
    turn, thought = tokenizer.assistant_turn, written_thought(text)
    if tokenizer.closes_thought:
        if not thought.closed:
            raise ChatTemplateError(
                f"the response {text[:60]!r} is a thought without an end and has no answer; close it with {CLOSING} "
                "and add one, or leave the row out"
            )
        text = thought.answer
    if tokenizer.opens_thought and thought.answer != text:
        text = text.lstrip().removeprefix(OPENING)
        text = text.removeprefix("\n") if turn.prompt.endswith("\n") else text
    messages = _checked([{"role": "user", "content": PROBE}, {"role": "assistant", "content": text}])
    safe, hidden = _hide(tokenizer, messages)
    whole = render_text(tokenizer.chat_template, safe, tokenizer.variables, add_generation_prompt=False)
    if turn.controls:
        controls = tokenizer.controls
        matches = [m for m in controls.pattern.finditer(whole) if controls.ids[m.group()] in controls.control_ids]
        whole = whole[: matches[-turn.controls].end()]
    ending = [] if turn.controls else [turn.end_of_turn]
    blocks = whole[whole.rfind(PROBE) :].count(OPENING) > text.count(OPENING) and thought.answer != text
    if not whole.startswith(turn.prompt) or tokenizer.opens_thought or blocks:
        # The template writes a finished turn unlike the start of a new one: a reasoning model drops its reasoning, or
        # the template adds a block of its own. Then the text itself follows the generation prompt.
        return _encode(tokenizer, safe[-1]["content"] + turn.closing, hidden) + ending
    ids, prompt_ids = _encode(tokenizer, whole, hidden), tokenizer.turn_prompt_ids
    if ids[: len(prompt_ids)] != prompt_ids:  # a token spans the border; the sampler sees the prompt's own tokens
        return _encode(tokenizer, whole[len(turn.prompt) :], hidden) + ending
    return ids[len(prompt_ids) :] + ending


def render_request(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """`render_prompt`, up to where an answer begins: if the template begins a thought, it is closed at once. For texts
    without a thought, which a model is to learn, or whose probability is asked for."""
    return [*render_prompt(tokenizer, messages), *_end_of_thought(tokenizer)]


def _end_of_thought(tokenizer: Tokenizer) -> list[int]:
    """What closes the thought that the prompt begins; nothing if it begins none."""
    if not tokenizer.opens_thought:
        return []
    gap = "" if tokenizer.assistant_turn.prompt.endswith("\n") else "\n"
    return tokenizer.encode_trusted(f"{gap}{CLOSING}\n\n")


def read_response(tokenizer: Tokenizer, token_ids: Sequence[int]) -> Thought:
    """The thought and the answer in sampled ids."""
    opened = tokenizer.opens_thought
    tag = tokenizer.thought_end
    ids = list(token_ids)
    if tag is not None and tag in tokenizer.control_ids and tag in ids:  # then decoding leaves the tag out
        end = len(ids) - 1 - ids[::-1].index(tag)
        before, after = split_thought(tokenizer.decode(ids[:end]), opened=True), tokenizer.decode(ids[end + 1 :])
        return Thought(before.reasoning, after.lstrip("\n"), closed=True)
    return split_thought(tokenizer.decode(ids), opened=opened)


def marker_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The token ids of a line that begins with ``text``, as a response contains them.

    Raises:
      ValueError: if the line break before it and its first characters form one token: then the sampler cannot see that
        the marker ends a response.
    """
    prefix, whole = tokenizer.encode_text("x\n"), tokenizer.encode_text(f"x\n{text}")
    if not text or whole[: len(prefix)] != prefix:
        raise ValueError(f"{text!r} does not begin with a token of its own after a line break; choose another marker")
    return tuple(whole[len(prefix) :])


def written_response(tokenizer: Tokenizer, id: str, prompt_id: str, text: str) -> Response:
    """A text that no model sampled (a person's demonstration, say) as a response. It ends the turn and has no logps. If
    the prompt begins a thought and the text has none, the response closes it first."""
    thought = written_thought(text)
    closing = _end_of_thought(tokenizer) if thought.answer == text else []
    return Response(
        id=id,
        prompt_id=prompt_id,
        sample=0,
        text=thought.answer,
        token_ids=(*closing, *render_response(tokenizer, text)),
        logps=(),
        finish_reason="stop",
        fingerprint="written",
        template=tokenizer.template_hash,
        reasoning=thought.reasoning,
    )
