"""Who may do what in etcd: each service what it needs and nothing else, and strangers nothing."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from shared.clock import SystemClock
from shared.embedded_etcd import EmbeddedEtcd, embedded_etcd
from shared.errors import StoreError, StoreUnavailable
from shared.etcd_admin import EtcdAdmin
from shared.etcd_certificates import CertificateAuthority
from shared.etcd_options import EtcdOptions
from shared.etcd_permissions import EtcdService, accounts, user_of, writable_keys
from shared.etcd_store import EtcdStore, connect_store
from shared.keys import Keys
from shared.secret import write_private_file
from shared.store import Compare, Delete, Put, Snapshot, WatchEvent
from shared.types import Accuser, Incarnation, NodeId, RankId

KEYS, OTHERS = Keys("ours"), Keys("theirs")
IDS = RankId(3), Incarnation(1)
EVERY_KEY = (
    *(KEYS.spec, KEYS.leader, KEYS.owner, KEYS.term, KEYS.map, KEYS.rank(*IDS)),
    *(KEYS.resident(*IDS), KEYS.assignment(*IDS), KEYS.view(*IDS), KEYS.verdict(*IDS)),
    *(KEYS.suspicion(*IDS, accuser, "x") for accuser in Accuser),
    *(KEYS.incarnation_counter(RankId(3)), KEYS.agent(NodeId("n")), KEYS.gateway("g")),
)
TOKEN_TTL_S = 1


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def etcd(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedEtcd]:
    async with embedded_etcd(tmp_path_factory.mktemp("etcd")) as server:
        for keys in (KEYS, OTHERS):
            await server.admit(keys)
        yield server


@asynccontextmanager
async def store_of(options: EtcdOptions) -> AsyncIterator[EtcdStore]:
    store = await connect_store(options)
    try:
        yield store
    finally:
        await store.close()


def may_write(service: EtcdService, key: str) -> bool:
    return any(
        key.startswith(own) if own.endswith("/") else key == own
        for own in writable_keys(KEYS)[service]
    )


@pytest.mark.parametrize("service", EtcdService)
@pytest.mark.asyncio(loop_scope="module")
async def test_each_service_reads_its_instance_and_writes_its_own_keys_alone(
    etcd: EmbeddedEtcd, service: EtcdService
) -> None:
    async with store_of(etcd.options(KEYS, service)) as store:
        await store.get_prefix(KEYS.root)
        lease_id = await store.grant_lease(30)
        for key in EVERY_KEY:
            attempts = (
                lambda key=key: store.put(key, b"x", lease_id=lease_id),
                lambda key=key: store.txn([], [Put(key=key, value=b"x")]),
                lambda key=key: store.txn([], [Delete(key=key)]),
                lambda key=key: store.delete(key),
            )
            for attempt in attempts:
                if may_write(service, key):
                    await attempt()
                else:
                    with pytest.raises(StoreError, match="does not let") as refused:
                        await attempt()
                    assert not isinstance(refused.value, StoreUnavailable)
        with pytest.raises(StoreError, match="does not let"):
            await store.get_prefix(OTHERS.root)
        with pytest.raises(StoreError, match="does not let"):
            await store.put(OTHERS.agent(NodeId("n")), b"x")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_rank_cannot_make_a_map_or_a_leader_and_a_gateway_kills_nobody(
    etcd: EmbeddedEtcd,
) -> None:
    """What the table says, in words: who is taken over cannot end others' lives."""
    for service, keys in (
        (EtcdService.RANK, (KEYS.map, KEYS.leader, KEYS.verdict(*IDS), KEYS.spec)),
        (EtcdService.GATEWAY, (KEYS.map, KEYS.rank(*IDS), KEYS.verdict(*IDS))),
        (EtcdService.READER, EVERY_KEY),
    ):
        assert not any(may_write(service, key) for key in keys)
    assert not may_write(EtcdService.RANK, KEYS.suspicion(*IDS, Accuser.AGENT, "x"))


@pytest.mark.asyncio(loop_scope="module")
async def test_an_agent_revokes_its_ranks_lease_and_a_gateway_does_not(etcd: EmbeddedEtcd) -> None:
    async with (
        store_of(etcd.options(KEYS, EtcdService.RANK)) as rank,
        store_of(etcd.options(KEYS, EtcdService.AGENT)) as agent,
        store_of(etcd.options(KEYS, EtcdService.GATEWAY)) as gateway,
    ):
        lease_id = await agent.grant_lease(30)
        for key in (KEYS.rank(*IDS), KEYS.resident(*IDS)):
            await rank.put(key, b"x", lease_id=lease_id)
        await rank.put(KEYS.suspicion(*IDS, Accuser.RANK, "x"), b"x", lease_id=lease_id)
        with pytest.raises(StoreError):
            await gateway.revoke_lease(lease_id)
        assert await rank.keep_alive(lease_id) > 0
        await agent.revoke_lease(lease_id)
        assert await rank.get(KEYS.rank(*IDS)) is None


