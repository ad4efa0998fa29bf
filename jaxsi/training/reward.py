"""Reward models: a scalar head on the decoder, read at the last token of a text.

Training and use encode texts with the same function. PIT's gap rewards are rewards of this kind, for a conversation
that shows a reference response: see jaxsi.stages.gap.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsi.lm import LM
from jaxsi.model import decoder, mesh as meshlib
from jaxsi.model.compute_dtype import settled_in
from jaxsi.model.decoder import ModelConfig, Remat, Weights
from jaxsi.runs import spent
from jaxsi.runs.progress import piece
from jaxsi.runs.records import Message, Prompt, Response
from jaxsi.runs.run import Scope
from jaxsi.sampling.scoring import rows_on_mesh
from jaxsi.text.chat import render_prompt, render_request, render_response
from jaxsi.text.tokenizer import Tokenizer
from jaxsi.training import batches, losses, resume, train
from jaxsi.training.batches import GroupBatch, Sequence_
from jaxsi.training.train import TrainConfig


class RewardError(ValueError):
    """No scalar head, a text that is too long, or a non-finite reward."""


class Objective(NamedTuple):
    """A loss of the N rewards of a group, and its inequalities: (name, index of the higher, index of the lower)."""

    loss: Callable[..., losses.Loss]
    inequalities: tuple[tuple[str, int, int], ...]


GAP = Objective(losses.gap, tuple((name, *places) for name, places in losses.GAP_INEQUALITIES.items()))
BRADLEY_TERRY = Objective(losses.bradley_terry, (("w>l", 0, 1),))


# ---------------------------------------------------------------------------------------------------------------- texts


def reward_sequence(tokenizer: Tokenizer, messages: Sequence[Message], response: Response | str) -> Sequence_:
    """Prompt and response as tokens, for r(x, y). A sampled response keeps the ids that were sampled, but a thought is
    left out."""
    if isinstance(response, Response) and response.token_ids and not response.reasoning:
        return batches.encode(render_prompt(tokenizer, messages), response.token_ids)
    text = response.text if isinstance(response, Response) else response
    return batches.encode(render_request(tokenizer, messages), render_response(tokenizer, text))


# ------------------------------------------------------------------------------------------------------------- training


def with_scalar_head(lm: LM) -> LM:
    """The decoder of ``lm`` with its head replaced by a scalar head of zeros. A reward model keeps the head it has."""
    if lm.config.scalar_head:
        return lm
    config = dataclasses.replace(lm.config, scalar_head=True)
    head = jax.device_put(
        np.zeros((config.embed_dim,), jax.tree.leaves(lm.weights)[0].dtype), meshlib.sharding(lm.mesh, ("embed",))
    )
    weights = {name: w for name, w in lm.weights.items() if name != "lm_head"} | {"score": head}
    return dataclasses.replace(lm, config=config, weights=weights, identity=None)


@dataclasses.dataclass(frozen=True)
class RewardLoss:
    """An objective of a ``GroupBatch``, and the share of groups in which each inequality holds. Instances with equal
    fields share one compiled program."""

    config: ModelConfig
    mesh: Mesh
    dtype: str
    remat: Remat
    objective: Objective

    def __call__(self, weights: Weights, batch: GroupBatch) -> tuple[losses.Loss, train.Metrics]:
        B, N, T = batch.tokens_BNT.shape

        def flat(x_BNT: jax.Array) -> jax.Array:
            return meshlib.constrain(x_BNT.reshape(N * B, T), self.mesh, ("batch", None))

        rewards_BN = last_values(
            weights,
            flat(batch.tokens_BNT),
            flat(batch.segments_BNT),
            config=self.config,
            mesh=self.mesh,
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
        ).reshape(B, N)
        loss, count = self.objective.loss(rewards_BN, batch.real_B)

        def mean(x_B: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.sum(jnp.where(batch.real_B, x_B, 0.0)), count

        metrics = {
            name: mean((rewards_BN[:, a] > rewards_BN[:, b]) + 0.5 * (rewards_BN[:, a] == rewards_BN[:, b]))
            for name, a, b in self.objective.inequalities
        }
        return (loss, count), metrics | {"reward_mean": mean(jnp.mean(rewards_BN, axis=-1))}


def last_values(
    weights: Weights,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    *,
    config: ModelConfig,
    mesh: Mesh,
    dtype: Any,
    remat: Remat = "none",
) -> jax.Array:
    """The scalar [B] float32 at the last token of each right-padded row, before its padding (segment 0)."""
    lengths_B = jnp.sum(segments_BT > 0, axis=-1)
    values_BT = decoder.scalar_values(
        weights, config, tokens_BT, lengths_B=lengths_B, dtype=dtype, remat=remat, mesh=mesh
    )
    last_B = jnp.maximum(lengths_B - 1, 0)
    return jnp.take_along_axis(values_BT, last_B[:, None], axis=-1)[:, 0]


def train_reward(
    lm: LM, groups: Sequence[tuple[Sequence_, ...]], objective: Objective, config: TrainConfig, scope: Scope
) -> LM:
    """A reward model on ``lm``'s decoder; the result is also the scope's checkpoint. If ``lm`` is a reward model, its
    training goes on.

    Groups with a sequence longer than ``config.max_length`` are dropped and counted.

    Raises: TrainingError if all groups are too long.
    """
    start = with_scalar_head(lm)
    if (trained := resume.finished(start, scope)) is not None:
        return trained
    config.check(lm.mesh)
    config = settled_in(scope, config)
    fitting = [group for group in groups if max(len(s.tokens) for s in group) <= config.max_length]
    scope.value("reward_data", lambda: {"groups": len(fitting), "dropped_too_long": len(groups) - len(fitting)})
    if not fitting:
        raise train.TrainingError(
            f"{scope.path}: none of {len(groups)} groups fits in max_length = {config.max_length} tokens; raise it"
        )
    with scope.timed("reward"):
        group_batches = batches.groups(
            fitting,
            config.batch_size,
            lm.mesh,
            epochs=config.epochs,
            seed=train.seed_of(scope, "reward"),
            min_length=config.min_length,
        )
        loss = RewardLoss(lm_config(start), lm.mesh, config.dtype, config.remat, objective)
        return train.fit(start, group_batches, loss, config, scope)


# ------------------------------------------------------------------------------------------------------------------ use


def lm_config(lm: LM) -> ModelConfig:
    """The configuration of a reward model. Raises: RewardError if it has no scalar head."""
    if not lm.config.scalar_head:
        raise RewardError(
            "this model has no scalar head, so it cannot give rewards; pass the checkpoint of a gap_reward or "
            "policy_reward scope, or a Hugging Face sequence classifier with one label"
        )
    return lm.config


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def score_rewards(
    weights: Weights, tokens_BT: jax.Array, lengths_B: jax.Array, *, config: ModelConfig, dtype: Any, mesh: Mesh
) -> jax.Array:
    """The reward [B] float32 of each right-padded row."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
    return last_values(weights, tokens_BT, segments_BT, config=config, dtype=dtype, mesh=mesh)


