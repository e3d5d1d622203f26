"""What a CUDA rank computes with and talks over: captured graphs on one card, and Mooncake's EP
buffer to its peers. Everything is loaded, compiled and captured before the rank registers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import torch

from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.config import DispatchForm, ExchangeKind, KvCacheDtype, RankConfig
from gpu_worker.cuda.block_cache import CudaBlockCache
from gpu_worker.cuda.driver import card_bytes
from gpu_worker.cuda.ep.dispatch import check_dispatch, exchange_kind
from gpu_worker.cuda.ep.endpoint import EpEndpoint, NoExchangeEndpoint
from gpu_worker.cuda.ep.exchange import EpExchange, EpShape
from gpu_worker.cuda.ep.rank_mask import RankMask
from gpu_worker.cuda.expert_counter import CudaExpertCounter
from gpu_worker.cuda.model_loading import CudaModel, load_cuda_model
from gpu_worker.cuda.runner import CudaRunner
from gpu_worker.cuda.streams import on_stream
from gpu_worker.engine.monitor import EngineMonitor
from gpu_worker.engine.step_runner import MakeRunner, RunnerParts
from gpu_worker.exchange.expert_counter import ExpertCounter
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierCallbacks, GraphBarrierDriver
from gpu_worker.exchange.replica_policy import ReplicaPolicy, num_turns
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _ProcessParts:
    """What all incarnations of one process compute with."""

    loaded: CudaModel
    decoder: Decoder
    blocks: CudaBlockCache | None
    counter: ExpertCounter | None
    stream: torch.cuda.Stream
    release_worker: WorkerThread


def card_of(config: RankConfig) -> int:
    """Which of this host's cards a rank computes on. Raises ConfigError."""
    cards = torch.cuda.device_count()
    card = config.cuda_device if config.cuda_device >= 0 else config.rank % cards
    if card >= cards:
        raise ConfigError(f"--cuda-device {card}: this host has {cards}, counted from 0")
    return card


