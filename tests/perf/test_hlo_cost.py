"""Costs read from optimized HLO, compared with counts by hand: for programs compiled here, and for text of a TPU's
compiler."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsi.perf import hlo_cost

MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def array(shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, PartitionSpec(*spec)))


def text_of(function, *arguments, **options) -> str:
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


def replicated():
    return NamedSharding(MESH, PartitionSpec())


def test_body_of_a_scan_counts_as_often_as_it_runs():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    text = text_of(layers, array((64, 256)), array((7, 256, 256)))
    assert hlo_cost.read(text).flops == 7 * 2 * 64 * 256 * 256


def test_nested_loops_multiply():
    def twice(x):
        def inner(_, x):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ x), x)

        return jax.lax.fori_loop(0, 12, inner, x)

    cost = hlo_cost.read(text_of(twice, array((128, 128))))
    assert cost.flops == 36 * 2 * 128**3
    assert cost.unknown_loops == 0


def test_loop_with_turns_that_depend_on_data_counts_once():
    def some(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x)

    text = text_of(some, array((128, 128)), jax.ShapeDtypeStruct((), jnp.int32))
    assert hlo_cost.read(text).flops == 2 * 128**3
    assert hlo_cost.read(text).unknown_loops == 1


def test_scan_reads_one_slice_of_stacked_weights_per_turn():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (x + w, None), x, weights)[0]

    N, n = 50, 256
    cost = hlo_cost.read(text_of(layers, array((n, n)), array((N, n, n))))
    slices = N * n * n * 4
    assert slices <= cost.hbm_bytes < 6 * slices  # per turn: a slice and the sum, read and written; not N times all


def test_product_over_a_split_dimension_needs_all_reduce():
    text = text_of(jnp.matmul, array((64, 256), None, "b"), array((256, 512), "b", None), out_shardings=replicated())
    cost = hlo_cost.read(text)
    assert cost.flops == 2 * 64 * 256 * 512 / 4
    assert set(cost.collectives) == {"all-reduce"}
    assert cost.wire_bytes == 2 * 64 * 512 * 4 * 3 / 4  # a ring sends (n-1)/n of the array, twice


def test_all_gather_sends_only_missing_parts():
    cost = hlo_cost.read(text_of(lambda x: 2 * x, array((64, 256), "b", None), out_shardings=replicated()))
    assert set(cost.collectives) == {"all-gather"}
    assert cost.wire_bytes == 64 * 256 * 4 * 3 / 4


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 4),
        ("replica_groups=[4,16]<=[16,4]T(1,0), dimensions={2}", 16),
        ("replica_groups=mesh['data'=1,'fsdp'=16,'tensor'=4] {'fsdp'}, use_global_device_ids=true", 16),
        ("replica_groups=mesh['data'=2,'fsdp'=16,'tensor'=4] {'data','tensor'}, to_apply=%add", 8),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, to_apply=%add.clone", 4),
    ],
)
def test_group_size_reads_every_notation_of_replica_groups(attributes, size):
    assert hlo_cost.group_size(attributes) == size
    assert hlo_cost.group_size("replica_groups={}, to_apply=%add", everyone=8) == 8
    with pytest.raises(hlo_cost.HLOError, match="no replica groups"):
        hlo_cost.group_size("dimensions={0}")


def test_tpu_text_with_loop_slices_and_scratch_memory():
    cost = hlo_cost.read((Path(__file__).parents[1] / "golden" / "tpu_loop.hlo").read_text())
    assert cost.flops == 80 * 2 * 64 * 512 * 128
    per_turn = 512 * 128 * 2 + 64 * 128 * 2  # the slice and the result; arrays in S(1) are not in main memory
    scalars = 80 * 200  # at most, of the loop
    once = 64 * 512 * 2  # read into S(1) before the loop
    assert 80 * per_turn + once <= cost.hbm_bytes <= 80 * per_turn + once + scalars
    assert cost.wire_bytes == 0


def test_padding_of_a_windowed_product_is_not_counted():
    """A product in a ring is written as a convolution over 16 positions, only one of which meets the input."""
    attributes = ", window={size=16x1 pad=15_15x0_0 rhs_reversal=1x0}, dim_labels=0bf1_0oi1->b0f1"
    lhs, kernel, out = (1, 4, 512, 1), (16, 128, 512, 1), (4, 16, 128, 1)
    assert hlo_cost._convolution(lhs, kernel, out, attributes) == 2 * 4 * 128 * 512 * 16


def test_text_without_hlo_is_refused():
    with pytest.raises(hlo_cost.HLOError, match="no ENTRY"):
        hlo_cost.read("HloModule nothing")
