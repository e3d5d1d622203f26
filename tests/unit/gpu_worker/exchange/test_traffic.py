"""The compiled exchange of two ranks in one process: what is found, what is refused, who wakes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_worker.exchange import packing, traffic
from gpu_worker.exchange.header import own_record
from gpu_worker.exchange.message import (
    BELL_OFFSET,
    HEADER_BYTES,
    ExchangePhase,
    MessageLayout,
    make_stamp,
    message_buffer_index,
    message_buffers_of,
)
from gpu_worker.exchange.shared_words import ring, wait_for_stamp
from shared.types import Epoch, Incarnation, Member, RankId, Step

LAYOUT = MessageLayout(hidden_size=4, top_k=2, step_tokens_max=3)
NUM_TOKENS, NUM_SLOTS = 3, 2
RECEIVER, SENDER = 0, 1
DISPATCH, COMBINE = int(ExchangePhase.DISPATCH), int(ExchangePhase.COMBINE)
STAMPS = [make_stamp(Epoch(1), Step(1), 0, phase) for phase in ExchangePhase]
LONG_NS = 900_000_000


def member(rank: int) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(rank + 1))


def make_region() -> NDArray[np.uint8]:
    return np.zeros(LAYOUT.region_bytes, dtype=np.uint8)


@dataclass
class End:
    """One of two ranks. Half of its pairs go to the other one."""

    rank: int
    regions: list[NDArray[np.uint8]]  # of its peer's messages, newest first
    target: NDArray[np.uint8]  # the peer's region

    def __post_init__(self) -> None:
        self.own_1 = own_record(member(self.rank), LAYOUT)
        self.own_1[0]["num_slots"], self.own_1[0]["num_tokens"] = NUM_SLOTS, NUM_TOKENS
        self.peer_P = np.zeros(1, dtype=traffic.PEER)
        peer = member(1 - self.rank)
        self.peer_P[0]["rank"], self.peer_P[0]["incarnation"] = peer.rank, peer.incarnation
        self.routes = packing.Routes(2, LAYOUT.step_tokens_max, LAYOUT.top_k)
        experts_TK = np.tile(np.array([[0, 1]], dtype=np.int32), (NUM_TOKENS, 1))
        ranks_UE, slots_UE = np.array([[0, 1]], dtype=np.int32), np.zeros((1, 2), dtype=np.int32)
        chosen_E = np.zeros(2, dtype=np.int64)
        r = self.routes
        arrays = (r.flat_RN, r.row_RN, r.slot_RN, r.token_RM, r.counts_R2)
        assert packing.route(experts_TK, ranks_UE, slots_UE, chosen_E, *arrays)
        self.x_TH = np.full((NUM_TOKENS, LAYOUT.hidden_size), self.rank + 1, dtype=np.float32)

    @property
    def routed(self) -> Any:
        r = self.routes
        return self.x_TH, r.row_RN, r.slot_RN, r.token_RM, r.counts_R2

    def send_dispatch(self) -> None:
        heads_P = np.array([message_buffers_of(self.target, LAYOUT)[0].head])
        traffic.write_dispatches(self.own_1, self.peer_P, heads_P, STAMPS[DISPATCH], *self.routed)

    def receive(self, phase: int, sleep_ns: int = 0) -> bool:
        index = message_buffer_index(ExchangePhase(phase), 0)
        heads = [message_buffers_of(region, LAYOUT)[index].head for region in self.regions]
        counts_R2 = self.routes.counts_R2
        return traffic.receive(
            phase,
            self.own_1,
            self.peer_P,
            np.array([heads]),
            counts_R2,
            STAMPS[phase],
            sleep_ns,
        )

    def read_dispatch(self) -> tuple[int, NDArray[np.float32]]:
        num_rows, num_pairs, _, _, _ = traffic.sum_dispatches(
            self.own_1, self.peer_P, self.routes.counts_R2
        )
        x_MH = np.zeros((num_rows, LAYOUT.hidden_size), dtype=np.float32)
        rows_N, slots_N = np.zeros((2, num_pairs), dtype=np.int32)
        arrived: Any = (x_MH, rows_N, slots_N)
        bad = traffic.read_dispatches(
            self.own_1, self.peer_P, STAMPS[DISPATCH], *(*self.routed, *arrived)
        )
        return bad, x_MH

    def combine(self, y_NH: NDArray[np.float32]) -> NDArray[np.float32]:
        """Sends what is the peer's; the result has this rank's own."""
        heads_P = np.array([message_buffers_of(self.target, LAYOUT)[2].head])
        y_PH = np.zeros((NUM_TOKENS * LAYOUT.top_k, LAYOUT.hidden_size), dtype=np.float32)
        r = self.routes
        outputs = (y_NH, r.counts_R2, r.flat_RN, y_PH)
        traffic.write_combines(self.own_1, self.peer_P, heads_P, STAMPS[COMBINE], *outputs)
        return y_PH

    def read_combine(self, y_PH: NDArray[np.float32]) -> int:
        r = self.routes
        return traffic.read_combines(
            self.own_1, self.peer_P, STAMPS[COMBINE], r.counts_R2, r.flat_RN, y_PH
        )


def two_ends() -> tuple[End, End]:
    """The first one reads an older region as well."""
    to_first, to_second = make_region(), make_region()
    return (
        End(RECEIVER, [make_region(), to_first], to_second),
        End(SENDER, [to_second], to_first),
    )


def test_outputs_come_back_to_their_places() -> None:
    ends = two_ends()
    for end in ends:
        end.send_dispatch()
    combined = []
    for end in ends:
        assert end.receive(DISPATCH)
        bad, x_MH = end.read_dispatch()
        assert bad == traffic.ALL_INTACT
        assert x_MH[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
        combined.append(end.combine(10 * x_MH + end.rank))
    for end, y_PH in zip(ends, combined, strict=True):
        assert end.receive(COMBINE)
        assert end.read_combine(y_PH) == traffic.ALL_INTACT
        mine = 10.0 * (end.rank + 1)
        assert y_PH[:, 0].tolist() == [mine, mine + 1] * NUM_TOKENS


def test_nothing_is_received_before_everybody_has_sent() -> None:
    first, second = two_ends()
    first.send_dispatch()
    assert not first.receive(DISPATCH)
    missing = traffic.missing_ranks(DISPATCH, first.peer_P, first.routes.counts_R2)
    assert list(missing) == [SENDER]
    second.send_dispatch()
    assert first.receive(DISPATCH)


def test_a_combine_with_another_number_of_rows_is_not_the_one() -> None:
    first, second = two_ends()
    for end in (first, second):
        end.send_dispatch()
    assert second.receive(DISPATCH)
    second.combine(second.read_dispatch()[1])
    assert first.receive(DISPATCH)
    first.combine(first.read_dispatch()[1])
    first.routes.counts_R2[SENDER, 1] -= 1
    assert not first.receive(COMBINE)
    first.routes.counts_R2[SENDER, 1] += 1
    assert first.receive(COMBINE)


@pytest.mark.parametrize("harm", ["slot", "overwritten"])
def test_a_message_that_cannot_be_read_names_its_sender(harm: str) -> None:
    first, second = two_ends()
    for end in (first, second):
        end.send_dispatch()
    assert first.receive(DISPATCH)
    message = message_buffers_of(second.target, LAYOUT)[0].bytes
    if harm == "slot":
        message[HEADER_BYTES:].view(np.int32)[1] = NUM_SLOTS
    else:
        message.view(np.int64)[0] = 0  # as a writer does first
    assert first.read_dispatch()[0] == SENDER


def test_who_sleeps_wakes_when_the_message_is_there() -> None:
    first, second = two_ends()
    first.regions.reverse()
    bell = int(second.target.ctypes.data) + BELL_OFFSET
    first.peer_P[0]["bell"] = second.peer_P[0]["bell_out"] = bell
    first.send_dispatch()
    found: list[bool] = []

    def sleep() -> None:
        while not found:
            if first.receive(DISPATCH, LONG_NS):
                found.append(True)

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    second.send_dispatch()
    sleeper.join()
    assert found == [True]


def test_a_ring_for_another_message_does_not_end_the_wait_with_a_wrong_answer() -> None:
    words = np.zeros(4, dtype=np.int64)
    head, bell = int(words.ctypes.data), int(words.ctypes.data) + 16
    ring(bell)
    assert not wait_for_stamp(head, 7, bell, 0, 1_000_000)
    words[0] = 7
    assert wait_for_stamp(head, 7, bell, 0, 1_000_000)
