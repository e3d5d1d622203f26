"""Control plane processes over a real etcd, with ranks that speak the control protocol over real
sockets: formation, deaths, hangs, mass expiry, a killed leader."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from shared.embedded_etcd import EmbeddedEtcd, embedded_etcd
from shared.errors import StoreUnavailable
from shared.etcd_permissions import EtcdService
from shared.etcd_store import EtcdStore, connect_store
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import (
    InstanceSpec,
    LeaderRecord,
    Suspicion,
    Verdict,
    unpack_map,
    unpack_record,
)
from shared.types import Epoch, Member, Step, SuspicionReason
from tests.support.etcd import flags_of
from tests.support.fake_rank import FakeRank

WAIT_S = 60.0
NUM_RANKS = 4

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-moe"
    folder.mkdir()
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class ControlPlane:
    """A real process."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self.process, self.name = process, name

    async def output(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()

    async def says(self, words: bytes) -> None:
        """Until a line of the log has them."""
        assert self.process.stderr is not None
        async with asyncio.timeout(WAIT_S):
            while words not in (line := await self.process.stderr.readline()):
                assert line, "it has ended"


@asynccontextmanager
async def control_plane(
    etcd: EmbeddedEtcd, keys: Keys, model: Path, *flags: str, name: str = "cp"
) -> AsyncIterator[ControlPlane]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "control_plane", *flags_of(etcd, keys, EtcdService.CONTROL_PLANE)),
        *("--model", str(model), "--ranks", str(NUM_RANKS), "--name", name, *flags),
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield ControlPlane(process, name)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def ranks(
    store: EtcdStore, keys: Keys, count: int = NUM_RANKS
) -> AsyncIterator[list[FakeRank]]:
    async with AsyncExitStack() as stack:
        result = [FakeRank(store, keys, rank=rank) for rank in range(count)]
        for rank in result:
            await rank.start()
            stack.push_async_callback(rank.stop)
        yield result


async def eventually(look: Callable[[], Awaitable[object]], what: str) -> object:
    for _ in range(int(WAIT_S / 0.02)):
        found = await read_or_none(look)
        if found:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"not within {WAIT_S} s: {what}")


async def read_map(store: EtcdStore, keys: Keys) -> ExpertMap | None:
    found = await store.get(keys.map)
    return unpack_map(found.value) if found else None


async def read_or_none(look: Callable[[], Awaitable[object]]) -> object:
    with suppress(StoreUnavailable):
        return await look()
    return None


async def map_with(store: EtcdStore, keys: Keys, *members: Member) -> ExpertMap:
    async def look() -> object:
        expert_map = await read_map(store, keys)
        return expert_map if expert_map and expert_map.members == members else None

    found = await eventually(look, f"a map of {[str(m) for m in members]}")
    assert isinstance(found, ExpertMap)
    assert found.uncovered() == []
    return found


async def leader(store: EtcdStore, keys: Keys, name: str) -> LeaderRecord:
    async def look() -> object:
        found = await store.get(keys.leader)
        record = unpack_record(found.value, LeaderRecord) if found else None
        return record if record and record.control_plane == name else None

    found = await eventually(look, f"leader {name}")
    assert isinstance(found, LeaderRecord)
    return found


async def verdict(store: EtcdStore, keys: Keys, member: Member) -> Verdict:
    found = await store.get(keys.verdict(member.rank, member.incarnation))
    assert found is not None
    return unpack_record(found.value, Verdict)


async def test_ranks_form_a_map_and_a_killed_one_leaves_and_returns(
    etcd: EmbeddedEtcd, store: EtcdStore, keys: Keys, model: Path
) -> None:
    async with control_plane(etcd, keys, model), ranks(store, keys) as alive:
        members = [rank.member for rank in alive]
        first = await map_with(store, keys, *members)
        assert first.epoch == 1
        assert (first.replica_counts() == 2).all()

        await alive[0].kill()
        second = await map_with(store, keys, *members[1:])
        assert second.epoch == 2
        for member in members[1:]:
            before, after = (m.placement[:, member.rank] for m in (first, second))
            assert (before == after).all(), "a death moved a survivor's replica"
        assert (await verdict(store, keys, members[0])).epoch == 2

        restarted = FakeRank(store, keys, rank=0, incarnation=2)
        await restarted.start()
        third = await map_with(store, keys, restarted.member, *members[1:])
        assert third.epoch >= 3
        await restarted.stop()


