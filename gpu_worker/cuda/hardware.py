"""What a CUDA rank computes with and talks over: captured graphs on one card, and Mooncake's EP
buffer to its peers. Everything is loaded, compiled and captured before the rank registers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import torch

from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.config import DispatchForm, ExchangeKind, RankConfig
from gpu_worker.cuda.block_cache import CudaBlockCache
from gpu_worker.cuda.ep.dispatch import check_dispatch, exchange_kind
from gpu_worker.cuda.ep.endpoint import EpEndpoint, SingleRankEndpoint
from gpu_worker.cuda.ep.exchange import EpExchange, EpShape
from gpu_worker.cuda.model_loading import CudaModel, load_cuda_model
from gpu_worker.cuda.runner import CudaRunner
from gpu_worker.cuda.streams import on_stream
from gpu_worker.engine.monitor import EngineMonitor
from gpu_worker.engine.step_runner import RunnerParts
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierCallbacks, GraphBarrierDriver
from gpu_worker.exchange.worker_thread import WorkerThread
from gpu_worker.kv_replication.budget import uses_kv_replication
from gpu_worker.rank import Hardware
from shared.clock import Clock
from shared.errors import ConfigError
from shared.expert_cache_memory import expert_cache_memory_of_rank
from shared.model_spec import ModelSpec
from shared.records import InstanceSpec
from shared.types import Member

if TYPE_CHECKING:
    from gpu_worker.cuda.decoder import Decoder, DecoderOptions
    from gpu_worker.cuda.stages.moe_stage import MoeStage

log = structlog.get_logger()

_POLL_INTERVAL_S = 20e-6  # the engine looks so often whether a graph has ended
_DECODE_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class CudaHardware:
    """`load` blocks while weights are read and kernels compiled."""

    def __init__(self, config: RankConfig, member: Member, clock: Clock) -> None:
        """Raises ConfigError."""
        cards = torch.cuda.device_count()
        card = config.cuda_device if config.cuda_device >= 0 else member.rank % cards
        if card >= cards:
            raise ConfigError(f"--cuda-device {card}: this host has {cards}, counted from 0")
        self._config = config
        self._member = member
        self._clock = clock
        self._device = torch.device("cuda", card)
        self._loop = asyncio.get_running_loop()

    def load(self, model: ModelSpec, spec: InstanceSpec, folder: Path) -> Hardware:
        """Raises CheckpointError, ConfigError."""
        # Triton is installed only on machines with a card.
        from gpu_worker.cuda.decoder import Decoder

        if spec.num_ranks > 1:
            check_dispatch(self._ep_shape(model, spec))
        torch.cuda.set_device(self._device)
        progress = LoadProgress(self._clock)
        loaded = self._load_model(model, spec, folder, progress)
        log.info(
            "model_loaded", folder=str(folder), card=self._device.index, **progress.log_fields()
        )
        exchange = self._open_exchange(model, spec) if spec.num_ranks > 1 else None
        began = self._clock.now()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with on_stream(stream):
            decoder = Decoder(
                loaded.sizes,
                loaded.weights,
                self._moe_stage(model, spec, loaded, exchange),
                self._decoder_options(spec),
                mask_R=None if exchange is None else exchange.mask_R,
            )
            decoder.capture()
            blocks = (
                CudaBlockCache(decoder.attention.cache(), architecture=model.architecture)
                if uses_kv_replication(self._config, spec)
                else None
            )
        log.info(
            "graphs_captured",
            seconds=round(self._clock.now() - began, 2),
            device_gb=round(torch.cuda.memory_allocated(self._device) / 1e9, 2),
        )
        return self._hardware(loaded, decoder, exchange, blocks, stream)

    def _hardware(
        self,
        loaded: CudaModel,
        decoder: Decoder,
        exchange: EpExchange | None,
        blocks: CudaBlockCache | None,
        stream: torch.cuda.Stream,
    ) -> Hardware:
        config, member, clock = self._config, self._member, self._clock
        kind = ExchangeKind.NONE if exchange is None else exchange_kind(config.ep_dispatch)
        mask = None if exchange is None else exchange.mask
        release = (lambda *_: None) if mask is None else mask.release
        release_worker = WorkerThread("release", lambda: torch.cuda.set_device(self._device))

        def init_thread() -> None:
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(stream)

        def make_runner(monitor: EngineMonitor, callbacks: GraphBarrierCallbacks) -> RunnerParts:
            barrier_driver = GraphBarrierDriver(
                member, release, self._loop, release_worker, callbacks
            )
            runner = CudaRunner(
                member=member,
                decoder=decoder,
                mask=mask,
                barrier_driver=barrier_driver,
                monitor=monitor,
                clock=clock,
                deadline_ms=1e12 if config.static else config.timings.exchange_deadline_ms,
                replicas=config.replicas,
                pause=lambda: time.sleep(_POLL_INTERVAL_S),
                init_thread=init_thread,
            )
            return RunnerParts(runner, barrier_driver)

        return Hardware(
            make_runner=make_runner,
            loader=loaded.loader,
            residents=loaded.slots.contents,
            endpoint=(
                SingleRankEndpoint(member)
                if exchange is None
                else EpEndpoint(
                    member, exchange.mask, kind, step_tokens_max=exchange.step_tokens_max
                )
            ),
            exchange=kind,
            blocks=blocks,
            handles=None if exchange is None else exchange.handles(),
            check_device=(lambda: None) if mask is None else mask.check_device,
        )

    def _load_model(
        self, model: ModelSpec, spec: InstanceSpec, folder: Path, progress: LoadProgress
    ) -> CudaModel:
        config = self._config
        return load_cuda_model(
            folder,
            model,
            slots_per_rank=spec.slots_per_rank,
            device=self._device,
            dtype=torch.bfloat16,
            progress=progress,
            cache_memory=expert_cache_memory_of_rank(
                config.host_experts_fd, config.host_experts_gb
            ),
        )

    def _open_exchange(self, model: ModelSpec, spec: InstanceSpec) -> EpExchange:
        return EpExchange(
            self._member,
            self._ep_shape(model, spec),
            timeout_ms=self._config.graph_timeout_ms,
            device=self._device,
            clock=self._clock,
        )

    def _ep_shape(self, model: ModelSpec, spec: InstanceSpec) -> EpShape:
        return EpShape(
            num_ranks=spec.num_ranks,
            slots_per_rank=spec.slots_per_rank,
            hidden_size=model.hidden_size,
            step_tokens_max=self._config.step_tokens_max,
            fp8=self._config.ep_dispatch is DispatchForm.FP8,
        )

    def _moe_stage(
        self, model: ModelSpec, spec: InstanceSpec, loaded: CudaModel, exchange: EpExchange | None
    ) -> MoeStage:
        from gpu_worker.cuda.stages.moe_stage import ExchangedMoe, LocalMoe

        if exchange is None:
            return LocalMoe(
                loaded.slots, top_k=model.top_k, step_tokens_max=self._config.step_tokens_max
            )
        rows = self._ep_shape(model, spec).received_rows_max
        return ExchangedMoe(loaded.slots, exchange, rows_of_slot=rows)

    def _decoder_options(self, spec: InstanceSpec) -> DecoderOptions:
        from gpu_worker.cuda.decoder import DecoderOptions

        config = self._config
        longest = next(n for n in _DECODE_BATCH_SIZES if n >= config.running_max)
        return DecoderOptions(
            kv_blocks=config.kv_tokens // config.kv_block_tokens,
            block_tokens=config.kv_block_tokens,
            context_tokens_max=spec.context_tokens_max,
            decode_batch_sizes=tuple(
                n for n in _DECODE_BATCH_SIZES if n <= min(longest, config.step_tokens_max)
            ),
            prefill_tokens=config.step_tokens_max,
            prefill_sequences=config.step_tokens_max,
        )
