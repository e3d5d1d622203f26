"""A release of the chart on an API server: what Helm does to it, and what the server then holds."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from tests.deploy.kubernetes_cluster import KubernetesApi, Object

CHART = Path("deploy/helm/starfish")
COMPONENTS = ("ranks", "control-plane", "gateway")
WAIT = "180s"
SETTLED_WITHIN_S = 60.0
_PASSING = {"Event", "Pod", "PodMetrics"}
"""Gone by themselves, sooner or later."""


def names(objects: list[Object]) -> set[str]:
    return {each["metadata"]["name"] for each in objects}


class Release:
    def __init__(
        self, api: KubernetesApi, helm: Path, kubeconfig: Path, folder: Path, namespace: str
    ) -> None:
        self.api = api
        self.name = "test"
        self.full_name = "test-starfish"
        self.namespace = namespace
        self.chart = CHART
        self._helm = helm
        homes = {f"HELM_{kind}_HOME": str(folder / kind) for kind in ("CACHE", "CONFIG", "DATA")}
        self._environment = os.environ | homes | {"KUBECONFIG": str(kubeconfig)}

    def helm(self, *arguments: str) -> str:
        """What it prints. Raises RuntimeError with what it says if it fails."""
        command = [str(self._helm), *arguments, "--namespace", self.namespace]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"helm {' '.join(arguments)}:\n{done.stderr}")
        return done.stdout

    def deploy(self, values: Path, changes: Mapping[str, str] | None = None, *further: str) -> None:
        """Installs or upgrades, and waits until every pod is ready and every old one gone."""
        changed = [f"--set={name}={value}" for name, value in (changes or {}).items()]
        flags = ["--wait", "--timeout", WAIT, "-f", str(values), *changed, *further]
        self.helm("upgrade", "--install", self.name, str(self.chart), *flags)
        deadline = time.monotonic() + SETTLED_WITHIN_S
        while any("deletionTimestamp" in pod["metadata"] for pod in self.pods()):
            if time.monotonic() > deadline:
                raise RuntimeError("pods that were deleted do not vanish")
            time.sleep(0.2)

    def uninstall(self) -> None:
        self.helm("uninstall", self.name, "--wait", "--timeout", WAIT)

    def path(self, kind: str, name: str = "") -> str:
        """Of a kind such as `apps/v1/statefulsets`; `v1/pods` is of the core."""
        group, _, plural = kind.rpartition("/")
        root = "/api/v1" if group == "v1" else f"/apis/{group}"
        return f"{root}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    def items(self, kind: str, labels: dict[str, str] | None = None) -> list[Object]:
        return self.api.items(self.path(kind), labels)

    def object(self, kind: str, component: str) -> Object:
        return self.api.get(self.path(kind, f"{self.full_name}-{component}"))

    def pods(self, labels: dict[str, str] | None = None) -> list[Object]:
        return self.items("v1/pods", labels)

    def pods_of(self, component: str) -> list[Object]:
        """By the names that the chart gives: independent of every selector."""
        prefix = f"{self.full_name}-{component}-"
        return [pod for pod in self.pods() if pod["metadata"]["name"].startswith(prefix)]

    def workloads(self) -> list[Object]:
        return self.items("apps/v1/statefulsets") + self.items("apps/v1/deployments")

    def leftovers(self) -> list[str]:
        """All objects in the namespace that controllers do not put into every one: KIND NAME."""
        left = set()
        for kind, path in self.kinds():
            of_every_namespace = names(
                self.api.items(path.replace(f"/{self.namespace}/", "/default/"))
            )
            left |= {f"{kind} {name}" for name in names(self.api.items(path)) - of_every_namespace}
        return sorted(left)

    def kinds(self) -> list[tuple[str, str]]:
        """Every kind of object in a namespace that the server has, with the path of its list."""
        groups = ["v1"]
        for group in self.api.get("/apis")["groups"]:
            groups.append(group["preferredVersion"]["groupVersion"])
        kinds = []
        for group in groups:
            root = "/api/v1" if group == "v1" else f"/apis/{group}"
            for each in self.api.get(root)["resources"]:
                listed = each["namespaced"] and "list" in each["verbs"] and "/" not in each["name"]
                if listed and each["kind"] not in _PASSING:
                    kinds.append((each["kind"], self.path(f"{group}/{each['name']}")))
        return kinds
