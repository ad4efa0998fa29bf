"""The accelerators that a run can be planned for, and the number of them in a topology.

    topology("v5p:4x4x4")  topology("v5p-128")  topology("v5litepod-64")  topology("h100:8")  topology("8xh200")

TPU slices are named by generation and shape, or by Cloud TPU's own names: v4- and v5p- are followed by the number of
cores, two per chip; v5litepod- and v6e- by the number of chips. Figures are the makers' (datasheets; dense, without
sparsity).
"""

import math
import re
from typing import NamedTuple

GPUS_PER_HOST = 8


class TopologyError(ValueError):
    """A topology that is not in the table of chips."""


class Chip(NamedTuple):
    """One accelerator. ``hbm_gib``: its memory; ``usable_gib``: the part that a program may use. ``bandwidth``: bytes/s
    of the memory. ``flops``: FLOP/s of bfloat16 products. ``wire``: bytes/s that it sends to other chips, over all its
    links. ``network``: bytes/s over the network between hosts."""

    name: str
    kind: str
    hbm_gib: float
    usable_gib: float
    bandwidth: float
    flops: float
    wire: float
    network: float


# The usable memory of a TPU is the figure of its compiler. On a GPU JAX takes three quarters by default
# (XLA_PYTHON_CLIENT_MEM_FRACTION); launch/ sets 0.92.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 32, 30.75, 1.2e12, 275e12, 300e9, 300e9),
        Chip("v5e", "tpu", 16, 15.75, 0.82e12, 197e12, 200e9, 200e9),
        Chip("v5p", "tpu", 95, 95.73, 2.77e12, 459e12, 600e9, 600e9),
        Chip("v6e", "tpu", 32, 31.24, 1.64e12, 918e12, 448e9, 448e9),
        Chip("a100", "gpu", 80, 0.92 * 79.2, 2.04e12, 312e12, 300e9, 25e9),
        Chip("h100", "gpu", 80, 0.92 * 79.6, 3.35e12, 989e12, 450e9, 50e9),
        Chip("h200", "gpu", 141, 0.92 * 139.8, 4.8e12, 989e12, 450e9, 50e9),
        Chip("b200", "gpu", 180, 0.92 * 178.3, 8.0e12, 2250e12, 900e9, 50e9),
        Chip("rtx4090", "gpu", 24, 0.92 * 23.5, 1.008e12, 165e12, 32e9, 3e9),
    )
}
CLOUD_NAMES = {"v4": ("v4", 2), "v5p": ("v5p", 2), "v5e": ("v5e", 1), "v5litepod": ("v5e", 1), "v6e": ("v6e", 1)}
# Shapes of the slices that Cloud TPU names only by their size.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


class Topology(NamedTuple):
    """``shape`` is () for GPUs, because their links do not form a grid."""

    chip: Chip
    shape: tuple[int, ...]
    chips: int

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape)) or self.chips}"

    @property
    def hosts(self) -> int:
        """The number of machines, with 8 GPUs or 4 TPU chips each (a v5e or v6e slice of up to 8 chips is one)."""
        if self.chip.kind == "gpu":
            return -(-self.chips // GPUS_PER_HOST)
        return 1 if self.chip.name in ("v5e", "v6e") and self.chips <= 8 else -(-self.chips // 4)

    def wire(self, span: int) -> float:
        """Bytes/s that a chip sends in a collective over ``span`` neighbouring chips. GPUs on several hosts use the
        network."""
        return self.chip.network if self.chip.kind == "gpu" and span > GPUS_PER_HOST else self.chip.wire


def topology(name: str) -> Topology:
    """The topology with this name. Raises: TopologyError."""
    text = name.strip().lower()
    if found := re.fullmatch(r"(v[\w]+):(\d+(?:x\d+){1,2})", text):
        chip, shape = found[1], tuple(int(n) for n in found[2].split("x"))
        chip = CLOUD_NAMES.get(chip, (chip, 1))[0]
        if chip in CHIPS and CHIPS[chip].kind == "tpu" and len(shape) == _dimensions(chip) and min(shape) > 0:
            return Topology(CHIPS[chip], shape, math.prod(shape))
    elif (found := re.fullmatch(r"(v[a-z0-9]+)-(\d+)", text)) and found[1] in CLOUD_NAMES:
        chip, per_chip = CLOUD_NAMES[found[1]]
        chips = int(found[2]) // per_chip
        shape = _cube(chips) if _dimensions(chip) == 3 else tuple(map(int, FLAT.get(chips, "0").split("x")))
        if int(found[2]) % per_chip == 0 and shape and math.prod(shape) == chips:
            return Topology(CHIPS[chip], shape, chips)
    elif found := re.fullmatch(r"(?:(\d+)x)?([a-z]+\d+)(?::(\d+))?", text):
        chip = found[2]
        if chip in CHIPS and CHIPS[chip].kind == "gpu" and not (found[1] and found[3]):
            chips = int(found[1] or found[3] or 1)
            if chips:
                return Topology(CHIPS[chip], (), chips)
    raise TopologyError(
        f"unknown topology {name!r}; give a TPU slice by generation and shape (v5p:4x4x4, v4:2x2x2, v5e:8x8, v6e:4x4) "
        f"or by its accelerator type (v5p-128, v5litepod-64), or GPUs and their number (h100:8, h200:1); known chips "
        f"are {', '.join(CHIPS)}"
    )


def _dimensions(chip: str) -> int:
    return 3 if chip in ("v4", "v5p") else 2


def _cube(chips: int) -> tuple[int, ...]:
    """The shape of a v4 or v5p slice: as close to a cube as possible. ``chips`` is a power of two."""
    power = chips.bit_length() - 1
    if chips == 4:
        return 2, 2, 1
    return (2 ** (power // 3), 2 ** ((power + 1) // 3), 2 ** ((power + 2) // 3)) if chips > 4 else ()
