"""Sessions that change their rank or their gateway while they run: those of a drained rank, and
those whose gateway is killed. All have the oracle's tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from gateway.stream_session import StreamSession
from gpu_worker.engine import scheduler
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.engine_client import EngineClient
from gpu_worker.membership.rank_membership import Leave, RankMembership
from shared.codec import pack
from shared.desired_state import DesiredState, Drain
from shared.types import RankId, SamplingParams
from shared.wire import SessionTokens, StatusQuery, StatusReply
from tests.sim.cluster import ClientSession, SimCluster, SimClusterSizes
from tests.sim.schedules import check_sessions, run_scenario
from tests.sim.sim_card import CardSizes
from tests.sim.sim_loop import kill
from tests.sim.sim_model import oracle

SIZES = pytest.mark.parametrize(
    "sizes", [SimClusterSizes(), SimClusterSizes(cards=CardSizes())], ids=["cpus", "cards"]
)
NUM_TOKENS = 120


@SIZES
@pytest.mark.parametrize("seed", range(2))
def test_a_drained_ranks_sessions_move_and_wait_for_nothing(
    seed: int, sizes: SimClusterSizes
) -> None:
    """Each waits for two tokens of the others at most, though its prompt takes many steps."""

    async def scenario(cluster: SimCluster) -> None:
        for first in range(8):
            cluster.send((first, *range(40)), NUM_TOKENS)
        sessions = [session_of(client) for client in cluster.clients]
        await cluster.until(lambda: min(len(s.emitted) for s in sessions) > 10, 20.0)
        there = [s for s in sessions if s.member is not None and s.member.rank == 1]
        others = [s for s in sessions if s not in there]
        for session in sessions:
            session.longest_gap_s = 0.0
        desired = DesiredState(
            drains=(Drain(rank=RankId(1), requested_at=cluster.clock.wall(), grace_s=0.05),)
        )
        await cluster.store("host-plane-0").put(cluster.keys.desired, pack(desired))
        await cluster.until(cluster.all_ended, 60.0)
        check_sessions(cluster)
        assert there
        assert {s.moves for s in there} == {1}
        usual_s = max(s.longest_gap_s for s in others)
        assert max(s.longest_gap_s for s in there) <= 2 * usual_s + 0.02

    run_scenario(scenario, seed, sizes)


DRAFTS = pytest.mark.parametrize("drafts", [False, True], ids=["", "drafts"])


@DRAFTS
@pytest.mark.parametrize("seed", range(3))
def test_no_step_is_thrown_away_for_a_rank_that_leaves_or_comes_back(
    seed: int, drafts: bool
) -> None:
    assert steps_thrown_away(seed, drafts=drafts) == 0


def test_no_step_is_thrown_away_for_a_rank_that_hears_late_of_a_map(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have_rank_3_hear_late(monkeypatch)
    assert steps_thrown_away(0) == 0


def have_rank_3_hear_late(monkeypatch: pytest.MonkeyPatch) -> None:
    adopt = EngineClient.adopt_map

    def adopt_late(self, expert_map):  # type: ignore[no-untyped-def]
        late_s = 0.2 if self._member.rank == 3 else 0.0
        asyncio.get_running_loop().call_later(late_s, adopt, self, expert_map)

    monkeypatch.setattr(EngineClient, "adopt_map", adopt_late)


@DRAFTS
def test_ranks_that_adopt_a_planned_map_on_their_own_are_noticed(
    monkeypatch: pytest.MonkeyPatch, drafts: bool
) -> None:
    monkeypatch.setattr(Engine, "_waits_for_others", lambda _: False)
    assert any(steps_thrown_away(seed, drafts=drafts) for seed in range(3))


def test_ranks_that_agree_although_one_does_not_know_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have_rank_3_hear_late(monkeypatch)
    monkeypatch.setattr("tests.support.local_exchange.all", any, raising=False)
    assert steps_thrown_away(0)


def test_a_leaver_that_does_not_take_the_last_step_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def leave(self, member, epoch, *, is_drained=False):  # type: ignore[no-untyped-def]
        is_own = member == self.record.member
        return [Leave(reason="drained")] if is_own else on_verdict(self, member, epoch)

    on_verdict = RankMembership.on_verdict
    monkeypatch.setattr(RankMembership, "on_verdict", leave)
    assert any(steps_thrown_away(seed) for seed in range(3))


def steps_thrown_away(seed: int, *, drafts: bool = False) -> int:
    """By ranks 0, 2 and 3, while rank 1 is drained and taken back."""
    thrown_away: list[int] = []

    async def scenario(cluster: SimCluster) -> None:
        for first in range(8):
            cluster.send((first, *range(10)), 2 * NUM_TOKENS)
        sessions = [session_of(client) for client in cluster.clients]
        await cluster.until(lambda: min(len(s.emitted) for s in sessions) > 10, 20.0)
        drain = Drain(rank=RankId(1), requested_at=cluster.clock.wall(), grace_s=0.05)
        for drains in ((drain,), ()):
            desired = DesiredState(drains=drains)
            await cluster.store("host-plane-0").put(cluster.keys.desired, pack(desired))
            wanted = {rank for rank in range(4) if not drains or rank != 1}
            await cluster.until(lambda wanted=wanted: ranks_in_map(cluster) == wanted, 20.0)
        assert not cluster.all_ended(), "the sessions ended too soon to notice anything"
        thrown_away.extend(status_of(cluster, rank).steps_abandoned for rank in (0, 2, 3))
        await cluster.until(cluster.all_ended, 120.0)
        check_sessions(cluster)

    run_scenario(scenario, seed, SimClusterSizes(drafts=drafts))
    return sum(thrown_away)


def ranks_in_map(cluster: SimCluster) -> set[int]:
    return {member.rank for member in cluster.gateway.view.members}


def status_of(cluster: SimCluster, rank: int) -> StatusReply:
    member = cluster.agents[rank].member
    assert member is not None
    return cluster.ranks[member]._rank._engine.status(StatusQuery(nonce=1))


def session_of(client: ClientSession) -> StreamSession:
    assert client.session is not None
    return client.session


def key_of(number: int) -> bytes:
    return bytes([number + 1]) * 16


def send_resumable(cluster: SimCluster, number: int, home: RankId | None) -> StreamSession:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return cluster.open((number, *range(12)), sampling, stream_key=key_of(number), home_rank=home)


@SIZES
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("also_a_rank", [False, True], ids=["gateway", "gateway_and_rank"])
def test_another_gateway_goes_on_with_a_dead_ones_streams(
    seed: int, sizes: SimClusterSizes, also_a_rank: bool
) -> None:
    async def scenario(cluster: SimCluster) -> None:
        resumed = await resume_all(cluster, kill_rank=also_a_rank)
        assert any(s.taken_over for s in resumed)
        assert also_a_rank or all(s.taken_over for s in resumed)

    run_scenario(scenario, seed, sizes)


async def resume_all(cluster: SimCluster, *, kill_rank: bool) -> list[StreamSession]:
    """Kills the gateway in the middle of streams. Clients come back soon, and read all."""
    old = [send_resumable(cluster, number, None) for number in range(8)]
    await cluster.until(lambda: min(len(s.emitted) for s in old) > 10, 20.0)
    seen = [(list(s.emitted), s.member) for s in old]
    await cluster.replace_gateway()
    if kill_rank:
        kill(cluster.process_of(1))  # type: ignore[arg-type]
    await asyncio.sleep(cluster.rng.uniform(0.0, 0.3))
    new = [
        send_resumable(cluster, number, None if member is None else member.rank)
        for number, (_, member) in enumerate(seen)
    ]
    await cluster.until(lambda: all(s.ended for s in new), 120.0)
    for (tokens, _), session in zip(seen, new, strict=True):
        assert session.failure is None
        assert session.emitted == list(oracle(session.prompt, NUM_TOKENS))
        assert session.emitted[: len(tokens)] == tokens
    return new


def test_an_orphan_that_leaves_a_token_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    missed_tokens = scheduler.missed_tokens

    def forget(*taken_over: Any) -> SessionTokens:
        reply = missed_tokens(*taken_over)
        return replace(reply, ids=reply.ids[1:])

    monkeypatch.setattr(scheduler, "missed_tokens", forget)

    async def scenario(cluster: SimCluster) -> None:
        await resume_all(cluster, kill_rank=False)

    with pytest.raises((AssertionError, TimeoutError)):
        run_scenario(scenario, 0, SimClusterSizes())
