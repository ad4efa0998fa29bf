# shellcheck shell=bash disable=SC2034
# What every script of this folder needs; export it, or write it here.
set -euo pipefail
NAME="${NAME:?a name for the TPU VM and its request, such as jaxsi-1}"
PROJECT="${PROJECT:?the Google Cloud project}"
ZONE="${ZONE:?a zone that has such TPUs, such as us-east5-b}"
ACCELERATOR="${ACCELERATOR:?the type and its size, such as v5p-128}"
RUNTIME="${RUNTIME:?the runtime of that type, such as v2-alpha-tpuv5}"
BUCKET="${BUCKET:?the bucket of the run directories, with a hierarchical namespace; its name alone}"
CONFIG="${CONFIG:?a config of this repository, such as configs/self_rewarding/llama2_70b_v5p128.py}"
RUN_NAME="${RUN_NAME:-$NAME}"
TOKENS="${TOKENS:-}" # a file of lines such as HF_TOKEN=..., or nothing
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
place=(--project="$PROJECT" --zone="$ZONE")
state() { gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format="value(state.state)"; }
everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"; }
