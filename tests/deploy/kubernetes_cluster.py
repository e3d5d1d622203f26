"""A Kubernetes control plane on loopback: etcd, API server, controllers and scheduler as processes,
reached with an administrator's token. It has no kubelet (simulated_hosts) and no network."""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import ssl
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

COMPONENTS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
READY_WITHIN_S = 180.0
STOP_WITHIN_S = 20.0
MERGE, STRATEGIC = "application/merge-patch+json", "application/strategic-merge-patch+json"
Object = dict[str, Any]


class Refused(Exception):
    """What the API server answered to a request that it did not carry out."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


def missing(folder: Path) -> list[str]:
    return [name for name in COMPONENTS if not (folder / name).is_file()]


class KubernetesApi:
    """Requests to one API server; every caller's thread may use it."""

    def __init__(self, port: int, token: str, authority: Path) -> None:
        self._port = port
        self._headers = {"Authorization": f"Bearer {token}"}
        self._tls = ssl.create_default_context(cafile=str(authority))

    def request(
        self, method: str, path: str, body: Object | None = None, kind: str = "application/json"
    ) -> tuple[Object, list[str]]:
        """The answer, and the server's warnings. Raises Refused."""
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self._port, context=self._tls, timeout=60
        )
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, self._headers | {"Content-Type": kind})
            answer = connection.getresponse()
            text = answer.read().decode()
            warnings = answer.headers.get_all("Warning", [])
        finally:
            connection.close()
        if answer.status >= 300:
            raise Refused(answer.status, text)
        return (json.loads(text) if text.startswith("{") else {"text": text}), warnings

    def get(self, path: str) -> Object:
        return self.request("GET", path)[0]

    def items(self, path: str, labels: dict[str, str] | None = None) -> list[Object]:
        chosen = ",".join(f"{name}%3D{value}" for name, value in (labels or {}).items())
        found: list[Object] = self.get(f"{path}?labelSelector={chosen}" if chosen else path)[
            "items"
        ]
        return found

    def create(self, path: str, body: Object) -> Object:
        return self.request("POST", path, body)[0]

    def patch(self, path: str, body: Object, kind: str = MERGE) -> Object:
        return self.request("PATCH", path, body, kind)[0]

    def delete(self, path: str, body: Object | None = None) -> None:
        self.request("DELETE", path, body)


class KubernetesCluster:
    """Starts the processes, and stops them at the end. Raises RuntimeError if one is not ready."""

    def __init__(self, binaries: Path, etcd: Path, folder: Path) -> None:
        self._binaries = binaries
        self._etcd = etcd
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._files = ExitStack()
        self.kubeconfig = folder / "kubeconfig"
        self.api: KubernetesApi

    def __enter__(self) -> KubernetesCluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        for process in reversed(self._processes.values()):
            process.terminate()
            try:
                process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._files.close()

    def _start(self) -> None:
        port, etcd_port, peer_port = free_ports(3)
        token = secrets.token_hex(16)
        tokens = self._folder / "tokens.csv"
        tokens.write_text(f"{token},administrator,administrator,system:masters\n")
        key = self._folder / "service-accounts.key"
        key.write_bytes(private_key())
        certificates = self._folder / "certificates"
        authority = certificates / "apiserver.crt"
        client, peer = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
        self._run(
            "etcd",
            str(self._etcd),
            "--unsafe-no-fsync",
            f"--data-dir={self._folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
        )
        self._component(
            "kube-apiserver",
            f"--etcd-servers={client}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={certificates}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-cluster-ip-range=10.96.0.0/24",
            "--endpoint-reconciler-type=none",  # it refuses loopback addresses
        )
        self._await_file(authority)
        self.kubeconfig.write_text(kubeconfig(port, token, authority))
        self.kubeconfig.chmod(0o600)
        self.api = KubernetesApi(port, token, authority)
        self._await_ready()
        common = (f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--secure-port=0")
        self._component(
            "kube-controller-manager",
            *common,
            f"--service-account-private-key-file={key}",
            f"--root-ca-file={authority}",
            "--controllers=*,-node-lifecycle-controller",  # no kubelet renews a lease
        )
        self._component("kube-scheduler", *common)

    def _component(self, name: str, *flags: str) -> None:
        self._run(name, str(self._binaries / name), *flags)

    def _run(self, name: str, *command: str) -> None:
        log = self._files.enter_context((self._folder / f"{name}.log").open("wb"))
        self._processes[name] = subprocess.Popen(
            command, cwd=self._folder, stdout=log, stderr=subprocess.STDOUT
        )

    def _await_file(self, path: Path) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while not (path.exists() and path.stat().st_size):
            self._check(deadline, f"{path.name} does not appear")

    def _await_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            try:
                if self.api.get("/readyz")["text"] == "ok":
                    return
            except (OSError, Refused) as error:
                self._check(deadline, f"the API server is not ready: {error}")

    def _check(self, deadline: float, problem: str) -> None:
        """Waits a little. Raises if a process has ended or it is too late."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                log = (self._folder / f"{name}.log").read_text(errors="replace")
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{log[-3000:]}")
        if time.monotonic() > deadline:
            raise RuntimeError(problem)
        time.sleep(0.2)


def free_ports(number: int) -> list[int]:
    with ExitStack() as held:
        sockets = [
            held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)
        ]
        return [each.getsockname()[1] for each in sockets]


def private_key() -> bytes:
    """For the tokens of service accounts, in PEM."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def kubeconfig(port: int, token: str, authority: Path) -> str:
    cluster = {"server": f"https://127.0.0.1:{port}", "certificate-authority": str(authority)}
    context = {"cluster": "test", "user": "administrator"}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "administrator", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": context}],
        }
    )
