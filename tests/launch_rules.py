"""Whether a file of launch/ would be taken by the tool that reads it, and says what this repository's files are to say.

``problems(name, text)`` is all there is to ask: a list of sentences, empty for a good file. ``name`` is the path below
launch/; the text need not be the file's, so that tests can plant mistakes.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import launch_schemas as schemas
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
FLAGS = json.loads((Path(__file__).parent / "golden" / "launch_flags.json").read_text())
KUBERNETES = "1.34"
SAVE_SECONDS = 120  # what a save may take: less than every time that is left between SIGTERM and SIGKILL
RUN = ["run", "$CONFIG", "--distributed", "--run-dir", "$RUN_DIR"]  # what is run, everywhere

TOKENS = ("HF_TOKEN", "OPENAI_API_KEY")  # of the hub, and of SRT's critic

# What is filled in where a file leaves it open.
VALUES = {
    "NAME": "run-1", "NAMESPACE": "default", "IMAGE": "images.invalid/jaxsi@sha256:" + "0" * 64,
    "CONFIG": "configs/self_rewarding/toy.py", "BUCKET": "runs", "SERVICE_ACCOUNT": "jaxsi", "TPU": "tpu-v6e-slice",
    "TOPOLOGY": "4x4", "HOSTS": "4", "CHIPS_PER_HOST": "4", "GPU": "nvidia-h100-80gb", "GPUS_PER_HOST": "8",
    "TPU_QUOTA": "16", "GPU_QUOTA": "32",
}  # fmt: skip

# Label of the nodes -> (a regular expression of the topologies of more than one host, chips of a host).
TOPOLOGIES = {
    "tpu-v5-lite-podslice": (r"2x4|4x4|4x8|8x8|8x16|16x16", (4,)),
    "tpu-v6e-slice": (r"2x4|4x4|4x8|8x8|8x16|16x16", (4,)),
    "tpu-v4-podslice": (r"\d+x\d+x\d+", (4,)),
    "tpu-v5p-slice": (r"\d+x\d+x\d+", (4,)),
}

# Sections of a unit -> their keys that are used here, as systemd 252 names them.
UNIT = {
    "Unit": {"Description", "StartLimitIntervalSec", "StartLimitBurst"},
    "Service": {
        "EnvironmentFile", "WorkingDirectory", "ExecStart", "Restart", "RestartSec", "RestartPreventExitStatus",
        "KillMode", "TimeoutStopSec",
    },
    "Install": {"WantedBy"},
}  # fmt: skip
PROPERTIES = {*UNIT["Unit"], *UNIT["Service"], "LimitMEMLOCK"}


def problems(name: str, text: str) -> list[str]:
    """What is wrong with the file ``name`` if it has this text."""
    unwanted = sorted(set(re.findall(r":latest\b|\bprivileged\b", without_comments(text))))
    found = [f"{word} is not for a launch file" for word in unwanted]
    if name.endswith((".sh", ".sbatch")):
        found += shell(name, text)
    elif name.endswith(".yaml"):
        found += from_yaml(name, text)
    elif "Dockerfile" in name:
        found += dockerfile(name, text)
    elif name.endswith(".service"):
        found += unit(text)
    elif not name.endswith((".md", ".shellcheckrc")):
        found.append(f"{name}: no rule reads such a file")
    return found


def without_comments(text: str) -> str:
    return re.sub(r"(?m)(^|\s)#.*$", "", text)


# ---- shell -----------------------------------------------------------------------------------------------------------


def shell(name: str, text: str) -> list[str]:
    """A script: bash reads it, shellcheck has nothing to say, its options exist, its variables are required."""
    found = syntax(text, LAUNCH / Path(name).parent)
    if not re.search(r"(?m)^set -euo pipefail$", text):
        found.append("set -euo pipefail is missing")
    if not name.endswith("variables.sh") and not text.startswith("#!/usr/bin/env bash\n"):
        found.append("the first line is not #!/usr/bin/env bash")
    found += [f"{line.strip()} goes on where that fails: || exit" for line in re.findall(r"(?m)^ *cd [^|\n]*$", text)]
    found += [problem for command in commands(text) for problem in options(command)]
    own = text + ((LAUNCH / Path(name).parent / "variables.sh").read_text() if "/variables.sh" in text else "")
    for variable in sorted(set(re.findall(r"\$\{?([A-Z][A-Z_]+)", without_comments(text)))):
        given = re.search(rf'(?m)^{variable}="(\$\{{{variable}:[?-]|\$HOME/)', own)
        if not given and variable not in ("HOME", "BASH_SOURCE", "SLURM_JOB_ID"):
            found.append(f'{variable} is used without {variable}="${{{variable}:?what it is}}"')
    if re.search(r'(?m)^IMAGE="\$\{IMAGE:-', text):
        found.append("IMAGE has a default; it is for the user to name")
    if name.endswith(".sbatch"):
        found += batch(text)
    return found


def syntax(text: str, folder: Path) -> list[str]:
    bash = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    checker = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or "shellcheck"
    arguments = [
        checker,
        "--norc",
        "--external-sources",
        f"--source-path={folder}",
        "--shell=bash",
        "--format=gcc",
        "-",
    ]
    checked = subprocess.run(arguments, input=text, capture_output=True, text=True, check=False)
    return [line for line in (bash.stderr + checked.stdout + checked.stderr).splitlines() if line]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of a tool whose options are known, sbatch's among them."""
    for line in re.findall(r"(?m)^#SBATCH +(.*)$", text):
        yield ["sbatch", *shlex.split(line)]
    for line in re.sub(r"\\\n", " ", without_comments(text)).splitlines():
        try:
            words = shlex.split(line)
        except ValueError:  # a quotation over several lines
            continue
        for start, word in enumerate(words):
            if word.split("(")[-1] not in {name.split()[0] for name in FLAGS}:
                continue
            ends = (
                at for at, later in enumerate(words[start:], start) if later in ("|", "||", "&&", "&", ";", "do", "}")
            )
            yield [word.split("(")[-1], *words[start + 1 : next(ends, len(words))]]


