"""``jaxsi chat``: a conversation with a model in the terminal, or with lines from a pipe."""

import dataclasses
import sys
from typing import IO, TYPE_CHECKING, Any

from jaxsi.cli.arguments import ChatOptions, Dtype, Model
from jaxsi.cli.command import SCREEN, Report, UsageError, parse
from jaxsi.cli.stored import Mesh, check_writes, mesh_for
from jaxsi.runs.progress import processes
from jaxsi.text.chat_config import CLOSING, OPENING, Thought

if TYPE_CHECKING:
    from jaxsi.lm import LM
    from jaxsi.runs.records import Message, Response

DESCRIPTION = """A conversation with MODEL, for a look at it. Each line is a turn of yours, and MODEL sees all turns
before it. Lines that begin with / are commands: /reset forgets the conversation, /quit ends it, and so does Ctrl-D.
Ctrl-C stops an answer. Lines from a pipe work as well; then stdout has the answers alone. With --json the conversation
is shown on stderr, and the object has all turns.

Examples:
  jaxsi chat MODEL
  jaxsi chat Qwen/Qwen3-0.6B --system "Answer in one sentence." --chat.thinking keep
  echo "Why is the sky blue?" | jaxsi chat runs/mine --temperature 0"""

COMMANDS = ("/reset", "/quit")
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(ChatOptions):
    model: Model
    system: str | None = None
    """The system message, if MODEL's chat template has one."""
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.9
    top_k: int = 0
    """0 is off."""
    max_new_tokens: int = 512
    """Longer answers are cut off."""
    seed: int = 0
    dtype: Dtype = "auto"
    """auto: bfloat16 if this device computes in it at speed, else float32."""
    mesh: Mesh = Mesh()


