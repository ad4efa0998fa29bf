"""Every shipped config: it loads, names its command, has the recorded flags, and fits its own mesh.

JAXSI_UPDATE_GOLDEN=1 python -m pytest tests/test_configs.py    writes the flags anew
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxsi.cli import bench
from jaxsi.cli.run import run
from jaxsi.methods.start import method_of
from jaxsi.model import decoder, mesh as meshlib
from jaxsi.model.decoder import ModelConfig
from jaxsi.perf.architectures import published
from jaxsi.runs.config_file import ConfigFileError, load_config, load_configs
from jaxsi.runs.config_snapshot import describe_config, describe_settled, parts_of, with_dtypes
from jaxsi.stages.critique import LocalCritic
from jaxsi.stages.endpoint import EndpointCritic
from jaxsi.stages.self_instruct import SelfInstruct
from jaxsi.toyworld import methods_table
from jaxsi.training import optim, train
from jaxsi.training.batches import GroupBatch, PairBatch, TokenBatch
from jaxsi.training.ppo import PPOConfig, ValueLoss
from jaxsi.training.reward import BRADLEY_TERRY, GAP, RewardLoss
from jaxsi.training.rl import PolicyLoss, RLConfig, RolloutBatch
from jaxsi.training.train import TrainConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
ABLATIONS = [path for path in CONFIGS if path.stem == "toy_ablations"]  # several configs, for the bench
GOLDEN = Path(__file__).parent / "golden"

REAL = [path for path in CONFIGS if not path.stem.startswith("toy")]

# Devices, by the last part of a config's name (that it fits in their memory: test_plan.py).
HARDWARE = {"v5p128": 64, "v5e64": 64, "8xh100": 8, "1xh200": 1, "1gpu": 1, "cpu": 1}
# By method: the losses of its training.
LOSSES = {
    "self_rewarding": {"SFTLoss", "PairLoss"},
    "srt": {"SFTLoss", "PairLoss"},
    "seft": {"SFTLoss"},
    "pit": {"SFTLoss", "RewardLoss", "PolicyLoss", "ValueLoss"},
    "spin": {"PairLoss"},
    "grpo": {"PolicyLoss", "ValueLoss"},
    "online_dpo": {"PolicyLoss", "ValueLoss"},
    "cream": {"SFTLoss", "PairLoss"},
    "temporal": {"SFTLoss", "PairLoss"},
    "meta_rewarding": {"PairLoss"},
}


# Where a control arm may differ from the toy.py beside it: one field, or the two kinds of round of seft.
ARMS = {
    "self_rewarding/toy_permuted": {"judging"},
    "self_rewarding/toy_exact": {"judging"},
    "self_rewarding/toy_paper_loss": {"dpo.nll_coef"},
    "srt/toy_coin": {"direction"},
    "srt/toy_exact": {"scoring"},
    "seft/toy_coin": {"reviser.rankings"},
    "seft/toy_exact": {"internal.target", "external.target"},
    "pit/toy_permuted": {"rewarding"},
    "pit/toy_exact": {"rewarding"},
    "grpo/toy_permuted": {"judging"},
    "grpo/toy_exact": {"judging"},
    "online_dpo/toy_permuted": {"judging"},
    "online_dpo/toy_exact": {"judging"},
    "cream/toy_permuted": {"consistency.rewarding"},
    "cream/toy_exact": {"consistency.rewarding"},
    "temporal/toy_permuted": {"judging"},
    "temporal/toy_exact": {"judging"},
    "meta_rewarding/toy_permuted": {"judging", "pairs.meta.judging"},
    "meta_rewarding/toy_exact": {"judging"},
}


def name_of(path: Path) -> str:
    """E.g. "srt/toy"."""
    return f"{path.parent.name}/{path.stem}"


def configs_of(path: Path) -> dict[str, Any]:
    """The configs of a file by name; most have one."""
    return load_configs(path) if path in ABLATIONS else {path.stem: load_config(path)}


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in REAL], ids=name_of)
def test_toy_leaves_no_dtype_to_the_device(path):
    for cfg in configs_of(path).values():
        describe_settled(cfg)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_config_loads_and_can_be_stored(path):
    again = configs_of(path)
    for name, cfg in configs_of(path).items():
        described = describe_config(cfg)
        assert describe_config(again[name]) == described  # what a resumed run compares
        assert described["__type__"].endswith(".Config")
        assert json.loads(json.dumps(described)) == described
        assert method_of(cfg).__name__ == path.parent.name


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_docstring_says_command_hardware_and_expected_time(path):
    text = path.read_text(encoding="utf-8")
    relative = path.relative_to(ROOT).as_posix()
    command = f"jaxsi run {relative}"
    if path in ABLATIONS:
        command = f"jaxsi bench methods --methods {path.parent.name} --ablations"
    for word in (command, "ardware", "xpect"):
        assert word in text.split('"""')[1], f"{relative}: the docstring lacks {word!r}"