@pytest.mark.asyncio(loop_scope="module")
async def test_without_a_certificate_of_its_own_authority_nobody_is_heard(
    etcd: EmbeddedEtcd, tmp_path: Path
) -> None:
    known = etcd.options(KEYS, EtcdService.CONTROL_PLANE)
    forger = CertificateAuthority.create(tmp_path / "forged", SystemClock())
    certificate, key = forger.issue_client(user_of(KEYS, EtcdService.CONTROL_PLANE))
    for stranger in (
        EtcdOptions(etcd=known.etcd),
        replace(known, etcd_cert=None, etcd_key=None),
        replace(known, etcd_cert=certificate, etcd_key=key),
    ):
        with pytest.raises(StoreUnavailable):
            await connect_store(stranger, timeout_s=0.7)


@pytest.mark.asyncio(loop_scope="module")
async def test_etcds_other_port_hears_nobody_either(etcd: EmbeddedEtcd) -> None:
    """Its members' port takes messages of consensus, and renews leases."""
    reader, writer = await asyncio.open_connection("127.0.0.1", etcd.peer_port)
    writer.write(b"GET /members HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    assert b"200" not in answer.split(b"\r\n")[0]
    assert b"clientURLs" not in answer


async def test_an_etcd_that_lost_its_data_knows_its_users_again(tmp_path: Path) -> None:
    async with embedded_etcd(tmp_path) as server:
        await server.admit(KEYS)
        async with store_of(server.options(KEYS, EtcdService.RANK)) as rank:
            for is_lost in (False, True):
                await server.kill()
                if is_lost:
                    shutil.rmtree(tmp_path / "data")
                await server.start()
                await rank.put(KEYS.rank(*IDS), b"x")
                with pytest.raises(StoreError, match="does not let"):
                    await rank.put(KEYS.map, b"x")


def with_password(server: EmbeddedEtcd, folder: Path, service: EtcdService) -> EtcdOptions:
    """The certificate lets it in, and the token says who it is: etcd prefers that."""
    path = folder / f"{service.value}.password"
    write_private_file(path, f"password of {service.value}".encode())
    return replace(
        server.options(KEYS, EtcdService.READER),
        etcd_user=user_of(KEYS, service),
        etcd_password_file=path,
    )


async def test_a_user_with_a_password_outlives_tokens_restarts_and_new_passwords(
    tmp_path: Path,
) -> None:
    """Calls, lease and watch go on, and the watch loses nothing."""
    server = EmbeddedEtcd(tmp_path / "etcd", token_ttl_s=TOKEN_TTL_S)
    await server.start()
    await server.admit(KEYS)
    service = EtcdService.CONTROL_PLANE
    options = with_password(server, tmp_path, service)
    passwords = {user_of(KEYS, service): options.password({}) or ""}
    admin = EtcdAdmin(server.root)
    await admin.set_up(accounts(KEYS), passwords)
    try:
        async with store_of(options) as store:
            watch = store.watch(KEYS.serving)
            assert isinstance(await anext(watch), Snapshot)
            lease_id = await store.grant_lease(60)
            for number in range(6):
                if number == 2:
                    await server.kill()  # it forgets all tokens
                    await server.start()
                elif number == 4:  # every change of users ends tokens of an earlier revision
                    await server.admit(OTHERS)
                else:
                    await asyncio.sleep(2.5 * TOKEN_TTL_S)
                await store.put(KEYS.map, b"%d" % number)
                assert await store.keep_alive(lease_id) > 0
                event = await asyncio.wait_for(anext(watch), 10)
                assert isinstance(event, WatchEvent)
                assert event.value == b"%d" % number
            late = store.watch(KEYS.root)  # opened with a token that has just ended
            await asyncio.sleep(2.5 * TOKEN_TTL_S)
            assert isinstance(await asyncio.wait_for(anext(late), 10), Snapshot)
            await late.aclose()
            await watch.aclose()
        wrong = tmp_path / "wrong"
        write_private_file(wrong, b"no such password")
        with pytest.raises(StoreError, match="authentication failed"):
            await connect_store(replace(options, etcd_password_file=wrong))
    finally:
        admin.close()
        await server.stop()


async def test_set_up_twice_changes_nothing_and_mends_what_was_changed(tmp_path: Path) -> None:
    async with embedded_etcd(tmp_path) as server:
        await server.admit(KEYS)
        admin = EtcdAdmin(server.root)
        reader = accounts(KEYS)[-1]
        too_much = accounts(KEYS)[0].permissions | reader.permissions
        await admin.set_up([replace(reader, permissions=too_much)], {})
        async with store_of(server.options(KEYS, EtcdService.READER)) as store:
            await store.put(KEYS.map, b"x")
            for _ in range(2):
                await admin.set_up(accounts(KEYS), {})
            with pytest.raises(StoreError, match="does not let"):
                await store.put(KEYS.map, b"y")
            await store.get_prefix(KEYS.root)
        admin.close()


async def test_a_change_of_users_in_mid_call_is_not_an_error(tmp_path: Path) -> None:
    """etcd refuses calls that began before it with "revision in header is old"."""
    async with embedded_etcd(tmp_path) as server:
        await server.admit(KEYS)
        async with store_of(server.options(KEYS, EtcdService.CONTROL_PLANE)) as store:

            async def write() -> None:
                for number in range(300):
                    await store.put(KEYS.map, b"%d" % number)
                    await store.txn(
                        [Compare(key=KEYS.leader, mod_revision=0)], [Delete(key=KEYS.spec)]
                    )

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(write())
                for number in range(3):
                    await server.admit(Keys(f"another-{number}"))