def options(words: list[str]) -> list[str]:
    """What is wrong with the options of a command."""
    name = next((name for name in FLAGS if words[: len(name.split())] == name.split()), None)
    if name is None:
        return [f"{' '.join(words[:5])}: no options are known for such a command"]
    found = []
    for word in words[len(name.split()) :]:
        if name in ("sbatch", "srun", "systemd-run", "docker run") and not word.startswith("-"):
            break  # the command that it runs
        flag, _, value = word.rstrip(";").partition("=")
        if flag == "--property" and value.split("=")[0] not in PROPERTIES:
            found.append(f"{name}: there is no property {value}")
        if flag.startswith("-") and flag not in FLAGS[name]["flags"] and flag != "--":
            found.append(f"{name} has no option {flag} ({FLAGS[name]['of']})")
    return found


def batch(text: str) -> list[str]:
    """A job of SLURM comes back after its time limit and after 75, and has time to save."""
    given = dict(line.lstrip("-").partition("=")[::2] for line in re.findall(r"(?m)^#SBATCH +(.*)$", text))
    found = [
        f"#SBATCH --{name} is missing" for name in ("requeue", "signal", "open-mode", "nodes") if name not in given
    ]
    signal = re.fullmatch(r"B:TERM@(\d+)", given.get("signal", ""))
    if not signal or int(signal[1]) < SAVE_SECONDS:
        found.append(
            f"--signal={given.get('signal')}; SIGTERM goes to the batch shell at least {SAVE_SECONDS} s before the end"
        )
    if given.get("open-mode") != "append":
        found.append("--open-mode is not append: the output of the job so far would be lost")
    if given.get("ntasks-per-node") != given.get("gpus-per-node"):
        found.append("JAX takes one task for each GPU: --ntasks-per-node is --gpus-per-node")
    body = without_comments(text)
    for what in (
        "trap save TERM",
        'scancel --signal=TERM "$SLURM_JOB_ID.0"',
        'scontrol requeue "$SLURM_JOB_ID"',
        '"$code" -eq 75',
    ):
        if what not in body:
            found.append(f"{what} is missing")
    return found


# ---- what is run -----------------------------------------------------------------------------------------------------


def entry(text: str) -> list[str]:
    """The words with which a script starts jaxsi, variables unexpanded; [] where it does not."""
    for line in re.sub(r"\\\n", " ", without_comments(text)).splitlines():
        found = re.search(r'(?:"[^" ]*/bin/)?jaxsi"? run .*--run-dir "?\$\{?RUN_DIR\}?"?', line)
        if found:
            return shlex.split(found.group())
    return []


# ---- Kubernetes and SkyPilot -----------------------------------------------------------------------------------------


class Once(yaml.SafeLoader):
    """YAML in which a key stands once."""


