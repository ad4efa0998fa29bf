"""An OpenAI-compatible endpoint: retries, concurrency, a cache on disk, an estimate and hard caps.

An answer is on disk before it is used. A run that is killed, or whose server dies, therefore pays for nothing twice.

The retries are our own. Those of the client neither retry a reply that is not a chat completion nor give up at once if
the account has no credit, and their waits, of up to two minutes, cannot be interrupted.
"""

import concurrent.futures
import contextlib
import dataclasses
import email.utils
import fcntl
import hashlib
import json
import logging
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxsi.runs.appended import AppendedLines
from jaxsi.runs.config_snapshot import may_change
from jaxsi.runs.first_process import from_first
from jaxsi.runs.progress import piece
from jaxsi.runs.records import from_json, to_json

_log = logging.getLogger(__name__)
BYTES_PER_TOKEN = 3.0  # of UTF-8 text; a low figure, because the estimate of tokens must not be too low
TEMPLATE_TOKENS = 32  # allowance for the chat template around a request
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds; if the server asks for a longer wait, the run stops
OPENAI = "https://api.openai.com/v1"
MANY = 16  # if this many requests are all refused, the settings are wrong and not the requests
_TEMPORARY = frozenset({408, 409, 425, 429})  # and 5xx: the same request may be answered later
_NO_CREDIT = re.compile(r"insufficient.?quota|insufficient.?(?:balance|credit|funds)", re.IGNORECASE)
_TOO_LONG = re.compile(
    r"context.?(?:length|window|size)|maximum.?model.?length|max_model_len|too many tokens"
    r"|(?:prompt|input|request|message)s? (?:is|are) too long|maximum number of tokens|max_new_tokens. must be",
    re.IGNORECASE,
)
_FILTERED = re.compile(r"content.?(?:filter|policy|management)|moderation|flagged|safety", re.IGNORECASE)


class EndpointError(RuntimeError):
    """The endpoint cannot be used, or its cap is reached. The cache keeps what was paid for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one request, a line of the cache. ``finish_reason`` "refusal": the text is not what was asked for.
    ``prompt_tokens`` 0: the endpoint refused the request, for its length or its content, and charged nothing."""

    entry: str
    model: str
    text: str
    finish_reason: Literal["stop", "length", "refusal"]
    prompt_tokens: int
    completion_tokens: int
    first_logps: dict[str, float] | None = None  # of the likeliest first tokens, if the request asks for them


