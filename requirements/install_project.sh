#!/bin/sh
# install_project.sh UNUSED...: in an image's build, Starfish itself, in place. Then the list of what
# is inside, and away with pip and with what of the installed packages (patterns of paths in
# site-packages) no service of this image runs. Last: what is left still loads.
set -eu
pip install --no-deps --no-build-isolation -e .
/opt/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application \
  --output-reproducible --of JSON -o sbom.cdx.json /opt/venv
pip uninstall -y pip
packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# shellcheck disable=SC2086
for unused; do rm -rf "${packages:?}"/$unused; done
# Root is read-only later, so what is not compiled now is compiled by every process anew.
python -m compileall -q --invalidation-mode unchecked-hash benchmarks cli control_plane gateway \
  gpu_worker node_agent shared
chmod -R go-w . /opt/venv
# Of torch, every path may be one that it looks for when it is imported.
python -c 'import numba, torch; print("torch", torch.__version__, "loads")'
