"""In what form tokens travel to experts: said once for all ranks of an instance, refused where the
kernels or a peer do not have it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from gpu_worker.config import DispatchForm, ExchangeKind, RankConfig
from gpu_worker.cuda.ep.dispatch import check_dispatch, exchange_kind
from gpu_worker.cuda.ep.endpoint import handles_of
from gpu_worker.cuda.ep.exchange import EpShape
from shared.config import load_config
from shared.errors import ConfigError
from shared.records import ExchangeHandles, RankRecord
from shared.types import Incarnation, NodeId, RankId, RankState

SHAPE = EpShape(num_ranks=3, slots_per_rank=8, hidden_size=7168, step_tokens_max=64, fp8=True)


def configured(**flags: str) -> RankConfig:
    return load_config(RankConfig, section="rank", file=None, environ={}, flags=flags)


def test_tokens_travel_as_bf16_unless_fp8_is_asked_for() -> None:
    assert configured().ep_dispatch is DispatchForm.BF16
    assert configured(ep_dispatch="fp8").ep_dispatch is DispatchForm.FP8
    with pytest.raises(ConfigError, match="fp16"):
        configured(ep_dispatch="fp16")


def test_sizes_that_fp8_messages_cannot_carry_are_refused_before_anything_is_loaded() -> None:
    check_dispatch(SHAPE)
    odd_step = replace(SHAPE, step_tokens_max=66)
    with pytest.raises(ConfigError, match="multiple of 4, and this one is 66"):
        check_dispatch(odd_step)
    check_dispatch(replace(odd_step, num_ranks=4))
    check_dispatch(replace(odd_step, fp8=False))


@pytest.mark.parametrize(
    ("hidden_size", "row_size", "fp8_row_size"),
    [(7168, 7168, 7168), (2880, 3072, 3072), (2816, 2816, 3072), (64, 256, 512)],
)
def test_rows_travel_in_sizes_that_the_kernels_know(
    hidden_size: int, row_size: int, fp8_row_size: int
) -> None:
    """gpt-oss has 2,880 values in a row, which its ranks could not send."""
    shape = replace(SHAPE, hidden_size=hidden_size)
    assert replace(shape, fp8=False).row_size == row_size
    assert shape.row_size == fp8_row_size


HANDLES = ExchangeHandles(
    host="h",
    address=1,
    remote_key=2,
    subnet_prefix=3,
    interface_id=4,
    queue_pairs=(5,),
    local_ids=(6,),
    ipc_handle=(7,),
    step_tokens_max=64,
    buffer_id="one",
)


def record(kind: ExchangeKind, handles: ExchangeHandles | None) -> RankRecord:
    return RankRecord(
        rank=RankId(1),
        incarnation=Incarnation(4),
        node=NodeId("n"),
        pid=1,
        lease_id=1,
        state=RankState.STARTING,
        control_host="127.0.0.1",
        control_port=1,
        transfer_name="ep-1.4",
        slots=8,
        kv_blocks=1,
        kv_block_tokens=16,
        exchange=kind.value,
        exchange_handles=handles,
    )


@pytest.mark.parametrize("form", DispatchForm)
def test_ranks_meet_in_the_form_that_both_speak(form: DispatchForm) -> None:
    kind = exchange_kind(form)
    assert handles_of(record(kind, HANDLES), kind, 64) is HANDLES


@pytest.mark.parametrize(
    ("theirs", "handles", "own"),
    [
        (ExchangeKind.EP_FP8, HANDLES, ExchangeKind.EP),
        (ExchangeKind.EP, HANDLES, ExchangeKind.EP_FP8),
        (ExchangeKind.TRANSFER, None, ExchangeKind.EP),
    ],
)
def test_a_peer_with_another_exchange_is_refused_in_a_sentence_that_says_what_to_do(
    theirs: ExchangeKind, handles: ExchangeHandles | None, own: ExchangeKind
) -> None:
    sentence = (
        f"has the exchange {theirs.value!r}, and this one {own.value!r}: start all ranks of an "
        "instance with the same --device and --ep-dispatch"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        handles_of(record(theirs, handles), own, 64)


def test_a_peer_whose_buffer_is_laid_out_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match="steps of 64 tokens at most, and this one of 128"):
        handles_of(record(ExchangeKind.EP, HANDLES), ExchangeKind.EP, 128)
