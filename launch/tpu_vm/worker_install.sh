#!/usr/bin/env bash
# On each worker: an environment with a newer Python than the system's, and the bucket as a folder.
set -euo pipefail
BUCKET="${BUCKET:?the bucket of the run directories}"
cd "$HOME" || exit 1
python3 -m pip install --quiet --user uv
"$HOME/.local/bin/uv" venv --allow-existing --python 3.12 jaxsi-venv
"$HOME/.local/bin/uv" pip install --quiet --python jaxsi-venv/bin/python "./jaxsi[tpu,endpoint]"
command -v gcsfuse >/dev/null || { echo "install gcsfuse on the workers first (launch/README.md)" >&2 && exit 1; }
mkdir -p runs
# A cache of what is in the bucket would hide what another host has just written.
mountpoint --quiet runs || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 \
  --metadata-cache-negative-ttl-secs=0 "$BUCKET" runs
