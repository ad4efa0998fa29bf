#!/usr/bin/env bash
# Fills the variables of a file of this folder in and gives it to the cluster: apply.sh jobset-tpu.yaml
set -euo pipefail
file="${1:?one of the YAML files of this folder}"
# shellcheck disable=SC2016 # the names, not their values
names="$(grep -o '\${[A-Z_]*}' "$file" | sort -u)"
for name in $names; do
  name="${name:2:-1}"
  if [[ -z "${!name:-}" ]]; then echo "$name is not set; launch/README.md says what it is" >&2 && exit 1; fi
  export "${name?}"
done
envsubst "$names" <"$file" | kubectl apply --filename=-