def differences(one: Any, other: Any) -> set[str]:
    """The fields, dotted, in which two configs of a type differ."""
    flat_one, flat_other = (leaves(describe_config(cfg)) for cfg in (one, other))
    return {name for name in flat_one | flat_other if flat_one.get(name) != flat_other.get(name)}


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf for key, item in value.items() for name, leaf in leaves(item, f"{prefix}.{key}".strip(".")).items()
    }


@pytest.mark.parametrize("name", ARMS)
def test_arm_differs_only_in_its_signal(name):
    path = ROOT / "configs" / f"{name}.py"
    toy, arm = load_config(path.with_name("toy.py")), load_config(path)
    assert differences(toy, arm) == ARMS[name]


def test_every_arm_is_in_the_bench():
    arms = {name_of(path) for path in CONFIGS if path.stem.startswith("toy_") and path not in ABLATIONS}
    assert arms == set(ARMS)
    benched = {f"{method}/{Path(file).stem}" for method, files in bench.ARMS.items() for file in files.values()}
    assert benched == arms | {f"{method}/toy" for method in bench.ARMS}


@pytest.mark.parametrize("path", ABLATIONS, ids=name_of)
def test_ablations_differ_from_the_toy_config_and_one_another(path):
    toy, ablations = load_config(path.with_name("toy.py")), load_configs(path)
    described = [json.dumps(describe_config(cfg)) for cfg in (toy, *ablations.values())]
    assert len(set(described)) == len(described)
    for name, cfg in ablations.items():
        assert type(cfg) is type(toy)
        changed = {field.partition(".")[0] for field in differences(toy, cfg)}
        allowed = methods_table.IN_COMMON[path.parent.name].fields | {"template", "first_stage", "learner"}
        assert changed <= allowed, name


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
def test_flags_are_the_recorded_ones(method, capsys, monkeypatch):
    found = set()
    for path in CONFIGS:
        if path.parent.name == method and path not in ABLATIONS:
            found |= flags(path, capsys, monkeypatch)
    text = "".join(f"{flag}\n" for flag in sorted(found))
    golden = GOLDEN / f"cli_{method}.txt"
    if os.environ.get("JAXSI_UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), "flags changed; JAXSI_UPDATE_GOLDEN=1 records them"


def test_file_without_a_config_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigFileError, match=r"empty\.py has no function config"):
        load_config(tmp_path / "empty.py")
    with pytest.raises(ConfigFileError, match="no such config file"):
        load_config(tmp_path / "absent.py")


def abstract_mesh(path: Path, cfg: Any) -> AbstractMesh:
    """The mesh of a config, of devices that this machine does not have."""
    devices = HARDWARE[path.stem.rpartition("_")[2]]
    return AbstractMesh(meshlib.sizes(cfg.mesh, devices), meshlib.AXES, axis_types=(AxisType.Auto,) * 3)


