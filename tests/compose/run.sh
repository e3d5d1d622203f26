#!/usr/bin/env bash
# Brings docker-compose.yml up on a real engine of its own, streams a completion through it, kills
# the process of a rank's container in the middle, and wants every token. Fails where the engine
# cannot start. Needs root; leaves nothing behind.
#
# The engine runs twice on one data root: without a bridge on the host's network to build (pip needs
# the network), then inside a network namespace of its own, where it may do with bridges and
# firewall rules what it likes.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
bin=$root/.venv/bin
work=
engine_pid=
namespace=starfish-compose-$$

fail() { echo "test-compose: $*" >&2; exit 1; }
say() { printf -- '-- %s\n' "$*"; }

stop_engine() {
  [ -n "$engine_pid" ] || return 0
  kill -TERM "$engine_pid" 2>/dev/null || true
  for _ in $(seq 100); do kill -0 "$engine_pid" 2>/dev/null || break; sleep 0.2; done
  kill -KILL "$engine_pid" 2>/dev/null || true
  wait "$engine_pid" 2>/dev/null || true
  engine_pid=
}

clean_up() {
  set +e
  if [ -n "$engine_pid" ]; then timeout 60 "${compose[@]}" down --volumes --timeout 3 >/dev/null 2>&1; fi
  stop_engine
  ip netns delete "$namespace" 2>/dev/null
  if [ -n "$work" ]; then
    grep -o " $work[^ ]*" /proc/mounts | sort -r | while read -r mount; do umount -l "$mount"; done
    rm -rf "$work"
  fi
}
trap clean_up EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

require_tools() {
  [ "$(id -u)" -eq 0 ] || fail "must be root to run an engine; run: sudo make test-compose"
  local missing=()
  command -v dockerd >/dev/null || missing+=(docker.io)
  command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
  command -v ip >/dev/null || missing+=(iproute2)
  command -v iptables >/dev/null || missing+=(iptables)
  if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  fi
}

start_engine() { # arguments: a command to run it under, then flags
  local under=$1
  shift
  # shellcheck disable=SC2086
  $under dockerd --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/pid" \
    -H "unix://$work/docker.sock" "$@" >>"$work/dockerd.log" 2>&1 &
  engine_pid=$!
  for _ in $(seq 100); do
    if docker info >/dev/null 2>&1; then return 0; fi
    kill -0 "$engine_pid" 2>/dev/null || break
    sleep 0.3
  done
  tail -20 "$work/dockerd.log" >&2
  fail "the container engine does not start"
}

make_base() { # stands in for the image that FROM names, which cannot be pulled everywhere
  say "making the base image"
  mmdebstrap --quiet --variant=minbase \
    --include=python3,python3-pip,python3-venv,ca-certificates bookworm "$work/base.tar"
  mkdir "$work/base"
  tar -C "$work/base" -xf "$work/base.tar" --exclude './dev/*'
  rm "$work/base.tar"
  cp /etc/ssl/certs/ca-certificates.crt "$work/base/etc/ssl/certs/ca-certificates.crt"
  # The one wheel of which the index has several builds: the build that this checkout runs on.
  "$bin/python" -m pip download -q --no-deps --dest "$work/base/opt/wheels" torch==2.13.0
  printf '[global]\ncert = %s\nfind-links = /opt/wheels\n' \
    /etc/ssl/certs/ca-certificates.crt >"$work/base/etc/pip.conf"
  ln -sf python3 "$work/base/usr/bin/python"
  rm -f "$work"/base/usr/lib/python3.*/EXTERNALLY-MANAGED
  tar -C "$work/base" -c . | docker import - python:3.11-slim-bookworm >/dev/null
  rm -rf "$work/base"
}

require_tools
work=$(mktemp -d /tmp/starfish-compose.XXXXXX)
mount -t tmpfs -o size=8g starfish-compose "$work"
export DOCKER_HOST=unix://$work/docker.sock DOCKER_CONFIG=$work/config DOCKER_BUILDKIT=0
export COMPOSE_BAKE=false STARFISH_IMAGE=starfish-moe:test
mkdir -p "$DOCKER_CONFIG/cli-plugins"
ln -s "$bin/docker-compose" "$DOCKER_CONFIG/cli-plugins/docker-compose"
compose=("$bin/docker-compose" -f "$root/docker-compose.yml" -f "$root/tests/compose/override.yml")

start_engine "" --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false --bridge=none
make_base
say "building the image"
docker build --network host -q -t "$STARFISH_IMAGE" "$root" >"$work/build.log" 2>&1 \
  || { tail -30 "$work/build.log" >&2; fail "the image does not build"; }
stop_engine

say "starting the stack in a network namespace of its own"
ip netns add "$namespace"
nsenter --net="/run/netns/$namespace" ip link set lo up
start_engine "nsenter --net=/run/netns/$namespace"
"${compose[@]}" up --no-build --detach --wait --wait-timeout 180 >"$work/up.log" 2>&1 \
  || { tail -20 "$work/up.log" >&2; "${compose[@]}" ps --all >&2; "${compose[@]}" logs --tail 15 >&2; fail "the stack does not become healthy"; }

say "streaming, with a kill in the middle"
victim=$("${compose[@]}" ps -q rank-2)
victim_pid=$(docker inspect --format '{{.State.Pid}}' "$victim")
nsenter --net="/run/netns/$namespace" "$bin/python" "$root/tests/compose/stream_through_death.py" \
  http://127.0.0.1:8000 "$victim_pid"

say "waiting until the rank's container is back"
for _ in $(seq 120); do
  state=$(docker inspect --format '{{.State.Pid}} {{.State.Health.Status}}' "$victim")
  if [ "${state% *}" != "$victim_pid" ] && [ "${state#* }" = healthy ]; then
    echo "test-compose: passed"
    exit 0
  fi
  sleep 0.5
done
fail "the killed rank's container did not become healthy again ($state)"
