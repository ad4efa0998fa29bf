#!/usr/bin/env bash
# One host with GPUs, in a container: one process drives all of them. docker stop (SIGTERM) has it save;
# Ctrl-C does not: what came after the last checkpoint is lost.
set -euo pipefail
IMAGE="${IMAGE:?the image of launch/containers/Dockerfile.cuda, by digest}"
CONFIG="${CONFIG:?a config in the image, such as /opt/jaxsi/configs/self_rewarding/qwen3_0p6b_1gpu.py}"
RUN_DIR="${RUN_DIR:?the run directory on this host}"
mkdir -p "$RUN_DIR"
exec docker run --rm --name=jaxsi --gpus=all --shm-size=8g --stop-timeout=300 --user="$(id -u):$(id -g)" \
  --env=HOME=/tmp --env=HF_TOKEN --env=OPENAI_API_KEY --volume="$RUN_DIR:$RUN_DIR" --workdir="$RUN_DIR" \
  "$IMAGE" run "$CONFIG" --distributed --run-dir "$RUN_DIR"
