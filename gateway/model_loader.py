"""Loads the served model as soon as the instance's spec is known."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import structlog

from gateway.cluster_view import ClusterView
from gateway.served_model import ParserNames, ServedModel, load_served_model
from gateway.tokenizer_loader import TokenizerOptions
from shared.clock import Clock
from shared.records import InstanceSpec

log = structlog.get_logger()

SPEC_REMINDER_S = 10.0


class ModelLoader:
    """`served` is None until `run` has loaded the model. A `folder` or `name` that is not empty
    replaces the spec's. The first spec counts: an instance serves one model all its life."""

    def __init__(
        self,
        *,
        folder: Path | None,
        name: str,
        clock: Clock,
        tokenizer_options: TokenizerOptions | None = None,
        parsers: ParserNames | None = None,
    ) -> None:
        self._folder = folder
        self._name = name
        self._clock = clock
        self._tokenizer_options = tokenizer_options or TokenizerOptions()
        self._parsers = parsers or ParserNames()
        self._spec: InstanceSpec | None = None
        self._has_spec = asyncio.Event()
        self._is_loaded = asyncio.Event()
        self.served: ServedModel | None = None

    def on_view(self, view: ClusterView) -> None:
        if view.spec is not None and self._spec is None:
            self._spec = view.spec
            self._has_spec.set()

    async def run(self) -> None:
        """Ends when the model is loaded. Raises CheckpointError if its tokenizer cannot be read."""
        while self._spec is None:
            try:
                async with asyncio.timeout(SPEC_REMINDER_S):
                    await self._has_spec.wait()
            except TimeoutError:
                log.info("waiting_for_spec", hint="is the control plane of this instance running?")
        self.served = await load_served_model(
            self._spec,
            folder=self._folder,
            name=self._name,
            clock=self._clock,
            tokenizer_options=self._tokenizer_options,
            parsers=self._parsers,
        )
        for template, reason in self.served.tokenizer.template_problems.items():
            log.warning("chat_template_unusable", template=template, reason=reason)
        self._is_loaded.set()
        log.info("model_ready", model=self.served.name)

    async def wait(self, timeout_s: float) -> ServedModel | None:
        """The model as soon as it is loaded; None if it is not loaded in time."""
        if self.served is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._is_loaded.wait()
        return self.served