def shaped(cfg: Any, config: ModelConfig, mesh: AbstractMesh) -> Iterator[tuple[Any, Any, ModelConfig, Any]]:
    """(settings, loss, architecture, batch of abstract arrays) of each training program of a config."""

    def rows(*shape, dtype=jnp.int32):
        sharding = meshlib.sharding(mesh, ("batch", *(None,) * (len(shape) - 1)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def group(B, N, T):
        return GroupBatch(*[rows(B, N, T)] * 2, rows(B, dtype=bool))

    def pairs(B, T):
        counted = [rows(B, 2, T)] * 2
        return PairBatch(*[rows(B, 1, T)] * 3, *counted, rows(B, 2, dtype=jnp.float32), rows(B, dtype=bool))

    scalar = dataclasses.replace(config, scalar_head=True)
    cfg = with_dtypes(cfg, lambda _: "bfloat16")  # what "auto" is on their hardware
    parts = {name: part for name, part in parts_of(cfg) if isinstance(part, TrainConfig | RLConfig)}
    longest = max([part.max_length for part in parts.values() if isinstance(part, TrainConfig)], default=2048)
    for name, part in parts.items():
        B, own = part.batch_size, (config, mesh, part.dtype, part.remat)
        match part:
            case RLConfig():  # of the learners: the policy's own loss, and PPO's for its value model
                floats = [rows(B, longest, dtype=jnp.float32)] * 4
                batch = RolloutBatch(*[rows(B, longest)] * 2, rows(B, longest, dtype=bool), *floats)
                value = ValueLoss(scalar, *own[1:], PPOConfig().value_clip)
                yield part, PolicyLoss(*own, part.clip), config, batch
                yield part, value, scalar, batch
            case TrainConfig() if name == "dpo.train":
                yield part, train.PairLoss(*own, cfg.dpo.loss, cfg.dpo.beta, 0.0), config, pairs(B, part.max_length)
            case TrainConfig() if name == "reward":
                for objective, N in ((GAP, 4), (BRADLEY_TERRY, 2)):
                    yield part, RewardLoss(scalar, *own[1:], objective), scalar, group(B, N, part.max_length)
            case TrainConfig():
                batch = TokenBatch(*[rows(B, part.max_length)] * 5)
                yield part, train.SFTLoss(*own), config, batch


@pytest.mark.parametrize("path", REAL, ids=name_of)
def test_batches_lengths_and_heads_fit_the_mesh(path):
    cfg = load_config(path)
    mesh, architecture = abstract_mesh(path, cfg), published(cfg.model)
    decoder.weight_shardings(architecture, mesh)  # heads and all else that the mesh cuts
    for name, part in parts_of(cfg):
        if isinstance(part, TrainConfig | RLConfig):
            part.check(mesh)
        longest = part.max_length if isinstance(part, TrainConfig) else getattr(part, "max_new_tokens", 0) + 1
        positions = architecture.max_positions
        if isinstance(part, LocalCritic | SelfInstruct) and (other := writer(part)) is not None:
            positions = published(other).max_positions
        assert isinstance(part, EndpointCritic) or longest <= positions, name


def writer(part: LocalCritic | SelfInstruct) -> str | None:
    return part.model if isinstance(part, LocalCritic) else part.generator


LOWERED: dict[tuple[Any, ...], str] = {}  # by kind of program


def lowered(part: TrainConfig | RLConfig, loss: Any, architecture: ModelConfig, batch: Any) -> str:
    """The text of a training step, for TPU; nothing is compiled or allocated."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=meshlib.sharding(loss.mesh, ()))
    weights = decoder.abstract_weights(architecture, loss.mesh)
    moments = jax.eval_shape(optim.make_optimizer(part.optim).init, weights)
    state, rate = train.State(weights, moments, scalar, scalar), jax.ShapeDtypeStruct((), jnp.float32)
    step = train.train_step.trace(state, batch, rate, loss=loss, optimizer=part.optim, accumulate=part.accumulate)
    return step.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", REAL, ids=name_of)
def test_config_lowers_for_its_mesh(path):
    """The training steps at the real widths, two layers deep: a scan is one program, whatever its length. Programs of
    one mesh that differ in sizes alone are lowered once: that the mesh divides them is tested above."""
    cfg = load_config(path)
    mesh, architecture = abstract_mesh(path, cfg), dataclasses.replace(published(cfg.model), num_layers=2)
    found = set()
    for part, loss, config, batch in shaped(cfg, architecture, mesh):
        objective = loss.objective if isinstance(loss, RewardLoss) else None
        kind = (type(loss), objective, mesh, config.family, part.optim.offload, part.accumulate > 1)
        if kind not in LOWERED:
            LOWERED[kind] = lowered(part, loss, config, batch)
        assert "fsdp" in LOWERED[kind]
        found.add(type(loss).__name__)
    without_sft = getattr(cfg, "sft", ...) is None  # the given model is M_1
    assert found == LOSSES[path.parent.name] - ({"SFTLoss"} if without_sft else set())


def test_docs_link_every_real_config():
    page = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(\.\./(configs/\S+\.py)\)", page)) == {
        path.relative_to(ROOT).as_posix() for path in REAL
    }
