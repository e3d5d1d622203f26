"""`python -m gpu_worker`: the wiring of one rank."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

from gpu_worker.config import RankConfig
from gpu_worker.engine.guide import Guides
from gpu_worker.engine.step_runner import ModelRunner
from gpu_worker.engine_thread import EngineThread
from gpu_worker.exchange.confine import require_confined
from gpu_worker.exchange.links import TransferEndpoint
from gpu_worker.exchange.message import Layout
from gpu_worker.exchange.mooncake_engine import Protocols
from gpu_worker.exchange.seam import StepMonitor
from gpu_worker.identity import take_identity
from gpu_worker.load_progress import LoadProgress
from gpu_worker.model.decoder import Decoder
from gpu_worker.model.registry import load_model
from gpu_worker.rank import Rank, RankParts
from gpu_worker.slot_loader import ExpertSlotLoader
from shared.clock import SystemClock
from shared.codec import unpack
from shared.config import add_flags, load_config
from shared.errors import CheckpointError, StarfishError
from shared.etcd_store import EtcdStore, connect_store
from shared.keys import Keys
from shared.lifeline import watch_lifeline
from shared.logs import configure_logs
from shared.model_spec import ModelSpec, read_model_spec
from shared.records import InstanceSpec
from shared.store import Store

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
        # The event loop answers probes while the engine computes: it cannot wait for the GIL.
        sys.setswitchinterval(GIL_SWITCH_S)
        code = asyncio.run(run_rank(config))
    except (StarfishError, OSError) as error:
        print(f"starfish rank: {error}", file=sys.stderr, flush=True)
        code = EXIT_ERROR
    except Exception:
        log.exception("rank_crashed")
        code = EXIT_CRASH
    # Neither an engine that waits for dead peers nor Mooncake's threads shall delay the exit that
    # the node agent waits for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parse(arguments: Sequence[str]) -> RankConfig:
    """Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="python -m gpu_worker",
        description="One data-parallel rank: its batch, its KV cache, its slots of experts. "
        "Node agents start it; by hand it takes its own incarnation and lease.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with [rank]")
    add_flags(parser, RankConfig)
    flags = vars(parser.parse_args(list(arguments)))
    config = load_config(
        RankConfig, section="rank", file=flags.pop("config"), environ=os.environ, flags=flags
    )
    config.check()
    return config


async def run_rank(config: RankConfig) -> int:
    """The exit code. Raises StarfishError, OSError, and whatever the engine raised."""
    keys, clock = Keys(config.instance), SystemClock()
    store = await connect_store(config.etcd.split(","))
    watch_lifeline(config.lifeline_fd, end_at_once)
    member, lease_id = await take_identity(config, store, keys)
    spec = await wait_for_spec(store, keys)
    folder = config.model or Path(spec.model_path)
    model_spec = read_model_spec(folder)
    endpoint = TransferEndpoint(
        config.data_host,
        layout_of(config, model_spec),
        clock,
        protocol=Protocols(config.transfer_protocol),
        device=config.mooncake_ib_device,
        replica_policy=config.replicas,
    )
    require_confined()
    progress = LoadProgress(clock)
    model = await asyncio.to_thread(load, config, spec, folder, progress)
    log.info("model_loaded", folder=str(folder), **progress.so_far())
    loader = ExpertSlotLoader(model.slots, progress)
    deadline_ms = 1e12 if config.static else config.timings.exchange_deadline_ms

    def make_runner(monitor: StepMonitor) -> ModelRunner:
        return ModelRunner(model, endpoint.exchange(member, monitor, clock, deadline_ms))

    rank = Rank(
        RankParts(
            member=member,
            lease_id=lease_id,
            config=config,
            spec=spec,
            eos_token_ids=model_spec.eos_token_ids,
            store=store,
            clock=clock,
            make_runner=make_runner,
            loader=loader,
            residents=model.slots.contents,
            endpoint=endpoint,
            engine_host=EngineThread(),
            guides=open_guides(folder, model_spec),
        )
    )
    return await run_until_signal(rank, store)


async def run_until_signal(rank: Rank, store: EtcdStore) -> int:
    """SIGTERM and SIGINT end the rank; its lease goes with it, so that nobody waits for it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, rank.stop)
    try:
        return await rank.run()
    finally:
        try:
            await store.revoke_lease(rank.lease_id)
        except StarfishError as error:
            log.warning("lease_not_revoked", detail=str(error))


def load(config: RankConfig, spec: InstanceSpec, folder: Path, progress: LoadProgress) -> Decoder:
    def say(done: int, total: int) -> None:
        log.debug("kernels_compiled", done=done, total=total)

    return load_model(
        folder,
        slots_per_rank=spec.slots_per_rank,
        kv_blocks=config.kv_tokens // config.kv_block_tokens,
        block_tokens=config.kv_block_tokens,
        on_warm_up=say,
        on_read=progress.count,
    )


def open_guides(folder: Path, spec: ModelSpec) -> Guides | None:
    """None where the checkpoint has no tokenizer for it; all else is served."""
    try:
        return Guides(folder, vocab_size=spec.vocab_size, eos_token_ids=spec.eos_token_ids)
    except CheckpointError as error:
        log.warning("no_guided_decoding", detail=str(error))
        return None


def layout_of(config: RankConfig, model: ModelSpec) -> Layout:
    return Layout(
        hidden_size=model.hidden_size, top_k=model.top_k, step_tokens_max=config.step_tokens_max
    )


async def wait_for_spec(store: Store, keys: Keys) -> InstanceSpec:
    """The control plane writes it; until then there is nothing to load."""
    said = False
    while (found := await store.get(keys.spec)) is None:
        if not said:
            log.info("waiting_for_spec", hint="is a control plane of this instance running?")
            said = True
        await asyncio.sleep(SPEC_POLL_S)
    return unpack(found.value, InstanceSpec)


def end_at_once() -> None:
    """Whoever started this rank is gone: nobody waits for it any more."""
    log.warning("lifeline_ended")
    os._exit(0)


if __name__ == "__main__":
    main()
