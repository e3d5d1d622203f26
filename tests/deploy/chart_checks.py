"""What must hold of a release that has settled: each object chooses the pods that it is about."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.deploy.kubernetes_cluster import Object, Refused
from tests.deploy.release import COMPONENTS, SETTLED_WITHIN_S, Release, names


def expect(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise AssertionError(f"{what}: {found!r} instead of {wanted!r}")


def eventually(look: Callable[[], object], wanted: object, what: str) -> None:
    """For what a controller writes after the pods have changed."""
    deadline = time.monotonic() + SETTLED_WITHIN_S
    while (found := look()) != wanted and time.monotonic() < deadline:
        time.sleep(0.3)
    expect(found, wanted, what)


def check_pods(release: Release, numbers: dict[str, int]) -> None:
    for component, number in numbers.items():
        expect(len(release.pods_of(component)), number, f"pods of {component}")
    expect(len(release.pods()), sum(numbers.values()), "pods of the release")
    ranks = release.pods_of("ranks")
    hosts = {pod["spec"]["nodeName"] for pod in ranks}
    expect(len(hosts), len(ranks), "hosts of ranks' pods")


def check_budgets(release: Release) -> None:
    for component in COMPONENTS:
        name = f"{release.full_name}-{component}"
        path = release.path("policy/v1/poddisruptionbudgets", name)
        pods = release.pods_of(component)
        chosen = release.api.get(path)["spec"]["selector"]["matchLabels"]
        expect(names(release.pods(chosen)), names(pods), f"pods of the budget {name}")

        def status(path: str = path) -> tuple[int, ...]:
            found = release.api.get(path)["status"]
            fields = ("expectedPods", "currentHealthy", "disruptionsAllowed")
            return tuple(found.get(field, 0) for field in fields)

        eventually(status, (len(pods), len(pods), 1), f"status of the budget {name}")


def check_services(release: Release) -> None:
    ports = {"ranks": {"http": 9200}, "control-plane": {"http": 9100, "admin": 9101}}
    ports["gateway"] = {"http": 8000}
    for component in COMPONENTS:
        name = f"{release.full_name}-{component}"
        wanted = {pod["status"]["podIP"] for pod in release.pods_of(component)}

        def served(name: str = name) -> set[str]:
            slices = slices_of(release, name)
            return {
                address
                for each in slices
                for endpoint in each["endpoints"] or []
                if endpoint["conditions"]["ready"]
                for address in endpoint["addresses"]
            }

        eventually(served, wanted, f"addresses behind the service {name}")
        for each in slices_of(release, name):
            found = {port["name"]: port["port"] for port in each["ports"]}
            expect(found, ports[component], f"ports behind the service {name}")


def slices_of(release: Release, service: str) -> list[Object]:
    kind = "discovery.k8s.io/v1/endpointslices"
    return release.items(kind, {"kubernetes.io/service-name": service})


def check_policies(release: Release) -> None:
    """Who is let in to whom, among the release's own pods."""
    kind = "networking.k8s.io/v1/networkpolicies"
    peers = {"ranks": {"ranks", "gateway", "control-plane"}, "gateway": set()}
    peers["control-plane"] = {"ranks", "control-plane"}
    for component in COMPONENTS:
        spec = release.object(kind, component)["spec"]
        guarded = release.pods(spec["podSelector"]["matchLabels"])
        expect(names(guarded), names(release.pods_of(component)), f"policy of {component}")
        allowed: set[str] = set()
        for rule in spec["ingress"]:
            for peer in rule.get("from", []):
                if "namespaceSelector" not in peer:
                    allowed |= names(release.pods(peer["podSelector"]["matchLabels"]))
        wanted = {name for each in peers[component] for name in names(release.pods_of(each))}
        expect(allowed, wanted, f"pods that reach {component}")


def check_containers(release: Release) -> None:
    """As the server holds them, after its defaults."""
    for pod in release.pods():
        name = pod["metadata"]["name"]
        for container in pod["spec"]["containers"]:
            security = container["securityContext"]
            expect(security["readOnlyRootFilesystem"], True, f"read-only root of {name}")
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
            expect(mounted, volumes, f"volumes of {name}")
        for volume in pod["spec"]["volumes"]:
            if "secret" in volume:
                expect(volume["secret"]["defaultMode"], 0o440, f"mode of {volume['name']}")


def check_evictions(release: Release) -> None:
    """The first pod of ranks may go. The next may not before it is back."""
    pods = sorted(names(release.pods_of("ranks")))
    evict(release, pods[0])
    try:
        evict(release, pods[1])
    except Refused as error:
        expect(error.status, 429, "answer to the eviction of a second pod")
    else:
        raise AssertionError("a second pod of ranks was evicted")
    eventually(lambda: names(release.pods_of("ranks")), set(pods), "pods after an eviction")
    check_budgets(release)


def evict(release: Release, pod: str) -> None:
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
    release.api.create(release.path("v1/pods", f"{pod}/eviction"), body)


def check_all(release: Release, numbers: dict[str, int]) -> None:
    check_pods(release, numbers)
    check_budgets(release)
    check_services(release)
    check_containers(release)
    if release.items("networking.k8s.io/v1/networkpolicies"):
        check_policies(release)
