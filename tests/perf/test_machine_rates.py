"""Floors and ceilings: counts match the work, and rates match the work that was timed."""

import math
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from jaxsi.model import decoder
from jaxsi.model.decoder import ModelConfig, Parameter
from jaxsi.perf import machine_rates
from jaxsi.perf.bench_shapes import SHAPES
from jaxsi.perf.machine_rates import Ceilings

WINDOWED = ModelConfig(
    family="mistral",
    vocab_size=100,
    embed_dim=12,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=20,
    max_positions=64,
    windows=(None, 5, 1),
)


@pytest.mark.parametrize(("name", "count"), [("s", 31_990_272), ("l", 152_980_224)])
def test_shape_has_documented_number_of_weights(name, count) -> None:
    assert decoder.count_parameters(SHAPES[name]) == count


@pytest.mark.parametrize("config", [tiny.CONFIG, WINDOWED, SHAPES["qwen3-0.6b"]])
def test_weights_of_products_are_the_matrices_of_the_model(config) -> None:
    layers = decoder.parameters(config)["layers"].values()
    matrices = [p for p in layers if isinstance(p, Parameter) and len(p.shape) > 2 and "norm" not in str(p.axes)]
    assert machine_rates.body_weights(config) == sum(math.prod(p.shape) for p in matrices)
    head = decoder.parameters(config)["embed" if config.tie_embeddings else "lm_head"]
    assert machine_rates.head_weights(config) == math.prod(head.shape)


def test_seen_counts_keys_token_by_token() -> None:
    def slowly(start: int, stop: int) -> int:
        return sum(min(t + 1, 10**9 if w is None else w) for t in range(start, stop) for w in WINDOWED.windows or ())

    for start, stop in ((0, 1), (0, 20), (3, 4), (4, 9), (7, 7)):
        assert machine_rates.seen(WINDOWED, start, stop) == slowly(start, stop)


def test_forward_flops_of_two_texts() -> None:
    weights = machine_rates.body_weights(WINDOWED) + machine_rates.head_weights(WINDOWED)
    attention = 4 * 6 * 4 * (machine_rates.seen(WINDOWED, 0, 7) + machine_rates.seen(WINDOWED, 0, 2))
    assert machine_rates.forward_flops(WINDOWED, [7, 2]) == 2 * weights * 9 + attention


def test_decode_step_takes_the_longer_of_reading_and_multiplying() -> None:
    config, spans = tiny.CONFIG, [(3, 8), (1, 2), (2, 4)]
    weights = machine_rates.body_weights(config) + machine_rates.head_weights(config)
    keys = sum(machine_rates.seen(config, a, b) for a, b in spans)
    cache = keys * 2 * 2 * 8 * 4
    slow_memory = Ceilings(bandwidth=1e3, gemm_rows=1e12, gemm_peak=1e12)
    seconds, steps = machine_rates.floor_of_decoding(config, spans, 2, 4, slow_memory)
    assert steps == 5  # the longest row; 8 tokens alone would fill 4 steps of 2 slots
    assert seconds == pytest.approx((5 * weights * 4 + cache) / 1e3)
    slow_products = Ceilings(bandwidth=1e12, gemm_rows=1e3, gemm_peak=1e12)
    assert machine_rates.floor_of_decoding(config, spans, 2, 4, slow_products)[0] == pytest.approx(
        2 * weights * 8 / 1e3
    )
    slow_heads = Ceilings(bandwidth=1e12, gemm_rows=1e12, gemm_peak=1e-3)
    assert machine_rates.floor_of_decoding(config, spans, 2, 4, slow_heads)[0] == pytest.approx(4 * 2 * 8 * keys / 1e-3)
    assert machine_rates.floor_of_decoding(config, spans, 1, 4, slow_memory)[1] == 8
    assert machine_rates.floor_of_decoding(config, [(3, 3)], 1, 4, slow_memory) == (0.0, 0)


def test_fastest_returns_seconds_of_one_iteration() -> None:
    assert machine_rates._fastest(lambda times: time.sleep(0.004 * times)) == pytest.approx(0.004, rel=0.5)


def test_rates_match_the_timed_work(monkeypatch) -> None:
    """If an iteration takes one second, the rate is the work of an iteration. Two iterations are run to check it."""
    results = []
    monkeypatch.setattr(machine_rates, "_fastest", lambda run: results.append(run(2)) or 1.0)
    device = jax.devices()[0]
    assert machine_rates.gemm(device, jnp.bfloat16, 4, 8, 16) == 4 * (4 * 4 * 8 * 16)  # four in a call
    loop, calls = results[-2:]
    np.testing.assert_array_equal(calls.shape, loop.shape)
    assert calls.shape == (4, 8) and calls.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(calls, np.float32)).all()
    assert machine_rates.bandwidth(device, size=4 * 256**2) == 4 * 256**2  # on a CPU the rate of reading
    read, copied = results[-2:]
    np.testing.assert_allclose(read, np.ones(256), rtol=1e-5)
    np.testing.assert_allclose(copied, np.full((256, 256), 0.999**2 / 256), rtol=1e-5)


def test_measure_gives_plausible_ceilings_on_this_machine(monkeypatch) -> None:
    monkeypatch.setattr(machine_rates, "MEASURED_SECONDS", 0.005)
    monkeypatch.setattr(machine_rates, "CPU_SQUARES", (64, 128))
    monkeypatch.setattr(machine_rates, "bandwidth", lambda device: 7.0)
    measured = machine_rates.measure(tiny.CONFIG, tiny.mesh("2x2x2"), jnp.float32, rows=4, tokens=64)
    assert measured.bandwidth == 7.0  # the devices of a CPU share it
    assert 1e6 < measured.gemm_rows <= measured.gemm_peak < 1e15


def test_rate_of_a_step_is_that_of_its_products_in_sequence(monkeypatch) -> None:
    monkeypatch.setattr(machine_rates, "bandwidth", lambda device: 7.0)
    monkeypatch.setattr(machine_rates, "gemm", lambda device, dtype, rows, inner, outer: float(rows * outer))
    measured = machine_rates.measure(WINDOWED, tiny.mesh(), jnp.float32, rows=2, tokens=64)
    # Query and output 12 x 24, key and value 12 x 8, the MLP 12 x 20, three layers; the head 12 x 100.
    weights = 12 * (3 * (2 * 24 + 2 * 8 + 3 * 20) + 100)
    assert measured.gemm_rows == pytest.approx(weights / (12 * (3 * (2 + 2 + 3) + 1) / 2))
    assert measured.gemm_peak == 2048 * 2048


def test_datasheet_flops_only_for_listed_devices() -> None:
    def mesh(kind: str) -> types.SimpleNamespace:
        device = types.SimpleNamespace(device_kind=kind)
        return types.SimpleNamespace(devices=np.asarray([device, device]), size=2)

    assert machine_rates.datasheet_flops(mesh("NVIDIA H200"), jnp.bfloat16) == 2 * 989e12
    assert machine_rates.datasheet_flops(mesh("NVIDIA H100 80GB HBM3"), "bfloat16") == 2 * 989e12
    assert machine_rates.datasheet_flops(mesh("NVIDIA H100 PCIe"), jnp.bfloat16) is None
    assert machine_rates.datasheet_flops(mesh("NVIDIA H200"), jnp.float32) is None
    assert machine_rates.datasheet_flops(mesh("cpu"), jnp.bfloat16) is None
