"""Meshes: sizes, their errors, and the tables of logical axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxsi.model import decoder, mesh as meshlib
from jaxsi.model.mesh import MeshConfig, MeshError, make_mesh

CONFIG = decoder.ModelConfig(
    family="llama",
    vocab_size=96,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=48,
    max_positions=64,
)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((1, -1, 1), (1, 8, 1)), ((2, 2, 2), (2, 2, 2)), ((-1, 2, 1), (4, 2, 1)), ((1, 2, -1), (1, 2, 4))],
)
def test_minus_one_takes_the_remaining_devices(sizes: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    assert tuple(mesh.shape[axis] for axis in meshlib.AXES) == shape
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


def test_default_takes_all_devices_and_one_device_is_a_mesh() -> None:
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (1, -2, 1), (1, 1, 0)])
def test_bad_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(MeshError, match="at most one -1"):
        MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])


def test_sizes_that_do_not_fit_the_devices_are_refused() -> None:
    with pytest.raises(MeshError, match=r"1x1x3 needs 3 devices, there are 8"):
        make_mesh(MeshConfig(fsdp=1, tensor=3))
    with pytest.raises(MeshError, match="8 devices are not divisible by 3"):
        make_mesh(MeshConfig(fsdp=-1, tensor=3))
    with pytest.raises(MeshError, match="needs 8 devices, there are 2"):
        make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:2])


def test_rules_map_logical_axes_to_mesh_axes() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert meshlib.partition_spec(("layers", "embed", "heads", "head_dim"), meshlib.TRAINING_RULES) == PartitionSpec(
        None, "fsdp", "tensor", None
    )
    assert meshlib.partition_spec(("batch", None), meshlib.TRAINING_RULES) == PartitionSpec(("data", "fsdp"), None)
    assert meshlib.partition_spec(("embed", "mlp"), meshlib.SAMPLING_RULES) == PartitionSpec(None, "tensor")
    sizes = {axis: meshlib.axis_size(mesh, axis) for axis in ("batch", "embed", "vocab", "layers")}
    assert sizes == {"batch": 4, "embed": 2, "vocab": 2, "layers": 1}


def test_constrain_sets_the_layout_inside_jit() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    out = jax.jit(lambda x: meshlib.constrain(x + 1, mesh, ("batch", "mlp")))(jnp.zeros((8, 6)))
    assert out.sharding.is_equivalent_to(meshlib.sharding(mesh, ("batch", "mlp")), 2)
    np.testing.assert_array_equal(out, np.ones((8, 6)))


def test_fetch_returns_whole_arrays_as_numpy() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x = np.arange(48, dtype=np.int32).reshape(8, 6)
    fetched = meshlib.fetch({"cut": jax.device_put(x, meshlib.sharding(mesh, ("batch", "mlp"))), "one": jnp.int32(3)})
    assert isinstance(fetched["cut"], np.ndarray) and fetched["one"] == 3
    np.testing.assert_array_equal(fetched["cut"], x)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 4), "kv_heads = 2 of the model is not divisible by 4"),
        ((1, 3, 1), "embed = 32 of the model is not divisible by 3"),
        ((1, 1, 8), "is not divisible by 8"),
    ],
)
def test_model_that_the_mesh_does_not_divide_is_refused_before_loading(
    sizes: tuple[int, int, int], message: str
) -> None:
    count = int(np.prod(sizes))
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), jax.devices()[:count])
    with pytest.raises(MeshError, match=message):
        decoder.weight_shardings(CONFIG, mesh)
    with pytest.raises(MeshError, match="choose a mesh"):
        decoder.abstract_weights(CONFIG, mesh)


def test_sampling_rules_keep_rows_whole() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    training = decoder.weight_shardings(CONFIG, mesh)
    sampling = decoder.weight_shardings(CONFIG, mesh, meshlib.SAMPLING_RULES)
    assert training["layers"]["q"].shard_shape((2, 32, 4, 6)) == (2, 8, 2, 6)
    assert sampling["layers"]["q"].shard_shape((2, 32, 4, 6)) == (2, 32, 2, 6)
