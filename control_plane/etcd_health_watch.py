"""Asks etcd for its alarms and its size, again and again, and tells operators: an etcd that takes
no writes explains why nothing changes."""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog

from control_plane.telemetry import Metrics
from shared.errors import StoreError
from shared.etcd_health import ALARM_KINDS, EtcdHealth, describe_alarm

log = structlog.get_logger()

_INTERVAL_S = 10.0


class _Etcd(Protocol):
    async def health(self) -> EtcdHealth: ...


class EtcdHealthWatch:
    def __init__(self, etcd: _Etcd, metrics: Metrics) -> None:
        self._etcd = etcd
        self._metrics = metrics
        self._alarms: tuple[str, ...] = ()

    @property
    def alarms(self) -> tuple[str, ...]:
        """The kinds that etcd had raised when it last answered."""
        return self._alarms

    async def run(self) -> None:
        while True:
            try:
                self.on_health(await self._etcd.health())
            except StoreError as error:
                log.debug("etcd_health_unknown", error=str(error))
            await asyncio.sleep(_INTERVAL_S)

    def on_health(self, health: EtcdHealth) -> None:
        for kind in {*health.alarms} - {*self._alarms}:
            log.error("etcd_alarm", kind=kind, detail=describe_alarm(kind))
        for kind in {*self._alarms} - {*health.alarms}:
            log.info("etcd_alarm_over", kind=kind)
        self._alarms = health.alarms
        for kind in {*ALARM_KINDS, *health.alarms}:
            self._metrics.etcd_alarm.labels(kind).set(kind in health.alarms)
        self._metrics.etcd_size.set(health.size_bytes)
