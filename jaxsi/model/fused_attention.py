"""Fused causal self-attention: Splash on TPU, cuDNN on GPU. ``attention.py`` decides which path a program takes.

Dimension letters as in decoder.py. Each function runs on one device, on its rows and heads; ``on_mesh`` spreads it over
all devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsi.model import mesh as meshlib

BLOCK = 512  # the most queries and keys that Splash holds on the chip at a time
LANES = 128  # its blocks are multiples of this


def splash_takes(q_BTHC: jax.Array) -> bool:
    """Whether Splash supports the shapes; shorter rows would be mostly padding."""
    return q_BTHC.shape[1] >= LANES and q_BTHC.shape[3] % 64 == 0 and q_BTHC.dtype in (jnp.bfloat16, jnp.float32)


def splash(
    q_BTHC: jax.Array,
    k_BKTC: jax.Array,
    v_BKTC: jax.Array,
    segments_BT: jax.Array,
    *,
    window: int,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention [B, T, H, C]: each token sees its own segment up to itself, at most ``window`` positions back.

    T is padded (with segment 0) to a multiple of 128.

    Args:
      interpret: whether to run the kernel step by step on a CPU.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    _, T, H, C = q_BTHC.shape
    padded = -(-T // LANES) * LANES
    block = math.gcd(padded, BLOCK)
    shape = (padded, padded)
    mask = kernels.CausalMask(shape) if window >= T else kernels.LocalMask(shape, (window - 1, 0), 0)
    attention = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * H),
        block_sizes=kernels.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, padded - T if a == axis else 0) for a in range(x.ndim)])

    # The kernel does not scale.
    scaled_BHTC = (q_BTHC.astype(jnp.float32) / math.sqrt(C)).astype(q_BTHC.dtype).swapaxes(1, 2)
    segments_BT = pad(segments_BT, 1)
    attended_BHTC: Any = jax.vmap(attention)(
        pad(scaled_BHTC, 2), pad(k_BKTC, 2), pad(v_BKTC, 2), kernels.SegmentIds(segments_BT, segments_BT)
    )
    return attended_BHTC[:, :, :T].swapaxes(1, 2)


def cudnn_takes(q_BTHC: jax.Array, window: int) -> bool:
    """Whether cuDNN's attention supports the shapes on every GPU."""
    _, T, _, C = q_BTHC.shape
    return q_BTHC.dtype in (jnp.bfloat16, jnp.float16) and C % 8 == 0 and C <= 128 and window >= T


def cudnn(q_BTHC: jax.Array, k_BKTC: jax.Array, v_BKTC: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """cuDNN's attention [B, T, H, C] of right-padded rows: each token sees its row up to itself. Padding gets zeros.

    cuDNN has no segments: packed rows must not come here.
    """
    real_BT = jnp.arange(q_BTHC.shape[1], dtype=jnp.int32)[None] < lengths_B[:, None]

    def masked(x_BTHC: jax.Array) -> jax.Array:
        # cuDNN's output and gradients are undefined at the padding, and for a row without tokens.
        return jnp.where(real_BT[:, :, None, None], x_BTHC, jnp.zeros((), x_BTHC.dtype))

    lengths_B = jnp.maximum(lengths_B, 1)
    attended_BTHC = jax.nn.dot_product_attention(
        masked(q_BTHC),
        masked(k_BKTC.swapaxes(1, 2)),
        masked(v_BKTC.swapaxes(1, 2)),
        is_causal=True,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )
    return masked(attended_BTHC)


def divides(q_BTHC: jax.Array, k_BKTC: jax.Array, mesh: Mesh) -> bool:
    """Whether every device of the mesh gets the same number of rows and heads."""
    parts = {"batch": q_BTHC.shape[0], "kv_heads": k_BKTC.shape[1]}
    return all(size % meshlib.axis_size(mesh, axis) == 0 for axis, size in parts.items())


def on_mesh(attention: Callable[..., jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """``attention(q, k, v, x)`` with ``x`` [B] or [B, T], on each device for its own rows and heads.

    XLA cannot divide a kernel among devices by itself.
    """
    spec = functools.partial(meshlib.partition_spec, rules=meshlib.TRAINING_RULES)
    q_spec = spec(("batch", "sequence", "heads", "head_dim"))
    kv_spec = spec(("batch", "kv_heads", "sequence", "head_dim"))
    return jax.shard_map(
        attention, mesh=mesh, in_specs=(q_spec, kv_spec, kv_spec, spec(("batch",))), out_specs=q_spec, check_vma=False
    )
