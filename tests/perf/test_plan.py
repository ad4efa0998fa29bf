"""Plans: they report what the compiler reports, their sums are right, and a plan that does not fit says why."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import pytest
from micro_runs import micro

import tiny
from jaxsi.cli.main import main
from jaxsi.cli.plan import architecture, text_of, value_of
from jaxsi.model import decoder
from jaxsi.model.mesh import MeshConfig, MeshError, make_mesh
from jaxsi.perf import builds, estimates, plan as planner
from jaxsi.perf.architectures import published
from jaxsi.perf.builds import Build, Shape, compile_all, estimate_all
from jaxsi.perf.plan import meshes, plan, search
from jaxsi.perf.planned_stages import Assumptions
from jaxsi.perf.programs import Sizes, memory_of, programs, tpu_devices
from jaxsi.perf.topologies import topology
from jaxsi.runs.config_file import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
SEVENTY = CONFIGS / "self_rewarding" / "llama2_70b_v5p128.py"
SIZES = Sizes(
    slots=8,
    wave=8,
    prompt_length=64,
    max_new_tokens=32,
    max_length=64,
    score_rows=8,
    batch_size=16,
    accumulate=2,
    dtype="float32",
)
MESH = "2x2x2"
CONFIG = dataclasses.replace(
    tiny.CONFIG, embed_dim=256, mlp_dim=1024, vocab_size=1024
)  # wide, so that attention costs almost nothing
HARDWARE = {"v5p128": "v5p-128", "v5e64": "v5e:8x8", "8xh100": "h100:8", "1xh200": "h200:1", "1gpu": "rtx4090"}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="pip install 'jaxsi[plan]' (libtpu)"
)


@pytest.fixture(scope="module")
def both():
    """Programs of the tiny model on eight CPU devices, compiled and estimated."""
    mesh = tiny.mesh(MESH)
    names = ("sft", "dpo", "score", "decode", "prefill")
    shapes = [Shape(name, CONFIG, SIZES) for name in names]
    return mesh, compile_all(shapes, mesh), estimate_all(shapes, mesh)


def test_memory_is_the_figure_of_the_compiler(both):
    mesh, compiled, _ = both
    for shape, build in compiled.items():
        assert build.memory == memory_of(shape.name, programs(CONFIG, mesh, SIZES)[shape.name].lower().compile())
        assert build.compile_seconds is not None and build.compile_seconds > 0


def test_flops_match_a_count_by_hand(both):
    """With remat "full" the backward pass recomputes the products of the layers, except for the last of each layer,
    whose result no gradient needs. The products of the head are recomputed as well."""
    mesh, compiled, _ = both
    c, T, rows = CONFIG, SIZES.max_length, SIZES.batch_size
    flops = {shape.name: build.cost.flops * mesh.size for shape, build in compiled.items()}
    layer = c.embed_dim * (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 3 * c.embed_dim * c.mlp_dim
    attention = 4 * c.num_heads * c.head_dim * T / 2
    recomputed = layer - c.embed_dim * c.mlp_dim
    head = 2 * c.embed_dim * c.vocab_size
    per_token = c.num_layers * (3 * 2 * layer + 2 * recomputed + 4 * attention) + 4 * head
    assert flops["sft"] == pytest.approx(rows * T * per_token, rel=0.05)
    forward = c.num_layers * (2 * layer + attention) + head
    assert flops["score"] == pytest.approx(SIZES.score_rows * T * forward, rel=0.05)
    cached = 64 + 32  # columns of the prompt and of the response
    step = c.num_layers * (2 * layer + 4 * c.num_heads * c.head_dim * cached) + head
    assert flops["decode"] == pytest.approx(SIZES.slots * step, rel=0.05)


def test_estimates_agree_with_the_compiler(both):
    _, compiled, estimates_ = both
    for shape, build in compiled.items():
        estimate = estimates_[shape]
        assert estimate.cost.flops == pytest.approx(build.cost.flops, rel=0.1), shape.name
        if shape.name != "prefill":  # the head is not among its arguments
            assert estimate.memory.arguments == pytest.approx(build.memory.arguments, rel=0.1), shape.name


def test_share_of_the_weights_on_a_chip_is_exact():
    mesh = tiny.mesh("2x2x2")
    weights = decoder.abstract_weights(tiny.CONFIG, mesh)
    exact = sum(4 * math.prod(w.sharding.shard_shape(w.shape)) for w in jax.tree.leaves(weights))
    assert estimates.canonical_gib(tiny.CONFIG, mesh) * 2**30 == exact


# ------------------------------------------------------------------------------------------------------------ the plans


def estimated_plan(path: Path, hardware: str, **changes):
    return plan_by_arithmetic(dataclasses.replace(load_config(path), **changes), hardware)


def plan_by_arithmetic(cfg, hardware: str):
    return plan(cfg, topology(hardware), Assumptions(), architecture, compiled=False)


def test_70b_fits_its_pod_and_hours_add_up():
    result = estimated_plan(SEVENTY, "v5p-128")
    assert result.fits and not result.advice and result.mesh == (1, 16, 4)
    each = [stage for stage in result.stages if stage.each]
    assert result.hours == pytest.approx(sum(result.seconds_of(stage) for stage in each) / 3600)
    assert result.hours_once + result.hours > result.hours > 0
    assert result.checkpoint_gib == pytest.approx(12 * 68_976_648_192 / 2**30)
    rows = {f"{row.stage.name}: {row.name}": row for row in result.rows}
    dpo = rows["dpo: dpo"]
    assert dpo.bound == "compute" and 0.45 < dpo.mfu < 1
    assert dpo.seconds == pytest.approx(dpo.flops / (64 * 459e12))
    assert rows["candidates: decode"].bound == "memory"


def test_plan_that_does_not_fit_says_why_and_what_would_fit():
    cfg = load_config(SEVENTY)
    small = dataclasses.replace(cfg, mesh=MeshConfig(fsdp=4, tensor=4))
    result = plan_by_arithmetic(small, "v5e:4x4")
    assert not result.fits
    advice = "\n".join(result.advice)
    assert "dpo: dpo takes" in advice and "a v5e has 15.8 GiB" in advice
    assert "use about 256 chips of this kind" in advice and "optim.offload" in advice
    assert "candidates: decode takes" in advice and "Most of it is other models that the method holds" in advice
    text = text_of(SEVENTY, result, Assumptions())
    assert "DOES NOT FIT" in text and advice.splitlines()[0] in text


def test_advice_names_the_accumulation_with_which_activations_fit():
    cfg = load_config(SEVENTY)
    train = dataclasses.replace(cfg.dpo.train, batch_size=256)
    cfg = dataclasses.replace(cfg, dpo=dataclasses.replace(cfg.dpo, train=train), early_stop=None)
    (advice,) = plan_by_arithmetic(cfg, "v5p-128").advice
    assert "dpo: dpo takes" in advice
    accumulate = int(advice.split("accumulate = ")[1].split()[0])
    assert accumulate in (4, 8, 16)
    train = dataclasses.replace(train, accumulate=accumulate)
    cfg = dataclasses.replace(cfg, dpo=dataclasses.replace(cfg.dpo, train=train))
    assert plan_by_arithmetic(cfg, "v5p-128").fits


def test_mesh_of_another_size_than_the_topology_is_refused():
    with pytest.raises(MeshError, match="needs 64 devices, there are 16"):
        estimated_plan(SEVENTY, "v5e:4x4")


def test_search_finds_all_dividing_meshes_and_ranks_the_fastest_that_fits_first():
    cfg = load_config(SEVENTY)
    found = meshes(cfg, published(cfg.model), topology("v5p-128"))
    shapes = {(mesh.data, mesh.fsdp, mesh.tensor) for mesh in found}
    assert (1, 16, 4) in shapes
    assert all(tensor <= 8 and data * fsdp <= 16 for data, fsdp, tensor in shapes)  # kv heads; rows of the batch
    ranked = [result for _, result in search(cfg, topology("v5p-128"), Assumptions(), architecture, compiled=False)]
    assert len(ranked) == len(found)
    fitting = [result for result in ranked if result.fits]
    assert fitting and ranked[: len(fitting)] == fitting
    assert fitting[0].hours == min(result.hours for result in fitting)
    with pytest.raises(MeshError, match="no mesh of 3 chips divides"):
        search(cfg, topology("h100:3"), Assumptions(), architecture)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*_*.py")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_plan_of_every_shipped_config_fits_its_hardware(path):
    if path.stem.startswith("toy") or path.stem.endswith("cpu"):
        pytest.skip("for a laptop")
    result = estimated_plan(path, hardware_of(path))
    assert result.hours > 0
    assert result.fits, result.advice
    value = value_of(path, result, Assumptions())
    assert json.loads(json.dumps(value, allow_nan=False))["fits"]


def hardware_of(path: Path) -> str:
    """The hardware in a config's name."""
    return next(hardware for word, hardware in HARDWARE.items() if word in path.stem)