class Request(NamedTuple):
    """A text that is sent, and how its answer is sampled. ``temperature`` None sends neither it nor ``top_p``.
    ``sample``: the number of the answer, if a text is sent several times. ``before``: (role, content) of the messages
    before the text. ``top_logprobs``: how many of the likeliest first tokens the server is to name."""

    text: str
    max_new_tokens: int
    temperature: float | None
    top_p: float = 1.0
    sample: int = 0
    before: tuple[tuple[str, str], ...] = ()
    top_logprobs: int = 0

    def entry(self, model: str) -> str:
        """The name of the answer in the cache: a hash of everything that it depends on."""
        more: list[Any] = [] if (self.top_p, self.sample) == (1.0, 0) else [self.top_p, self.sample]
        more += [{"before": self.before, "top_logprobs": self.top_logprobs}] if self.before or self.top_logprobs else []
        text = json.dumps([model, self.temperature, self.max_new_tokens, self.text, *more])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def settings(self, length_parameter: str) -> dict[str, Any]:
        """The sampling settings, by the server's names."""
        settings: dict[str, Any] = {length_parameter: self.max_new_tokens}
        if self.temperature is not None:
            settings["temperature"] = self.temperature
            if self.top_p != 1.0:
                settings["top_p"] = self.top_p
        if self.top_logprobs:
            settings |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return settings

    def messages(self) -> list[dict[str, str]]:
        """The conversation as it is sent. Half a surrogate pair cannot be sent, and becomes a question mark."""
        rows = [*self.before, ("user", self.text)]
        return [{"role": role, "content": text.encode("utf-8", "replace").decode()} for role, text in rows]

    def upper_bound(self) -> Counter[str]:
        """An estimate from above of the tokens that are paid for."""
        text = "".join([content for _, content in self.before]) + self.text
        prompt = int(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) + TEMPLATE_TOKENS
        return Counter(prompt_tokens=prompt, completion_tokens=self.max_new_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """``model`` at ``base_url``, which is asked with ``concurrency`` requests at a time.

    The key is read from the environment variable ``api_key_variable`` and stored nowhere. Answers are kept in the file
    ``cache``, under model, request and sampling settings: the same model at another address gives the same answers.
    ``length_parameter`` is the server's name for the largest number of new tokens (some models of OpenAI accept only
    "max_completion_tokens").

    ``max_total_tokens`` caps the prompt and completion tokens of all answers of ``model`` in the cache, whichever runs
    wrote them. A request is sent only if the answers so far, by the server's counts, and the requests in flight and to
    come, by an estimate from above, stay below the cap. ``max_cost`` does the same in the currency of the two prices
    (per million tokens). Tokens that a server counts for requests it then fails to answer are not seen.
    """

    base_url: str = dataclasses.field(metadata=may_change())
    model: str
    cache: str = dataclasses.field(metadata=may_change())
    api_key_variable: str = dataclasses.field(default="OPENAI_API_KEY", metadata=may_change())
    length_parameter: str = dataclasses.field(default="max_tokens", metadata=may_change())
    concurrency: int = dataclasses.field(default=8, metadata=may_change())
    retries: int = dataclasses.field(default=6, metadata=may_change())
    timeout: float = dataclasses.field(default=120.0, metadata=may_change())
    prompt_price: float = dataclasses.field(default=0.0, metadata=may_change())
    completion_price: float = dataclasses.field(default=0.0, metadata=may_change())
    max_cost: float | None = dataclasses.field(default=None, metadata=may_change())
    max_total_tokens: int | None = dataclasses.field(default=None, metadata=may_change())

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if type(value) is int}
        if wrong := [f"{name} is {value}" for name, value in numbers.items() if value < 1]:
            raise ValueError(f"{', '.join(wrong)}; the least is 1")
        if self.timeout <= 0 or min(self.prompt_price, self.completion_price) < 0:
            raise ValueError(
                f"timeout is {self.timeout} (> 0), prices {self.prompt_price}, {self.completion_price} (>= 0)"
            )
        if self.max_cost is not None and not (self.prompt_price or self.completion_price):
            raise ValueError(f"max_cost is {self.max_cost}, but both prices are 0; set prompt_price, completion_price")

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """The answer to each request.

        Raises: EndpointError: if the endpoint refuses all requests (key, model, credit) or does not answer after all
          retries, or if a cap is reached. Every answer that came is kept.
        """
        by_entry = {request.entry(self.model): request for request in requests}
        rows = from_first(lambda: [to_json(answer) for answer in self._answers(by_entry).values()])
        answers = {answer.entry: answer for answer in (from_json(Answer, row) for row in rows)}
        return [answers[request.entry(self.model)] for request in requests]

    def estimate(self, requests: Sequence[Request]) -> dict[str, float]:
        """An upper estimate for the requests: {"calls", "prompt_tokens", "completion_tokens", "cost"}."""
        usage = sum((request.upper_bound() for request in requests), Counter())
        tokens = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        return {"calls": len(requests), **tokens, "cost": self._cost(usage)}

    def _cost(self, usage: Mapping[str, int]) -> float:
        return (usage["prompt_tokens"] * self.prompt_price + usage["completion_tokens"] * self.completion_price) / 1e6

    def _answers(self, requests: Mapping[str, Request]) -> dict[str, Answer]:
        """The answer to each of the requests, by entry."""
        cache = _Cache(Path(self.cache), self.model)
        if missing := {entry: request for entry, request in requests.items() if entry not in cache.answers}:
            self._ask_all(missing, cache)
        answers = {entry: cache.answers[entry] for entry in requests}
        counts = Counter(answer.finish_reason for answer in answers.values())
        if counts["refusal"] or counts["length"]:
            _log.warning(
                "%s: of %d answers %d are refusals, and %d are cut off by max_new_tokens = %d or belong to requests "
                "that are too long",
                self.model,
                len(answers),
                counts["refusal"],
                counts["length"],
                max(request.max_new_tokens for request in requests.values()),
            )
        return answers

    def _ask_all(self, missing: Mapping[str, Request], cache: "_Cache") -> None:
        """Asks for what is not in the cache. Each answer goes there as it comes."""
        expected = self.estimate(list(missing.values()))
        _log.warning(
            "%s: %d calls, at most %d prompt and %d completion tokens%s",
            self.model,
            expected["calls"],
            expected["prompt_tokens"],
            expected["completion_tokens"],
            f", {expected['cost']:.2f} in all" if self.prompt_price or self.completion_price else "",
        )
        self._check_caps(cache.usage, sum((request.upper_bound() for request in missing.values()), Counter()))
        cache.check_writable()  # before anything is paid for
        in_flight: Counter[str] = Counter()
        lock, stop = threading.Lock(), threading.Event()

        def ask(entry: str, request: Request) -> None:
            bound = request.upper_bound()
            with lock:
                cache.read()  # another process may have asked meanwhile
                if stop.is_set() or entry in cache.answers:
                    return
                self._check_caps(cache.usage, in_flight + bound)
                in_flight.update(bound)
            answer = None
            try:
                answer = self._ask(client, entry, request, stop)
            except BaseException:
                stop.set()  # here, not only below: this thread would otherwise begin the next request
                raise
            finally:
                with lock:
                    in_flight.subtract(bound)
                    if answer is not None:  # stored before anything else
                        cache.add(answer)

        pool = concurrent.futures.ThreadPoolExecutor(self.concurrency)
        with self._client() as client, pool, piece(f"answers of {self.model}", len(missing)) as advance:
            futures = [pool.submit(ask, *item) for item in missing.items()]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    advance(1, True)
            except BaseException:
                stop.set()  # requests in flight end and are stored; no other begins
                raise
        all_refused = all(cache.answers[entry].prompt_tokens == 0 for entry in missing)
        if all_refused and (not cache.usage.total() or len(missing) >= MANY):  # the fault is not in single requests
            raise EndpointError(
                f"{self.model} at {self.base_url} refuses all {len(missing)} requests for their length or content; "
                "lower max_new_tokens or serve the model with a longer context"
            )

    def _check_caps(self, usage: Counter[str], further: Counter[str]) -> None:
        """Raises: EndpointError: if the usage so far and what may be added exceed a cap."""
        total = usage + further
        for name, cap, unit, measure in (
            ("max_total_tokens", self.max_total_tokens, "tokens", lambda counts: counts.total()),
            ("max_cost", self.max_cost, "in cost", self._cost),
        ):
            if cap is not None and measure(total) > cap:
                raise EndpointError(
                    f"{self.model} may come to {measure(total):g} {unit}, over {name} = {cap:g}; the answers in "
                    f"{self.cache} have used {measure(usage):g} and are kept; raise the cap, lower max_new_tokens, or "
                    "give fewer prompts"
                )

    def _client(self) -> Any:
        try:
            import openai
        except ImportError:
            raise EndpointError("the openai client is not installed: pip install 'jaxsi[endpoint]'") from None
        key = os.environ.get(self.api_key_variable, "").strip()
        if not (key and key.isascii() and key.isprintable()):
            raise EndpointError(
                f"the environment variable {self.api_key_variable} is not set to a key; put the key of {self.base_url} "
                "there (any text if the server needs no key)"
            )
        return openai.OpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=0)

    def _ask(self, client: Any, entry: str, request: Request, stop: threading.Event) -> Answer | None:
        """The answer to one request, after at most ``retries`` retries; None if ``stop`` ends the waiting.

        Raises: EndpointError: if asking again cannot help, or did not help.
        """
        import openai

        messages, settings = request.messages(), request.settings(self.length_parameter)
        message = ""
        for attempt in range(self.retries + 1):
            try:
                reply = client.chat.completions.create(model=self.model, messages=messages, **settings)
                return self._answer(entry, request, reply)
            except (openai.APIError, ValueError) as error:  # ValueError: not JSON, or not a chat completion
                failure = error
            message = _message(failure, client.api_key)
            status, server_wait = _status(failure), _server_wait(failure)
            if (reason := _refusal(status, message)) is not None:
                return Answer(
                    entry=entry, model=self.model, text="", finish_reason=reason, prompt_tokens=0, completion_tokens=0
                )
            if server_wait > LONGEST_WAIT:
                message += f", to wait {server_wait:.0f} s"
            if not _is_temporary(status, message) or server_wait > LONGEST_WAIT:
                raise EndpointError(
                    f"{self.model} at {self.base_url} refuses requests ({message}); check the model's name, the key in "
                    f"{self.api_key_variable}, its credit, temperature, max_new_tokens and length_parameter; "
                    f"{self.cache} keeps the answers so far"
                )
            wait = max(FIRST_WAIT * 2**attempt, server_wait) * random.uniform(1.0, 1.25)
            if attempt < self.retries and stop.wait(wait):
                return None
        raise EndpointError(
            f"{self.model} at {self.base_url} did not answer after {self.retries} retries ({message}); {self.cache} "
            "keeps the answers so far; run the same command again when the server is back"
        )

    def _answer(self, entry: str, request: Request, reply: Any) -> Answer:
        """Raises: ValueError: if the reply is not a chat completion."""
        try:
            choice, usage = reply.choices[0], reply.usage
            text, refusal = choice.message.content or "", choice.message.refusal or ""
            if not isinstance(text, str) or not isinstance(refusal, str):
                raise TypeError(f"the content is {text!r:.80}")
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"the reply is not a chat completion: {reply!r:.80} ({error})") from None
        if refusal or choice.finish_reason == "content_filter":
            reason = "refusal"
        else:  # another reason, such as "error" or "tool_calls", means that the text ended too early
            reason = "stop" if choice.finish_reason in ("stop", "eos", "end_turn", None) else "length"
        bound = request.upper_bound()
        counted = usage is not None and usage.prompt_tokens and usage.completion_tokens is not None
        return Answer(
            entry=entry,
            model=self.model,
            text=refusal or text,
            finish_reason=reason,
            prompt_tokens=int(usage.prompt_tokens) if counted else bound["prompt_tokens"],
            completion_tokens=int(usage.completion_tokens) if counted else bound["completion_tokens"],
            first_logps=_first_logps(choice) if request.top_logprobs else None,
        )


