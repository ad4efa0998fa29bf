#!/usr/bin/env bash
# Asks for a spot TPU VM and waits until it is there. Without --spot it is on demand.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/variables.sh"
gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id="$NAME" \
  --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --spot
while now="$(state)" && [[ "$now" != ACTIVE ]]; do
  case "$now" in
    FAILED | SUSPENDED | SUSPENDING) echo "the request is $now; delete.sh, then create.sh again" >&2 && exit 1 ;;
  esac
  echo "$NAME: $now"
  sleep 30
done
