#!/usr/bin/env bash
# Ends a workload. The run directory stays in the bucket.
set -euo pipefail
PROJECT="${PROJECT:?the Google Cloud project}"
ZONE="${ZONE:?the zone of the cluster}"
CLUSTER="${CLUSTER:?the cluster that xpk has made}"
NAME="${NAME:?the name of the workload}"
xpk workload delete --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME"
