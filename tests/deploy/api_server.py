"""`api_server.py --kube FOLDER --bin FOLDER`: the chart on a real API server with its controllers
and scheduler, on hosts that are simulated. Installs each set of values of the chart's `ci/`,
upgrades, evicts, scales by hand and uninstalls. The folder of --kube has kube-apiserver,
kube-controller-manager and kube-scheduler; that of --bin has helm; that of --crds, if given, the
CustomResourceDefinitions of ServiceMonitor and LeaderWorkerSet."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from shared.etcd_binary import etcd_binary
from tests.deploy.chart_checks import check_all, check_evictions, eventually, expect
from tests.deploy.custom_kinds import add_custom_kinds
from tests.deploy.kubernetes_cluster import KubernetesApi, KubernetesCluster, missing
from tests.deploy.release import CHART, COMPONENTS, Release, names
from tests.deploy.simulated_hosts import SimulatedHosts

NUM_HOSTS = 5
CPU, CARDS, LEADER_WORKER_SET = (
    CHART / "ci" / f"{name}.yaml" for name in ("cpu", "cards", "leader_worker_set")
)
ALL = frozenset(COMPONENTS)


class Upgrade(NamedTuple):
    """`numbers` of pods that it changes, and the components whose pods it replaces."""

    changes: dict[str, str]
    replaces: frozenset[str]
    numbers: dict[str, int]


UPGRADES = (
    Upgrade({}, frozenset(), {}),
    Upgrade({"ranks.hosts": "3", "controlPlane.ranks": "8"}, frozenset(), {"ranks": 3}),
    Upgrade({"gateway.replicas": "4"}, frozenset(), {"gateway": 4}),
    Upgrade({"controlPlane.replicas": "1"}, frozenset(), {"control-plane": 1}),
    Upgrade({"ranks.perHost": "2"}, frozenset({"ranks", "control-plane"}), {}),
    Upgrade({"image.tag": "next"}, ALL, {}),
    Upgrade({"ranks.drain.enabled": "false"}, frozenset({"ranks"}), {}),
    Upgrade({"ranks.antiAffinity": "preferred"}, frozenset({"ranks"}), {}),
    Upgrade({"gateway.service.type": "NodePort"}, frozenset(), {}),
    Upgrade(
        {"gateway.apiKeysSecret": "keys", "gateway.tlsSecret": "tls"}, frozenset({"gateway"}), {}
    ),
    Upgrade({"etcd.tls.enabled": "false"}, ALL, {}),
    Upgrade(
        {
            "model.volume.emptyDir.medium": "Memory",
            "ranks.kernelCache.persistentVolumeClaim.claimName": "models",
        },
        ALL,
        {},
    ),
    Upgrade({"networkPolicy.enabled": "false"}, frozenset(), {}),
    Upgrade({"serviceAccount.create": "false", "serviceAccount.name": "default"}, ALL, {}),
)
"""Each from the values of ci/cpu.yaml on, and back to them."""


def say(what: str) -> None:
    print(f"-- {what}", flush=True)


def check_manifests(release: Release, values: Path) -> None:
    """The server takes every object as it is, with no unknown or doubled field and no warning."""
    rendered = release.helm("template", release.name, str(release.chart), "-f", str(values))
    paths = dict(release.kinds())
    for manifest in yaml.safe_load_all(rendered):
        path = f"{paths[manifest['kind']]}?dryRun=All&fieldValidation=Strict"
        _, warnings = release.api.request("POST", path, manifest)
        expect(warnings, [], f"warnings about {manifest['kind']} {manifest['metadata']['name']}")


def uids(release: Release, component: str) -> dict[str, str]:
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in release.pods_of(component)}


def deploy(release: Release, values: Path, upgrade: Upgrade, numbers: dict[str, int]) -> None:
    """Pods of the other components stay: none is replaced that need not be."""
    before = {component: uids(release, component) for component in COMPONENTS}
    release.deploy(values, upgrade.changes)
    for component in COMPONENTS:
        old, new = set(before[component].values()), set(uids(release, component).values())
        if component in upgrade.replaces:
            expect(old & new, set(), f"pods of {component} that were not replaced")
        else:
            expect(old <= new or new <= old, True, f"pods of {component} stay")
    check_all(release, numbers | upgrade.numbers)


def upgrades(release: Release) -> None:
    numbers = {"ranks": 2, "control-plane": 2, "gateway": 2}
    release.deploy(CPU)
    check_all(release, numbers)
    for upgrade in UPGRADES:
        say(f"upgrade, and back: {upgrade.changes or 'nothing'}")
        deploy(release, CPU, upgrade, numbers)
        deploy(release, CPU, Upgrade({}, upgrade.replaces, {}), numbers)
    say("evictions")
    check_evictions(release)
    say("gateways scaled by hand")
    scaled_by_hand(release, numbers)


def scaled_by_hand(release: Release, numbers: dict[str, int]) -> None:
    """A number that the values leave open is not touched; one that they name can be had back."""
    left_open = Upgrade({"gateway.replicas": "null"}, frozenset(), {"gateway": 3})
    release.deploy(CPU, left_open.changes)
    scale(release, "apps/v1/deployments", "gateway", 3)
    deploy(release, CPU, left_open, numbers)
    scale(release, "apps/v1/deployments", "gateway", 4)
    release.deploy(CPU, {}, "--force-conflicts")
    check_all(release, numbers)


def new_chart(release: Release, folder: Path) -> None:
    """The next release of the chart, of the same image, restarts nothing."""
    release.chart = folder / "chart"
    shutil.copytree(CHART, release.chart)
    about = release.chart / "Chart.yaml"
    text = about.read_text()
    about.write_text(text.replace("\nversion: ", "\nversion: 9"))
    assert about.read_text() != text
    numbers = {"ranks": 2, "control-plane": 2, "gateway": 2}
    deploy(release, CPU, Upgrade({}, frozenset(), {}), numbers)
    release.chart = CHART


def scale(release: Release, kind: str, component: str, replicas: int) -> None:
    """As `kubectl scale` does it."""
    path = release.path(kind, f"{release.full_name}-{component}")
    release.api.patch(f"{path}/scale", {"spec": {"replicas": replicas}})
    eventually(lambda: len(release.pods_of(component)), replicas, f"pods of {component}")


def cards(release: Release) -> None:
    runtime = {"metadata": {"name": "nvidia"}, "handler": "nvidia"}
    release.api.create("/apis/node.k8s.io/v1/runtimeclasses", runtime)
    release.deploy(CARDS)
    check_all(release, {"ranks": 4, "control-plane": 2, "gateway": 4})
    expect(len(release.items("monitoring.coreos.com/v1/servicemonitors")), 3, "service monitors")
    check_evictions(release)


def leader_worker_set(release: Release) -> None:
    """Its controller is not here, so there are no ranks."""
    release.deploy(LEADER_WORKER_SET)
    for component in ("control-plane", "gateway"):
        expect(len(release.pods_of(component)), 2, f"pods of {component}")
    groups = release.items("leaderworkerset.x-k8s.io/v1/leaderworkersets")
    expect(names(groups), {f"{release.full_name}-ranks"}, "LeaderWorkerSets")


def add_namespace(api: KubernetesApi, name: str, level: str) -> None:
    """Where pods below the level of Pod Security are refused; with the volume of the model."""
    labels = {f"pod-security.kubernetes.io/{mode}": level for mode in ("enforce", "warn")}
    api.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
    spec = {
        "accessModes": ["ReadOnlyMany"],
        "storageClassName": "",
        "resources": {"requests": {"storage": "1Gi"}},
    }
    claims = f"/api/v1/namespaces/{name}/persistentvolumeclaims"
    api.create(claims, {"metadata": {"name": "models"}, "spec": spec})
    claim = {"kind": "PersistentVolumeClaim", "namespace": name, "name": "models"}
    volume = {
        "accessModes": ["ReadOnlyMany"],
        "capacity": {"storage": "1Gi"},
        "hostPath": {"path": "/models"},
        "claimRef": claim,
    }
    body = {"metadata": {"name": f"models-{name}"}, "spec": volume}
    api.create("/api/v1/persistentvolumes", body)


def try_values(
    release: Release, values: Path, level: str, scenario: Callable[[Release], None]
) -> None:
    say(f"{values.name} in a namespace that enforces {level!r}")
    add_namespace(release.api, release.namespace, level)
    own = release.leftovers()
    check_manifests(release, values)
    scenario(release)
    say("uninstall")
    release.uninstall()
    eventually(release.leftovers, own, "objects left after uninstalling")
    eventually(lambda: names(release.pods()), set(), "pods left after uninstalling")


def run(kube: Path, helm: Path, definitions: Path | None, folder: Path) -> None:
    etcd = asyncio.run(etcd_binary())
    say("starting etcd, the API server, the controllers and the scheduler")
    with KubernetesCluster(kube, etcd, folder) as cluster:
        api = cluster.api
        add_custom_kinds(api, definitions)

        def release(namespace: str) -> Release:
            return Release(api, helm, cluster.kubeconfig, folder, namespace)

        version = release("default").helm("version", "--short").strip()
        say(f"Kubernetes {api.get('/version')['gitVersion']}, Helm {version}")

        def upgrades_and_new_chart(installed: Release) -> None:
            upgrades(installed)
            say("a new release of the chart")
            new_chart(installed, folder)

        with SimulatedHosts(api, NUM_HOSTS):
            try_values(release("cpu"), CPU, "restricted", upgrades_and_new_chart)
            try_values(release("cards"), CARDS, "privileged", cards)
            groups = release("leader-worker-set")
            try_values(groups, LEADER_WORKER_SET, "restricted", leader_worker_set)
    print("test-chart: passed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kube", type=Path, required=True)
    parser.add_argument("--crds", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    arguments = parser.parse_args()
    absent = [f"{arguments.kube / name}" for name in missing(arguments.kube)]
    helm = arguments.bin / "helm"
    if not helm.is_file():
        absent.append(f"{helm} (tests/deploy/fetch_helm.py puts it there)")
    if absent:
        sys.exit("test-chart: missing " + ", ".join(absent))
    with tempfile.TemporaryDirectory(prefix="starfish-chart-") as folder:
        run(arguments.kube.resolve(), helm.resolve(), arguments.crds, Path(folder))


if __name__ == "__main__":
    main()
