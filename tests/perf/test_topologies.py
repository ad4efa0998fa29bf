"""Names of topologies, and the table of chips."""

import math

import pytest

from jaxsi.perf.topologies import CHIPS, TopologyError, topology


@pytest.mark.parametrize(
    ("name", "shape", "chips", "hosts"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, 16),
        ("v5p-128", "v5p:4x4x4", 64, 16),  # cores, two per chip
        ("v5p-8", "v5p:2x2x1", 4, 1),
        ("v5p-32", "v5p:2x2x4", 16, 4),
        ("v5p-256", "v5p:4x4x8", 128, 32),
        ("v4-64", "v4:2x4x4", 32, 8),
        ("v5litepod-64", "v5e:8x8", 64, 16),  # chips
        ("v5e-8", "v5e:2x4", 8, 1),
        ("v5litepod:4x4", "v5e:4x4", 16, 4),
        ("v6e-256", "v6e:16x16", 256, 64),
        ("V6E:4x4", "v6e:4x4", 16, 4),
        ("h100:8", "h100:8", 8, 1),
        ("16xh200", "h200:16", 16, 2),
        ("b200", "b200:1", 1, 1),
    ],
)
def test_topology_accepts_every_notation(name, shape, chips, hosts):
    found = topology(name)
    assert (found.name, found.chips, found.hosts) == (shape, chips, hosts)
    assert topology(found.name) == found
    assert math.prod(found.shape) in (1, chips)


@pytest.mark.parametrize(
    "name",
    ["", "v5p", "v5p:4x4", "v5e:4x4x4", "v5p-7", "v5e-12", "v5p:0x4x4", "h100:0", "8xh100:8", "h900:8", "v7:2x2", "64"],
)
def test_topology_refuses_unknown_name_with_examples(name):
    with pytest.raises(TopologyError, match=r"unknown topology .*; give a TPU slice .*v5p:4x4x4.*h100:8"):
        topology(name)


def test_table_of_chips_uses_its_units():
    for chip in CHIPS.values():
        assert 0.75 * chip.hbm_gib < chip.usable_gib <= 1.01 * chip.hbm_gib
        assert 5e11 < chip.bandwidth < 1e13 and 1e14 < chip.flops < 3e15
        assert chip.network <= chip.wire < 1e12


def test_gpus_on_several_hosts_use_the_network():
    assert topology("h100:16").wire(8) == 450e9
    assert topology("h100:16").wire(16) == 50e9
    assert topology("v5p:4x4x4").wire(64) == 600e9
