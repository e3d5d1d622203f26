"""What a draw depends on is the same whenever it is made, and is made no earlier than needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gpu_worker.engine.draw import Draw, edited_logits
from gpu_worker.engine.sequence import Origin, Sequence
from shared.types import Attempt, SamplingParams, SessionId
from shared.wire import Submit
from tests.unit.gpu_worker.engine.test_scheduler_tenants import of, step
from tests.unit.gpu_worker.engine.toy import origin, scheduler

VOCAB = 24
SAMPLING = SamplingParams(
    max_tokens=50,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    logit_bias=((3, 1.5), (7, -2.0)),
    bad_words=((5, 6), (9,)),
)


def sequence_of(tokens: tuple[int, ...], num_emitted: int = 0) -> Sequence:
    submit = Submit(
        session=SessionId("a/1"),
        attempt=Attempt(0),
        tokens=tokens,
        num_emitted=num_emitted,
        sampling=SAMPLING,
    )
    return Sequence(submit, origin=Origin(1), arrival=1, eos_token_ids=(0,), tokens_max=100)


def edited(sequence: Sequence) -> list[float]:
    logits = np.linspace(-1.0, 2.0, VOCAB, dtype=np.float32)
    state, num_tokens = sequence.draw_state, len(sequence.tokens)
    banned = sequence.banned_ids_at(num_tokens)
    draw = Draw(SAMPLING, num_tokens, banned, state.counts, sequence.allowed, state.bias)
    return edited_logits(logits, draw).tolist()


def test_it_is_the_same_made_before_the_tokens_with_the_first_and_after_a_death() -> None:
    prompt, generated = (1, 2, 3), (4, 4, 8, 5)
    early, late = sequence_of(prompt), sequence_of(prompt)
    edited(early)
    for token in generated:
        early.append(token)
        late.append(token)
    continued = sequence_of((*prompt, *generated), num_emitted=len(generated))
    assert edited(early) == edited(late) == edited(continued)
    assert edited(early)[6] == -np.inf, "5 was the last, so 6 would end a bad word"


def test_of_hundreds_that_come_between_two_steps_only_what_runs_is_made_ready() -> None:
    engine = scheduler(
        step_tokens_max=64,
        prefill_chunk_tokens=64,
        running_max=40,
        kv_blocks=256,
        waiting_max=512,
        tenant_step_tokens=3,
    )
    engine.submit(origin(), of("other", "other", tokens=(1,), max_tokens=50))
    step(engine)
    for number in range(300):
        request = of("hostile", f"hostile/{number}", tokens=(2, 3), max_tokens=50)
        engine.submit(origin(), replace(request, sampling=SAMPLING))
    ready = [s for s in engine._sequences.values() if s._draw_state is not None]
    assert [str(s.session) for s in ready] == ["other"]
    for number in range(1, 4):
        step(engine)
        ready = [s for s in engine._sequences.values() if s._draw_state is not None]
        assert 1 < len(ready) <= 1 + number * 3 * 4, "no more than its part of the steps"
