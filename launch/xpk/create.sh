#!/usr/bin/env bash
# Starts a run on a cluster of XPK. A disruption, a crash and a stop with everything saved (75) start it again; wrong usage
# (2) fails at once: it is not among the codes.
set -euo pipefail
PROJECT="${PROJECT:?the Google Cloud project}"
ZONE="${ZONE:?the zone of the cluster}"
CLUSTER="${CLUSTER:?the cluster that xpk has made}"
NAME="${NAME:?a name for the workload}"
TPU_TYPE="${TPU_TYPE:?the type and its size, such as v5p-128}"
IMAGE="${IMAGE:?the image of launch/containers/Dockerfile.tpu, by digest}"
CONFIG="${CONFIG:?a config in the image, such as /opt/jaxsi/configs/self_rewarding/llama2_70b_v5p128.py}"
RUN_DIR="${RUN_DIR:-/runs/$NAME}"
TOKENS="${TOKENS:-}"
tokens=()
if [[ -n "$TOKENS" ]]; then tokens=(--env-file="$TOKENS"); fi
xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
  --tpu-type="$TPU_TYPE" --num-slices=1 --spot --docker-image="$IMAGE" --storage=jaxsi-runs --priority=medium \
  --max-restarts=50 --restart-on-exit-codes=1,75 --termination-grace-period-seconds=300 \
  "${tokens[@]}" --command="$(printf '%q ' jaxsi run "$CONFIG" --distributed --run-dir "$RUN_DIR")"