def test_advice_ranks_a_refused_program_above_all_others():
    cfg = dataclasses.replace(load_config(SEVENTY), mesh=MeshConfig(fsdp=4, tensor=4))
    result = plan_by_arithmetic(cfg, "v5e:4x4")
    larger = Build(None, None, 1.0, "needs 60.0GiB of 15.75GiB")
    smaller = Build(None, None, 1.0, "needs 26.0GiB of 15.75GiB")
    refused = {"dpo": (larger, 60.0), "reference": (smaller, 26.0)}
    rows = [
        dataclasses.replace(row, build=refused[row.name][0], gib=refused[row.name][1]) if row.name in refused else row
        for row in result.rows
    ]
    mesh = planner.mesh_of(cfg.mesh, topology("v5e:4x4"), compiled=False)
    advice = "\n".join(planner.advise(rows, result.config, mesh, result.topology))
    assert "dpo: dpo needs 60.0GiB of 15.75GiB beside 32.1 of other models" in advice


def test_failed_compilation_stops_the_others(monkeypatch):
    started = []

    def compile_(shape, mesh):
        started.append(shape)
        raise RuntimeError("no")

    monkeypatch.setattr(builds, "_compile", compile_)
    shapes = [Shape("sft", CONFIG, dataclasses.replace(SIZES, batch_size=8 * n)) for n in range(1, 40)]
    with pytest.raises(RuntimeError, match="no"):
        compile_all(shapes, tiny.mesh(MESH))
    assert len(started) < len(shapes)


