#!/usr/bin/env bash
# Checks Dockerfile and docker-compose.yml. Argument: the bin folder that holds hadolint.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${1:-.venv/bin}

"$bin/hadolint" --failure-threshold warning Dockerfile

"$bin/docker-compose" -f docker-compose.yml config -q
echo "Dockerfile and docker-compose.yml are well-formed"
