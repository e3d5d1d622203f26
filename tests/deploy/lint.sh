#!/usr/bin/env bash
# Checks the Helm chart and the units of systemd. Argument: the bin folder that holds helm.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${1:-.venv/bin}
chart=deploy/helm/starfish
rendered=$(mktemp -d)
trap 'rm -rf "$rendered"' EXIT

export HELM_CACHE_HOME=$rendered/cache HELM_CONFIG_HOME=$rendered/config HELM_DATA_HOME=$rendered/data
for values in "$chart"/ci/*.yaml; do
  "$bin/helm" lint --strict --quiet "$chart" -f "$values"
  "$bin/helm" template release "$chart" --namespace starfish -f "$values" \
    >"$rendered/$(basename "$values")"
done
if "$bin/helm" template release "$chart" >"$rendered/none" 2>&1; then
  echo "the chart renders without an etcd" >&2
  exit 1
fi
"$bin/python" tests/deploy/validate_manifests.py "$rendered"/*.yaml

if command -v systemd-analyze >/dev/null; then
  for unit in deploy/systemd/*.service deploy/systemd/*.timer; do
    # What the units start is not on this machine.
    sed -E 's#^(Exec[A-Za-z]*=-?)/(opt|usr)/[^ ]*#\1/bin/true#' "$unit" >"$rendered/$(basename "$unit")"
  done
  (cd "$rendered" && systemd-analyze verify --man=no ./*.service ./*.timer)
  echo "the units of systemd are well-formed"
fi
