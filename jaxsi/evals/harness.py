"""A model as one of lm-evaluation-harness (`lm-eval`), so that its tasks run on it.

The interface has three calls: `loglikelihood`, `loglikelihood_rolling` and `generate_until`. Texts become tokens as in
its interface to `transformers`: a text is one that the harness wrote, so control strings in it are control tokens, and
BOS stands in front if the tokenizer adds one.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.lm import LM
from jaxsi.sampling.generate import generate_ids, named_keys
from jaxsi.sampling.scoring import score_greedy
from jaxsi.text.chat_config import split_thought
from jaxsi.text.chat_template import render_text

MAX_NEW_TOKENS = 256  # of `generate_until`, if the task does not say; the harness' own default


def encode(lm: LM, text: str, add_bos: bool | None = None) -> list[int]:
    """The ids of a text of the harness. ``add_bos`` None: as the tokenizer does, but never twice."""
    tokenizer = lm.tokenizer
    ids = tokenizer.encode_trusted(text)
    bos = tokenizer.bos_id
    if add_bos is None:
        add_bos = tokenizer.adds_bos and ids[:1] != [bos]
    return [bos, *ids] if add_bos and bos is not None else ids


def loglikelihoods(
    lm: LM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int
) -> list[tuple[float, bool]]:
    """The summed log-prob of each continuation after its context, both as token ids, and whether greedy sampling would
    write it. What exceeds the model's positions is cut off from the left of the context.

    Raises: EvaluationError: if a continuation has no token, or more than the model has positions.
    """
    most = lm.config.max_positions + 1  # the last token is not read
    prefixes = []
    for context, continuation in pairs:
        if not continuation:
            raise EvaluationError(
                "a continuation has no token of its own: the tokenizer joins it with the end of its context, "
                f"{lm.tokenizer.decode(list(context)[-8:])!r}; let the task write a space or a line break between them"
            )
        room = most - len(continuation)
        if room < 1:
            raise EvaluationError(
                f"a continuation has {len(continuation)} tokens; the model has {lm.config.max_positions} positions; "
                "choose a task with shorter answers, or a model of a longer context"
            )
        prefixes.append(list(context)[-room:])
    scored = score_greedy(lm, prefixes, [list(rest) for _, rest in pairs], batch_size=batch_size)
    return [(float(logps.sum(dtype="float64")), bool(greedy.all())) for logps, greedy in scored]


def generated(
    lm: LM, contexts: Sequence[str], settings: Mapping[str, Any], *, batch_size: int, seed: int = 0
) -> list[str]:
    """The texts that follow the contexts, up to the first of the stop texts `until`, without a thought. ``settings``
    are those that `normalize_gen_kwargs` of the harness gives.

    Raises: EvaluationError: if a setting is not supported, or the new tokens leave no room for a context.
    """
    settings = dict(settings)
    most, until = settings.pop("max_gen_toks", MAX_NEW_TOKENS), settings.pop("until", [])
    sampled = settings.pop("do_sample", False)
    given: dict[str, Any] = {"temperature": settings.pop("temperature", 1.0 if sampled else 0.0)}
    given |= {name: settings.pop(name) for name in ("top_p", "top_k") if name in settings}
    if not sampled:
        given: dict[str, Any] = {"temperature": 0.0}
    if settings:
        raise EvaluationError(f"generation setting {min(settings)!r} of the task is not supported; leave it out")
    room = lm.config.max_positions - most
    if room < 1:
        raise EvaluationError(
            f"the task generates {most} tokens; the model has {lm.config.max_positions} positions; give "
            "--gen-kwargs max_gen_toks=N with a smaller number"
        )
    ids = [(encode(lm, context) or [_prefix(lm)])[-room:] for context in contexts]
    keys = named_keys(jax.random.key(seed), [f"{number}" for number in range(len(ids))])
    found = generate_ids(lm, ids, keys, max_new_tokens=most, batch_size=batch_size, **given)
    texts = []
    for ((tokens, _, _),) in found:
        thought = split_thought(lm.tokenizer.decode(tokens))
        text = thought.answer if thought.closed else ""
        for stop in until:
            text = text.split(stop)[0] if stop else text
        texts.append(text)
    return texts


def _prefix(lm: LM) -> int:
    """The token before a text without a context."""
    prefix = lm.tokenizer.bos_id if lm.tokenizer.bos_id is not None else lm.tokenizer.eos_id
    if prefix is None:
        raise EvaluationError("the tokenizer has neither BOS nor EOS, which stands before a text without a context")
    return prefix


def harness_model(lm: LM, *, batch_size: int = 64, seed: int = 0) -> Any:
    """``lm`` as a model of the harness: give it to `lm_eval.simple_evaluate(model=...)`.

    Raises: EvaluationError: if lm-eval is not installed.
    """
    return _model_class()(lm, batch_size, seed)


@functools.cache
def _model_class() -> Any:
    """The class, which exists only where lm-eval does."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.models.utils import normalize_gen_kwargs
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise EvaluationError(f"lm-eval cannot be used here ({error}); pip install 'jaxsi[lm-eval]'") from error

    class Model(TemplateLM):  # the harness wants a subclass
        """The three calls of the harness, answered by an LM."""

        def __init__(self, lm: LM, batch_size: int, seed: int) -> None:
            super().__init__()
            self.lm, self.batch_size, self.seed = lm, batch_size, seed

        @property
        def eot_token_id(self) -> int:
            return lm_eos if (lm_eos := self.lm.tokenizer.eos_id) is not None else _prefix(self.lm)

        @property
        def prefix_token_id(self) -> int:
            return _prefix(self.lm)

        @property
        def max_length(self) -> int:
            return self.lm.config.max_positions

        @property
        def tokenizer_name(self) -> str:
            return self.lm.template_hash

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return self.lm.tokenizer.chat_template if chat_template else None

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            tokenizer = self.lm.tokenizer
            return render_text(
                tokenizer.chat_template, chat_history, tokenizer.variables, add_generation_prompt=add_generation_prompt
            )

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return encode(self.lm, string, add_special_tokens)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return loglikelihoods(self.lm, pairs, self.batch_size)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            windows = [
                (number, *make_disjoint_window(window))
                for number, request in enumerate(requests)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            scores = loglikelihoods(self.lm, [(before, after) for _, before, after in windows], self.batch_size)
            totals = [0.0] * len(requests)
            for (number, *_), (logp, _) in zip(windows, scores, strict=True):
                totals[number] += logp
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            texts: dict[int, str] = {}
            groups: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                groups.setdefault(repr(request.args[1]), []).append(number)
            for numbers in groups.values():
                settings = normalize_gen_kwargs(dict(requests[numbers[0]].args[1]), MAX_NEW_TOKENS)
                contexts = [requests[number].args[0] for number in numbers]
                found = generated(self.lm, contexts, settings, batch_size=self.batch_size, seed=self.seed)
                texts |= dict(zip(numbers, found, strict=True))
            return [texts[number] for number in range(len(requests))]

    return Model


def tasks_of(names: Sequence[str], folder: Any = None) -> Any:
    """The harness' manager of tasks, with those in a folder of one's own.

    Raises: EvaluationError: if lm-eval is not installed, or there is no such task.
    """
    _model_class()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    known = set(manager.match_tasks(list(names)))
    if missing := [name for name in names if name not in known and not manager.match_tasks([name])]:
        raise EvaluationError(
            f"there is no task {missing[0]!r} in lm-eval; `lm-eval ls tasks` lists them, and --include-path names a "
            "folder with your own"
        )
    return manager
