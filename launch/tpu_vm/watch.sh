#!/usr/bin/env bash
# Until the run is complete: makes the TPU VM anew when it was preempted, and starts the service again after a reboot.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/variables.sh"
WATCH_SECONDS="${WATCH_SECONDS:-60}"
finished="grep -qE '\"status\": *\"complete\"' runs/$(printf %q "$RUN_NAME")/summary.json"
while ! gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=0 --command="$finished" 2>/dev/null; do
  # That it cannot be asked for once is no reason to give it back.
  now="$(state || { sleep "$WATCH_SECONDS" && state; } || echo ABSENT)"
  service="$(everywhere "systemctl is-active jaxsi.service || true" 2>/dev/null || echo unreachable)"
  if [[ "$now" != ACTIVE ]]; then
    echo "$NAME is $now; making it anew"
    bash "$here/delete.sh" || true
    if ! { bash "$here/create.sh" && bash "$here/install.sh" && bash "$here/start.sh"; }; then echo "trying again"; fi
  elif [[ "$service" == *failed* ]]; then
    echo "$NAME: wrong usage, or more crashes than restarts; journalctl --unit=jaxsi on the workers says what" >&2
    exit 1
  elif [[ "$service" == *inactive* ]]; then
    echo "$NAME: the service is not there; starting it"
    if ! { bash "$here/install.sh" && bash "$here/start.sh"; }; then echo "trying again"; fi
  fi
  sleep "$WATCH_SECONDS"
done
echo "$NAME: the run is complete; delete.sh gives the TPU VM back"
