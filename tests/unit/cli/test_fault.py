"""The effect of a fault on streams: gaps by rank, and tokens that differ from the undisturbed
answers."""

from __future__ import annotations

import random

from cli.bench.fault import FaultRun, fault_result, fresh_prompts
from cli.bench.loads import FaultLoad
from cli.bench.stream_client import StreamRecord

LOAD = FaultLoad(tries=2, streams=5, prompt_tokens=8, new_tokens=4, seed=3)


def record(
    rank: int | None, ids: list[int], *arrivals: float, error: str | None = None
) -> StreamRecord:
    return StreamRecord(sent_at=0.0, rank=rank, ids=ids, arrivals=[*arrivals], error=error)


def disturbed(*records: StreamRecord) -> FaultRun:
    return FaultRun(
        rank=1,
        killed_at=2.0,
        prompts=[[n] for n in range(len(records))],
        records=records,
        phases=None,
    )


def test_gaps_are_told_by_who_had_the_stream() -> None:
    one = disturbed(
        record(0, [1, 2, 3], 1.0, 2.5, 3.0),
        record(1, [1, 2, 3], 1.0, 1.5, 4.0),
        record(None, [1, 2], 1.5, 2.25),
        record(2, [1, 2], 1.0, 1.5),
    )
    found = fault_result(one, one.records)
    assert found.survivors_ms == (1500.0,)
    assert found.victims_ms == (2500.0,)
    assert found.unknown_ms == (750.0,)
    assert (found.rank, found.killed_at, found.wrong, found.errors) == (1, 2.0, 0, ())


def test_streams_count_as_wrong_that_differ_in_a_token_or_lack_one() -> None:
    one = disturbed(
        record(0, [1, 2, 3], 1.0, 3.0),
        record(1, [1, 2, 4], 1.0, 3.0),
        record(1, [1, 2], 1.0, 3.0, error="the stream broke off"),
    )
    answers = [record(0, [1, 2, 3]) for _ in range(3)]
    found = fault_result(one, answers)
    assert found.wrong == 2
    assert found.errors == ("the stream broke off",)


def test_no_two_runs_send_a_prompt_alike_but_equal_seeds_send_the_same() -> None:
    draw, again = random.Random(LOAD.seed), random.Random(LOAD.seed)
    runs = [fresh_prompts(draw, LOAD) for _ in range(3)]
    assert runs == [fresh_prompts(again, LOAD) for _ in range(3)]
    prompts = {tuple(prompt) for run in runs for prompt in run}
    assert len(prompts) == 3 * LOAD.streams
    assert {len(prompt) for prompt in prompts} == {LOAD.prompt_tokens}
