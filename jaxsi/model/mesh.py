"""Device meshes and the two tables that map logical axes to mesh axes. The only module that knows device axes.

A mesh always has the three axes ``data``, ``fsdp`` and ``tensor``; one device is the mesh 1x1x1. Axes are Auto: XLA's
partitioner decides what the rules leave open.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.errors import InputError

AXES = ("data", "fsdp", "tensor")

Rules = Mapping[str, str | tuple[str, ...] | None]

# Training: weights are split over fsdp (embed) and tensor, activations over data and fsdp (batch).
TRAINING_RULES: Rules = {
    "batch": ("data", "fsdp"),
    "sequence": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
}
# Sampling: the same, except that every fsdp group holds whole rows. Otherwise each decoded token would gather the
# weights again.
SAMPLING_RULES: Rules = {**TRAINING_RULES, "embed": None}


class MeshError(InputError, ValueError):
    """A mesh that does not fit the devices, the model or the batch."""


@stored_as("mesh.MeshConfig")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes. At most one may be -1: it takes all remaining devices."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if sum(s == -1 for s in sizes) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise MeshError(f"data x fsdp x tensor is {sizes}; mesh sizes must be positive, with at most one -1")


def sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """data x fsdp x tensor on this number of devices.

    Raises:
      MeshError: if the product of the sizes is not the number of devices.
    """
    shape = [config.data, config.fsdp, config.tensor]
    if -1 in shape:
        fixed = -int(np.prod(shape))
        if devices % fixed:
            raise MeshError(f"{devices} devices are not divisible by {fixed}; change the mesh {config}")
        shape[shape.index(-1)] = devices // fixed
    if int(np.prod(shape)) != devices:
        raise MeshError(
            f"mesh data x fsdp x tensor = {'x'.join(map(str, shape))} needs {int(np.prod(shape))} devices, "
            f"there are {devices}; set one axis to -1 to take all of them"
        )
    return shape[0], shape[1], shape[2]


def make_mesh(config: MeshConfig | None = None, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh ``data x fsdp x tensor`` over ``devices`` (all by default).

    Raises:
      MeshError: if the product of the sizes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = sizes(config or MeshConfig(), len(devices))
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(axes: tuple[str | None, ...], rules: Rules) -> PartitionSpec:
    """Mesh axes of an array whose dimensions have the logical names ``axes``."""
    return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


def sharding(mesh: Mesh, axes: tuple[str | None, ...], rules: Rules = TRAINING_RULES) -> NamedSharding:
    """The sharding on ``mesh`` of an array whose dimensions have the logical names ``axes``."""
    return NamedSharding(mesh, partition_spec(axes, rules))


def axis_size(mesh: Mesh | AbstractMesh, axis: str, rules: Rules = TRAINING_RULES) -> int:
    """Number of parts into which the rules divide the logical axis ``axis``."""
    names = rules[axis]
    names = () if names is None else (names,) if isinstance(names, str) else names
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))


def check_rows(batch_size: int, accumulate: int, mesh: Mesh, name: str = "") -> None:
    """Checks that the rows of a micro-batch of the config part ``name`` divide evenly among the devices.

    Raises: MeshError
    """
    rows, devices = batch_size // accumulate, axis_size(mesh, "batch")
    if rows % devices:
        raise MeshError(
            f"{name and name + '.'}batch_size {batch_size} in accumulate = {accumulate} parts is {rows} rows at once, "
            f"which do not divide over {devices} devices (mesh axes data x fsdp); make it a multiple of "
            f"{devices * accumulate}, or choose another mesh"
        )


def platform(mesh: Mesh | AbstractMesh) -> str:
    """Kind of the devices of the mesh: "cpu", "gpu" or "tpu". They may belong to another machine.

    A mesh without devices, on which programs are only lowered, counts as "cpu".
    """
    if isinstance(mesh, AbstractMesh):
        return "cpu"
    return mesh.devices.flat[0].platform


def put(x: np.ndarray, mesh: Mesh, axes: tuple[str | None, ...]) -> jax.Array:
    """Puts an array that every process has onto the mesh; each process copies the parts for its own devices.

    (``jax.device_put`` would first compare the arrays of all processes: one more exchange between hosts per array.)
    """
    layout = sharding(mesh, axes)
    if layout.is_fully_addressable:
        return jax.device_put(x, layout)
    return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])


def fetch(tree: Any) -> Any:
    """Arrays of the mesh as NumPy arrays on every process; parts that another process holds are gathered."""

    def one(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


def constrain(x: jax.Array, mesh: Mesh, axes: tuple[str | None, ...], rules: Rules = TRAINING_RULES) -> jax.Array:
    """Inside jit: states the layout of ``x`` on the mesh."""
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, rules))
