"""Ranks on simulated cards: the real runner, graph barrier and its driver, slot loader, mask and
mappings, over `sim_card`'s devices."""

from __future__ import annotations

from typing import Any

import torch

from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.config import ExchangeKind
from gpu_worker.cuda.ep.endpoint import EpEndpoint
from gpu_worker.cuda.ep.handles import HandleStore
from gpu_worker.cuda.ep.rank_mask import RankMask
from gpu_worker.cuda.experts.slot_loader import CudaSlotLoader
from gpu_worker.cuda.runner import CudaRunner
from gpu_worker.engine.monitor import EngineMonitor
from gpu_worker.engine.step_runner import RunnerParts
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierCallbacks, GraphBarrierDriver
from gpu_worker.exchange.replica_policy import ReplicaPolicy
from gpu_worker.rank import Hardware
from shared.records import ExchangeHandles
from shared.types import Member
from tests.sim.sim_card import CardSizes, Fabric, SimDevice, SimSlots
from tests.sim.sim_loop import SimLoop
from tests.sim.sim_rank import HardwareContext
from tests.sim.sim_worker import GreenletWorker, InlineExecutor

STEP_TOKENS_MAX = 16
WORKER_START_S = (0.00005, 0.001)


class SimCards:
    """The cards of an instance."""

    def __init__(self, loop: SimLoop, sizes: CardSizes, num_ranks: int, seed: int) -> None:
        self.fabric = Fabric(loop, sizes, seed)
        self._num_ranks = num_ranks
        self.replicas = self.fabric.rng.choice(list(ReplicaPolicy))

    def options(self) -> dict[str, Any]:
        """Of `RankConfig`."""
        return {"graph_timeout_ms": round(self.fabric.sizes.graph_timeout_s * 1000)}

    def build_hardware(self, context: HardwareContext) -> Hardware:
        member, process, host = context.member, context.process, context.host
        handle_store = HandleStore()
        slots = SimSlots(context.spec.slots_per_rank, process, self.fabric)
        device = SimDevice(
            member=member,
            num_ranks=self._num_ranks,
            process=process,
            fabric=self.fabric,
            engine=host,
            model=context.model,
            slots=slots,
            handle_store=handle_store,
        )
        mask = RankMask(
            member,
            device=device,
            buffer=device,
            handle_store=handle_store,
            clock=context.clock,
            mapping_worker=self._worker(context),
        )
        loader = CudaSlotLoader(
            slots=slots,
            reader=slots,
            host_experts=slots,
            progress=LoadProgress(context.clock),
            staging=[torch.zeros(1, slots.form.num_values)],
            open_readers=InlineExecutor,
        )
        return self._of_incarnation(context, device, mask, loader, self._worker(context))

    def _of_incarnation(
        self,
        context: HardwareContext,
        device: SimDevice,
        mask: RankMask,
        loader: CudaSlotLoader,
        release_worker: GreenletWorker,
        *,
        is_renewed: bool = False,
    ) -> Hardware:
        """`context` is that of the process's first incarnation."""
        member, host = device.member, context.host

        def renew(next_member: Member) -> Hardware:
            next_mask = mask.renew(next_member)
            device.renew(next_member)
            return self._of_incarnation(
                context, device, next_mask, loader, release_worker, is_renewed=True
            )

        def make_runner(monitor: EngineMonitor, callbacks: GraphBarrierCallbacks) -> RunnerParts:
            barrier_driver = GraphBarrierDriver(
                member, mask.release, context.loop, release_worker, callbacks
            )
            runner = CudaRunner(
                member=member,
                decoder=device,
                mask=mask,
                barrier_driver=barrier_driver,
                monitor=monitor,
                clock=context.clock,
                deadline_ms=context.config.timings.exchange_deadline_ms,
                replicas=self.replicas,
                pause=host.park_exchange,
                has_met_others=is_renewed,
            )
            return RunnerParts(runner, barrier_driver)

        return Hardware(
            make_runner=make_runner,
            loader=loader,
            residents=device.slots.contents,
            endpoint=EpEndpoint(member, mask, ExchangeKind.EP, step_tokens_max=STEP_TOKENS_MAX),
            exchange=ExchangeKind.EP,
            blocks=context.blocks,
            handles=_handles(context.member),
            renew=renew,
            end_waits=mask.end,
            check_device=mask.check_device,
        )

    def _worker(self, context: HardwareContext) -> GreenletWorker:
        rng = self.fabric.rng
        return GreenletWorker(context.loop, context.process, lambda: rng.uniform(*WORKER_START_S))


def _handles(member: Member) -> ExchangeHandles:
    """They name the process's first incarnation, as memory handles name their memory."""
    return ExchangeHandles(
        host="sim",
        address=0,
        remote_key=0,
        subnet_prefix=0,
        interface_id=0,
        queue_pairs=(),
        local_ids=(),
        ipc_handle=(member.incarnation,),
        step_tokens_max=STEP_TOKENS_MAX,
        buffer_id=str(member),
    )
