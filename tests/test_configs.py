"""Every shipped config: it loads, names its command, has the recorded flags, and fits its own mesh.

JAXSI_UPDATE_GOLDEN=1 python -m pytest tests/test_configs.py    writes the flags anew
"""

import dataclasses
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxsi import mesh as meshlib, model, optim, train
from jaxsi.commands.run import run
from jaxsi.config import describe_config
from jaxsi.config_file import ConfigFileError, load_config
from jaxsi.data import GroupBatch, TokenBatch
from jaxsi.methods import method_of
from jaxsi.model import ModelConfig, Rope

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
GOLDEN = Path(__file__).parent / "golden"

# The architectures that the configs name on the hub, as their config.json has them.
HUB = {
    "meta-llama/Llama-2-70b-hf": ModelConfig(
        family="llama", vocab_size=32000, embed_dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128,
        mlp_dim=28672, max_positions=4096,
    ),
    "Qwen/Qwen3-0.6B": ModelConfig(
        family="qwen3", vocab_size=151936, embed_dim=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128,
        mlp_dim=3072, max_positions=40960, tie_embeddings=True, qk_norm=True, rope=Rope(theta=1e6), norm_eps=1e-6,
    ),
}  # fmt: skip
DEVICES = {"llama2_70b_v5p128": 64, "qwen3_0p6b_1gpu": 1}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_loads_and_can_be_stored(path):
    cfg = load_config(path)
    assert describe_config(load_config(path)) == describe_config(cfg)  # what a resumed run compares
    assert describe_config(cfg)["__type__"].endswith(".Config")
    assert method_of(cfg).__name__ == path.parent.name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_docstring_says_command_hardware_and_expectation(path):
    text = path.read_text(encoding="utf-8")
    relative = path.relative_to(ROOT).as_posix()
    for word in (f"jaxsi run {relative}", "ardware", "xpect"):
        assert word in text.split('"""')[1], f"{relative}: the docstring lacks {word!r}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_arms_differ_in_the_judge_alone(path):
    if path.stem not in ("toy_permuted", "toy_exact"):
        pytest.skip("no arm")
    toy, arm = load_config(path.with_name("toy.py")), load_config(path)
    assert arm.judging is not toy.judging
    assert dataclasses.replace(arm, judging=toy.judging) == toy


def flags(path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What `jaxsi run CONFIG --help` lists, with the kind of each value and without the defaults."""
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        run([str(path), "--help"])
    assert stop.value.code == 0
    lines = [line.strip(" │|") for line in capsys.readouterr().out.splitlines()]  # the frame depends on the terminal
    listed = {re.split(r" {2,}", line)[0] for line in lines if re.match(r"--?[a-z]", line)}
    assert len(listed) > 20
    return listed


@pytest.mark.parametrize("method", sorted({path.parent.name for path in CONFIGS}))
def test_the_flags_are_those_on_record(method, capsys, monkeypatch):
    found = set()
    for path in CONFIGS:
        if path.parent.name == method:
            found |= flags(path, capsys, monkeypatch)
    text = "".join(f"{flag}\n" for flag in sorted(found))
    golden = GOLDEN / f"cli_{method}.txt"
    if os.environ.get("JAXSI_UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), "flags changed; JAXSI_UPDATE_GOLDEN=1 records them"


def test_a_file_that_is_no_config_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigFileError, match=r"empty\.py has no function config"):
        load_config(tmp_path / "empty.py")
    with pytest.raises(ConfigFileError, match="no such config file"):
        load_config(tmp_path / "absent.py")


def abstract_mesh(cfg, devices):
    """The mesh of a config, of devices that this machine does not have."""
    sizes = [cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor]
    if -1 in sizes:
        sizes[sizes.index(-1)] = -devices // (sizes[0] * sizes[1] * sizes[2])
    sizes = [abs(size) for size in sizes]
    assert sizes[0] * sizes[1] * sizes[2] == devices
    return AbstractMesh(tuple(sizes), meshlib.AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem in DEVICES], ids=lambda path: path.stem)
def test_it_lowers_for_its_own_mesh(path):
    """The training steps of the real architecture, lowered for the config's mesh; nothing is compiled or allocated."""
    cfg = load_config(path)
    mesh, config = abstract_mesh(cfg, DEVICES[path.stem]), HUB[cfg.model]
    if config.num_layers > 8:  # a scan: one layer or eighty is one program
        config = dataclasses.replace(config, num_layers=8)

    def placed(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshlib.sharding(mesh, axes))

    weights = model.abstract_weights(config, mesh)
    scalar = placed((), jnp.int32, ())
    jobs = [(cfg.dpo.train, train.PairLoss(config, mesh, cfg.dpo.train.dtype, True, cfg.dpo.loss, cfg.dpo.beta, 0.0))]
    if cfg.sft is not None:
        jobs.append((cfg.sft, train.SFTLoss(config, mesh, cfg.sft.dtype, True)))
    for job, loss in jobs:
        B, T = job.batch_size, job.max_length
        assert B // job.accumulate % meshlib.axis_size(mesh, "batch") == 0
        moments = jax.eval_shape(optim.make_optimizer(job.optim).init, weights)
        state = train.State(weights, moments, scalar, scalar)
        token = lambda shape, dtype: placed(shape, dtype, ("batch", *(None,) * (len(shape) - 1)))  # noqa: E731
        if isinstance(loss, train.PairLoss):
            ids = [token((B, 2, T), dtype) for dtype in (jnp.int32, jnp.int32, bool)]
            batch = GroupBatch(*ids, token((B, 2), jnp.float32), token((B,), bool))
        else:
            batch = TokenBatch(*(token((B, T), dtype) for dtype in (jnp.int32, jnp.int32, jnp.int32, bool)))
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        lowered = train.train_step.trace(
            state, batch, rate, loss=loss, optimizer=job.optim, accumulate=job.accumulate
        ).lower(lowering_platforms=("tpu",))
        assert "fsdp" in lowered.as_text()
