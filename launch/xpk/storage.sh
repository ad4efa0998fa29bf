#!/usr/bin/env bash
# Makes the bucket known to the cluster, once; workloads that name it have it at /runs.
set -euo pipefail
PROJECT="${PROJECT:?the Google Cloud project}"
ZONE="${ZONE:?the zone of the cluster}"
CLUSTER="${CLUSTER:?the cluster that xpk has made}"
BUCKET="${BUCKET:?the bucket of the run directories, with a hierarchical namespace}"
xpk storage attach jaxsi-runs --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --type=gcsfuse \
  --bucket="$BUCKET" --size=1 --mount-point=/runs --readonly=false --auto-mount=false \
  --mount-options="implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0,uid=1000,gid=1000"
