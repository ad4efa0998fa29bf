#!/usr/bin/env bash
# Asks for a spot TPU VM and waits until it is there. Without --spot it is on demand.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/variables.sh"
WAIT_SECONDS="${WAIT_SECONDS:-86400}"
ASK_SECONDS="${ASK_SECONDS:-30}"
gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id="$NAME" \
  --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --spot
while now="$(state || echo UNKNOWN)"; [[ "$now" != ACTIVE ]]; do
  case "$now" in
    FAILED | SUSPENDED | SUSPENDING) echo "the request is $now; delete.sh, then create.sh again" >&2 && exit 1 ;;
  esac
  if ((SECONDS >= WAIT_SECONDS)); then
    echo "the request is $now after WAIT_SECONDS = $WAIT_SECONDS; delete.sh takes it back" >&2 && exit 1
  fi
  echo "$NAME: $now"
  sleep "$ASK_SECONDS"
done
