"""Hosts without a kubelet: their pods are reported ready with an address each, and vanish when they
are deleted. No container runs. Scheduler and controllers cannot tell."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from tests.deploy.kubernetes_cluster import MERGE, STRATEGIC, KubernetesApi, Object, Refused

POLL_S = 0.2
NUM_CARDS = 8
CAPACITY = {"cpu": "64", "memory": "2Ti", "pods": "110", "nvidia.com/gpu": str(NUM_CARDS)}


class SimulatedHosts:
    """`num_hosts` nodes with cards in two zones, while the context lasts."""

    def __init__(self, api: KubernetesApi, num_hosts: int) -> None:
        self._api = api
        self._stopped = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hosts")
        self._addresses = addresses()
        for number in range(num_hosts):
            self._add_node(number)

    def __enter__(self) -> SimulatedHosts:
        self._serving = self._thread.submit(self._serve)
        return self

    def __exit__(self, *_: object) -> None:
        """Raises what the thread has ended with, if it has."""
        self._stopped.set()
        self._thread.shutdown()
        self._serving.result()

    def _add_node(self, number: int) -> None:
        name = f"host-{number}"
        labels = {
            "kubernetes.io/hostname": name,
            "topology.kubernetes.io/zone": f"zone-{number % 2}",
            "nvidia.com/gpu.product": "NVIDIA-H200",
        }
        status = {
            "capacity": CAPACITY,
            "allocatable": CAPACITY,
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        node = {"kind": "Node", "metadata": {"name": name, "labels": labels}, "status": status}
        self._api.create("/api/v1/nodes", node)
        # Admission taints a new node until a controller has seen that it is ready.
        self._api.patch(f"/api/v1/nodes/{name}", {"spec": {"taints": None}}, MERGE)

    def _serve(self) -> None:
        while not self._stopped.wait(POLL_S):
            for pod in self._api.items("/api/v1/pods"):
                if "nodeName" in pod["spec"]:
                    self._tend(pod)

    def _tend(self, pod: Object) -> None:
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        same = {"preconditions": {"uid": metadata["uid"]}}
        try:
            if "deletionTimestamp" in metadata:
                self._api.delete(path, {"gracePeriodSeconds": 0} | same)
            elif pod["status"].get("phase") == "Pending":
                status = running(pod, next(self._addresses))
                body = {"metadata": {"uid": metadata["uid"]}, "status": status}
                self._api.patch(f"{path}/status", body, STRATEGIC)
        except Refused as error:
            if error.status not in (404, 409):  # it has gone, or another has its name
                raise


def running(pod: Object, address: str) -> Object:
    """The status of the pod with all of its containers ready."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    conditions = ("Initialized", "ContainersReady", "Ready")
    containers = [
        {
            "name": container["name"],
            "image": container["image"],
            "imageID": container["image"],
            "ready": True,
            "started": True,
            "restartCount": 0,
            "state": {"running": {"startedAt": now}},
        }
        for container in pod["spec"]["containers"]
    ]
    return {
        "phase": "Running",
        "startTime": now,
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [
            {"type": kind, "status": "True", "lastTransitionTime": now} for kind in conditions
        ],
        "containerStatuses": containers,
    }


def addresses() -> Iterator[str]:
    """Of pods; no interface has them."""
    for number in count(1):
        yield f"10.{32 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"