def _first_logps(choice: Any) -> dict[str, float]:
    """The log-probs of the likeliest first tokens. Raises: EndpointError: if the server did not name them."""
    try:
        return {top.token: float(top.logprob) for top in choice.logprobs.content[0].top_logprobs}
    except (AttributeError, IndexError, TypeError, ValueError):
        raise EndpointError(
            "the server names no log-probs of first tokens, which a weighted verdict needs; ask a server or model that "
            "does (logprobs, top_logprobs), or take a rubric whose verdict is written"
        ) from None


# ---- the meaning of an error -----------------------------------------------------------------------------------------


def _message(error: Exception, key: str) -> str:
    """The error as text, cut to 400 characters and without the key, which servers and errors about headers quote."""
    import openai

    code = f" [{error.code}]" if isinstance(error, openai.APIError) and error.code else ""
    cause = "" if error.__cause__ is None else f": {error.__cause__}"
    message = f"{type(error).__name__}{code}: {error}{cause}"
    return (message.replace(key, "***") if len(key) >= 8 else message)[:400]


def _status(error: Exception) -> int | None:
    """The HTTP status of an error; None without a reply, or if the reply could not be read."""
    import openai

    return error.status_code if isinstance(error, openai.APIStatusError) else None


def _refusal(status: int | None, message: str) -> Literal["length", "refusal"] | None:
    """Why the server refuses this request in particular; None if the error is not about the request."""
    if status == 413 or (status in (400, 422, 500) and _TOO_LONG.search(message)):
        return "length"
    return "refusal" if status in (400, 403, 451) and _FILTERED.search(message) else None


