"""Plans: what is compiled is what is reported, sums are right, and an over-full plan says why."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import pytest

import tiny
from jaxsi.cli.main import main
from jaxsi.cli.plan import architecture, text_of, value_of
from jaxsi.model import decoder
from jaxsi.model.mesh import MeshConfig, MeshError, make_mesh
from jaxsi.perf import estimates, plan as planner
from jaxsi.perf.architectures import published
from jaxsi.perf.method_stages import Assumed
from jaxsi.perf.plan import Shape, compile_all, estimate_all, meshes, plan, search
from jaxsi.perf.programs import Sizes, memory_of, programs
from jaxsi.perf.topologies import topology
from jaxsi.runs.config_file import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
SEVENTY = CONFIGS / "self_rewarding" / "llama2_70b_v5p128.py"
SIZES = Sizes(
    slots=8, wave=8, prompt_length=64, max_new_tokens=32, max_length=64, score_rows=8, batch_size=16, accumulate=2,
    dtype="float32",
)  # fmt: skip
MESH = "2x2x2"
CONFIG = dataclasses.replace(tiny.CONFIG, embed_dim=256, mlp_dim=1024, vocab_size=1024)  # attention is next to nothing
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


def test_memory_is_the_compilers_own(both):
    mesh, compiled, _ = both
    for shape, made in compiled.items():
        assert made.memory == memory_of(shape.name, programs(CONFIG, mesh, SIZES)[shape.name].lower().compile())
        assert made.compile_seconds is not None and made.compile_seconds > 0


def test_flops_are_those_of_a_count_by_hand(both):
    """The layers' products are computed again in the backward pass (remat "full"), but for the last of each layer,
    whose result no gradient needs; so are the head's."""
    mesh, compiled, _ = both
    c, T, rows = CONFIG, SIZES.max_length, SIZES.batch_size
    flops = {shape.name: made.cost.flops * mesh.size for shape, made in compiled.items()}
    layer = c.embed_dim * (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 3 * c.embed_dim * c.mlp_dim
    attention = 4 * c.num_heads * c.head_dim * T / 2
    again = layer - c.embed_dim * c.mlp_dim
    head = 2 * c.embed_dim * c.vocab_size
    a_token = c.num_layers * (3 * 2 * layer + 2 * again + 4 * attention) + 4 * head
    assert flops["sft"] == pytest.approx(rows * T * a_token, rel=0.05)
    forward = c.num_layers * (2 * layer + attention) + head
    assert flops["score"] == pytest.approx(SIZES.score_rows * T * forward, rel=0.05)
    cached = 64 + 32  # columns of the prompt and of the response
    step = c.num_layers * (2 * layer + 4 * c.num_heads * c.head_dim * cached) + head
    assert flops["decode"] == pytest.approx(SIZES.slots * step, rel=0.05)


def test_arithmetic_agrees_with_what_is_compiled(both):
    _, compiled, estimated = both
    for shape, made in compiled.items():
        guess = estimated[shape]
        assert guess.cost.flops == pytest.approx(made.cost.flops, rel=0.1), shape.name
        if shape.name != "prefill":  # which is not given the head
            assert guess.memory.arguments == pytest.approx(made.memory.arguments, rel=0.1), shape.name


def test_a_chips_share_of_the_weights_is_exact():
    mesh = tiny.mesh("2x2x2")
    weights = decoder.abstract_weights(tiny.CONFIG, mesh)
    exact = sum(4 * math.prod(w.sharding.shard_shape(w.shape)) for w in jax.tree.leaves(weights))
    assert estimates.canonical_gib(tiny.CONFIG, mesh) * 2**30 == exact


# ------------------------------------------------------------------------------------------------------------ the plans


def estimated(path: Path, where: str, **changes):
    cfg = dataclasses.replace(load_config(path), **changes)
    return plan(cfg, topology(where), Assumed(), architecture, compiled=False)


def test_the_70b_fits_its_pod_and_the_sums_are_right():
    made = estimated(SEVENTY, "v5p-128")
    assert made.fits and not made.advice and made.mesh == (1, 16, 4)
    each = [stage for stage in made.stages if stage.each]
    assert made.hours == pytest.approx(sum(made.seconds_of(stage) for stage in each) / 3600)
    assert made.hours_once + made.hours > made.hours > 0
    assert made.checkpoint_gib == pytest.approx(12 * 68_976_648_192 / 2**30)
    rows = {f"{row.stage.name}: {row.name}": row for row in made.rows}
    dpo = rows["dpo: dpo"]
    assert dpo.bound == "compute" and 0.45 < dpo.mfu < 1
    assert dpo.seconds == pytest.approx(dpo.flops / (64 * 459e12))
    assert rows["candidates: decode"].bound == "memory"


def test_an_over_full_plan_says_what_does_not_fit_and_what_would():
    cfg = load_config(SEVENTY)
    small = dataclasses.replace(cfg, mesh=MeshConfig(fsdp=4, tensor=4))
    made = plan(small, topology("v5e:4x4"), Assumed(), architecture, compiled=False)
    assert not made.fits
    said = "\n".join(made.advice)
    assert "dpo: dpo takes" in said and "of 15.8 GiB of a v5e" in said
    assert "some 256 chips of this kind" in said and "optim.offload" in said
    assert "candidates: decode takes" in said and "Models that the method holds meanwhile take most of it" in said
    text = text_of(SEVENTY, made, Assumed())
    assert "DOES NOT FIT" in text and said.splitlines()[0] in text


def test_activations_that_do_not_fit_name_the_accumulation_that_does():
    cfg = load_config(SEVENTY)
    train = dataclasses.replace(cfg.dpo.train, batch_size=256)
    cfg = dataclasses.replace(cfg, dpo=dataclasses.replace(cfg.dpo, train=train), early_stop=None)
    made = plan(cfg, topology("v5p-128"), Assumed(), architecture, compiled=False)
    (advice,) = made.advice
    assert "dpo: dpo takes" in advice
    wanted = int(advice.split("accumulate = ")[1].split()[0])
    assert wanted in (4, 8, 16)
    train = dataclasses.replace(train, accumulate=wanted)
    cfg = dataclasses.replace(cfg, dpo=dataclasses.replace(cfg.dpo, train=train))
    assert plan(cfg, topology("v5p-128"), Assumed(), architecture, compiled=False).fits


def test_a_mesh_of_another_size_than_the_topology_is_refused():
    with pytest.raises(MeshError, match="needs 64 devices, there are 16"):
        estimated(SEVENTY, "v5e:4x4")


def test_search_offers_the_meshes_that_divide_and_puts_the_fastest_that_fits_first():
    cfg = load_config(SEVENTY)
    found = meshes(cfg, published(cfg.model), topology("v5p-128"))
    shapes = {(mesh.data, mesh.fsdp, mesh.tensor) for mesh in found}
    assert (1, 16, 4) in shapes
    assert all(tensor <= 8 and data * fsdp <= 16 for data, fsdp, tensor in shapes)  # kv heads; rows of the batch
    ranked = search(cfg, topology("v5p-128"), Assumed(), architecture, compiled=False)
    assert len(ranked) == len(found)
    fitting = [made for _, made in ranked if made.fits]
    assert fitting and [made for _, made in ranked][: len(fitting)] == fitting
    assert fitting[0].hours == min(made.hours for made in fitting)
    with pytest.raises(MeshError, match="no mesh of 3 chips divides"):
        search(cfg, topology("h100:3"), Assumed(), architecture)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*_*.py")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_has_a_plan(path):
    if path.stem.startswith("toy"):
        pytest.skip("for a laptop")
    where = planned_for(path)
    made = estimated(path, where)
    assert made.hours > 0
    assert made.fits, made.advice
    value = value_of(path, made, Assumed())
    assert json.loads(json.dumps(value, allow_nan=False))["fits"]


def planned_for(path: Path) -> str:
    """The hardware in a config's name."""
    return next(where for word, where in HARDWARE.items() if word in path.stem)


def test_what_the_compiler_refused_is_larger_than_all_that_it_did_not():
    cfg = dataclasses.replace(load_config(SEVENTY), mesh=MeshConfig(fsdp=4, tensor=4))
    made = plan(cfg, topology("v5e:4x4"), Assumed(), architecture, compiled=False)
    refusal = planner.Made(None, None, 1.0, "needs 60.0GiB of 15.75GiB")
    smaller = planner.Made(None, None, 1.0, "needs 26.0GiB of 15.75GiB")
    refused = {"dpo": (refusal, 60.0), "reference": (smaller, 26.0)}
    rows = [
        dataclasses.replace(row, made=refused[row.name][0], gib=refused[row.name][1]) if row.name in refused else row
        for row in made.rows
    ]
    mesh = planner.mesh_of(cfg.mesh, topology("v5e:4x4"), compiled=False)
    said = "\n".join(planner.advise(rows, made.config, mesh, made.topology))
    assert "dpo: dpo needs 60.0GiB of 15.75GiB beside 32.1 of other models" in said


def test_a_program_that_cannot_be_made_stops_the_others(monkeypatch):
    begun = []

    def compile_(shape, mesh):
        begun.append(shape)
        raise RuntimeError("no")

    monkeypatch.setattr(planner, "_compile", compile_)
    shapes = [Shape("sft", CONFIG, dataclasses.replace(SIZES, batch_size=8 * n)) for n in range(1, 40)]
    with pytest.raises(RuntimeError, match="no"):
        compile_all(shapes, tiny.mesh(MESH))
    assert len(begun) < len(shapes)


# --------------------------------------------------------------------------------------------------------- the command


def test_json_has_the_promised_keys(capsys):
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
    hours = lambda value: {stage["name"]: stage["hours"] for stage in value["stages"]}  # noqa: E731
    # Twice as many, half as long.
    assert hours(after)["candidates"] == pytest.approx(hours(before)["candidates"], rel=0.2)
    assert after["assumed"]["fill"] == 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a config first"),
        ([str(SEVENTY)], "give the topology"),
        ([str(SEVENTY), "--topology", "v9:2x2"], "names no topology"),
        ([str(SEVENTY), "--topology", "v5p:4x4x4", "--fill", "2"], "fill 2.0 lies in"),
        ([str(SEVENTY), "--topology", "h100:64", "--model", "nobody/nothing"], "is not known here"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(words, said, capsys):
    assert main(["plan", *words]) in (1, 2)
    assert said in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- the compiler


@needs_libtpu
@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize(
    ("name", "where", "programs_"),
    [
        ("self_rewarding/llama2_70b_v5p128", "v5p:4x4x4", ("dpo", "decode")),
        ("srt/tulu2_70b_v5p128", "v5p:4x4x4", ("reference",)),
        ("seft/llama3_8b_v5e64", "v5e:8x8", ("score", "prefill")),
        ("pit/llama2_70b_v5p128", "v5p:4x4x4", ("gap reward",)),
    ],
)
def test_a_config_of_each_method_compiles_for_its_tpu_at_depth_2(name, where, programs_, monkeypatch):
    """Compiled for real; FLOPs within 5 % of a count by hand, and every loop's turns known but decoding's."""
    compile_everything = planner.compile_all

    def first_of_each(shapes, mesh):
        chosen = [next(shape for shape in shapes if shape.name == program) for program in programs_]
        return dict.fromkeys(shapes, planner.Made(None, None)) | compile_everything(chosen, mesh)

    monkeypatch.setattr(planner, "compile_all", first_of_each)
    cfg = load_config(CONFIGS / f"{name}.py")
    shallow = lambda model_name: dataclasses.replace(published(model_name), num_layers=2)  # noqa: E731
    made = plan(cfg, topology(where), Assumed(), shallow)
    assert made.fits and made.compiled
    rows = {row.name: row for row in made.rows if row.made.cost is not None}
    assert set(rows) == set(programs_)
    for row in rows.values():
        guess = estimates.estimate(row.name, row.shape.config, abstract(made), row.shape.sizes)[1]
        assert row.made.cost.flops == pytest.approx(guess.flops, rel=0.05), row.name
        assert (row.made.cost.unknown_loops > 0) == (row.name == "decode")
        assert row.seconds > 0 and row.made.memory.total > 0


def abstract(made):
    data, fsdp, tensor = made.mesh
    return planner.mesh_of(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), made.topology, compiled=False)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
def test_what_the_compiler_refuses_is_a_row_that_does_not_fit():
    config = dataclasses.replace(published("meta-llama/Llama-2-70b-hf"), num_layers=8)
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=1), planner.tpu_devices("v5e:1x1"))
    shape = Shape("score", config, Sizes(score_rows=1, max_length=128))
    (made,) = compile_all([shape], mesh).values()
    assert made.memory is None and made.refusal is not None
    assert made.refusal.startswith("needs ") and made.refusal.endswith("of 15.75GiB")
    assert planner.refused_gib(made.refusal) > 15.75
    assert planner.refused_gib("needs 512.0MiB of 15.75GiB") == 0.5 and planner.refused_gib("no memory") == 0.0
