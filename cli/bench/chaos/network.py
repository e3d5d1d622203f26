"""Hosts as network namespaces on one switch: each has an address of its own, links that can be cut,
and rules that drop what comes from others. The namespaces have no names: they end with this process
and those that it started in them, however these end. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import Unavailable

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_SUBNET = "10.99.0."
_PREFIX_BITS = "24"
_LOCAL_TABLE_RULE = "1000"  # below the rules that drop, which must come first
_DROP_RULE = "10"
_BRIDGE = "switch"
_PROGRAMS = ("ip", "nsenter", "setpriv")
_PACKAGES = "iproute2 and util-linux"


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """`descriptor` keeps it alive."""

    name: str
    descriptor: int
    address: str = ""

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def command(self, *argv: str) -> tuple[str, ...]:
        """`argv` to be run in it."""
        return ("nsenter", f"--net={self.path}", *argv)

    def run(self, *argv: str) -> None:
        """Raises Unavailable."""
        done = subprocess.run(self.command(*argv), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unavailable(f"`{' '.join(argv)}` in {self.name}: {done.stderr.strip()}")

    def port(self) -> str:
        """The switch's end of its link."""
        return f"p{self.address.rpartition('.')[2]}"


def networks_are_possible() -> str | None:
    """None if they are, else what is missing."""
    if os.geteuid() != 0:
        return "needs root: hosts are network namespaces"
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    return f"needs {', '.join(missing)}: install {_PACKAGES}" if missing else None


@dataclass(slots=True, kw_only=True)
class Network:
    """The switch and all that is plugged into it. Every method runs programs, and blocks so
    long."""

    switch: Namespace
    hosts: list[Namespace] = field(default_factory=list)
    _down: list[Namespace] = field(default_factory=list)
    _dropping: list[Namespace] = field(default_factory=list)

    def add(self, name: str) -> Namespace:
        """A new namespace with a link to the switch. Raises Unavailable."""
        address = f"{_SUBNET}{len(self.hosts) + 1}"
        host = Namespace(name=name, descriptor=_new_namespace(), address=address)
        self.hosts.append(host)
        self.switch.run(
            *("ip", "link", "add", host.port(), "type", "veth"),
            *("peer", "name", "eth0", "netns", host.path),
        )
        self.switch.run("ip", "link", "set", host.port(), "master", _BRIDGE, "up")
        host.run("ip", "link", "set", "lo", "up")
        host.run("ip", "address", "add", f"{address}/{_PREFIX_BITS}", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        # A packet for this host is delivered by the rule of the local table, which comes first
        # of all by default, so that nothing could be dropped before.
        host.run("ip", "rule", "add", "priority", _LOCAL_TABLE_RULE, "lookup", "local")
        host.run("ip", "rule", "delete", "priority", "0")
        return host

    def cut(self, host: Namespace) -> None:
        """From now on nothing reaches it, nor leaves it. Raises Unavailable."""
        self._down.append(host)
        self.switch.run("ip", "link", "set", host.port(), "down")

    def drop(self, source: Namespace, destination: Namespace) -> None:
        """From now on nothing from `source` reaches `destination`; the way back stays. Raises
        Unavailable."""
        self._dropping.append(destination)
        destination.run(
            *("ip", "rule", "add", "priority", _DROP_RULE),
            *("iif", "eth0", "from", source.address, "blackhole"),
        )

    @contextlib.contextmanager
    def relayed(self, host: Namespace, delay_s: float, loss: float) -> Iterator[None]:
        """While the body runs, all that `host` sends and gets goes through a relay that delays it,
        and loses a fraction. Raises Unavailable."""
        near, far = f"{host.port()}n", f"{host.port()}f"
        relay: subprocess.Popen[bytes] | None = None
        self.switch.run("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        try:
            self.switch.run("ip", "link", "set", host.port(), "nomaster")
            for name in (near, host.port()):
                self.switch.run("ip", "link", "set", name, "promisc", "on", "up")
            self.switch.run("ip", "link", "set", far, "master", _BRIDGE, "up")
            script = Path(__file__).with_name("relay.py")
            relay = subprocess.Popen(
                self.switch.command(
                    *("setpriv", "--pdeathsig", "KILL", sys.executable, str(script)),
                    *(host.port(), near, str(delay_s), str(loss)),
                )
            )
            yield
        finally:
            if relay is not None:
                relay.kill()
                relay.wait()
            with contextlib.suppress(Unavailable):
                self.switch.run("ip", "link", "delete", near)
            self.switch.run("ip", "link", "set", host.port(), "promisc", "off", "master", _BRIDGE)

    def heal(self) -> None:
        """All links are up, nothing is dropped. Idempotent."""
        for host in self._down:
            with contextlib.suppress(Unavailable):
                self.switch.run("ip", "link", "set", host.port(), "up")
        for host in self._dropping:  # once for each rule
            with contextlib.suppress(Unavailable):
                host.run("ip", "rule", "delete", "priority", _DROP_RULE)
        self._down.clear()
        self._dropping.clear()

    def close(self) -> None:
        for namespace in (*self.hosts, self.switch):
            os.close(namespace.descriptor)
        self.hosts.clear()


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """While the body runs. Raises Unavailable if this host does not allow it."""
    why_not = networks_are_possible()
    if why_not is not None:
        raise Unavailable(why_not)
    found = Network(switch=Namespace(name="switch", descriptor=_new_namespace()))
    try:
        found.switch.run("ip", "link", "add", _BRIDGE, "type", "bridge")
        found.switch.run("ip", "link", "set", _BRIDGE, "up")
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def entered(namespace: Namespace) -> Iterator[None]:
    """This thread is in the namespace while the body runs, and so are threads that it begins."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _set_namespace(namespace.descriptor)
        yield
    finally:
        _set_namespace(home)
        os.close(home)


def _set_namespace(descriptor: int) -> None:
    if _LIBC.setns(descriptor, _CLONE_NEWNET) != 0:
        raise Unavailable(f"cannot enter a network namespace: {os.strerror(ctypes.get_errno())}")


def _new_namespace() -> int:
    """Its descriptor. Raises Unavailable."""
    found: list[int] = []

    def make() -> None:
        if _LIBC.unshare(_CLONE_NEWNET) == 0:
            path = Path("/proc/thread-self/ns/net")
            found.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    maker = threading.Thread(target=make)  # whose own network nobody else needs
    maker.start()
    maker.join()
    if not found:
        raise Unavailable("this host allows no network namespaces")
    return found[0]
