"""The hardware of a CPU rank: a model with numba kernels, and Mooncake's TransferEngine for the
exchange."""

from __future__ import annotations

from pathlib import Path

import structlog

from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.config import ExchangeKind, RankConfig
from gpu_worker.cpu.block_cache import CpuBlockCache
from gpu_worker.cpu.decoder import Decoder
from gpu_worker.cpu.registry import load_model
from gpu_worker.cpu.runner import CpuRunner
from gpu_worker.cpu.slot_loader import ExpertSlotLoader
from gpu_worker.engine.step_runner import RunnerParts
from gpu_worker.exchange.expert_counter import HostExpertCounter
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierCallbacks
from gpu_worker.exchange.interface import StepMonitor
from gpu_worker.exchange.links import TransferEndpoint
from gpu_worker.exchange.message import MessageLayout
from gpu_worker.exchange.mooncake_engine import Protocols
from gpu_worker.exchange.replica_policy import ReplicaPolicy
from gpu_worker.exchange.transfer import TransferExchange
from gpu_worker.kv_replication.budget import uses_kv_replication
from gpu_worker.rank import Hardware
from shared.clock import Clock
from shared.confinement import require_confined
from shared.model_spec import ModelSpec
from shared.records import InstanceSpec
from shared.types import Member

log = structlog.get_logger()


class CpuHardware:
    """Opened in two steps. The constructor opens the endpoint, because Mooncake binds its port on
    the calling thread. `load` reads the model and may run on another thread."""

    def __init__(self, config: RankConfig, member: Member, model: ModelSpec, clock: Clock) -> None:
        """Raises ConfigError."""
        self._config = config
        self._member = member
        self._clock = clock
        self._endpoint = TransferEndpoint(
            config.data_host,
            message_layout_of(config, model),
            clock,
            protocol=Protocols(config.transfer_protocol),
            device=config.mooncake_ib_device,
            replica_policy=config.replicas,
            shares_memory=config.memory_links,
        )
        require_confined()

    def load(self, spec: InstanceSpec, folder: Path) -> Hardware:
        """Blocks for as long as reading and compiling take. Raises CheckpointError."""
        progress = LoadProgress(self._clock)
        model = self._load_model(spec, folder, progress)
        log.info("model_loaded", folder=str(folder), **progress.log_fields())
        loader = ExpertSlotLoader(model.slots, progress)
        blocks = CpuBlockCache(model) if uses_kv_replication(self._config, spec) else None
        return self._of_incarnation(self._member, self._endpoint, model, loader, blocks)

    def _of_incarnation(
        self,
        member: Member,
        endpoint: TransferEndpoint,
        model: Decoder,
        loader: ExpertSlotLoader,
        blocks: CpuBlockCache | None,
    ) -> Hardware:
        config = self._config
        deadline_ms = 1e12 if config.static else config.timings.exchange_deadline_ms
        exchanges: list[TransferExchange] = []
        spec = model.spec
        counter = HostExpertCounter(
            spec.num_moe_layers,
            spec.num_experts,
            spread=config.replicas is ReplicaPolicy.SPREAD,
        )

        def make_runner(monitor: StepMonitor, _: GraphBarrierCallbacks) -> RunnerParts:
            exchange = TransferExchange(
                endpoint, member, monitor, self._clock, deadline_ms, counter
            )
            exchanges.append(exchange)
            return RunnerParts(CpuRunner(model, exchange, member.rank, self._clock))

        def renew(next_member: Member) -> Hardware:
            while exchanges:
                exchanges.pop().close()
            return self._of_incarnation(next_member, endpoint.renew(), model, loader, blocks)

        return Hardware(
            make_runner=make_runner,
            loader=loader,
            residents=model.slots.contents,
            endpoint=endpoint,
            exchange=ExchangeKind.TRANSFER,
            blocks=blocks,
            expert_counter=counter,
            computes_on_demand=True,
            renew=renew,
        )

    def _load_model(self, spec: InstanceSpec, folder: Path, progress: LoadProgress) -> Decoder:
        def log_progress(done: int, total: int) -> None:
            log.debug("kernels_compiled", done=done, total=total)

        config = self._config
        return load_model(
            folder,
            slots_per_rank=spec.slots_per_rank,
            kv_blocks=config.kv_tokens // config.kv_block_tokens,
            block_tokens=config.kv_block_tokens,
            speculative_tokens=spec.speculative_tokens,
            on_warm_up=log_progress,
            on_read=progress.count,
        )


def message_layout_of(config: RankConfig, model: ModelSpec) -> MessageLayout:
    return MessageLayout(
        hidden_size=model.hidden_size, top_k=model.top_k, step_tokens_max=config.step_tokens_max
    )
