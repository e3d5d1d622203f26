"""A message survives its trip, and nothing else is ever taken for one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpu_worker.exchange import header as headers
from gpu_worker.exchange import packing
from gpu_worker.exchange.header import Header, own_record
from gpu_worker.exchange.message import (
    HEADER_BYTES,
    HEADER_WORDS,
    PAIR_BYTES,
    ExchangePhase,
    MessageBuffer,
    MessageLayout,
    is_of_later_epoch,
    make_stamp,
    message_buffers_of,
)
from gpu_worker.exchange.shared_words import begin_write
from shared.types import Epoch, Incarnation, Member, RankId, Step

UNTIMED = settings(deadline=None)
LAYOUT = MessageLayout(hidden_size=6, top_k=3, step_tokens_max=5)
SENDER = Member(rank=RankId(2), incarnation=Incarnation(9))
READER = Member(rank=RankId(0), incarnation=Incarnation(1))
NUM_RANKS, NUM_EXPERTS = 4, 8
STAMP = make_stamp(Epoch(3), Step(4), 5, ExchangePhase.DISPATCH)


def fresh_message_buffer(phase: ExchangePhase = ExchangePhase.DISPATCH) -> MessageBuffer:
    memory = np.zeros(LAYOUT.region_bytes, dtype=np.uint8)
    return message_buffers_of(memory, LAYOUT)[2 * phase]


def words_of(message_buffer: MessageBuffer) -> NDArray[np.int32]:
    return message_buffer.bytes.view(np.int32)


def stamps_of(message_buffer: MessageBuffer) -> NDArray[np.int64]:
    return message_buffer.bytes.view(np.int64)


def seal(
    message_buffer: MessageBuffer,
    phase: ExchangePhase,
    stamp: int,
    header: Header,
) -> int:
    own_1 = own_record(SENDER, LAYOUT)
    own_1[0]["num_tokens"], own_1[0]["has_work"] = header.num_tokens, header.has_work
    own_1[0]["knows_next"] = header.knows_next
    head = message_buffer.head
    return headers.seal(head, own_1, int(phase), stamp, header.num_rows, header.num_pairs)


def read_header(
    message_buffer: MessageBuffer,
    stamp: int = STAMP,
    sender: Member = SENDER,
    phase: ExchangePhase = ExchangePhase.DISPATCH,
) -> Header | None:
    return headers.read_header(message_buffer, own_record(READER, LAYOUT), phase, stamp, sender)


def body_of(
    message_buffer: MessageBuffer, num_rows: int, num_pairs: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Pairs and rows of a dispatch."""
    rows_at = HEADER_BYTES + PAIR_BYTES * num_pairs
    rows = message_buffer.bytes[rows_at : rows_at + 4 * LAYOUT.hidden_size * num_rows]
    pairs = message_buffer.bytes[HEADER_BYTES:rows_at].view(np.int32)
    return pairs, rows.view(np.float32).reshape(num_rows, LAYOUT.hidden_size)


