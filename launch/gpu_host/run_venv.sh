#!/usr/bin/env bash
# One host with GPUs, in an environment of Python: one process drives all of them.
set -euo pipefail
VENV="${VENV:?an environment with jaxsi[cuda13,endpoint]}"
CONFIG="${CONFIG:?a config, such as configs/self_rewarding/qwen3_0p6b_1gpu.py}"
RUN_DIR="${RUN_DIR:?the run directory}"
exec "$VENV/bin/jaxsi" run "$CONFIG" --distributed --run-dir "$RUN_DIR"
