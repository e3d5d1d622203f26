"""Whatever comes over a wire or out of etcd is decoded, or refused with the error that its readers
expect. Nothing else is raised, and small inputs make no large objects."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc
import typing
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from control_plane.state_applier import StateApplier
from shared.codec import pack, pack_plain, to_plain, unpack
from shared.errors import WireError
from shared.fork_server import ForkReply, ForkRequest, ForkServerStatus
from shared.keys import Keys
from shared.records import (
    AgentRecord,
    GatewayRecord,
    InstanceSpec,
    LeaderRecord,
    OwnerRecord,
    ProcessView,
    RankRecord,
    SlotContents,
    Suspicion,
    Verdict,
    unpack_map,
)
from shared.store import WatchEvent
from shared.types import Accuser, Incarnation, RankId
from shared.wire import Message, decode
from tests.fuzz.budget import Fuzzing
from tests.fuzz.mutator import Mutator

KINDS: Sequence[type[Any]] = typing.get_args(Message)
RECORDS: Sequence[type[Any]] = (
    *(AgentRecord, GatewayRecord, InstanceSpec, LeaderRecord, OwnerRecord, ProcessView),
    *(RankRecord, SlotContents, Suspicion, Verdict, ForkReply, ForkRequest, ForkServerStatus),
)
BYTES_PER_INPUT_BYTE = 120
BYTES_AT_LEAST = 200_000
MEASURED_EVERY = 50
KEYS = Keys("fuzz")


def frame(mutator: Mutator) -> bytes:
    kind = mutator.rng.choice(KINDS)
    name, fields = kind.__name__, to_plain(mutator.sample(kind))
    match mutator.rng.randrange(5):
        case 0:
            return pack_plain([name, fields])
        case 1:
            return mutator.data(pack_plain([name, fields]))
        case 2:
            return _packed(mutator.value([name, fields]))
        case _:
            return _packed([name, mutator.value(fields)])


def record(mutator: Mutator) -> bytes:
    plain = to_plain(mutator.sample(mutator.rng.choice(RECORDS)))
    return mutator.data(_packed(plain)) if mutator.rng.random() < 0.3 else _packed(plain)


def _packed(plain: Any) -> bytes:
    """What cannot be packed is no input."""
    try:
        return pack_plain(plain)
    except (ValueError, OverflowError, TypeError, UnicodeEncodeError):
        return b"\xc0"


def expect_small(data: bytes, read: Callable[[bytes], object]) -> None:
    tracemalloc.start()
    try:
        read(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < BYTES_AT_LEAST + BYTES_PER_INPUT_BYTE * len(data), f"{peak} of {len(data)}"


def read_frame(data: bytes) -> None:
    try:
        message = decode(data)
    except WireError:
        return
    assert dataclasses.is_dataclass(message)


def read_everywhere(data: bytes) -> None:
    for kind in RECORDS:
        try:
            unpack(data, kind)
        except WireError:
            continue
    with contextlib.suppress(WireError):
        unpack_map(data)
    applier = StateApplier(KEYS)
    ids = RankId(1), Incarnation(1)
    for number, key in enumerate(
        (
            *(KEYS.spec, KEYS.leader, KEYS.term, KEYS.map, KEYS.rank(*ids), KEYS.resident(*ids)),
            *(KEYS.assignment(*ids), KEYS.view(*ids), KEYS.verdict(*ids)),
            KEYS.suspicion(*ids, Accuser.AGENT, "x"),
        )
    ):
        applier.apply(WatchEvent(key=key, value=data, mod_revision=number + 1))


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("target", "make", "read"),
    [("wire", frame, read_frame), ("records", record, read_everywhere)],
)
def test_what_is_malformed_is_refused_in_one_way(
    target: str, make: Callable[[Mutator], bytes], read: Callable[[bytes], None]
) -> None:
    fuzzing = Fuzzing(target)
    mutator = Mutator(fuzzing.rng)
    for data in fuzzing.corpus():
        read(data)
        expect_small(data, read)
    for number in fuzzing.rounds():
        data = make(mutator)
        with fuzzing.kept_on_failure(data):
            if number % MEASURED_EVERY:
                read(data)
            else:
                expect_small(data, read)
    assert fuzzing.num_inputs > 100


def test_the_samples_are_valid() -> None:
    """Without mutation the inputs reach what is behind the decoder."""
    mutator = Mutator(Fuzzing("samples").rng)
    for kind in KINDS:
        message = mutator.sample(kind)
        assert decode(pack_plain([kind.__name__, to_plain(message)])) == message
    for kind in RECORDS:
        value = mutator.sample(kind)
        assert unpack(pack(value), kind) == value
