"""What the outer objects of the launch files may hold, field by field: JobSet, the objects of queues, SkyPilot's tasks.

Strict: what is not named is refused, as the servers would drop it silently. The inner Job is Kubernetes' own schema's.
"""

from typing import Any


def record(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    fields = {**required, **optional}
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def several(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
FLAG = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
METADATA = record({"name": NAME}, namespace=NAME, labels=TEXTS, annotations=TEXTS)


def version(text: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return record({"apiVersion": {"const": text}, "kind": {"const": kind}, "metadata": METADATA, "spec": spec})


# jobset.x-k8s.io/v1alpha2, the fields of its release 0.13.
RULE = record(
    {
        "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
        "action": {
            "enum": [
                "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
                "RestartJobAndIgnoreMaxRestarts",
            ]
        },
    },
    onJobFailureReasons=several({"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]}),
    onJobFailureMessagePatterns=several(TEXT),
    targetReplicatedJobs=several(NAME),
)  # fmt: skip
JOBSET = version(
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
    record(
        {"replicatedJobs": several(record({"name": NAME, "template": {"type": "object"}}, replicas=COUNT))},
        network=record({}, enableDNSHostnames=FLAG, subdomain=NAME, publishNotReadyAddresses=FLAG),
        failurePolicy=record(
            {"maxRestarts": COUNT}, restartStrategy={"enum": ["Recreate", "BlockingRecreate"]}, rules=several(RULE)
        ),
        successPolicy=record({"operator": {"enum": ["All", "Any"]}}, targetReplicatedJobs=several(NAME)),
        suspend=FLAG,
        ttlSecondsAfterFinished=COUNT,
    ),
)

# kueue.x-k8s.io/v1beta2
KUEUE = "kueue.x-k8s.io/v1beta2"
TOLERATION = record(
    {"key": TEXT, "operator": {"enum": ["Equal", "Exists"]}},
    value=TEXT,
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
QUOTA = record({"name": TEXT, "nominalQuota": COUNT})
GROUP = record(
    {"coveredResources": several(TEXT), "flavors": several(record({"name": NAME, "resources": several(QUOTA)}))}
)
QUEUES = {
    "ResourceFlavor": version(KUEUE, "ResourceFlavor", record({}, nodeLabels=TEXTS, tolerations=several(TOLERATION))),
    "ClusterQueue": version(
        KUEUE,
        "ClusterQueue",
        record(
            {"resourceGroups": several(GROUP), "namespaceSelector": record({}, matchLabels=TEXTS)},
            queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
            stopPolicy={"enum": ["None", "Hold", "HoldAndDrain"]},
        ),
    ),
    "LocalQueue": version(KUEUE, "LocalQueue", record({"clusterQueue": NAME})),
}

# A task of SkyPilot 0.14
CODE = {"type": "integer", "minimum": 1, "maximum": 255}
RECOVERY = record(
    {"strategy": {"enum": ["EAGER_NEXT_REGION", "FAILOVER"]}, "max_restarts_on_errors": COUNT},
    recover_on_exit_codes=several(CODE),
)
SKYPILOT = record(
    {
        "name": NAME,
        "resources": record(
            {"accelerators": TEXT, "use_spot": FLAG, "job_recovery": RECOVERY},
            infra=TEXT,
            accelerator_args=record({}, runtime_version=TEXT, tpu_vm=FLAG),
            image_id=TEXT,
            disk_size={"type": "integer"},
        ),
        "num_nodes": {"type": "integer", "minimum": 1},
        "envs": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        "file_mounts": {
            "type": "object",
            "additionalProperties": record(
                {
                    "source": {"type": "string", "pattern": "^(gs|s3)://"},
                    "mode": {"enum": ["MOUNT", "MOUNT_CACHED", "COPY"]},
                }
            ),
        },
        "setup": TEXT,
        "run": TEXT,
    },
    workdir=TEXT,
    secrets={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
)