def chat(argv: list[str]) -> Report:
    """Talks to a model."""
    args = parse(Chat, argv, "jaxsi chat", DESCRIPTION)
    if processes()[1] > 1:
        raise UsageError("chat reads one keyboard, so it runs in one process; leave --distributed out")
    from jaxsi.lm import load
    from jaxsi.sampling.generate import SamplingConfig

    names = ("temperature", "top_p", "top_k", "max_new_tokens")
    settings = {name: getattr(args, name) for name in names}
    try:
        SamplingConfig(**settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    lm = load(args.model, mesh_for(args.model, args.mesh), args.dtype, chat=args.model_chat)
    check_writes(lm, args.model)
    talk = Talk(lm, settings, args.system, args.seed, SCREEN.get(sys.stdout))
    talk.check_fits("Hi")
    interrupted = talk.go_on(sys.stdin)
    return Report({"model": args.model, "fingerprint": lm.fingerprint, "turns": talk.turns}, "", 130 * interrupted)


class Talk:
    """A conversation: what MODEL sees of it, and a record of every turn."""

    def __init__(self, lm: "LM", settings: dict[str, Any], system: str | None, seed: int, screen: IO[str]) -> None:
        self.lm, self.settings, self.seed, self.screen = lm, settings, seed, screen
        self.beginning: tuple[Message, ...] = () if system is None else ({"role": "system", "content": system},)
        self.messages: tuple[Message, ...] = self.beginning
        self.turns: list[dict[str, Any]] = []

    def go_on(self, lines: IO[str]) -> bool:
        """Answers line after line, until the last one or /quit. Returns whether Ctrl-C has ended it.

        Raises: UsageError: if a line from a pipe cannot be answered. At a keyboard this is shown, and the user goes on.
        """
        live = lines.isatty()
        if live:
            self.note("/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer")
        while True:
            if live:
                print("\n> ", end="", file=self.screen, flush=True)
            try:
                line = lines.readline()
            except KeyboardInterrupt:
                return True
            text = line.strip()
            if not line or text == "/quit":
                return False
            try:
                self.take(text)
            except UsageError as error:
                if not live:
                    raise
                self.note(str(error))
            except KeyboardInterrupt:
                if not live:
                    raise
                self.note("stopped; this turn is not part of the conversation")

    def take(self, text: str) -> None:
        """One line: a command, or a turn of the user. Raises: UsageError: if it cannot be answered."""
        if text == "/reset":
            self.messages = self.beginning
            self.note("the conversation is forgotten")
        elif text.startswith("/"):
            raise UsageError(f"{text.split()[0]} is not a command; the commands are {', '.join(COMMANDS)}")
        elif text:
            self.answer(text)

    def answer(self, text: str) -> None:
        """Samples an answer and shows it as it comes. Raises: UsageError: if there is no room for one."""
        from jaxsi.runs.records import Prompt
        from jaxsi.sampling.generate import generate
        from jaxsi.text.chat import read_response

        messages = self.check_fits(text)
        shown = Shown(self.screen)
        # The number of the turn is part of the noise: the same question again may get another answer.
        (response,) = generate(
            self.lm,
            [Prompt(id=f"turn {len(self.turns)}", messages=messages)],
            seed=self.seed,
            watch=lambda prompt, sample, ids: shown.update(read_response(self.lm.tokenizer, ids)),
            **self.settings,
        )
        shown.finish(Thought(response.reasoning, response.text, closed=True))
        self.turns.append(_turn(text, response))
        if response.finish_reason == "length":
            self.note(f"cut off at --max-new-tokens {self.settings['max_new_tokens']}")
        if response.text:
            self.messages = (*messages, {"role": "assistant", "content": response.text})
        else:
            self.note("an empty answer; this turn is not part of the conversation")

    def check_fits(self, text: str) -> "tuple[Message, ...]":
        """The conversation with a new turn of the user. Raises: UsageError: if MODEL has no room for it and an answer,
        or if its chat template refuses it."""
        from jaxsi.text.chat import render_prompt
        from jaxsi.text.chat_template import ChatTemplateError

        messages = (*self.messages, {"role": "user", "content": text})
        try:
            tokens = len(render_prompt(self.lm.tokenizer, messages))
        except ChatTemplateError as error:
            raise UsageError(str(error)) from error
        most, positions = self.settings["max_new_tokens"], self.lm.config.max_positions
        if tokens + most > positions:
            raise UsageError(
                f"with this turn the conversation has {tokens} tokens, and --max-new-tokens {most} for the answer make "
                f"more than the {positions} positions of the model; the turn is left out. /reset forgets the "
                "conversation; or start again with a lower --max-new-tokens"
            )
        return messages

    def note(self, text: str) -> None:
        """Shows what is not part of the conversation."""
        print(f"[{text}]", file=sys.stderr, flush=True)


class Shown:
    """An answer on the screen while it grows. Thoughts are dim on a terminal, and go to stderr if stdout is a pipe."""

    def __init__(self, screen: IO[str]) -> None:
        self.screen = screen
        self.thoughts, self.dim, self.plain = (screen, DIM, PLAIN) if screen.isatty() else (sys.stderr, "", "")
        self.reasoning = self.answer = ""

    def update(self, thought: Thought) -> None:
        """Shows what is new, except for what later tokens may still change."""
        self.show(thought._replace(reasoning=_settled(thought.reasoning), answer=_settled(thought.answer)))

    def finish(self, thought: Thought) -> None:
        """Shows the rest, and ends the line."""
        self.show(thought)
        if not thought.answer.startswith(self.answer):  # a tokenizer that decodes a part unlike the whole
            print(f"\n\n{thought.answer}", end="", file=self.screen)
        if self.reasoning and not self.answer:
            print(file=self.thoughts, flush=True)
        else:
            print(file=self.screen, flush=True)

    def show(self, thought: Thought) -> None:
        if thought.reasoning.startswith(self.reasoning) and thought.reasoning != self.reasoning:
            new, self.reasoning = thought.reasoning[len(self.reasoning) :], thought.reasoning
            print(f"{self.dim}{new}{self.plain}", end="", file=self.thoughts, flush=True)
        if thought.answer.startswith(self.answer) and thought.answer != self.answer:
            if self.reasoning and not self.answer:
                print("\n", file=self.thoughts, flush=True)
            new, self.answer = thought.answer[len(self.answer) :], thought.answer
            print(new, end="", file=self.screen, flush=True)


def _settled(text: str) -> str:
    """A text that still grows, without an end that may yet turn out to be another character, a tag or white space."""
    text = text.rstrip("\ufffd")
    for tag in (OPENING, CLOSING):
        length = next((n for n in range(len(tag), 0, -1) if text.endswith(tag[:n])), 0)
        text = text[: len(text) - length]
    return text.rstrip()


def _turn(text: str, response: "Response") -> dict[str, Any]:
    return {
        "prompt": text,
        "reasoning": response.reasoning,
        "text": response.text,
        "tokens": len(response.token_ids),
        "finish_reason": response.finish_reason,
    }
