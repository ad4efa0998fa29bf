#!/usr/bin/env bash
# Makes the bucket, once: folders in it are real, and renamed in one step.
set -euo pipefail
PROJECT="${PROJECT:?the Google Cloud project}"
BUCKET="${BUCKET:?a name for the bucket}"
LOCATION="${LOCATION:?the region of the TPUs, such as us-east5}"
gcloud storage buckets create "gs://$BUCKET" --project="$PROJECT" --location="$LOCATION" \
  --uniform-bucket-level-access --enable-hierarchical-namespace --public-access-prevention
