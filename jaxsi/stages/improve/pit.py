"""PIT's improver: a model that answers (prompt, response) with a better response, and when to believe it.

Wang et al. 2024, arXiv 2310.00898. The layout is that of ``prompts.ask_to_improve``. The paper gives no rule for when
to stop improving; ``accepted`` is ours: a response replaces its reference where the gap reward model sees a gain.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxsi.lm import LM
from jaxsi.runs.records import Prompt, Response, Revision
from jaxsi.sampling.generate import generate
from jaxsi.stages.gap import gains
from jaxsi.stages.prompts import ask_to_improve
from jaxsi.text.chat import render_prompt


def improve(
    lm: LM,
    prompts: Sequence[Prompt],
    drafts: Sequence[Response],
    request: str,
    key: jax.Array,
    **sampling: Any,
) -> list[Revision]:
    """One response of the improver ``lm`` to each of ``drafts``, in their order; ``sampling`` is ``generate``'s.

    A draft that leaves no room for a response in the model's context comes back as it is, with the label "TOO LONG".

    Raises: ValueError for a draft whose prompt is not among ``prompts``.
    """
    messages = {prompt.id: prompt.messages for prompt in prompts}
    asked = []
    for draft in drafts:
        if draft.prompt_id not in messages:
            raise ValueError(
                f"response {draft.id!r} answers prompt {draft.prompt_id!r}, not one of the {len(messages)} given"
            )
        asked.append(Prompt(id=draft.id, messages=ask_to_improve(messages[draft.prompt_id], draft.text, request)))
    room = lm.config.max_positions - sampling["max_new_tokens"]
    fitting = [prompt for prompt in asked if len(render_prompt(lm.tokenizer, prompt.messages)) <= room]
    improved = {r.prompt_id: r for r in generate(lm, fitting, num_samples=1, key=key, **sampling)}
    return [_revision(draft, improved.get(draft.id)) for draft in drafts]


def _revision(draft: Response, improved: Response | None) -> Revision:
    label = None if improved is not None else "TOO LONG"
    return Revision(
        id=draft.id, prompt_id=draft.prompt_id, label=label, label_probs=None, response=improved or draft
    )  # fmt: skip


def accepted(
    gap_lm: LM,
    prompts: Sequence[Prompt],
    drafts: Sequence[Response],
    improved: Sequence[Response],
    request: str,
    *,
    delta: float = 0.0,
    batch_size: int = 64,
) -> list[bool]:
    """Whether g(x, y, draft) - g(x, draft, draft) > ``delta`` for each improved response y and its draft."""
    messages = {prompt.id: prompt.messages for prompt in prompts}
    items = [(messages[draft.prompt_id], y, draft.text) for draft, y in zip(drafts, improved, strict=True)]
    return (np.asarray(gains(gap_lm, items, request, batch_size=batch_size)) > delta).tolist()
