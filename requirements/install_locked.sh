#!/bin/sh
# install_locked.sh LOCK [PIP'S OPTIONS]: in an image's build, exactly what the lock names.
# A package that comes as source alone (etcd3) is built with the lock's setuptools, so that goes first.
set -eu
lock=$1
shift
if grep '^setuptools==' "$lock" >/tmp/setuptools.lock; then
  pip install --require-hashes --no-deps -r /tmp/setuptools.lock
fi
pip install --require-hashes --no-deps --no-build-isolation "$@" -r "$lock"
