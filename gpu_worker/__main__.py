"""`python -m gpu_worker`: the wiring of one rank."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import structlog

from gpu_worker.config import RankConfig
from gpu_worker.device_choice import require_drafts, uses_cuda
from gpu_worker.engine.engine_thread import EngineThread
from gpu_worker.engine.grammar_service import GrammarService
from gpu_worker.exchange.mooncake_engine import Protocols
from gpu_worker.identity import (
    acquire_identity,
    read_peers,
    require_kv_cache_dtype,
    step_tokens_of,
)
from gpu_worker.kv_replication.budget import kv_replica_bytes, uses_kv_replication
from gpu_worker.kv_replication.data_transport import DataTransport
from gpu_worker.kv_replication.mooncake_replicator import MooncakeReplicator
from gpu_worker.kv_replication.writer import ReplicaWriter
from gpu_worker.rank import Hardware, KvReplication, RankParts
from gpu_worker.rejoin import RejoiningRank
from gpu_worker.startup_timer import StartupTimer
from gpu_worker.step_sizes import tokens_max_of_exchange, with_step_sizes
from shared.accept_errors import log_failed_accepts_once
from shared.clock import Clock, SystemClock
from shared.codec import unpack
from shared.config import add_flags, load_config
from shared.confinement import require_confined, require_internal
from shared.errors import StarfishError
from shared.etcd_store import connect_store
from shared.exit_codes import END_AT_ONCE
from shared.garbage_collector import freeze_loaded_objects
from shared.grammars.child import TokenizerFile
from shared.grammars.messages import GrammarBudget
from shared.handshake import Access
from shared.keys import Keys
from shared.lifeline import watch_lifeline
from shared.logs import configure_logs
from shared.model_spec import ModelSpec, read_model_spec
from shared.records import InstanceSpec
from shared.secret import read_secret
from shared.store import Store
from shared.tracing import open_tracer
from shared.types import Member, NodeId, RankId

log = structlog.get_logger()

EXIT_ERROR = 1
EXIT_CRASH = 70
GIL_SWITCH_S = 0.001
SPEC_POLL_S = 0.2


def main() -> None:
    try:
        config = parse(sys.argv[1:])
        configure_logs(
            service="rank", level=config.log_level, json=config.log_json, rank=config.rank
        )
        # The event loop answers probes while the engine computes, so it must get the GIL soon.
        sys.setswitchinterval(GIL_SWITCH_S)
        asyncio.run(run_rank(config))
    except (StarfishError, OSError) as error:
        print(f"starfish rank: {error}", file=sys.stderr, flush=True)
        code = EXIT_ERROR
    except Exception:
        log.exception("rank_crashed")
        code = EXIT_CRASH
    exit_process(code)


async def run_rank(config: RankConfig) -> NoReturn:
    """Ends the process. Raises StarfishError, OSError, and whatever the engine raised."""
    log_failed_accepts_once(asyncio.get_running_loop())
    if not config.public_data_host:
        require_internal(config.data_host)
    clock, keys = SystemClock(), Keys(config.instance)
    access = Access(config.instance, read_secret(config.secret_file))
    timer = StartupTimer(clock)
    store = await connect_store(config.store)
    watch_lifeline(config.lifeline_fd, exit_at_once)
    member, lease_id = await acquire_identity(config, store, keys)
    timer.end_stage("etcd")
    spec = await wait_for_spec(store, keys)
    peers = await read_peers(store, keys, config.rank)
    timer.end_stage("spec")
    tracer = open_tracer(
        config.otlp_endpoint,
        clock,
        service="starfish-rank",
        attributes={"starfish.instance": config.instance, "starfish.node": config.node},
    )
    folder = config.model or Path(spec.model_path)
    model_spec = read_model_spec(folder)
    transport = _open_replication_transport(config, spec, clock)
    timer.end_stage("kv_replication")
    on_card = uses_cuda(config, model_spec)
    # Ranks of a dense model exchange nothing, so each is as if alone.
    num_ranks = spec.capacity if model_spec.moe_layers else 1
    require_drafts(spec, on_card=on_card)
    require_kv_cache_dtype(peers, config.kv_cache_dtype, on_card=on_card)
    if on_card:
        from gpu_worker.cuda.hardware import CudaHardware, card_share

        tokens_max = step_tokens_of(peers)
        if num_ranks > 1 and not tokens_max:
            num_slots = spec.capacity * spec.slots_per_rank
            share = card_share(config, spec)
            tokens_max = tokens_max_of_exchange(model_spec.hidden_size, num_slots, *share)
        config = with_step_sizes(config, on_card=True, num_ranks=num_ranks, tokens_max=tokens_max)
        cuda = CudaHardware(config, member, clock, timer.end_stage)
        timer.end_stage("device")
        hardware = await asyncio.to_thread(cuda.load, model_spec, spec, folder)
    else:
        from gpu_worker.cpu.hardware import CpuHardware  # a host with a card may lack numba

        config = with_step_sizes(config, on_card=False, num_ranks=num_ranks)
        cpu = CpuHardware(config, member, model_spec, clock)
        timer.end_stage("device")
        hardware = await asyncio.to_thread(cpu.load, spec, folder)
    timer.end_stage("model")
    replication = await asyncio.to_thread(
        _make_replication, transport, hardware, member, access, spec, config
    )
    timer.end_stage("replicas")
    grammars = start_grammars(config, folder, model_spec)
    timer.end_stage("grammars")
    rank = RejoiningRank(
        RankParts(
            member=member,
            lease_id=lease_id,
            config=config,
            access=access,
            spec=spec,
            eos_token_ids=model_spec.eos_token_ids,
            store=store,
            clock=clock,
            hardware=hardware,
            engine_executor=EngineThread(),
            grammars=grammars,
            replication=replication,
            tracer=tracer,
        )
    )
    freeze_loaded_objects()
    timer.end_stage("wiring")
    code = await run_until_signal(rank, config.leave_grace_s)
    if tracer is not None and code == 0:
        await asyncio.to_thread(tracer.flush)
    exit_process(code)


def _open_replication_transport(
    config: RankConfig, spec: InstanceSpec, clock: Clock
) -> DataTransport | None:
    """None if this rank keeps no KV replicas. On the main thread, to which Mooncake binds its
    port. Raises ConfigError."""
    if not uses_kv_replication(config, spec):
        return None
    transport = DataTransport(
        config.data_host,
        clock,
        protocol=Protocols(config.transfer_protocol),
        device=config.mooncake_ib_device,
    )
    require_confined()
    return transport


def _make_replication(
    transport: DataTransport | None,
    hardware: Hardware,
    member: Member,
    access: Access,
    spec: InstanceSpec,
    config: RankConfig,
) -> KvReplication | None:
    """Blocks. Raises OSError if there is no memory for it."""
    blocks = hardware.blocks
    if transport is None or blocks is None:
        return None
    endpoint = MooncakeReplicator(
        member=member,
        access=access,
        node=NodeId(config.node),
        transport=transport,
        cache=blocks,
        budget_bytes=kv_replica_bytes(config, blocks.block_bytes),
        num_ranks=spec.capacity,
    )

    def renew(member: Member) -> KvReplication:
        endpoint.renew(member)
        return of_incarnation()

    def of_incarnation() -> KvReplication:
        replicator = ReplicaWriter(blocks, endpoint, rank=RankId(config.rank))
        return KvReplication(endpoint=endpoint, replicator=replicator, renew=renew)

    return of_incarnation()


async def run_until_signal(rank: RejoiningRank, leave_grace_s: float) -> int:
    """SIGTERM has the rank drained first, the others end it at once."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, END_AT_ONCE):
        loop.add_signal_handler(number, rank.stop)
    loop.add_signal_handler(signal.SIGTERM, rank.leave, leave_grace_s)
    return await rank.run()


