"""Exchange handles through a real etcd: what one life's Buffer says reaches the life it is meant
for, and nothing that a dead life has left reaches anybody."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio

from gpu_worker.cuda.ep_rendezvous import EpRendezvous, Peer, RendezvousTimeout
from shared.errors import WireError
from shared.etcd_store import EtcdStore
from shared.keys import Keys
from shared.types import Incarnation, Member, RankId

LEASE_TTL_S = 30.0
SOON = timedelta(milliseconds=300)


def member(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def envelope(mark: int) -> bytes:
    """As the Buffer makes it; `mark` stands in for the IPC handle."""
    return pickle.dumps(("host", (-(2**63), 2, -3, 4, (5, 6), (7, 8), (mark,) * 16)))


class Rank:
    """One life with a lease of its own, and the Buffer's calls on a thread as the Buffer makes
    them."""

    def __init__(self, store: EtcdStore, keys: Keys, own: Member, lease_id: int) -> None:
        self.store, self.lease_id = store, lease_id
        self.rendezvous = EpRendezvous(
            store, asyncio.get_running_loop(), keys, own, lease_id=lease_id
        )
        self.rank = own.rank

    @classmethod
    async def born(cls, store: EtcdStore, keys: Keys, own: Member) -> Rank:
        return cls(store, keys, own, await store.grant_lease(LEASE_TTL_S))

    async def tell(self, peer: Peer, mark: int) -> None:
        rank = peer.member.rank
        self.rendezvous.expect({rank: peer})
        key = f"MOONCAKE_EP/{self.rank}/{rank}"
        await asyncio.to_thread(self.rendezvous.set, key, envelope(mark))

    async def hear(self, *peers: Peer, timeout: timedelta = SOON) -> list[bytes]:
        self.rendezvous.expect({p.member.rank: p for p in peers})
        keys = [f"MOONCAKE_EP/{p.member.rank}/{self.rank}" for p in peers]
        await asyncio.to_thread(self.rendezvous.wait, keys, timeout)
        found = await asyncio.to_thread(self.rendezvous.multi_get, keys)
        for key in keys:
            await asyncio.to_thread(self.rendezvous.delete_key, key)
        return found


@pytest_asyncio.fixture
async def three(store: EtcdStore, keys: Keys) -> AsyncIterator[list[Rank]]:
    yield [await Rank.born(store, keys, member(rank)) for rank in range(3)]


async def test_what_the_buffer_said_arrives_unchanged_whoever_comes_first(
    three: list[Rank],
) -> None:
    waiting = asyncio.create_task(
        three[0].hear(Peer(member(1)), Peer(member(2)), timeout=timedelta(seconds=20))
    )
    await three[2].tell(Peer(member(0)), 12)
    await three[1].tell(Peer(member(0)), 11)
    assert await waiting == [envelope(11), envelope(12)]


async def test_a_record_is_gone_once_it_was_read(three: list[Rank], keys: Keys) -> None:
    await three[1].tell(Peer(member(0)), 11)
    await three[0].hear(Peer(member(1)))
    assert (await three[0].store.get_prefix(keys.root)).values == ()


async def test_nobody_reads_what_a_former_life_of_a_peer_left(three: list[Rank]) -> None:
    await three[1].tell(Peer(member(0)), 11)
    with pytest.raises(RendezvousTimeout, match=r"00001/00000002/0"):
        await three[0].hear(Peer(member(1, incarnation=2)))


async def test_a_new_life_does_not_read_what_was_meant_for_its_former_one(
    store: EtcdStore, keys: Keys, three: list[Rank]
) -> None:
    await three[1].tell(Peer(member(0)), 11)
    reborn = await Rank.born(store, keys, member(0, incarnation=2))
    with pytest.raises(RendezvousTimeout):
        await reborn.hear(Peer(member(1)))


async def test_two_lives_that_meet_again_do_not_read_their_first_meeting(
    three: list[Rank],
) -> None:
    await three[1].tell(Peer(member(0), generation=0), 11)
    with pytest.raises(RendezvousTimeout):
        await three[0].hear(Peer(member(1), generation=1))
    await three[1].tell(Peer(member(0), generation=1), 12)
    assert await three[0].hear(Peer(member(1), generation=1)) == [envelope(12)]


async def test_a_life_takes_its_records_with_it(three: list[Rank]) -> None:
    await three[1].tell(Peer(member(0)), 11)
    await three[1].store.revoke_lease(three[1].lease_id)
    with pytest.raises(RendezvousTimeout):
        await three[0].hear(Peer(member(1)))


async def test_what_stands_in_etcd_is_never_unpickled(three: list[Rank], keys: Keys) -> None:
    key = keys.exchange_handle(member(0), member(1), 0)
    await three[0].store.put(key, envelope(11))
    with pytest.raises(WireError):
        await three[0].hear(Peer(member(1)))
