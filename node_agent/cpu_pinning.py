"""Keeps each rank's process on its share of the host's CPUs, as long as all of the host's ranks
run."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from node_agent.cpu_share import share_cpus
from node_agent.rank_process import RankProcess
from shared.types import RankId


@dataclass(slots=True, kw_only=True)
class CpuPinning:
    """`cpus` empty: nobody is pinned. `processes` are those that run now."""

    cpus: Sequence[int]
    processes: Mapping[RankId, RankProcess]
    _shares: dict[RankId, frozenset[int]] = field(default_factory=dict)

    def of(self, rank: RankId) -> frozenset[int]:
        """Of a process that starts; empty: it is not pinned."""
        return self._shares.get(rank, frozenset())

    def share(self, ranks: Collection[RankId]) -> None:
        """These shall run here."""
        if self.cpus and self._shares.keys() != ranks:
            self._shares = share_cpus(self.cpus, sorted(ranks)) if ranks else {}
            self.pin_if_all_run()

    def pin_if_all_run(self) -> None:
        if self.processes.keys() == self._shares.keys():
            self._pin(self._shares)

    def unpin(self) -> None:
        """While a rank is missing all CPUs serve all ranks, because survivors do its work as
        well."""
        if self.cpus:
            self._pin(dict.fromkeys(self.processes, frozenset(self.cpus)))

    def _pin(self, cpus: Mapping[RankId, frozenset[int]]) -> None:
        for rank, process in self.processes.items():
            with contextlib.suppress(FileNotFoundError):
                process.set_cpu_affinity(cpus[rank])
