#!/usr/bin/env bash
# Until the run is complete: makes the TPU VM anew when it was preempted, installs, and goes on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/variables.sh"
finished="grep -qE '\"status\": *\"complete\"' runs/$(printf %q "$RUN_NAME")/summary.json"
while ! gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=0 --command="$finished" 2>/dev/null; do
  now="$(state || echo ABSENT)"
  if [[ "$now" != ACTIVE ]]; then
    echo "$NAME is $now; making it anew"
    bash "$here/delete.sh" || true
    if ! { bash "$here/create.sh" && bash "$here/install.sh" && bash "$here/start.sh"; }; then echo "trying again"; fi
  fi
  sleep 60
done
echo "$NAME: the run is complete; delete.sh gives the TPU VM back"
