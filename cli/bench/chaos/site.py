"""Where faults happen: the processes, folders and (if it has them) networks of one instance, and
what is known of it at the moment."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cli.bench.chaos.cluster import Cluster
from cli.bench.chaos.processes import ProcessKind, ServiceProcess, processes_of, send
from cli.bench.fault_observer import FaultObserver


@dataclass(slots=True, kw_only=True)
class Site:
    """`mark` and `owner` find its processes (`processes_of`). `urls` are its gateways'. `folder` is
    a folder that its services write to, on a file system of its own; None if there is none.
    `cluster`: its hosts, if it has several here. `run_dir`: that of `starfish up`, if that runs
    it. No fault chooses one of the ranks `spared` (what hits all ranks hits these as well): a soak
    needs some that live long."""

    urls: tuple[str, ...]
    mark: str
    observer: FaultObserver
    owner: int = 0
    folder: Path | None = None
    cluster: Cluster | None = None
    run_dir: Path | None = None
    spared: frozenset[int] = frozenset()
    stopped: set[ServiceProcess] = field(default_factory=set)

    def processes(self, *kinds: ProcessKind) -> list[ServiceProcess]:
        """By kind and rank; of a rank only the process that the map names."""
        members = {record.pid for record in self.observer.members()}
        found = [
            process
            for process in processes_of(self.mark, self.owner)
            if process.kind in kinds and (process.rank < 0 or process.pid in members)
        ]
        return sorted(found, key=lambda process: (process.rank, process.pid))

    def ranks(self) -> list[ServiceProcess]:
        return self.processes(ProcessKind.RANK)

    def victims(self, kind: ProcessKind) -> list[ServiceProcess]:
        """Those of a kind among which a fault may choose."""
        return [process for process in self.processes(kind) if process.rank not in self.spared]

    def leader(self) -> list[ServiceProcess]:
        """The control plane that leads; none while nobody does."""
        pid = self.observer.leader_pid
        return [p for p in self.processes(ProcessKind.CONTROL_PLANE) if p.pid == pid]

    def send(self, victims: Iterable[ServiceProcess], number: signal.Signals) -> None:
        for victim in victims:
            if send(victim, number) and number is signal.SIGSTOP:
                self.stopped.add(victim)

    def continue_all(self) -> None:
        """Continues what was stopped. Idempotent."""
        for victim in list(self.stopped):
            send(victim, signal.SIGCONT)
            self.stopped.discard(victim)

    def census(self) -> dict[ProcessKind, int]:
        """How many processes of each kind there are."""
        found = processes_of(self.mark, self.owner)
        return {kind: sum(p.kind is kind for p in found) for kind in ProcessKind}

    def is_whole(self, census: dict[ProcessKind, int]) -> bool:
        """Whether every rank is in the map, somebody leads, and no process is missing."""
        if not self.observer.are_all_ranks_in_map() or self.observer.leader_pid is None:
            return False
        found = self.census()
        return all(found[kind] >= number for kind, number in census.items())


def choose(rng: random.Random, victims: list[ServiceProcess], count: int) -> list[ServiceProcess]:
    return rng.sample(victims, min(count, len(victims)))