async def test_a_refused_probe_is_a_death_without_any_other_word(
    etcd: EmbeddedEtcd, store: EtcdStore, keys: Keys, model: Path
) -> None:
    async with control_plane(etcd, keys, model), ranks(store, keys) as alive:
        members = [rank.member for rank in alive]
        await map_with(store, keys, *members)
        await alive[2].kill_without_agent()
        await map_with(store, keys, members[0], members[1], members[3])
        assert await store.get(keys.rank(members[2].rank, members[2].incarnation)) is not None


@pytest.mark.parametrize("stuck", ["process", "engine"])
async def test_a_hung_rank_that_is_suspected_dies_and_a_slow_one_does_not(
    etcd: EmbeddedEtcd, store: EtcdStore, keys: Keys, model: Path, stuck: str
) -> None:
    async with control_plane(etcd, keys, model), ranks(store, keys) as alive:
        members = [rank.member for rank in alive]
        await map_with(store, keys, *members)
        for accused in (alive[1], alive[3]):
            suspicion = Suspicion(
                rank=accused.member.rank,
                incarnation=accused.member.incarnation,
                by="rank-0.1",
                reason=SuspicionReason.EXCHANGE,
                epoch=Epoch(1),
                step=Step(0),
                raised_at=0.0,
            )
            if accused is alive[3] and stuck == "process":
                accused.hang()
            elif accused is alive[3]:
                accused.engine_age_ms = 60_000.0
            await alive[0].suspect(accused.member, suspicion)
        await map_with(store, keys, *members[:3])
        assert (await verdict(store, keys, members[3])).cause is SuspicionReason.EXCHANGE


async def test_leases_that_expire_at_once_freeze_the_map_while_their_ranks_answer(
    etcd: EmbeddedEtcd, store: EtcdStore, keys: Keys, model: Path
) -> None:
    async with control_plane(etcd, keys, model) as process, ranks(store, keys) as alive:
        members = [rank.member for rank in alive]
        await map_with(store, keys, *members)
        await asyncio.gather(*(store.revoke_lease(rank.lease_id) for rank in alive[:3]))
        await asyncio.sleep(1.0)
        found = await read_map(store, keys)
        assert found is not None
        assert found.members == tuple(members)
        # A death that does not rest on the lease is still a death.
        await alive[0].kill_without_agent()
        await map_with(store, keys, *members[1:])
        process.process.terminate()
        assert "mass_expiry" in await process.output()


async def test_the_standby_takes_over_from_a_killed_leader_and_publishes(
    etcd: EmbeddedEtcd, store: EtcdStore, keys: Keys, model: Path
) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(control_plane(etcd, keys, model, name="first"))
        term = (await leader(store, keys, "first")).term
        await stack.enter_async_context(control_plane(etcd, keys, model, name="second"))
        alive = await stack.enter_async_context(ranks(store, keys))
        members = [rank.member for rank in alive]
        before = await map_with(store, keys, *members)
        os.kill(first.process.pid, signal.SIGKILL)
        await alive[3].kill()
        after = await map_with(store, keys, *members[:3])
        assert (await leader(store, keys, "second")).term > term
        assert after.epoch > before.epoch


async def test_a_leader_that_is_told_to_stop_hands_over_at_once(
    etcd: EmbeddedEtcd, store: EtcdStore, keys: Keys, model: Path
) -> None:
    flags = ("--leader-ttl-s", "60")  # only a resignation can be quick
    async with (
        control_plane(etcd, keys, model, *flags, name="first") as first,
        control_plane(etcd, keys, model, *flags, name="second") as second,
    ):
        by_name = {"first": first, "second": second}

        async def look() -> object:
            return await store.get(keys.leader)

        await eventually(look, "a leader")
        found = await store.get(keys.leader)
        assert found is not None
        chosen = unpack_record(found.value, LeaderRecord).control_plane
        leaving = by_name.pop(chosen)
        (staying,) = by_name.values()
        leaving.process.terminate()
        assert await asyncio.wait_for(leaving.process.wait(), WAIT_S) == 0
        await leader(store, keys, staying.name)


