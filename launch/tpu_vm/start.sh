#!/usr/bin/env bash
# Starts the run on all workers, or goes on with it. It does not depend on this shell.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/variables.sh"
if [[ -n "$TOKENS" ]]; then
  everywhere "install --mode=600 /dev/null jaxsi-tokens.env"
  gcloud compute tpus tpu-vm scp "$TOKENS" "$NAME:jaxsi-tokens.env" "${place[@]}" --worker=all
fi
everywhere "CONFIG=$(printf %q "$CONFIG") RUN_NAME=$(printf %q "$RUN_NAME") bash jaxsi/launch/tpu_vm/worker_start.sh"
