"""`validate_manifests.py FILE …`: checks rendered manifests against Kubernetes' own schemas,
unknown fields included, and for what an API server alone would refuse or replace pods for. Kinds of
other people's controllers are not checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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
            problems += [f"{name}: {problem}" for problem in problems_of_pods(manifest)]
    print("\n".join(problems) or f"{num_checked} manifests fit Kubernetes {VERSION}")
    return 1 if problems or not num_checked else 0


def problems_of_pods(manifest: dict[str, Any]) -> list[str]:
    if "template" not in manifest.get("spec", {}):
        return []
    template, selector = manifest["spec"]["template"], manifest["spec"]["selector"]
    problems = [
        f"volume {volume['name']} has {len(volume) - 1} sources"
        for volume in template["spec"]["volumes"]
        if len(volume) != 2
    ]
    if template["metadata"]["labels"] != selector["matchLabels"]:
        problems.append("pods have labels that no selector needs, whose changes would replace them")
    return problems


if __name__ == "__main__":
    sys.exit(main())
