#!/usr/bin/env bash
# Checks Dockerfile and the compose files. Argument: the bin folder that holds hadolint.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${1:-.venv/bin}

"$bin/hadolint" --failure-threshold warning Dockerfile

for file in docker-compose.yml docker-compose.cluster.yml; do
  "$bin/docker-compose" -f "$file" config -q
done
echo "Dockerfile and the compose files are well-formed"
