#!/usr/bin/env bash
# Gives the TPU VM back. The run directory stays in the bucket.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/variables.sh"
gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