def rewards(lm: LM, sequences: Sequence[Sequence_], *, batch_size: int = 64) -> np.ndarray:
    """The reward [N] float32 of each text.

    Raises: RewardError if the model has no scalar head, if a text is longer than its positions, or if a reward is not
      finite (the message names the text's number).
    """
    config = lm_config(lm)
    longest = max((len(s.tokens) for s in sequences), default=0)
    if longest > config.max_positions:
        raise RewardError(
            f"a text has {longest} tokens, the reward model {config.max_positions} positions; drop the text"
        )
    out = np.zeros(len(sequences), np.float32)
    with piece("rewards", len(sequences)) as advance:
        for batch, tokens_BT, lengths_B in rows_on_mesh(lm, [s.tokens.tolist() for s in sequences], batch_size):
            rewards_B = score_rewards(
                lm.weights, tokens_BT, lengths_B, config=config, dtype=jnp.dtype(lm.dtype), mesh=lm.mesh
            )
            out[batch] = meshlib.fetch(rewards_B)[: len(batch)]
            advance(len(batch), True)
    spent.count(scored=sum(len(sequence.tokens) for sequence in sequences))
    bad = np.flatnonzero(~np.isfinite(out))
    if len(bad):
        raise RewardError(
            f"the reward of text {bad[0]} is {out[bad[0]]} ({len(bad)} of {len(out)} are not finite); train the reward "
            "model again, with a lower learning rate"
        )
    return out


def reads_as(reader: Tokenizer, writer: Tokenizer | None) -> Callable[[Response], Response | str]:
    """How a reward model with the tokenizer ``reader`` takes responses that a model with the tokenizer ``writer``
    sampled: as token ids if these mean the same to both, else as text."""
    probe = "Reverse: 12 red cats, über."
    if writer is None:
        return lambda response: response.text
    same = reader.template_hash == writer.template_hash and reader.vocab_size == writer.vocab_size
    same = same and reader.encode_text(probe) == writer.encode_text(probe)
    return (lambda response: response) if same else (lambda response: response.text)


class RewardOf(NamedTuple):
    """A reward model as the reward function of reinforcement learning: (prompts, responses) -> [N] float32, NaN for a
    text that is longer than the model's positions. ``writer`` is the tokenizer of the model that sampled; None: the
    reward model reads the texts of responses, not their token ids.

    To a reward model with another tokenizer, a response that was cut off looks complete, because it reads the text.
    """

    lm: LM
    writer: Tokenizer | None
    batch_size: int

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        limit, read = lm_config(self.lm).max_positions, reads_as(self.lm.tokenizer, self.writer)
        messages = {prompt.id: prompt.messages for prompt in prompts}
        texts = [reward_sequence(self.lm.tokenizer, messages[r.prompt_id], read(r)) for r in responses]
        fits_N = np.asarray([len(text.tokens) <= limit for text in texts], bool)
        values_N = np.full(len(texts), np.nan, np.float32)
        values_N[fits_N] = rewards(self.lm, [texts[i] for i in np.flatnonzero(fits_N)], batch_size=self.batch_size)
        return values_N


def inequalities(
    lm: LM, groups: Sequence[tuple[Sequence_, ...]], objective: Objective, **options: Any
) -> Mapping[str, float]:
    """The share of held-out groups in which each inequality of the objective holds, and the "mean" of these shares."""
    N = len(groups[0])
    rewards_BN = rewards(lm, [s for group in groups for s in group], **options).reshape(-1, N)
    shares = {
        name: float(np.mean((rewards_BN[:, a] > rewards_BN[:, b]) + 0.5 * (rewards_BN[:, a] == rewards_BN[:, b])))
        for name, a, b in objective.inequalities
    }
    return shares | {"mean": float(np.mean(list(shares.values())))}