def routed(num_tokens: int, seed: int) -> tuple[packing.Routes, NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    experts_TK = rng.integers(0, NUM_EXPERTS, size=(num_tokens, LAYOUT.top_k)).astype(np.int32)
    rank_UE = (np.arange(NUM_EXPERTS, dtype=np.int32)[None] * 7 + seed % 5) % NUM_RANKS
    slot_UE = np.arange(NUM_EXPERTS, dtype=np.int32)[None]
    chosen_E = np.zeros(NUM_EXPERTS, dtype=np.int64)
    r = packing.Routes(NUM_RANKS, LAYOUT.step_tokens_max, LAYOUT.top_k)
    args = (r.flat_RN, r.row_RN, r.slot_RN, r.token_RM, r.counts_R2)
    assert packing.route(experts_TK, rank_UE.astype(np.int32), slot_UE, chosen_E, *args)
    assert (chosen_E == np.bincount(experts_TK.ravel(), minlength=NUM_EXPERTS)).all()
    return r, experts_TK


def written(
    num_tokens: int, seed: int, rank: int = 1
) -> tuple[MessageBuffer, NDArray[np.float32], int]:
    r, _ = routed(num_tokens, seed)
    rng = np.random.default_rng(seed + 1)
    x_TH = rng.standard_normal((num_tokens, LAYOUT.hidden_size), dtype=np.float32)
    message_buffer = fresh_message_buffer()
    rows, pairs = r.counts_R2[rank]  # of the type with which it is compiled for the exchange
    packing.write_dispatch(
        *body_of(message_buffer, rows, pairs),
        x_TH,
        r.row_RN,
        r.slot_RN,
        r.token_RM,
        rank,
        rows,
        pairs,
    )
    header = Header(num_tokens, int(rows), int(pairs), True, False)
    return (
        message_buffer,
        x_TH,
        seal(message_buffer, ExchangePhase.DISPATCH, STAMP, header),
    )


def unpacked(
    message_buffer: MessageBuffer, header: Header, num_slots: int
) -> tuple[bool, NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
    x_MH = np.zeros((header.num_rows, LAYOUT.hidden_size), dtype=np.float32)
    rows_N = np.zeros(header.num_pairs, dtype=np.int32)
    slots_N = np.zeros(header.num_pairs, dtype=np.int32)
    ok = packing.read_dispatch(
        *body_of(message_buffer, header.num_rows, header.num_pairs),
        header.num_rows,
        header.num_pairs,
        num_slots,
        x_MH,
        rows_N,
        slots_N,
        0,
        0,
    )
    return bool(ok), x_MH, rows_N, slots_N


@UNTIMED
@given(st.integers(0, LAYOUT.step_tokens_max), st.integers(0, 1000), st.integers(0, 3))
def test_a_dispatch_arrives_as_it_was_routed(num_tokens: int, seed: int, rank: int) -> None:
    r, experts_TK = routed(num_tokens, seed)
    message_buffer, x_TH, _ = written(num_tokens, seed, rank)
    header = read_header(message_buffer)
    assert header is not None
    ok, x_MH, rows_N, slots_N = unpacked(message_buffer, header, NUM_EXPERTS)
    assert ok
    flat_N = r.flat_RN[rank, : header.num_pairs]
    assert (np.diff(flat_N) > 0).all()
    for flat, row, slot in zip(flat_N, rows_N, slots_N, strict=True):
        assert slot == experts_TK.reshape(-1)[flat]  # slot_E is the identity
        assert (x_MH[row] == x_TH[flat // LAYOUT.top_k]).all()
    assert header.num_rows == len(set(flat_N // LAYOUT.top_k))


@UNTIMED
@given(st.integers(0, LAYOUT.step_tokens_max), st.integers(0, 1000))
def test_every_pair_goes_to_exactly_one_rank(num_tokens: int, seed: int) -> None:
    r, _ = routed(num_tokens, seed)
    flats = [int(f) for rank in range(NUM_RANKS) for f in r.flat_RN[rank, : r.counts_R2[rank, 1]]]
    assert sorted(flats) == list(range(num_tokens * LAYOUT.top_k))


@pytest.mark.parametrize("expert", [-1, NUM_EXPERTS, 3])
def test_an_expert_that_no_rank_holds_is_refused(expert: int) -> None:
    r = packing.Routes(NUM_RANKS, LAYOUT.step_tokens_max, LAYOUT.top_k)
    rank_UE = np.zeros((1, NUM_EXPERTS), dtype=np.int32)
    rank_UE[0, 3] = -1
    chosen_E = np.zeros(NUM_EXPERTS, dtype=np.int64)
    experts_TK = np.array([[0, 1, expert]], dtype=np.int32)
    args = (r.flat_RN, r.row_RN, r.slot_RN, r.token_RM, r.counts_R2)
    assert not packing.route(experts_TK, rank_UE, np.zeros_like(rank_UE), chosen_E, *args)


def test_tokens_take_the_turns_of_the_replica_choice_one_after_the_other() -> None:
    r = packing.Routes(NUM_RANKS, LAYOUT.step_tokens_max, LAYOUT.top_k)
    rank_UE = np.array([[0, 1], [2, 1]], dtype=np.int32)
    slot_UE = np.array([[4, 5], [6, 5]], dtype=np.int32)
    experts_TK = np.array([[0, 1]] * 3, dtype=np.int32)
    chosen_E = np.zeros(2, dtype=np.int64)
    args = (r.flat_RN, r.row_RN, r.slot_RN, r.token_RM, r.counts_R2)
    assert packing.route(experts_TK, rank_UE, slot_UE, chosen_E, *args)
    assert r.counts_R2[:, 1].tolist() == [2, 3, 1, 0]
    assert (r.slot_RN[0, :2].tolist(), r.slot_RN[2, :1].tolist()) == ([4, 4], [6])
    assert r.token_RM[2, 0] == 1
    assert chosen_E.tolist() == [3, 3]


@UNTIMED
@given(st.integers(1, LAYOUT.step_tokens_max), st.integers(0, 1000), st.data())
def test_a_prefix_of_a_message_is_not_a_message(
    num_tokens: int, seed: int, data: st.DataObject
) -> None:
    whole, _, nbytes = written(num_tokens, seed)
    arrived = fresh_message_buffer()
    if data.draw(st.booleans()):  # over the remains of an older message
        arrived.bytes[:] = written(LAYOUT.step_tokens_max, seed + 7)[0].bytes
        older = make_stamp(Epoch(3), Step(3), 5, ExchangePhase.DISPATCH)
        header = Header(LAYOUT.step_tokens_max, 1, 1, True, False)
        seal(arrived, ExchangePhase.DISPATCH, older, header)
        stamps_of(arrived)[nbytes // 8 - 1] = older
    cut = data.draw(st.integers(0, nbytes - 1))
    arrived.bytes[:cut] = whole.bytes[:cut]
    tail_arrived = stamps_of(arrived)[nbytes // 8 - 1] == STAMP
    assert tail_arrived or read_header(arrived) is None


@pytest.mark.parametrize("begun_again", [False, True])
def test_a_message_whose_writer_stopped_in_the_middle_is_none(begun_again: bool) -> None:
    message_buffer, _, nbytes = written(3, 0)
    older = make_stamp(Epoch(3), Step(3), 5, ExchangePhase.DISPATCH)
    if begun_again:  # over a complete message, which is torn from then on
        stamps_of(message_buffer)[[0, nbytes // 8 - 1]] = older
    begin_write(message_buffer.head)
    assert read_header(message_buffer) is None
    assert read_header(message_buffer, older) is None
    seal(message_buffer, ExchangePhase.DISPATCH, STAMP, Header(3, 1, 1, True, True))
    assert read_header(message_buffer) == Header(3, 1, 1, True, True)


def test_a_message_of_another_sender_incarnation_step_layer_or_phase_is_not_ours() -> None:
    message_buffer, _, _ = written(3, 0)
    others = (
        Member(rank=RankId(2), incarnation=Incarnation(8)),
        Member(rank=RankId(1), incarnation=Incarnation(9)),
    )
    for sender in others:
        assert read_header(message_buffer, sender=sender) is None
    for stamp in (
        make_stamp(Epoch(4), Step(4), 5, ExchangePhase.DISPATCH),
        make_stamp(Epoch(3), Step(5), 5, ExchangePhase.DISPATCH),
        make_stamp(Epoch(3), Step(4), 6, ExchangePhase.DISPATCH),
        make_stamp(Epoch(3), Step(4), 5, ExchangePhase.COMBINE),
    ):
        assert read_header(message_buffer, stamp) is None


@UNTIMED
@given(st.integers(0, 2**32), st.integers(0, 200), st.booleans())
def test_any_bytes_at_all_are_read_within_bounds(seed: int, num_bytes: int, sealed: bool) -> None:
    message_buffer = fresh_message_buffer()
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, size=len(message_buffer.bytes), dtype=np.uint8)
    if num_bytes % 2:
        noise = np.full(len(message_buffer.bytes), 255, dtype=np.uint8)
    message_buffer.bytes[:] = noise
    if sealed:  # foreign contents between stamps that fit
        pairs = seed % (LAYOUT.pairs_max + 1)
        header = Header(LAYOUT.step_tokens_max, min(pairs, 5), pairs, False, True)
        seal(message_buffer, ExchangePhase.DISPATCH, STAMP, header)
    found = read_header(message_buffer)
    assert (found is not None) == sealed
    if found is not None:
        ok, _, rows_N, slots_N = unpacked(message_buffer, found, num_slots=4)
        if ok:
            assert ((rows_N >= 0) & (rows_N < found.num_rows)).all()
            assert ((slots_N >= 0) & (slots_N < 4)).all()


@pytest.mark.parametrize("word", [4, 5, 6, 7, 9])  # rank, tokens, rows, pairs, hidden size
@pytest.mark.parametrize("value", [-1, -(2**31), 2**31 - 1, 1 << 20])
def test_a_count_out_of_bounds_makes_it_no_message(word: int, value: int) -> None:
    message_buffer, _, _ = written(3, 0)
    assert read_header(message_buffer) is not None
    words_of(message_buffer)[word] = value
    assert read_header(message_buffer) is None


@pytest.mark.parametrize(("offset", "value"), [(0, 5), (0, -1), (1, 4), (1, -1)])
def test_a_row_or_slot_that_is_not_there_is_refused(offset: int, value: int) -> None:
    message_buffer, _, _ = written(5, 0)
    header = read_header(message_buffer)
    assert header is not None
    assert header.num_pairs > 0
    words_of(message_buffer)[HEADER_WORDS : HEADER_WORDS + 2 * header.num_pairs] = 0
    assert unpacked(message_buffer, header, num_slots=4)[0]
    words_of(message_buffer)[HEADER_WORDS + offset] = value
    assert not unpacked(message_buffer, header, num_slots=4)[0]


@UNTIMED
@given(st.integers(0, LAYOUT.pairs_max))
def test_a_combine_arrives_whole(num_rows: int) -> None:
    message_buffer = fresh_message_buffer(ExchangePhase.COMBINE)
    y_NH = np.random.default_rng(num_rows).standard_normal((num_rows, 6), dtype=np.float32)
    rows_NH = body_of(message_buffer, num_rows, 0)[1]
    rows_NH[:] = y_NH
    stamp = make_stamp(Epoch(1), Step(0), 0, ExchangePhase.COMBINE)
    header = Header(0, num_rows, num_rows, False, False)
    seal(message_buffer, ExchangePhase.COMBINE, stamp, header)
    assert read_header(message_buffer, stamp, phase=ExchangePhase.COMBINE) == header
    assert (rows_NH == y_NH).all()


@UNTIMED
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 500))
def test_a_stamp_is_positive_and_tells_a_later_epoch(epoch: int, step: int, layer: int) -> None:
    stamp = make_stamp(Epoch(epoch), Step(step), layer, ExchangePhase.COMBINE)
    assert 0 < stamp < 2**63
    assert not is_of_later_epoch(stamp, Epoch(epoch))
    assert not is_of_later_epoch(stamp, Epoch(epoch + 1))
    if epoch:
        assert is_of_later_epoch(stamp, Epoch(epoch - 1))


def test_the_regions_of_an_area_hold_the_largest_messages_without_overlap() -> None:
    ends = 4096
    for index in range(4):
        offset, size = LAYOUT.message_buffer(index)
        assert offset == ends
        ends = offset + size
        phase = ExchangePhase(index // 2)
        rows = LAYOUT.step_tokens_max if phase is ExchangePhase.DISPATCH else LAYOUT.pairs_max
        assert LAYOUT.message_bytes(phase, rows, LAYOUT.pairs_max) <= size
    assert ends == LAYOUT.region_bytes