def start_grammars(config: RankConfig, folder: Path, spec: ModelSpec) -> GrammarService | None:
    """None if the checkpoint has no tokenizer for it; requests without a grammar are still
    served. Raises OSError."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        log.warning("no_guided_decoding", detail=f"there is no {file}")
        return None
    tokenizer = TokenizerFile(
        path=file, vocab_size=spec.vocab_size, eos_token_ids=spec.eos_token_ids
    )
    budget = GrammarBudget(compile_s=config.grammar_compile_s, memory_mb=config.grammar_memory_mb)
    grammars = GrammarService(tokenizer, budget)
    grammars.start()
    return grammars


async def wait_for_spec(store: Store, keys: Keys) -> InstanceSpec:
    """Waits until the control plane has written it."""
    logged = False
    while (found := await store.get(keys.spec)) is None:
        if not logged:
            log.info("waiting_for_spec", hint="is a control plane of this instance running?")
            logged = True
        await asyncio.sleep(SPEC_POLL_S)
    return unpack(found.value, InstanceSpec)


def parse(arguments: Sequence[str]) -> RankConfig:
    """Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="python -m gpu_worker",
        description="One data-parallel rank: its batch, its KV cache, its slots of experts. "
        "Node agents start it; started by hand, it takes its own incarnation and lease.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with [rank]")
    add_flags(parser, RankConfig)
    flags = vars(parser.parse_args(list(arguments)))
    config = load_config(
        RankConfig, section="rank", file=flags.pop("config"), environ=os.environ, flags=flags
    )
    config.check()
    return config


def exit_at_once() -> None:
    """The process that started this rank is gone, so nobody needs a clean exit."""
    log.warning("lifeline_ended")
    os._exit(0)


def exit_process(code: int) -> NoReturn:
    """Exits at once: the node agent waits for the exit, and an engine that waits for dead peers or
    Mooncake's threads would delay it. Frees nothing before: kernels in flight, here and on peers,
    still use this rank's memory."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