# --------------------------------------------------------------------------------------------------------- the command


def test_json_has_the_documented_keys(capsys):
    assert main(["plan", str(SEVENTY), "--topology", "v5p:4x4x4", "--arithmetic", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["topology"] == "v5p:4x4x4" and value["chips"] == 64 and value["fits"] is True
    assert value["hours"] > 0 and value["chip_hours"] == pytest.approx(64 * value["hours"])
    for program in value["programs"]:
        assert {"name", "hbm_gib", "flops", "seconds", "mfu"} <= set(program)
    assert {"dpo: dpo", "candidates: decode", "judgments: decode", "sft: sft"} <= {p["name"] for p in value["programs"]}


def test_overrides_and_assumptions_change_the_plan(capsys):
    base = ["plan", str(SEVENTY), "--topology", "v5p:4x4x4", "--arithmetic", "--json"]
    main(base)
    before = json.loads(capsys.readouterr().out)
    main([*base, "--sampling.num-samples", "8", "--fill", "0.5"])
    after = json.loads(capsys.readouterr().out)
    hours_before, hours_after = ({stage["name"]: stage["hours"] for stage in v["stages"]} for v in (before, after))
    # Twice as many samples, half as long.
    assert hours_after["candidates"] == pytest.approx(hours_before["candidates"], rel=0.2)
    assert after["assumed"]["fill"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a config first"),
        ([str(SEVENTY)], "give the topology"),
        ([str(SEVENTY), "--topology", "v9:2x2"], "unknown topology"),
        ([str(SEVENTY), "--topology", "v5p:4x4x4", "--fill", "2"], "fill 2.0 must be in"),
        ([str(SEVENTY), "--topology", "h100:64", "--model", "nobody/nothing"], "unknown architecture"),
        (
            [str(micro("sampling")), "--topology", "h100:1"],
            "sampling.Config is not the Config of a method of this package",
        ),
    ],
)
def test_wrong_command_line_says_what_is_wrong(words, message, capsys):
    assert main(["plan", *words]) in (1, 2)
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- the compiler


@needs_libtpu
@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.usefixtures("least_effort")
@pytest.mark.parametrize(
    ("name", "hardware", "program_names"),
    [
        ("self_rewarding/llama2_70b_v5p128", "v5p:4x4x4", ("dpo", "decode")),
        ("srt/tulu2_70b_v5p128", "v5p:4x4x4", ("reference",)),
        ("seft/llama3_8b_v5e64", "v5e:8x8", ("score", "prefill")),
        ("pit/llama2_70b_v5p128", "v5p:4x4x4", ("gap reward",)),
    ],
)
def test_config_of_each_method_compiles_for_its_tpu_at_depth_1(name, hardware, program_names, monkeypatch):
    """With the real compiler: FLOPs are within 5 % of the estimate, and only decoding has loops of unknown length."""
    compile_everything = compile_all

    def compile_first_of_each(shapes, mesh):
        chosen = [next(shape for shape in shapes if shape.name == program) for program in program_names]
        return dict.fromkeys(shapes, Build(None, None)) | compile_everything(chosen, mesh)

    def shallow(model_name):
        return dataclasses.replace(published(model_name), num_layers=1)

    monkeypatch.setattr(planner, "compile_all", compile_first_of_each)
    cfg = load_config(CONFIGS / f"{name}.py")
    result = plan(cfg, topology(hardware), Assumptions(), shallow)
    assert result.fits and result.compiled
    rows = {row.name: row for row in result.rows if row.build.cost is not None}
    assert set(rows) == set(program_names)
    for row in rows.values():
        estimate = estimates.estimate(row.name, row.shape.config, abstract_mesh(result), row.shape.sizes)[1]
        assert row.build.cost.flops == pytest.approx(estimate.flops, rel=0.05), row.name
        assert (row.build.cost.unknown_loops > 0) == (row.name == "decode")
        assert row.seconds > 0 and row.build.memory.total > 0


def abstract_mesh(result):
    data, fsdp, tensor = result.mesh
    return planner.mesh_of(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), result.topology, compiled=False)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.usefixtures("least_effort")
def test_refusal_of_the_compiler_names_the_memory_needed():
    config = dataclasses.replace(published("meta-llama/Llama-2-70b-hf"), num_layers=8)
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=1), tpu_devices("v5e:1x1"))
    shape = Shape("score", config, Sizes(score_rows=1, max_length=128))
    (build,) = compile_all([shape], mesh).values()
    assert build.memory is None and build.refusal is not None
    assert build.refusal.startswith("needs ") and build.refusal.endswith("of 15.75GiB")
    assert builds.refused_gib(build.refusal) > 15.75
    assert builds.refused_gib("needs 512.0MiB of 15.75GiB") == 0.5 and builds.refused_gib("no memory") == 0.0