def _mapping(loader: Once, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    if len(set(keys)) < len(keys):
        raise yaml.YAMLError(f"a key stands twice among {keys}")
    return loader.construct_mapping(node, deep=True)


Once.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def rendered(text: str, values: dict[str, str] = VALUES) -> str:
    """As envsubst does it. Raises: KeyError for a variable without a value."""
    return re.sub(r"\$\{([A-Z_]+)\}", lambda found: values[found[1]], text)


def from_yaml(name: str, text: str) -> list[str]:
    try:
        objects = list(yaml.load_all(rendered(text), Once))
    except (yaml.YAMLError, KeyError) as error:
        return [f"{type(error).__name__}: {error}"]
    if name.startswith("skypilot/"):
        return [problem for task in objects for problem in skypilot(task)]
    found = []
    for item in objects:
        schema = (
            schemas.JOBSET if "jobset" in name else schemas.QUEUES.get(item.get("kind"), {"const": "a kind of kueue"})
        )
        found += against(schema, item)
    if not found and "jobset" in name:
        found += [problem for item in objects for problem in jobset(item, text)]
    if not found and "kueue" in name:
        found += queues(objects)
    return found


def against(schema: dict[str, Any], item: Any) -> list[str]:
    errors = jsonschema.Draft202012Validator(schema).iter_errors(item)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors]