def _is_temporary(status: int | None, message: str) -> bool:
    return status is None or ((status in _TEMPORARY or status >= 500) and not _NO_CREDIT.search(message))


def _server_wait(error: Exception) -> float:
    """The seconds that the server asks to wait; 0 if it does not ask."""
    import openai

    if not isinstance(error, openai.APIStatusError):
        return 0.0
    headers = error.response.headers
    if (milliseconds := headers.get("retry-after-ms", "")).isdigit():
        return int(milliseconds) / 1000
    after = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(float(after), 0.0)
    with contextlib.suppress(ValueError, TypeError):  # a date
        return max(email.utils.parsedate_to_datetime(after).timestamp() - time.time(), 0.0)
    return 0.0


# ---- the cache on disk -----------------------------------------------------------------------------------------------


class _Cache:
    """Answers by entry, appended as they come. Several processes may share the file: each sees the answers of the
    others."""

    def __init__(self, path: Path, model: str):
        self.lines, self.model = AppendedLines(path), model
        self.answers: dict[str, Answer] = {}
        self.usage: Counter[str] = Counter()  # tokens of this model's answers
        self.read()

    def read(self) -> None:
        """Reads what was added to the file."""
        with self._explained():
            for value in self.lines.read():
                with contextlib.suppress(ValueError):  # not an answer
                    self._add(from_json(Answer, value))

    def check_writable(self) -> None:
        """Raises: EndpointError: if an answer could not be written."""
        with self._explained(), self.lines.locked("ab", fcntl.LOCK_SH):
            pass

    def add(self, answer: Answer) -> None:
        """Writes an answer; it is on disk when this returns. A refusal that cost nothing is not written, so that the
        next run asks again."""
        if answer.prompt_tokens > 0:
            with self._explained():
                self.lines.append([to_json(answer)])
        self._add(answer)

    def _add(self, answer: Answer) -> None:
        if answer.entry not in self.answers:
            self.answers[answer.entry] = answer
            if answer.model == self.model:
                self.usage.update(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EndpointError(
                f"answers cannot be written to {self.lines.path}: {error.strerror}; earlier answers are kept. Make it "
                "a writable file on a disk with free space, and run the same command again"
            ) from None
