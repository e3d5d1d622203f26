"""`validate_manifests.py FILE …`: checks rendered manifests against Kubernetes' own schemas,
unknown fields included. Kinds of other people's controllers are not checked."""

from __future__ import annotations

import sys
from pathlib import Path

import kubernetes_validate
import yaml

VERSION = "1.37"
OTHERS = {"ServiceMonitor", "LeaderWorkerSet"}


def main() -> int:
    problems, num_checked = [], 0
    for file in map(Path, sys.argv[1:]):
        for manifest in yaml.safe_load_all(file.read_text()):
            if manifest is None or manifest["kind"] in OTHERS:
                continue
            num_checked += 1
            name = f"{file.name}: {manifest['kind']} {manifest['metadata']['name']}"
            try:
                kubernetes_validate.validate(manifest, VERSION, strict=True)
            except kubernetes_validate.ValidationError as error:
                problems.append(f"{name}: {error.message}")
    print("\n".join(problems) or f"{num_checked} manifests fit Kubernetes {VERSION}")
    return 1 if problems or not num_checked else 0


if __name__ == "__main__":
    sys.exit(main())
