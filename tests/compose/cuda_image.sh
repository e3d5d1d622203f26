#!/usr/bin/env bash
# Builds the CUDA image on a real engine of its own, and tries it as far as that goes without a card:
# what it holds, what compiles in it with root read-only, and what it says if there is no card. Needs
# root. KEEP=FOLDER keeps the engine's images and layers there (25 GB), so that the next build is
# quick; otherwise they lie in a folder of /var/tmp until the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
image=starfish-moe:cuda
test_name=test-cuda-image
own_data=
# shellcheck source=tests/compose/engine.sh
. tests/compose/engine.sh

clean_up() {
  close_engine
  [ -z "$own_data" ] || rm -rf "$own_data"
}
trap clean_up EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

build_image() {
  say "building the image"
  # The classic builder would build all stages up to the target, those of the CPU image too.
  awk '/^FROM /{skipped = $NF ~ /^(build-)?cpu$/} !skipped' Dockerfile \
    | docker build --network host --file - --target cuda --build-arg "BASE_IMAGE=$base" \
      -t "$image" . >"$work/build.log" 2>&1 \
    || { tail -30 "$work/build.log" >&2; fail "the image does not build"; }
  say "the image has $(size "$image") MB, of which $(size "$base") are its base's"
}

inside() { # as a container of production: arguments of docker run, then a command
  docker run --rm --network none --read-only --tmpfs /tmp --cap-drop ALL \
    --security-opt no-new-privileges "$@"
}

try_image() {
  say "what is inside"
  inside -i "$image" python - <tests/compose/cuda_contents.py
  say "as another user, with a folder of its own for what is compiled"
  install -d -o 4711 "$work/compiled"
  inside -i --user 4711:4711 --volume "$work/compiled:/var/lib/starfish" "$image" \
    python - <tests/compose/cuda_contents.py
  say "commands"
  inside "$image" >"$work/help"
  grep -q 'Usage: starfish' "$work/help" || fail "starfish --help says nothing"
  inside "$image" starfish plan --experts 8 --ranks 4 --nodes 2 --layers 1 --redundant 8 >"$work/plan"
  grep -q survive "$work/plan" || { cat "$work/plan" >&2; fail "starfish plan says nothing"; }
  say "ranks on cards, without a card"
  if inside "$image" starfish up --device cuda >"$work/up" 2>&1; then fail "it starts"; fi
  grep -q -- '--device cuda: .*pass --device cpu' "$work/up" \
    || { cat "$work/up" >&2; fail "it does not say that there is no card"; }
}

require_tools "$test_name"
[ -n "${KEEP:-}" ] || own_data=$(mktemp -d /var/tmp/starfish-cuda-image.XXXXXX)
open_engine "${KEEP:-$own_data}"
start_building_engine
make_base
build_image
try_image
echo "$test_name: passed"