def card_share(config: RankConfig, spec: InstanceSpec) -> tuple[int, int]:
    """The bytes of a rank's card, and how many ranks may share it. The same on all ranks whose
    hosts and cards are alike. Raises ConfigError."""
    return card_bytes(card_of(config)), -(-spec.capacity // torch.cuda.device_count())


class CudaHardware:
    """`load` blocks while weights are read and kernels compiled."""

    def __init__(
        self,
        config: RankConfig,
        member: Member,
        clock: Clock,
        end_stage: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`end_stage` hears of each stage of the start. Raises ConfigError."""
        card = card_of(config)
        self._config = config
        self._member = member
        self._clock = clock
        self._end_stage = end_stage
        self._device = torch.device("cuda", card)
        self._loop = asyncio.get_running_loop()

    def load(self, model: ModelSpec, spec: InstanceSpec, folder: Path) -> Hardware:
        """Raises CheckpointError, ConfigError."""
        # Triton is installed only on machines with a card.
        from gpu_worker.cuda.decoder import Decoder

        # A dense model's ranks exchange nothing.
        exchanges = spec.capacity > 1 and bool(model.moe_layers)
        if exchanges:
            check_dispatch(self._ep_shape(model, spec))
        torch.cuda.set_device(self._device)
        torch.zeros(1, device=self._device)
        self._end_stage("context")
        progress = LoadProgress(self._clock)
        loaded = self._load_model(model, spec, folder, progress)
        log.info(
            "model_loaded", folder=str(folder), card=self._device.index, **progress.log_fields()
        )
        self._end_stage("weights")
        exchange = self._open_exchange(model, spec) if exchanges else None
        self._end_stage("exchange")
        began = self._clock.now()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with on_stream(stream):
            moe = self._moe_stage(model, spec, loaded, exchange)
            decoder = Decoder(
                loaded.sizes,
                loaded.weights,
                moe,
                self._decoder_options(spec),
                mask_R=None if exchange is None else exchange.mask_R,
            )
            if exchange is not None:
                exchange.watch_slot_table(decoder.slot_of_LUE)
            self._end_stage("decoder")
            decoder.capture(self._report_graphs)
            self._end_stage("graphs")
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
        parts = _ProcessParts(
            loaded=loaded,
            decoder=decoder,
            blocks=blocks,
            counter=self._counter(decoder, moe),
            stream=stream,
            release_worker=WorkerThread("release", lambda: torch.cuda.set_device(self._device)),
        )
        self._end_stage("kv_blocks")
        loaded.host_experts.end_pinning()
        self._end_stage("pinning")
        if exchange is None:
            return self._alone(self._member, parts, has_peers=spec.capacity > 1)
        return self._of_incarnation(self._member, parts, exchange, exchange.mask)

    def _report_graphs(self, done: int, total: int) -> None:
        """For whoever starts the instance: with kernels to compile it takes minutes."""
        log.info("captures_graphs", done=done, total=total)

    def _alone(self, member: Member, parts: _ProcessParts, *, has_peers: bool) -> Hardware:
        """Of a rank that exchanges nothing. Without peers, nobody ends its life."""

        def renew(next_member: Member) -> Hardware:
            return self._alone(next_member, parts, has_peers=True)

        return Hardware(
            make_runner=self._runner_maker(member, parts, None, is_renewed=False),
            loader=parts.loaded.loader,
            residents=parts.loaded.slots.contents,
            endpoint=NoExchangeEndpoint(member, has_peers=has_peers),
            exchange=ExchangeKind.NONE,
            blocks=parts.blocks,
            renew=renew if has_peers else None,
        )

    def _of_incarnation(
        self, member: Member, parts: _ProcessParts, exchange: EpExchange, mask: RankMask
    ) -> Hardware:
        """The first incarnation has the exchange's own mask. The next ones have the same weights,
        graphs and buffer: graphs hold the buffer's addresses. Nothing of the former one is in
        flight by then, and what others have sent it is wiped before the first step."""
        kind = exchange_kind(self._config.ep_dispatch)

        def renew(next_member: Member) -> Hardware:
            return self._of_incarnation(next_member, parts, exchange, mask.renew(next_member))

        return Hardware(
            make_runner=self._runner_maker(
                member, parts, mask, is_renewed=mask is not exchange.mask
            ),
            loader=parts.loaded.loader,
            residents=parts.loaded.slots.contents,
            endpoint=EpEndpoint(member, mask, kind, step_tokens_max=exchange.step_tokens_max),
            exchange=kind,
            blocks=parts.blocks,
            expert_counter=parts.counter,
            handles=exchange.handles(),
            renew=renew,
            end_waits=mask.end,
            check_device=mask.check_device,
        )

    def _runner_maker(
        self, member: Member, parts: _ProcessParts, mask: RankMask | None, *, is_renewed: bool
    ) -> MakeRunner:
        config = self._config
        release = (lambda *_: None) if mask is None else mask.release

        def init_thread() -> None:
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(parts.stream)

        def make_runner(monitor: EngineMonitor, callbacks: GraphBarrierCallbacks) -> RunnerParts:
            barrier_driver = GraphBarrierDriver(
                member,
                release,
                self._loop,
                parts.release_worker,
                callbacks,
                meets_peers=mask is not None,
            )
            runner = CudaRunner(
                member=member,
                decoder=parts.decoder,
                mask=mask,
                barrier_driver=barrier_driver,
                monitor=monitor,
                clock=self._clock,
                deadline_ms=1e12 if config.static else config.timings.exchange_deadline_ms,
                replicas=config.replicas,
                pause=lambda: time.sleep(_POLL_INTERVAL_S),
                init_thread=init_thread,
                has_met_others=is_renewed,
            )
            return RunnerParts(runner, barrier_driver)

        return make_runner

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
            kv_tokens=config.kv_tokens,
            kv_dtype=_kv_dtype(config),
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
            num_ranks=spec.capacity,
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
                loaded.slots,
                top_k=model.top_k,
                step_tokens_max=self._config.step_tokens_max,
                clamped=loaded.sizes.clamped_experts,
            )
        rows = self._ep_shape(model, spec).received_rows_max
        return ExchangedMoe(
            loaded.slots, exchange, rows_of_slot=rows, clamped=loaded.sizes.clamped_experts
        )

    def _counter(self, decoder: Decoder, moe: MoeStage) -> ExpertCounter | None:
        """None in an instance of one rank, which has no choice of places."""
        from gpu_worker.cuda.stages.moe_stage import ExchangedMoe

        if not isinstance(moe, ExchangedMoe):
            return None
        spread = self._config.replicas is ReplicaPolicy.SPREAD
        return CudaExpertCounter(decoder.expert_counts, moe.computed_L, spread=spread)

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
            prefill_sequences=config.step_sequences_max,
            replica_turns=num_turns(config.replicas),
            kv_dtype=_kv_dtype(config),
        )


def _kv_dtype(config: RankConfig) -> torch.dtype | None:
    return torch.float8_e4m3fn if config.kv_cache_dtype is KvCacheDtype.FP8 else None
