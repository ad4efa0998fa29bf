"""Abstract programs: they have the shapes and layouts of a run, they lower, and they compile for TPUs."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

import tiny
from jaxsi.model import decoder
from jaxsi.model.mesh import MeshConfig, make_mesh
from jaxsi.perf.bench_shapes import SHAPES
from jaxsi.perf.programs import Sizes, memory_of, programs, sampling_programs, tpu_devices, training_programs
from jaxsi.sampling import slots
from jaxsi.training import train

SMALL = Sizes(
    slots=8,
    wave=4,
    prompt_length=32,
    max_new_tokens=16,
    max_length=64,
    score_rows=8,
    batch_size=8,
    accumulate=2,
    dtype="float32",
)
WHOLE_SEQUENCES = ("prefill", "score", "sft", "reference", "dpo", "rl")
COMPILED_ELSEWHERE = ("dpo", "dpo, prompt shared", "reward", "gap reward", "value", "rewards", "reference")


def assert_same_layout(real, abstract):
    for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


WINDOWS = [None, (8, None), (8, 8)]


@pytest.mark.parametrize("windows", WINDOWS)
def test_programs_have_the_shapes_and_layouts_of_a_run(windows):
    lm = tiny.make_lm("2x2x2", config=dataclasses.replace(tiny.CONFIG, windows=windows))
    programs_ = programs(lm.config, lm.mesh, SMALL)
    assert_same_layout(lm.weights, decoder.abstract_weights(lm.config, lm.mesh))
    assert_same_layout(train.initial_state(lm.weights, SMALL.optim), programs_["sft"].arguments[0])
    assert_same_layout(lm.sampling_weights, programs_["prefill"].arguments[0])
    fixed = slots.Fixed(lm.config, lm.mesh, jnp.dtype("float32"))
    empty = slots.empty_slots(fixed=fixed, size=8, ring=16, prompt=32)
    assert_same_layout(empty, programs_["decode"].arguments[1])
    rows, places = (jnp.ones(shape, jnp.int32) for shape in ((4, 32), (4,)))
    wave = slots.prefill_prompts(lm.sampling_weights, slots.Packed(*[rows] * 3, *[places] * 3), fixed=fixed)
    assert_same_layout(wave.cache, programs_["extend"].arguments[3].cache)


@pytest.mark.parametrize(("mesh", "windows"), [("1x1x1", None), *[("2x2x2", windows) for windows in WINDOWS]])
def test_every_program_lowers(mesh, windows):
    config = dataclasses.replace(tiny.CONFIG, windows=windows)
    for name, program in programs(config, tiny.mesh(mesh), SMALL).items():
        assert program.lower().as_text(), name


def test_int8_cache_changes_the_shapes_of_programs():
    lm = tiny.make_lm("2x2x2")
    programs_ = programs(lm.config, lm.mesh, dataclasses.replace(SMALL, cache="int8"))
    for name in ("prefill", "extend", "fill", "refill", "grow", "decode"):
        programs_[name].lower()
    fixed = slots.Fixed(lm.config, lm.mesh, jnp.dtype("float32"), int8=True)
    empty = slots.empty_slots(fixed=fixed, size=8, ring=16, prompt=32)
    assert_same_layout(empty, programs_["decode"].arguments[1])
    assert any(x.dtype == jnp.int8 for x in jax.tree.leaves(programs_["extend"].arguments[3].cache))


def test_dpo_with_large_vocabulary_takes_a_third_of_the_memory_of_full_logits(monkeypatch):
    """8,192 tokens of DPO at V = 128,256, compiled but not run: the temporary memory of the step."""
    config = dataclasses.replace(SHAPES["s"], vocab_size=128_256, num_layers=2)
    sizes = Sizes(batch_size=4, max_length=1024, accumulate=1, remat="full", dtype="bfloat16")

    def temporaries() -> float:
        jax.clear_caches()  # so that the step is traced again
        program = training_programs(config, make_mesh(devices=jax.devices()[:1]), sizes)["dpo"]
        return memory_of("dpo", program.lower().compile()).temporaries

    def full(hidden_BTD, head_DV, targets_BT, **_):
        logps_BTV = jax.nn.log_softmax(jnp.matmul(hidden_BTD, head_DV, preferred_element_type=jnp.float32))
        return jnp.take_along_axis(logps_BTV, targets_BT[..., None], axis=-1)[..., 0], None

    tiled = temporaries()
    monkeypatch.setattr(decoder.lm_head, "logps_and_entropies", full)
    whole = temporaries()
    assert whole > 8192 * config.vocab_size * 4 / 2**30  # the full logits are among them
    assert tiled < whole / 3, (tiled, whole)


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.usefixtures("least_effort")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install 'jaxsi[plan]' (libtpu)")
@pytest.mark.parametrize(
    ("topology", "sizes", "gib", "family"),
    [("v5e:4x4", (1, 4, 4), 16, sampling_programs), ("v5p:2x2x2", (1, 4, 2), 95, training_programs)],
    ids=["sampling on v5e:4x4", "training on v5p:2x2x2"],
)
def test_programs_compile_for_tpu(topology, sizes, gib, family):
    """The programs of an 8B with two layers and fused attention. Those of preferences and rewards compile in
    test_plan.py."""
    data, fsdp, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), tpu_devices(topology))
    config = dataclasses.replace(SHAPES["llama-3-8b"], num_layers=2)
    programs_ = {name: p for name, p in family(config, mesh, Sizes()).items() if name not in COMPILED_ELSEWHERE}
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(decoder.abstract_weights(config, mesh))) / 2**30
    for name, program in programs_.items():
        compiled = program.lower().compile()
        memory, text = memory_of(name, compiled), compiled.as_text()
        assert 0 < memory.total < gib, memory
        assert ("splash" in text and "tpu_custom_call" in text) == (name in WHOLE_SEQUENCES), name
        if name in ("sft", "rl"):
            # The state is overwritten, and its weights are split over all chips.
            assert memory.outputs < 0.1
            assert memory.arguments < 1.5 * 3 * weights / mesh.size
        if name in ("extend in place", "grow"):
            cache = r"bf16\[\d+,\d+,\d+,128\]\S* all-gather"
            assert not re.search(cache, text), f"{name}: every chip has the whole cache"
