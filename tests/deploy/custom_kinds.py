"""Kinds of other people's controllers, as the chart uses them. Their schemas come with those
controllers: where none is given, the server takes any fields in them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import yaml

from tests.deploy.chart_checks import eventually
from tests.deploy.kubernetes_cluster import KubernetesApi, Object, Refused

_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
_KINDS = {"ServiceMonitor": "monitoring.coreos.com", "LeaderWorkerSet": "leaderworkerset.x-k8s.io"}


def definition(group: str, kind: str) -> Object:
    plural = f"{kind.lower()}s"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            # Kubernetes keeps its own groups to those whom it has approved.
            "annotations": {"api-approved.kubernetes.io": "unapproved, a test"},
        },
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [version],
        },
    }


def add_custom_kinds(api: KubernetesApi, folder: Path | None) -> None:
    """With the schemas of the CustomResourceDefinitions in the folder's YAML files."""
    files = sorted(folder.glob("*.yaml")) if folder else []
    given = [each for file in files for each in yaml.safe_load_all(file.read_text()) if each]
    found = {each["spec"]["names"]["kind"]: each for each in given}
    for kind, group in _KINDS.items():
        api.create(_PATH, found.get(kind) or definition(group, kind))
        path = f"/apis/{group}/v1/{kind.lower()}s"
        eventually(partial(is_served, api, path), True, f"{path} is served")
        if kind not in found:
            print(f"   no schema of {kind}: its fields are not checked")


def is_served(api: KubernetesApi, path: str) -> bool:
    try:
        api.get(path)
    except Refused as error:
        if error.status != 404:
            raise
        return False
    return True
