"""The launch files: each is taken by a strict reader, planted mistakes are not, and what they start is one run."""

import json
import math
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import launch_rules as rules
import pytest
import yaml
from jax.sharding import AbstractMesh, AxisType

from jaxsi.cli.run import configure
from jaxsi.cli.supervisor import cpu_devices
from jaxsi.model import mesh as meshlib
from jaxsi.runs.config_snapshot import parts_of
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
FILES = sorted(path.relative_to(LAUNCH).as_posix() for path in LAUNCH.rglob("*") if path.is_file())
MICRO = ROOT / "tests" / "micro" / "sampling.py"
STARTS = ["gpu_host/run_venv.sh", "slurm/multi_node.sbatch", "slurm/multi_node_container.sbatch",
          "slurm/single_node.sbatch", "tpu_vm/worker_start.sh", "xpk/create.sh"]  # fmt: skip


def text_of(name):
    return (LAUNCH / name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_strict_reader_accepts_every_file(name):
    assert rules.problems(name, text_of(name)) == []


@pytest.mark.parametrize("name", STARTS)
def test_every_script_starts_the_same_command(name):
    program, *rest = rules.entry(text_of(name))
    assert program in ("jaxsi", "$VENV/bin/jaxsi", "$HOME/jaxsi-venv/bin/jaxsi")
    assert rest == rules.RUN


def test_no_other_script_starts_jobs_and_no_registry_is_named():
    assert [name for name in FILES if name.endswith((".sh", ".sbatch")) and rules.entry(text_of(name))] == STARTS
    assert '"$IMAGE" run "$CONFIG" --distributed --run-dir "$RUN_DIR"' in text_of("gpu_host/run_container.sh")
    for name in FILES:
        assert not re.search(r"\b(?:gcr|ghcr|quay|docker|nvcr)\.io\b|docker\.pkg\.dev|\bpkg\.dev\b", text_of(name)), (
            name
        )


# File, what stands there, what a slip would make of it.
MISTAKES = [
    ("gke/jobset-tpu.yaml", "backoffLimit: 0", "backofLimit: 0"),
    ("gke/jobset-tpu.yaml", "backoffLimit: 0", "backoffLimit: 6"),
    ("gke/jobset-tpu.yaml", "completions: ${HOSTS}", 'completions: "4"'),
    ("gke/jobset-tpu.yaml", "completions: ${HOSTS}", "completions: 3"),
    ("gke/jobset-tpu.yaml", "terminationGracePeriodSeconds: 300", "terminationGraceSeconds: 300"),
    ("gke/jobset-tpu.yaml", "terminationGracePeriodSeconds: 300", "terminationGracePeriodSeconds: 30"),
    ("gke/jobset-tpu.yaml", "restartPolicy: Never", "restartPolicy: Nevr"),
    ("gke/jobset-tpu.yaml", "restartPolicy: Never", "restartPolicy: OnFailure"),
    ("gke/jobset-tpu.yaml", "gke-tpu-topology: ${TOPOLOGY}", "gke-tpu-topology: 4x8"),
    ("gke/jobset-tpu.yaml", "gke-tpu-topology: ${TOPOLOGY}", "gke-tpu-topology: 4x4x4"),
    ("gke/jobset-tpu.yaml", "gke-tpu-topology: ${TOPOLOGY}", "gke-tpu-topolgy: ${TOPOLOGY}"),
    ("gke/jobset-tpu.yaml", "gke-tpu-accelerator: ${TPU}", "gke-tpu-accelerator: tpu-v6-slice"),
    ("gke/jobset-tpu.yaml", "google.com/tpu: ${CHIPS_PER_HOST}", "google.com/tpu: 8"),
    ("gke/jobset-tpu.yaml", "google.com/tpu:", "google.com/tpus:"),
    ("gke/jobset-tpu.yaml", "image: ${IMAGE}", "image: images.invalid/jaxsi:latest"),
    ("gke/jobset-tpu.yaml", "image: ${IMAGE}", "image: images.invalid/jaxsi"),
    ("gke/jobset-tpu.yaml", "allowPrivilegeEscalation: false", "privileged: true"),
    ("gke/jobset-tpu.yaml", "values: [2, 75]", "values: [75]"),
    ("gke/jobset-tpu.yaml", "containerName: jaxsi", "containerName: jaxsy"),
    ("gke/jobset-tpu.yaml", "type: DisruptionTarget", "type: DisruptionTargt"),
    ("gke/jobset-tpu.yaml", "onPodConditions:", "onPodCondition:"),
    ("gke/jobset-tpu.yaml", "exit code 2 matching", "exit code 75 matching"),
    ("gke/jobset-tpu.yaml", "action: FailJobSet", "action: FailJobset"),
    ("gke/jobset-tpu.yaml", "action: RestartJobSetAndIgnoreMaxRestarts", "action: RestartJobSet"),
    ("gke/jobset-tpu.yaml", "maxRestarts: 50", "maxRestart: 50"),
    ("gke/jobset-tpu.yaml", "maxRestarts: 50", "maxRestarts: 0"),
    ("gke/jobset-tpu.yaml", "queue-name: jaxsi", "queue-name: jaxsy"),
    ("gke/jobset-tpu.yaml", "subdomain: ${NAME}", "subdomain: other"),
    ("gke/jobset-tpu.yaml", "replicatedJobs:", "replicatedJob:"),
    ("gke/jobset-tpu.yaml", "jobset.x-k8s.io/v1alpha2", "jobset.x-k8s.io/v1"),
    ("gke/jobset-tpu.yaml", "--distributed, ", ""),
    ("gke/jobset-tpu.yaml", "mountPath: /runs", "mountPath: /run"),
    ("gke/jobset-tpu.yaml", "metadata-cache:ttl-secs:0,", ""),
    ("gke/jobset-tpu.yaml", 'gke-gcsfuse/volumes: "true"', "gke-gcsfuse/volumes: true"),
    ("gke/jobset-tpu.yaml", "${CONFIG}", "${CONFG}"),
    ("gke/jobset-tpu.yaml", "backoffLimit: 0", "backoffLimit: 0\n          backoffLimit: 6"),
    ("gke/jobset-tpu.yaml", "key: HF_TOKEN, optional: true", "key: HF_TOKEN"),
    ("gke/jobset-gpu.yaml", "name: jaxsi-tokens", "name: jaxsi-token"),
    ("gke/jobset-gpu.yaml", "nvidia.com/gpu:", "nvidia.com/gpus:"),
    ("gke/jobset-gpu.yaml", "- name: JAX_PROCESS_ID", "- name: JAX_PROCES_ID"),
    ("gke/jobset-gpu.yaml", "fieldPath:", "fieldpath:"),
    ("gke/jobset-gpu.yaml", "medium: Memory", "medum: Memory"),
    ("gke/kueue.yaml", "kueue.x-k8s.io/v1beta2", "kueue.x-k8s.io/v1beta1"),
    ("gke/kueue.yaml", "clusterQueue: jaxsi", "clusterQueue: jaxsy"),
    ("gke/kueue.yaml", "- name: tpu-spot", "- name: tpu-spt"),
    ("gke/kueue.yaml", "coveredResources: [google.com/tpu]", "coveredResources: [google.com/tpu, cpu]"),
    ("gke/kueue.yaml", "nominalQuota: ${TPU_QUOTA}", "quota: ${TPU_QUOTA}"),
    ("gke/kueue.yaml", "queueingStrategy: BestEffortFIFO", "queueingStrategy: BestEffort"),
    ("gke/kueue.yaml", 'cloud.google.com/gke-spot: "true"', 'cloud.google.com/gke-spot: "yes"'),
    ("gke/apply.sh", "--filename=-", "--file=-"),
    ("gke/apply.sh", "set -euo pipefail", "set -eu"),
    ("tpu_vm/create.sh", "--accelerator-type=", "--acelerator-type="),
    ("tpu_vm/create.sh", "--runtime-version=", "--version="),
    ("tpu_vm/create.sh", "queued-resources create", "queued-resource create"),
    ("tpu_vm/create.sh", '--node-id="$NAME"', "--node-id=$NAME"),
    ("tpu_vm/create.sh", "esac", "esca"),
    ("tpu_vm/install.sh", "--worker=all", "--workers=all"),
    ("tpu_vm/worker_install.sh", 'cd "$HOME" || exit 1', 'cd "$HOME"'),
    ("tpu_vm/worker_install.sh", "set -euo pipefail", "set -uo pipefail"),
    ("tpu_vm/worker_install.sh", "--metadata-cache-ttl-secs", "--metadata-cache-ttl"),
    ("tpu_vm/worker_start.sh", "--property=RestartPreventExitStatus=2", "--property=RestartPreventExit=2"),
    ("tpu_vm/worker_start.sh", "--setenv=", "--set-env="),
    ("tpu_vm/variables.sh", 'ZONE="${ZONE:?', 'ZONE="${ZOEN:?'),
    ("tpu_vm/delete.sh", "--force", "--forced"),
    ("tpu_vm/bucket.sh", "--enable-hierarchical-namespace", "--hierarchical-namespace"),
    ("xpk/create.sh", "--max-restarts=50", "--max-restart=50"),
    ("xpk/create.sh", "--docker-image=", "--image="),
    ("xpk/create.sh", 'IMAGE="${IMAGE:?the image', 'IMAGE="${IMAGE:-the image'),
    ("xpk/storage.sh", "--mount-point=", "--mount="),
    ("slurm/multi_node.sbatch", "#SBATCH --requeue", "#SBATCH --reque"),
    ("slurm/multi_node.sbatch", "#SBATCH --requeue\n", ""),
    ("slurm/multi_node.sbatch", "--signal=B:TERM@300", "--signal=TERM@300"),
    ("slurm/multi_node.sbatch", "--signal=B:TERM@300", "--signal=B:TERM@30"),
    ("slurm/multi_node.sbatch", "--open-mode=append", "--open-mode=truncate"),
    ("slurm/multi_node.sbatch", "--ntasks-per-node=8", "--ntasks-per-node=1"),
    ("slurm/multi_node.sbatch", "--kill-on-bad-exit=0", "--kill-on-bad-exits=0"),
    ("slurm/multi_node.sbatch", 'scancel --signal=TERM "$SLURM_JOB_ID.0"', 'kill -TERM "$step"'),
    ("slurm/multi_node.sbatch", "  scancel --signal=TERM", "  scancel --signals=TERM"),
    ("slurm/multi_node.sbatch", '"$SLURM_JOB_ID.0"', '"$SLURM_JOB_ID"'),
    ("slurm/multi_node.sbatch", 'scontrol requeue "$SLURM_JOB_ID"', "scontrol requeue $SLURM_JOB_ID"),
    ("slurm/multi_node.sbatch", "\ndone\n", "\n"),
    ("slurm/multi_node_container.sbatch", "--container-image=", "--container-img="),
    ("slurm/multi_node_container.sbatch", '--container-image="$IMAGE"', '--container-image="$IMGE"'),
    ("gpu_host/run_container.sh", "--gpus=all", "--gpu=all"),
    ("gpu_host/run_container.sh", "--gpus=all", "--gpus=all --privileged"),
    ("gpu_host/run_container.sh", '"$IMAGE" run', "jaxsi:latest run"),
    ("gpu_host/jaxsi.service", "RestartPreventExitStatus=2", "RestartPreventExitStatus=75"),
    ("gpu_host/jaxsi.service", "Restart=on-failure", "Restart=always"),
    ("gpu_host/jaxsi.service", "StartLimitIntervalSec=1d", "StartLimitIntervalSec=0"),
    ("gpu_host/jaxsi.service", "StartLimitBurst=20", "After=network-online.target"),
    ("gpu_host/jaxsi.service", "WorkingDirectory=", "WorkDirectory="),
    ("gpu_host/jaxsi.service", "TimeoutStopSec=300", "TimeoutStopSec=10"),
    ("containers/Dockerfile.tpu", "ARG BASE\n", "ARG BASE=python:3.11\n"),
    ("containers/Dockerfile.tpu", "FROM ${BASE}", "FROM python:latest"),
    ("containers/Dockerfile.tpu", "USER 1000", "USER root"),
    ("containers/Dockerfile.tpu", '".[tpu,endpoint]"', '".[tpu]"'),
    ("containers/Dockerfile.tpu", "WORKDIR", "WORKINGDIR"),
    ("containers/Dockerfile.tpu", "WORKDIR /runs", "WORKDIR /opt/jaxsi"),
    ("containers/Dockerfile.cuda", '".[cuda13,endpoint]"', '".[tpu,endpoint]"'),
    ("containers/Dockerfile.cpu", 'ENTRYPOINT ["jaxsi"]', 'ENTRYPOINT ["jaxis"]'),
    ("containers/Dockerfile.cpu", " --constraint constraints.txt", ""),
    ("skypilot/tpu.yaml", "use_spot: true", "use_spots: true"),
    ("skypilot/tpu.yaml", "use_spot: true", "use_spot: false"),
    ("skypilot/tpu.yaml", "strategy: EAGER_NEXT_REGION", "strategy: EAGER_NEXT_ZONE"),
    ("skypilot/tpu.yaml", "[75, 134, 137]", "[2, 75, 134, 137]"),
    ("skypilot/tpu.yaml", "[75, 134, 137]", "[134, 137]"),
    ("skypilot/tpu.yaml", "mode: MOUNT", "mode: MUONT"),
    ("skypilot/tpu.yaml", "num_nodes: 1", 'num_nodes: "1"'),
    ("skypilot/tpu.yaml", "file_mounts:", "file_mount:"),
    ("skypilot/tpu.yaml", '"$CONFIG"', '"$CONFG"'),
    ("skypilot/gpu.yaml", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_RNAK"),
    ("skypilot/gpu.yaml", " --distributed", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "right", "wrong"), MISTAKES)
def test_planted_mistake_is_found(name, right, wrong):
    text = text_of(name)
    assert right in text
    assert rules.problems(name, text.replace(right, wrong, 1)) != []


def test_every_variable_of_a_file_is_documented():
    readme = text_of("README.md")
    for section in re.split(r"(?m)^## ", readme)[1:]:
        named = re.findall(r"`launch/([\w./-]+)`", section)
        for name in named:
            assert (LAUNCH / name).exists(), name
    sections = {title: part for part in re.split(r"(?m)^## ", readme)[1:] for title in [part.splitlines()[0]]}
    for name in FILES:
        wanted = set(re.findall(r"\$\{([A-Z_]+):\?", text_of(name)))
        if name.endswith(".yaml"):
            wanted |= set(re.findall(r"\$\{([A-Z_]+)\}", text_of(name)))
        own = [part for part in sections.values() if f"launch/{name.split('/')[0]}/" in part]
        assert own or "/" not in name, f"{name} is in no section of README.md"
        missing = {variable for variable in wanted if not any(re.search(rf"\b{variable}\b", part) for part in own)}
        assert not missing, f"{name}: {missing}"


def readme_blocks():
    return re.findall(r"```bash\n(.*?)```", text_of("README.md"), re.DOTALL)


def test_readme_commands_have_the_options_they_need():
    seen = [command for block in readme_blocks() for command in rules.commands(block)]
    assert {"docker", "sky", "sbatch"} <= {command[0] for command in seen}
    assert [problem for command in seen for problem in rules.options(command)] == []
    for block in readme_blocks():
        assert [line for line in rules.syntax(f"#!/usr/bin/env bash\n{block}", LAUNCH) if "error" in line] == []
        for path in re.findall(r"\blaunch/[\w./-]+\w", block):
            assert (ROOT / path).exists(), path


def chips_of_type(name):
    """The chips of an accelerator type of Cloud TPU: v4 and v5p count two cores for each."""
    kind, _, count = name.removeprefix("tpu-").rpartition("-")
    return int(count) // 2 if kind in ("v4", "v5p") else int(count)


def chips_of_job(words):
    """The GPUs of a job of SLURM, whose options are the file's unless the command has others; the config's options."""
    (file,) = [word for word in words if word.endswith(".sbatch")]
    at = words.index(file)
    lines = re.findall(r"(?m)^#SBATCH +--([\w-]+)=(\S+)$", (ROOT / file).read_text())
    given = dict(lines) | dict(word.removeprefix("--").split("=") for word in words[1:at])
    return int(given["nodes"]) * int(given["gpus-per-node"]), words[at + 1 :]


def readme_launches():
    """(config, options of the config, chips) of every command of the README that starts a run."""
    for block in readme_blocks():
        env = {}
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(line)
            env |= dict(word.split("=", 1) for word in words[1:] if words[0] == "export" and "=" in word)
            if "launch/tpu_vm/create.sh" in words:
                yield env["CONFIG"], [], chips_of_type(env["ACCELERATOR"])
            if "launch/xpk/create.sh" in words:
                yield env["CONFIG"], [], chips_of_type(env["TPU_TYPE"])
            if "launch/gke/jobset-tpu.yaml" in words:
                chips = int(env["HOSTS"]) * int(env["CHIPS_PER_HOST"])
                assert re.fullmatch(rules.TOPOLOGIES[env["TPU"]][0], env["TOPOLOGY"])
                assert math.prod(map(int, env["TOPOLOGY"].split("x"))) == chips
                yield env["CONFIG"], [], chips
            if "launch/gke/jobset-gpu.yaml" in words:
                yield env["CONFIG"], [], int(env["HOSTS"]) * int(env["GPUS_PER_HOST"])
            if words[:1] == ["sbatch"]:
                chips, options = chips_of_job(words)
                yield env["CONFIG"], options, chips
            if words and words[-1].startswith("launch/gpu_host/run_"):
                yield env["CONFIG"], [], 1
            if words[:1] == ["sky"]:
                task = yaml.safe_load((ROOT / words[3]).read_text())
                kind = task["resources"]["accelerators"]
                chips = chips_of_type(kind) if kind.startswith("tpu-") else int(kind.split(":")[1])
                yield env["CONFIG"], [], task["num_nodes"] * chips


def test_readme_gives_every_config_the_chips_of_its_mesh():
    found = list(readme_launches())
    assert [chips for _, _, chips in found] == [64, 64, 64, 8, 8, 32, 32, 1, 1, 64, 8]
    for path, options, chips in found:
        cfg = configure(ROOT / path.removeprefix("/opt/jaxsi/"), options)
        mesh = AbstractMesh(meshlib.sizes(cfg.mesh, chips), meshlib.AXES, axis_types=(AxisType.Auto,) * 3)
        for _, part in parts_of(cfg):
            if isinstance(part, TrainConfig | RLConfig):
                part.check(mesh)


def test_quotas_in_the_readme_admit_its_runs():
    quotas = dict(re.findall(r"\b(TPU_QUOTA|GPU_QUOTA)=(\d+)", text_of("README.md")))
    hosts = re.findall(r"HOSTS=(\d+) (CHIPS|GPUS)_PER_HOST=(\d+)", text_of("README.md"))
    assert [kind for _, kind, _ in hosts] == ["CHIPS", "GPUS"]
    for count, kind, of_host in hosts:
        assert int(count) * int(of_host) <= int(quotas["TPU_QUOTA" if kind == "CHIPS" else "GPU_QUOTA"])


def test_image_user_may_write_to_the_bucket():
    user = re.search(r"(?m)^USER (\d+)$", text_of("containers/Dockerfile.tpu"))[1]
    for name in ("gke/jobset-tpu.yaml", "gke/jobset-gpu.yaml", "xpk/storage.sh"):
        assert f"uid={user},gid={user}" in text_of(name)


def test_user_service_outlives_the_login():
    (block,) = [block for block in readme_blocks() if "systemctl --user" in block]
    assert block.index('loginctl enable-linger "$USER"') < block.index("systemctl --user enable")


# ---- the scripts, run with tools that only say what they were asked --------------------------------------------------


def tool(folder, name, text):
    """A program of this name in the folder."""
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# gettext's, which a machine need not have
ENVSUBST = f"""#!{sys.executable}
import os, re, sys
names = re.findall("[A-Z_]+", sys.argv[1])
filled = lambda found: os.environ[found[1]] if found[1] in names else found[0]
print(re.sub(r"[$][{{]([A-Z_]+)[}}]", filled, sys.stdin.read()))
"""
# Writes down what it is asked; a TPU VM is there at once.
GCLOUD = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["LOG"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
asked = open(os.environ["LOG"]).read()
if "describe" in sys.argv and asked.count('"describe"') <= int(os.environ.get("DEAF", "0")):
    sys.exit("no connection")
if "describe" in sys.argv:
    print("ACTIVE" if '"delete"' in asked else os.environ.get("STATE", "ACTIVE"))
if "is-active" in sys.argv[-1]:
    print(os.environ.get("SERVICE", "active"))
if "summary.json" in sys.argv[-1] and asked.count("is-active") < int(os.environ.get("ROUNDS", "0")):
    sys.exit(1)
"""


@pytest.fixture
def tools(tmp_path):
    folder = tmp_path / "tools"
    folder.mkdir()
    return folder


def environment(tools, **given):
    return {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tools), "LANG": "C.UTF-8", **given}


def bash(name, *arguments, env):
    return subprocess.run(
        ["bash", LAUNCH / name, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("name", ["jobset-tpu.yaml", "jobset-gpu.yaml", "kueue.yaml"])
def test_file_is_filled_in_and_submitted(name, tools):
    tool(tools, "kubectl", '#!/usr/bin/env bash\necho "# $*"\ncat\n')
    tool(tools, "envsubst", ENVSUBST)
    done = bash("gke/apply.sh", LAUNCH / "gke" / name, env=environment(tools, **rules.VALUES))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# apply --filename=-\n")
    assert list(yaml.safe_load_all(done.stdout)) == list(yaml.safe_load_all(rules.rendered(text_of(f"gke/{name}"))))
    variable = re.search(r"\$\{([A-Z_]+)\}", text_of(f"gke/{name}"))[1]
    given = {key: value for key, value in rules.VALUES.items() if key != variable}
    failed = bash("gke/apply.sh", LAUNCH / "gke" / name, env=environment(tools, **given))
    assert failed.returncode != 0
    assert f"{variable} is not set; launch/README.md says what it is" in failed.stderr


def test_tpu_vm_is_created_with_its_command(tools, tmp_path):
    log = tmp_path / "log"
    tool(tools, "gcloud", GCLOUD)
    given = {"NAME": "a-1", "PROJECT": "p", "ZONE": "z", "ACCELERATOR": "v6e-16", "RUNTIME": "r", "BUCKET": "b",
             "CONFIG": "my configs/it's.py"}  # fmt: skip
    for name in ("create.sh", "install.sh", "start.sh", "watch.sh", "delete.sh"):
        done = bash(f"tpu_vm/{name}", env=environment(tools, LOG=str(log), **given))
        assert done.returncode == 0, done.stderr
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert asked[0] == ["compute", "tpus", "queued-resources", "create", "a-1", "--project=p", "--zone=z",
                        "--node-id=a-1", "--accelerator-type=v6e-16", "--runtime-version=r", "--spot"]  # fmt: skip
    (start,) = [words for words in asked if "worker_start.sh" in words[-1]]
    command = start[-1].removeprefix("--command=").replace("bash jaxsi/launch/tpu_vm/worker_start.sh", "env")
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"CONFIG=my configs/it's.py", "RUN_NAME=a-1"} <= set(told)
    for name in given:
        without = {key: value for key, value in given.items() if key != name}
        assert name in bash("tpu_vm/create.sh", env=environment(tools, **without)).stderr


def test_failed_query_does_not_count_as_an_existing_tpu_vm(tools, tmp_path):
    tool(tools, "gcloud", GCLOUD)
    given = {"NAME": "a-1", "PROJECT": "p", "ZONE": "z", "ACCELERATOR": "v6e-16", "RUNTIME": "r", "BUCKET": "b",
             "CONFIG": "c.py", "ASK_SECONDS": "0.01"}  # fmt: skip
    done = bash("tpu_vm/create.sh", env=environment(tools, LOG=str(tmp_path / "log"), DEAF="3", **given))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a-1: UNKNOWN\n" * 3
    given |= {"WAIT_SECONDS": "0"}
    done = bash("tpu_vm/create.sh", env=environment(tools, LOG=str(tmp_path / "log"), DEAF="99", **given))
    assert done.returncode == 1
    assert "the request is UNKNOWN after WAIT_SECONDS = 0; delete.sh takes it back" in done.stderr


def test_tokens_are_passed_to_the_run_if_they_are_set(tools, tmp_path):
    log, tokens = tmp_path / "log", tmp_path / "tokens.env"
    for name in ("gcloud", "xpk", "docker"):
        tool(tools, name, GCLOUD)
    given = {"NAME": "a-1", "PROJECT": "p", "ZONE": "z", "ACCELERATOR": "v6e-16", "RUNTIME": "r", "BUCKET": "b",
             "CONFIG": "c.py", "CLUSTER": "c", "TPU_TYPE": "v6e-16", "IMAGE": "i", "RUN_DIR": str(tmp_path / "run"),
             "LOG": str(log)}  # fmt: skip
    for more in ({}, {"TOKENS": str(tokens)}):
        log.write_text("")
        for name in ("tpu_vm/start.sh", "xpk/create.sh", "gpu_host/run_container.sh"):
            done = bash(name, env=environment(tools, **given, **more))
            assert done.returncode == 0, done.stderr
        asked = [json.loads(line) for line in log.read_text().splitlines()]
        assert len(asked) == (5 if more else 3)
        assert [words for words in asked if f"--env-file={tokens}" in words] == ([asked[3]] if more else [])
        assert {"--env=HF_TOKEN", "--env=OPENAI_API_KEY"} <= set(asked[-1])
        if more:
            assert asked[0][-1] == "--command=install --mode=600 /dev/null jaxsi-tokens.env"
            assert [str(tokens), "a-1:jaxsi-tokens.env"] == asked[1][4:6]
    assert '--property=EnvironmentFile="-$HOME/jaxsi-tokens.env"' in text_of("tpu_vm/worker_start.sh")


@pytest.mark.parametrize(
    ("state", "service", "again", "code"),
    [
        ("ACTIVE", "active\nactive", [], 0),
        ("ACTIVE", "activating", [], 0),
        ("ACTIVE", "active\ninactive", ["install", "start"], 0),
        ("SUSPENDED", "", ["delete", "create", "install", "start"], 0),
        ("ACTIVE", "active\nfailed", [], 1),
    ],
)
def test_watcher_recreates_a_preempted_tpu_vm(state, service, again, code, tools, tmp_path):
    log = tmp_path / "log"
    tool(tools, "gcloud", GCLOUD)
    given = {"NAME": "a", "PROJECT": "p", "ZONE": "z", "ACCELERATOR": "v6e-16", "RUNTIME": "r", "BUCKET": "b",
             "CONFIG": "c.py", "WATCH_SECONDS": "0"}  # fmt: skip
    env = environment(tools, LOG=str(log), STATE=state, SERVICE=service, ROUNDS="1", **given)
    done = bash("tpu_vm/watch.sh", env=env)
    assert done.returncode == code, done.stderr
    assert ("wrong usage" in done.stderr) == (code == 1)
    asked = log.read_text()
    seen = {"delete": '"delete"', "create": '"create"', "install": "worker_install.sh", "start": "worker_start.sh"}
    assert [name for name, word in seen.items() if word in asked] == again


def test_tpu_vm_survives_one_failed_query(tools, tmp_path):
    log = tmp_path / "log"
    tool(tools, "gcloud", GCLOUD)
    given = {"NAME": "a", "PROJECT": "p", "ZONE": "z", "ACCELERATOR": "v6e-16", "RUNTIME": "r", "BUCKET": "b",
             "CONFIG": "c.py", "WATCH_SECONDS": "0"}  # fmt: skip
    done = bash("tpu_vm/watch.sh", env=environment(tools, LOG=str(log), DEAF="1", ROUNDS="1", **given))
    assert done.returncode == 0, done.stderr
    assert log.read_text().count('"describe"') == 2
    assert '"delete"' not in log.read_text()


SRUN = f"""#!{sys.executable}
# Starts the tasks of a step on this machine, as srun tells them who they are, and ends with the highest exit code. Like
# srun it does not hand SIGTERM on: it kills its tasks. Where they are is in steps/JOB.0, for scancel.
import os, pathlib, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
for index in range(int(os.environ["SLURM_NTASKS"])):
    who = {{"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}}
    tasks.append(subprocess.Popen(words, env=os.environ | who))
steps = pathlib.Path(sys.argv[0]).parent / "steps"
steps.mkdir()
(steps / f"{{os.environ['SLURM_JOB_ID']}}.0").write_text(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

# As scancel signals the tasks of one step; a step that is not there is an error.
SCANCEL = f"""#!{sys.executable}
import os, pathlib, signal, sys
option, step = sys.argv[1:]
number = signal.Signals[f"SIG{{option.removeprefix('--signal=')}}"]
for pid in (pathlib.Path(sys.argv[0]).parent / "steps" / step).read_text().split():
    os.kill(int(pid), number)
"""


def slurm(tools, name, tmp_path, *options, **given):
    """A job of SLURM: its script under bash, with the environment that the batch shell has."""
    tool(tools, "srun", SRUN)
    tool(tools, "scancel", SCANCEL)
    tool(tools, "scontrol", f'#!/usr/bin/env bash\necho "$*" >>{tmp_path}/requeued\n')
    (tools / "bin").mkdir(exist_ok=True)
    who = {"VENV": str(tools), "IMAGE": "images.invalid/jaxsi", "SLURM_JOB_ID": "77",
           "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2"}  # fmt: skip
    env = environment(tools, **who | given)
    return subprocess.Popen(
        ["bash", LAUNCH / "slurm" / name, *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT,
    )  # fmt: skip


SCRIPTS = ["single_node.sbatch", "multi_node.sbatch", "multi_node_container.sbatch"]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (75, True), (134, False)])
def test_job_is_requeued_only_for_exit_codes_worth_it(name, code, again, tools, tmp_path):
    for folder in (tools, tools / "bin"):
        folder.mkdir(exist_ok=True)
        tool(folder, "jaxsi", f'#!/usr/bin/env bash\necho "$SLURM_PROCID $*" >>{tmp_path}/asked\nexit {code}\n')
    process = slurm(tools, name, tmp_path, "--mesh.fsdp", "-1", CONFIG="c.py", RUN_DIR=str(tmp_path / "run"))
    outs = process.communicate(timeout=60)
    assert process.returncode == code, outs
    wanted = f"run c.py --distributed --run-dir {tmp_path}/run --mesh.fsdp -1"
    assert sorted((tmp_path / "asked").read_text().splitlines()) == [f"0 {wanted}", f"1 {wanted}"]
    assert (tmp_path / "requeued").exists() == again


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(("code", "again"), [(75, True), (134, True), (0, False), (2, False)])
def test_job_signals_its_tasks_to_save_before_the_time_limit(name, code, again, tools, tmp_path):
    (tools / "bin").mkdir()
    saves = (
        f'trap "sleep 0.3; touch {tmp_path}/saved.$SLURM_PROCID; exit {code}" TERM\ntouch {tmp_path}/up.$SLURM_PROCID\n'
    )
    for folder in (tools, tools / "bin"):
        tool(folder, "jaxsi", f"#!/usr/bin/env bash\n{saves}while :; do sleep 0.1; done\n")
    process = slurm(tools, name, tmp_path, CONFIG="c.py", RUN_DIR=str(tmp_path / "run"))
    end = time.monotonic() + 30
    while len([*tmp_path.glob("up.*"), *tools.glob("steps/*")]) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    outs = process.communicate(timeout=60)
    assert process.returncode == code, outs
    assert len(list(tmp_path.glob("saved.*"))) == 2, outs
    assert (tmp_path / "requeued").exists() == again
    if again:
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"


# ---- the very commands, as two real processes ------------------------------------------------------------------------


def here(**given):
    """What the processes of this machine need beside what their launcher gives them: four fake devices each."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMPI_", "TPU_"))}
    return kept | cpu_devices(os.environ, 4) | {"PYTHONPATH": str(ROOT)} | given


def one_complete_run(directory, outs):
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"] == "complete", outs
    journal = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    assert journal
    status = subprocess.run(
        [sys.executable, "-m", "jaxsi", "status", str(directory), "--json"], env=here(), cwd=ROOT, capture_output=True,
        text=True, timeout=120, check=True,
    )  # fmt: skip
    stages = json.loads(status.stdout)["stages"]
    assert stages
    assert len({(stage["scope"], stage["stage"]) for stage in stages}) == len(stages)


def free_job_id():
    """A job id whose port, as JAX chooses it, nothing listens on."""
    for job in range(100, 4000):
        with socket.socket() as free:
            try:
                free.bind(("", job % 4096 + 61440))
            except OSError:
                continue
            return str(job)
    raise AssertionError("no free port")


@pytest.mark.slow
def test_slurm_job_is_one_run(tools, tmp_path):
    directory = tmp_path / "run"
    (tools / "bin").mkdir()
    tool(tools / "bin", "jaxsi", f'#!/usr/bin/env bash\nexec {sys.executable} -m jaxsi "$@"\n')
    given = here(CONFIG=str(MICRO), RUN_DIR=str(directory), SLURM_JOB_ID=free_job_id())
    given["PATH"] = f"{tools}:{given['PATH']}"
    process = slurm(tools, "multi_node.sbatch", tmp_path, **given)
    outs = process.communicate(timeout=600)
    assert process.returncode == 0, outs
    assert not (tmp_path / "requeued").exists()
    one_complete_run(directory, outs)


def pods(name, count):
    """(command, environment) of every pod of a JobSet, as its controller and the kubelet make them."""
    values = rules.VALUES | {"HOSTS": str(count), "CONFIG": str(MICRO)}
    item = yaml.safe_load(rules.rendered(text_of(name), values))
    (job,) = item["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    first = f"{item['metadata']['name']}-{job['name']}-0-0.{item['spec']['network']['subdomain']}"
    for index in range(count):
        annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
        env = {"JOB_COMPLETION_INDEX": str(index)}
        for entry in container.get("env", []):
            path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
            key = re.fullmatch(r"metadata\.annotations\['(.*)'\]", path)
            if "secretKeyRef" not in entry.get("valueFrom", {}):  # none is there
                env[entry["name"]] = annotations[key[1]] if key else entry["value"]
        yield container["command"], env, first


@pytest.mark.slow
def test_pods_of_a_jobset_are_one_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for command, env, first in pods("gke/jobset-gpu.yaml", 2):
        # The name of the first pod is one of the cluster; here it is this machine, with a free port.
        host, _, own = env["JAX_COORDINATOR_ADDRESS"].rpartition(":")
        assert host == first
        assert int(own) > 0
        env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        assert command[0] == "jaxsi"
        words = [sys.executable, "-m", "jaxsi", *command[1:-1], str(tmp_path / Path(command[-1]).name)]
        started.append(subprocess.Popen(
            words, env=here(**env), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))  # fmt: skip
    outs = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], outs
    one_complete_run(tmp_path / rules.VALUES["NAME"], outs)


def test_only_gke_configures_the_pods_of_a_tpu_slice(monkeypatch):
    from jax._src.clusters import GkeTpuCluster

    names = [f"run-1-workers-0-{index}.run-1" for index in range(4)]
    for index, (_, env, first) in enumerate(pods("gke/jobset-tpu.yaml", 4)):
        assert not [name for name in env if name.startswith("JAX_")]
        assert first == names[0]
        monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
        monkeypatch.setenv("MEGASCALE_SLICE_ID", "0")
        monkeypatch.setenv("TPU_WORKER_ID", env["JOB_COMPLETION_INDEX"])
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", ",".join(names))
        assert GkeTpuCluster.get_process_id() == index
        assert GkeTpuCluster.get_process_count() == 4