def jobset(item: dict[str, Any], text: str) -> list[str]:
    """The jobs of a JobSet by Kubernetes' own schema, and what no schema says."""
    found = []
    for replicated in item["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **replicated["template"]}
        try:
            kubernetes_validate.validate(job, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{'.'.join(map(str, error.path))}: {error.message}")
        else:
            found += pods(job["spec"], item)
    if item["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name") not in local_queues():
        found.append("the label kueue.x-k8s.io/queue-name names no LocalQueue of kueue.yaml")
    if "image: ${IMAGE}\n" not in text:
        found.append("the image is not ${IMAGE}, which a user must name")
    if item["spec"].get("network", {}).get("subdomain") != item["metadata"]["name"]:
        found.append("the subdomain is not the JobSet's name, at which its processes find each other")
    return found + failures(item["spec"].get("failurePolicy", {}))


def failures(policy: dict[str, Any]) -> list[str]:
    """Wrong usage ends the JobSet; a disruption and 75 use up no restart. The first rule that fits is taken."""
    said = {
        2: "Container jaxsi for pod default/x failed with exit code 2 matching FailJob rule at index 1",
        75: "Container jaxsi for pod default/x failed with exit code 75 matching FailJob rule at index 1",
        0: "Pod default/x has condition DisruptionTarget matching FailJob rule at index 0",
    }
    found = []
    for code, message in said.items():
        action = "RestartJobSet"
        for rule in policy.get("rules", []):
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if "PodFailurePolicy" in rule.get("onJobFailureReasons", ["PodFailurePolicy"]) and any(
                re.search(pattern, message) for pattern in patterns
            ):
                action = rule["action"]
                break
        wanted = "FailJobSet" if code == 2 else "RestartJobSetAndIgnoreMaxRestarts"
        if action != wanted:
            found.append(f"{message!r} leads to {action}, not to {wanted}")
    return found if policy.get("maxRestarts") else [*found, "maxRestarts is missing: the first crash would be the last"]


def pods(spec: dict[str, Any], item: dict[str, Any]) -> list[str]:
    pod, found = spec["template"]["spec"], []
    if spec.get("parallelism") != spec.get("completions") or spec.get("completionMode") != "Indexed":
        found.append("parallelism and completions are the number of hosts, completionMode is Indexed")
    if spec.get("backoffLimit") != 0:
        found.append("backoffLimit is not 0: a pod alone would be started again, and its peers wait for the old one")
    if pod.get("restartPolicy") != "Never":
        found.append(f"restartPolicy is {pod.get('restartPolicy')!r}; with podFailurePolicy it is Never")
    grace = pod.get("terminationGracePeriodSeconds", 30)
    if grace < SAVE_SECONDS:
        found.append(f"terminationGracePeriodSeconds is {grace}; a save may take {SAVE_SECONDS}")
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    codes = [set(rule["onExitCodes"]["values"]) for rule in rules if "onExitCodes" in rule]
    disrupted = [on["type"] for rule in rules[:1] for on in rule.get("onPodConditions", [])]
    if codes != [{2, 75}] or disrupted != ["DisruptionTarget"] or {rule["action"] for rule in rules} != {"FailJob"}:
        found.append("podFailurePolicy fails the job for DisruptionTarget first, then for exit codes 2 and 75")
    (container,) = pod["containers"]
    named = {rule["onExitCodes"].get("containerName") for rule in rules if "onExitCodes" in rule}
    if named != {container["name"]}:
        found.append(f"the exit codes are those of {named}, the container is {container['name']}")
    where = f"/runs/{item['metadata']['name']}"
    if container.get("command") != ["jaxsi", "run", VALUES["CONFIG"], "--distributed", "--run-dir", where]:
        found.append(f"the command is {container.get('command')}")
    secrets = [entry["valueFrom"].get("secretKeyRef") for entry in container.get("env", []) if "valueFrom" in entry]
    for name in TOKENS:
        if {"name": "jaxsi-tokens", "key": name, "optional": True} not in secrets:
            found.append(f"{name} is not that of the Secret jaxsi-tokens, which need not be there")
    mounts, volumes = ({each["name"] for each in items} for items in (container["volumeMounts"], pod["volumes"]))
    if mounts != volumes or "/runs" not in [mount["mountPath"] for mount in container["volumeMounts"]]:
        found.append("the volumes and their mounts differ, or none is at /runs")
    bucket = [volume["csi"] for volume in pod["volumes"] if "csi" in volume]
    cached = "metadata-cache:ttl-secs:0" not in str(bucket)
    if cached or [csi["driver"] for csi in bucket] != ["gcsfuse.csi.storage.gke.io"]:
        found.append("the bucket is not mounted by gcsfuse.csi.storage.gke.io without a cache of its metadata")
    annotations = spec["template"].get("metadata", {}).get("annotations", {})
    if annotations.get("gke-gcsfuse/volumes") != "true":
        found.append("without the annotation gke-gcsfuse/volumes GKE mounts no bucket")
    return found + chips(spec, pod, container)


def chips(spec: dict[str, Any], pod: dict[str, Any], container: dict[str, Any]) -> list[str]:
    """The hosts and their chips are the slice's; a process of a GPU host knows who it is."""
    limits, labels = container["resources"]["limits"], pod.get("nodeSelector", {})
    if set(limits) == {"nvidia.com/gpu"}:
        known = {entry["name"] for entry in container.get("env", [])}
        wanted = {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
        found = [f"{name} is not given" for name in sorted(wanted - known)]
        return found if "cloud.google.com/gke-accelerator" in labels else [*found, "no GPU is selected"]
    kind, topology = (labels.get(f"cloud.google.com/gke-tpu-{name}", "") for name in ("accelerator", "topology"))
    if set(limits) != {"google.com/tpu"} or kind not in TOPOLOGIES:
        return [f"limits {limits} and a TPU {kind!r}: the one is google.com/tpu, the other of {sorted(TOPOLOGIES)}"]
    shapes, of_host = TOPOLOGIES[kind]
    if not re.fullmatch(shapes, topology):
        return [f"{kind} has no topology {topology!r} of several hosts"]
    product = 1
    for side in topology.split("x"):
        product *= int(side)
    count = limits["google.com/tpu"]
    if count not in of_host or product != spec["parallelism"] * count:
        return [f"{topology} has {product} chips, and {spec['parallelism']} hosts of {count} have others"]
    return []


def local_queues() -> set[str]:
    objects = yaml.load_all(rendered((LAUNCH / "gke" / "kueue.yaml").read_text()), Once)
    return {item["metadata"]["name"] for item in objects if item["kind"] == "LocalQueue"}


def queues(objects: list[dict[str, Any]]) -> list[str]:
    """The objects of a queue name each other, and every flavour is spot."""
    of = {kind: [item for item in objects if item["kind"] == kind] for kind in schemas.QUEUES}
    flavours = {item["metadata"]["name"]: item["spec"] for item in of["ResourceFlavor"]}
    found = [f"{name} is not spot" for name, spec in flavours.items()
             if spec.get("nodeLabels", {}).get("cloud.google.com/gke-spot") != "true"]  # fmt: skip
    for queue in of["ClusterQueue"]:
        for group in queue["spec"]["resourceGroups"]:
            for flavour in group["flavors"]:
                if flavour["name"] not in flavours:
                    found.append(f"there is no ResourceFlavor {flavour['name']}")
                if [each["name"] for each in flavour["resources"]] != group["coveredResources"]:
                    found.append(
                        f"the quotas of {flavour['name']} are not those of the covered resources, in their order"
                    )
    names = {item["metadata"]["name"] for item in of["ClusterQueue"]}
    found += [f"there is no ClusterQueue {item['spec']['clusterQueue']}" for item in of["LocalQueue"]
              if item["spec"]["clusterQueue"] not in names]  # fmt: skip
    return found if of["LocalQueue"] else [*found, "there is no LocalQueue"]


def skypilot(task: dict[str, Any]) -> list[str]:
    found = against(schemas.SKYPILOT, task)
    if found:
        return found
    header = "#!/usr/bin/env bash\n"
    given = "".join(f'{name}="${{{name}:?}}"\n' for name in [*task["envs"], "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES",
                                                          "SKYPILOT_NODE_RANK"])  # fmt: skip
    for part in ("setup", "run"):
        found += [line for line in syntax(header + given + task[part], LAUNCH) if "SC2034" not in line]
        if not task[part].startswith("set -euo pipefail\n"):
            found.append(f"{part} does not begin with set -euo pipefail")
    if entry(task["run"])[1:] != RUN:
        found.append(f"{entry(task['run'])} is not how jaxsi is run")
    recovery = task["resources"]["job_recovery"]
    codes = set(recovery.get("recover_on_exit_codes", []))
    if recovery["max_restarts_on_errors"] != 0 or 75 not in codes or codes & {0, 1, 2}:
        found.append("a restart is for 75 and for processes that died, not for wrong usage (2)")
    if not task["resources"]["use_spot"] or {mount["mode"] for mount in task["file_mounts"].values()} != {"MOUNT"}:
        found.append("spot first, and the bucket mounted")
    if any(value is not None for value in task["envs"].values()):
        found.append("variables are the user's to give: null in the file")
    if task["num_nodes"] > 1 and not all(name in task["run"] for name in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID")):
        found.append("of several nodes each must be told who it is")
    return found


# ---- containers and services -----------------------------------------------------------------------------------------

INSTRUCTIONS = {"ARG", "FROM", "COPY", "WORKDIR", "RUN", "ENV", "USER", "STOPSIGNAL", "ENTRYPOINT"}
EXTRAS = {"tpu": '".[tpu,endpoint]"', "cuda": '".[cuda13,endpoint]"', "cpu": '".[endpoint]"'}


def dockerfile(name: str, text: str) -> list[str]:
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*$", "", text)).splitlines()
    steps = [tuple(line.split(None, 1)) for line in lines if line.strip()]
    found = [f"{step[0]} is not an instruction that these files use" for step in steps if step[0] not in INSTRUCTIONS]
    if found or any(len(step) != 2 for step in steps):
        return found or ["an instruction without arguments"]
    if steps[:2] != [("ARG", "BASE"), ("FROM", "${BASE}")] or len([step for step in steps if step[0] == "FROM"]) != 1:
        found.append("the base is ARG BASE without a default, then FROM ${BASE}")
    installs = [rest for word, rest in steps if word == "RUN" and "pip install" in rest]
    extra = EXTRAS[name.rsplit(".", 1)[1]]
    if len(installs) != 1 or not installs[0].endswith(f" {extra}") or "--constraint constraints.txt" not in installs[0]:
        found.append(f"pip installs {extra} of this repository with constraints.txt, once")
    users = [rest for word, rest in steps if word == "USER"]
    if not users or users[-1] in ("0", "root"):
        found.append("the user is root")
    if [rest for word, rest in steps if word == "WORKDIR"][-1:] != ["/runs"]:
        found.append("the working directory is not /runs, where what a config writes beside the run would last")
    if [rest for word, rest in steps if word == "ENTRYPOINT"] != ['["jaxsi"]']:
        found.append('the entry point is not ["jaxsi"]')
    for word, rest in steps:
        if word == "RUN":
            found += syntax(f"#!/bin/sh\n{rest}\n", LAUNCH)
    return found


def unit(text: str) -> list[str]:
    section, found, given = "", [], {}
    for line in filter(None, without_comments(text).splitlines()):
        if line.startswith("["):
            section = line.strip("[]")
            if section not in UNIT:
                found.append(f"there is no section {section}")
            continue
        key, equals, value = line.partition("=")
        if not equals or key not in UNIT.get(section, ()):
            found.append(f"{key} is not a key of [{section}]")
        given[key] = value
    if given.get("Restart") != "on-failure" or given.get("RestartPreventExitStatus") != "2":
        found.append("Restart=on-failure with RestartPreventExitStatus=2: not after wrong usage")
    if given.get("StartLimitIntervalSec") != "1d" or not given.get("StartLimitBurst", "").isdecimal():
        found.append("StartLimitIntervalSec=1d with a StartLimitBurst: a run that always fails is not started for ever")
    if not given.get("TimeoutStopSec", "").isdecimal() or int(given["TimeoutStopSec"]) < SAVE_SECONDS:
        found.append(f"TimeoutStopSec is less than a save may take ({SAVE_SECONDS} s)")
    return found
