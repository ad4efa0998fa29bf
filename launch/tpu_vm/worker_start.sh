#!/usr/bin/env bash
# On each worker: the run as a service, which is started again after a crash, up to fifty times a day, but not after wrong
# usage (2). A stop of the host sends SIGTERM and leaves it five minutes to save. Relative paths of a config are the bucket's.
set -euo pipefail
CONFIG="${CONFIG:?the config}"
RUN_NAME="${RUN_NAME:?the name of the run directory in the bucket}"
RUN_DIR="$HOME/runs/$RUN_NAME"
if [[ "$CONFIG" != /* ]]; then CONFIG="$HOME/jaxsi/$CONFIG"; fi
sudo systemctl stop jaxsi.service 2>/dev/null || true
sudo systemctl reset-failed jaxsi.service 2>/dev/null || true
sudo systemd-run --unit=jaxsi --uid="$(id -u)" --gid="$(id -g)" --working-directory="$HOME/runs" \
  --property=Restart=on-failure --property=RestartSec=10 --property=RestartPreventExitStatus=2 \
  --property=StartLimitIntervalSec=1d --property=StartLimitBurst=50 --property=TimeoutStopSec=300 --property=KillMode=mixed \
  --property=LimitMEMLOCK=infinity --property=EnvironmentFile="-$HOME/jaxsi-tokens.env" \
  --setenv=PYTHONUNBUFFERED=1 \
  "$HOME/jaxsi-venv/bin/jaxsi" run "$CONFIG" --distributed --run-dir "$RUN_DIR"
