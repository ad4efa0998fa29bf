#!/usr/bin/env bash
# Installs the last commit of this checkout on all workers, and mounts the bucket there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/variables.sh"
archive="$(mktemp -d)/jaxsi.tar.gz"
git -C "$here/../.." archive --format=tar.gz --prefix=jaxsi/ --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$NAME:jaxsi.tar.gz" "${place[@]}" --worker=all
everywhere "tar -xzf jaxsi.tar.gz && BUCKET=$(printf %q "$BUCKET") bash jaxsi/launch/tpu_vm/worker_install.sh"
