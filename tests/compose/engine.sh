# Sourced by the scripts beside this file, from the root of the checkout: a container engine of the
# script's own, with a data root and a socket of its own, and the base image. Set `test_name` first.
# `open_engine` makes the folders, `start_engine` starts it, and what is left goes when the script ends.
base=python:3.11-slim-bookworm
work=
data=
engine_pid=

fail() { echo "$test_name: $*" >&2; exit 1; }
say() { printf -- '-- %s\n' "$*"; }

stop_engine() {
  [ -n "$engine_pid" ] || return 0
  kill -TERM "$engine_pid" 2>/dev/null || true
  for _ in $(seq 100); do kill -0 "$engine_pid" 2>/dev/null || break; sleep 0.2; done
  kill -KILL "$engine_pid" 2>/dev/null || true
  wait "$engine_pid" 2>/dev/null || true
  engine_pid=
}

close_engine() { # what a trap calls: nothing in it may end the script
  set +e
  stop_engine
  [ -n "$work" ] || return 0
  awk '{print $2}' /proc/mounts | grep -E "^($work|${data:-$work})(/|$)" | sort -r \
    | while read -r mount; do umount -l "$mount"; done
  rmdir "$work"
}

require_tools() { # argument: the make target that needs them
  [ "$(id -u)" -eq 0 ] || fail "must be root to run an engine; run: sudo make $1"
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

open_engine() { # argument: the folder for images and layers; none: in memory with the rest
  work=$(mktemp -d "/tmp/starfish-${test_name#test-}.XXXXXX")
  data=$(realpath -m "${1:-$work/data}")
  mount -t tmpfs -o size=8g "starfish-${test_name#test-}" "$work"
  export DOCKER_HOST=unix://$work/docker.sock DOCKER_CONFIG=$work/config DOCKER_BUILDKIT=0
  mkdir -p "$DOCKER_CONFIG"
}

start_engine() { # arguments: a command to run it under, then flags
  local under=$1
  shift
  # shellcheck disable=SC2086
  $under dockerd --data-root "$data" --exec-root "$work/exec" --pidfile "$work/pid" \
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

start_building_engine() { # without a bridge, on the host's network: pip needs it
  start_engine "" --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false --bridge=none
}

has_image() { docker image inspect "$1" >/dev/null 2>&1; }
size() { echo $(($(docker image inspect --format '{{.Size}}' "$1") / 1000000)); }

make_base() { # stands in for the image that FROM names, which cannot be pulled everywhere
  has_image "$base" && return 0
  say "making the base image"
  # Python's headers, as in that image, but no C library's.
  mmdebstrap --quiet --variant=minbase \
    --include=python3,python3-pip,python3-venv,ca-certificates \
    --customize-hook='chroot "$1" sh -euc "cd /tmp; apt-get download -qq libpython3.11-dev
      dpkg-deb --fsys-tarfile libpython3.11-dev*.deb | tar -C / -x ./usr/include; rm libpython3*"' \
    bookworm "$work/base.tar"
  mkdir "$work/base"
  tar -C "$work/base" -xf "$work/base.tar" --exclude './dev/*'
  rm "$work/base.tar"
  cp /etc/ssl/certs/ca-certificates.crt "$work/base/etc/ssl/certs/ca-certificates.crt"
  printf '[global]\ncert = %s\n' /etc/ssl/certs/ca-certificates.crt >"$work/base/etc/pip.conf"
  ln -sf python3 "$work/base/usr/bin/python"
  rm -f "$work"/base/usr/lib/python3.*/EXTERNALLY-MANAGED
  tar -C "$work/base" -c . | docker import - "$base" >/dev/null
  rm -rf "$work/base"
}
