#!/usr/bin/env bash
# Brings the compose files up on a real engine of its own. On the one host of docker-compose.yml it
# streams completions, kills the process of a rank's container in the middle, and wants every token;
# on docker-compose.cluster.yml it kills each part in turn, under load. Fails where the engine cannot
# start. Needs root; leaves nothing behind. Argument: the bin folder of an installed checkout.
# FORMS="host cluster" says which of them, FORMS= builds the image alone. KEEP=FOLDER keeps the
# engine's images and layers there, so that the next build is quick; otherwise all is in memory.
#
# The engine runs twice on one data root: without a bridge on the host's network to build (pip needs
# the network), then inside a network namespace of its own, where it may do with bridges and
# firewall rules what it likes.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
bin=$(realpath "${1:-.venv/bin}")
forms=${FORMS-host cluster}
balancer=haproxy:3.2
index_port=18471 # always the same: it is part of what the engine knows a layer by
index_pid=
compose=
namespace=starfish-compose-$$
test_name=test-compose
# shellcheck source=tests/compose/engine.sh
. tests/compose/engine.sh

clean_up() {
  set +e
  if [ -n "$engine_pid" ] && [ -n "$compose" ]; then take_down; fi
  [ -z "$index_pid" ] || kill "$index_pid" 2>/dev/null
  close_engine
  ip netns delete "$namespace" 2>/dev/null
}
trap clean_up EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

take_down() { timeout 90 "${compose[@]}" down --volumes --timeout 3 >/dev/null 2>&1 || true; compose=; }

make_balancer() { # Debian's haproxy
  has_image "$balancer" && return 0
  say "making the balancer's image"
  mmdebstrap --quiet --variant=minbase --include=haproxy bookworm "$work/balancer.tar"
  docker import "$work/balancer.tar" "$balancer" >/dev/null
  rm "$work/balancer.tar"
}

build_image() {
  say "building the image"
  # torch is the one wheel of which there are several builds: that of this checkout.
  mkdir -p "$work/index/torch"
  "$bin/python" -m pip download -q --no-deps --dest "$work/index/torch" torch==2.13.0
  "$bin/python" -m http.server --bind 127.0.0.1 --directory "$work/index" "$index_port" \
    >"$work/index.log" 2>&1 &
  index_pid=$!
  docker build --network host -q --target cpu --build-arg "BASE_IMAGE=$base" \
    --build-arg "TORCH_INDEX=http://127.0.0.1:$index_port" \
    -t "$STARFISH_IMAGE" "$root" >"$work/build.log" 2>&1 \
    || { tail -30 "$work/build.log" >&2; fail "the image does not build"; }
  kill "$index_pid"
  index_pid=
  say "the image has $(size "$STARFISH_IMAGE") MB, of which $(size "$base") are its base's"
}

bring_up() { # argument: the compose file
  say "starting $1 in a network namespace of its own"
  compose=("$bin/docker-compose" -f "$root/$1" -f "$root/tests/compose/override.yml")
  "${compose[@]}" up --no-build --detach --wait --wait-timeout 300 >"$work/up.log" 2>&1 \
    || { tail -20 "$work/up.log" >&2; "${compose[@]}" ps --all >&2; "${compose[@]}" logs --tail 15 >&2; fail "$1 does not become healthy"; }
}

try_host() {
  bring_up docker-compose.yml
  say "streaming, with a kill in the middle"
  local victim victim_pid state
  victim=$("${compose[@]}" ps -q rank-2)
  victim_pid=$(docker inspect --format '{{.State.Pid}}' "$victim")
  nsenter --net="/run/netns/$namespace" "$bin/python" "$root/tests/compose/stream_through_death.py" \
    http://127.0.0.1:8000 "$victim_pid"
  say "waiting until the rank's container is back"
  for _ in $(seq 120); do
    state=$(docker inspect --format '{{.State.Pid}} {{.State.Health.Status}}' "$victim")
    if [ "${state% *}" != "$victim_pid" ] && [ "${state#* }" = healthy ]; then take_down; return 0; fi
    sleep 0.5
  done
  fail "the killed rank's container did not become healthy again ($state)"
}

try_cluster() {
  bring_up docker-compose.cluster.yml
  say "killing each part under load"
  nsenter --net="/run/netns/$namespace" "$bin/python" -m tests.compose.kill_each_part \
    http://127.0.0.1:8000 starfish-cluster \
    || { "${compose[@]}" ps --all >&2; "${compose[@]}" logs --tail 30 >&2; fail "a part was not survived"; }
  take_down
}

require_tools "$test_name"
open_engine "${KEEP:-}"
export COMPOSE_BAKE=false STARFISH_IMAGE=starfish-moe:test
mkdir "$DOCKER_CONFIG/cli-plugins"
ln -s "$bin/docker-compose" "$DOCKER_CONFIG/cli-plugins/docker-compose"

start_building_engine
make_base
[[ $forms != *cluster* ]] || make_balancer
build_image
stop_engine

ip netns add "$namespace"
nsenter --net="/run/netns/$namespace" ip link set lo up
start_engine "nsenter --net=/run/netns/$namespace"
for form in $forms; do "try_$form"; done
echo "test-compose: passed"