async def test_a_new_leader_goes_on_with_a_half_done_join(
    etcd: EmbeddedEtcd, store: EtcdStore, keys: Keys, model: Path
) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(control_plane(etcd, keys, model, name="first"))
        alive = await stack.enter_async_context(ranks(store, keys))
        members = [rank.member for rank in alive]
        await map_with(store, keys, *members)
        await alive[1].kill()
        await map_with(store, keys, members[0], members[2], members[3])
        restarted = FakeRank(store, keys, rank=1, incarnation=2)
        restarted.loads_allowed.clear()
        await restarted.start()
        stack.push_async_callback(restarted.stop)

        async def is_assigned() -> object:
            return await store.get(
                keys.assignment(restarted.member.rank, restarted.member.incarnation)
            )

        await eventually(is_assigned, "an assignment for the joiner")
        os.kill(first.process.pid, signal.SIGKILL)
        restarted.loads_allowed.set()
        await stack.enter_async_context(control_plane(etcd, keys, model, name="second"))
        await map_with(store, keys, members[0], restarted.member, members[2], members[3])
        assert len(restarted.loads) == 1, "the new leader planned the join anew"


async def test_a_death_while_etcd_is_away_is_published_when_it_is_back(
    tmp_path: Path, keys: Keys, model: Path
) -> None:
    async with embedded_etcd(tmp_path / "etcd") as server:
        await server.admit(keys)
        store = await connect_store(server.root)
        async with control_plane(server, keys, model) as process, ranks(store, keys) as alive:
            members = [rank.member for rank in alive]
            await map_with(store, keys, *members)
            await server.kill()
            await alive[1].kill_without_agent()
            await process.says(b"map_offered")
            await asyncio.sleep(3.0)  # longer than the leader's lease
            await server.start()
            after = await map_with(store, keys, members[0], members[2], members[3])
            # Before, the leader gave it to the ranks itself, which these do not understand.
            assert after.cause.startswith("published again")
        await store.close()


async def test_the_spec_may_change_only_while_no_rank_lives(
    etcd: EmbeddedEtcd, store: EtcdStore, keys: Keys, model: Path
) -> None:
    async with control_plane(etcd, keys, model), ranks(store, keys) as alive:
        await map_with(store, keys, *(rank.member for rank in alive))
    for rank in alive:
        await store.revoke_lease(rank.lease_id)
    async with ranks(store, keys, 1) as alive:
        async with control_plane(etcd, keys, model, "--slots-per-rank", "5") as refused:
            assert await asyncio.wait_for(refused.process.wait(), WAIT_S) == 1
            assert "slots_per_rank 4, not 5" in await refused.output()
        await store.revoke_lease(alive[0].lease_id)
    async with control_plane(etcd, keys, model, "--slots-per-rank", "5"):

        async def look() -> object:
            found = await store.get(keys.spec)
            return found and unpack_record(found.value, InstanceSpec).slots_per_rank == 5

        await eventually(look, "the new spec")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--slots-per-rank", "1"), "4 ranks with 1 slots each hold 4 experts of a layer"),
        (("--redundant-experts", "9", "--slots-per-rank", "4"), "do not fit into 4 ranks"),
        (("--etcd", "127.0.0.1:1"), "no etcd answers at 127.0.0.1:1"),
        (("--model", "/nowhere"), "/nowhere is not a folder"),
        (("--ranks", "none"), "Expected `int`"),
    ],
)
async def test_a_wrong_flag_ends_in_one_sentence(
    etcd: EmbeddedEtcd, keys: Keys, model: Path, flags: tuple[str, str], sentence: str
) -> None:
    async with control_plane(etcd, keys, model, *flags) as process:
        text = await asyncio.wait_for(process.output(), WAIT_S)
        assert await process.process.wait() == 1
    assert sentence in text
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) == 1


async def test_the_endpoint_shows_health_and_metrics(
    etcd: EmbeddedEtcd, store: EtcdStore, keys: Keys, model: Path
) -> None:
    async with control_plane(etcd, keys, model, "--port", "0") as process, ranks(store, keys) as up:
        await map_with(store, keys, *(rank.member for rank in up))
        assert process.process.stderr is not None
        port = ""
        while not port:
            line = (await asyncio.wait_for(process.process.stderr.readline(), WAIT_S)).decode()
            found = re.search(r"listening.*port=(\d+)", line)
            port = found.group(1) if found else ""
        async with aiohttp.ClientSession() as session:
            base = f"http://127.0.0.1:{port}"
            async with session.get(base + "/health") as reply:
                health = await reply.json()
            async with session.get(base + "/metrics") as reply:
                metrics = await reply.text()
    assert health["leading"] is True
    assert health["epoch"] == 1
    assert "starfish_epoch 1.0" in metrics
