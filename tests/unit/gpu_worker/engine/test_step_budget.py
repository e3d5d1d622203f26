"""What fits into one step beside decodes, and how many rows it has."""

from __future__ import annotations

from gpu_worker.engine.projected_state import ProjectedState, current_state
from gpu_worker.engine.scheduler_limits import NO_LIMIT
from gpu_worker.engine.sequence import Origin, Sequence
from gpu_worker.engine.step_budget import StepBudget
from gpu_worker.engine.step_shares import StepShares
from tests.unit.gpu_worker.engine.toy import EOS, limits, submit

LONG = 40_000


def sequence_of(tokens: tuple[int, ...], *, num_emitted: int = 0, **sampling: object) -> Sequence:
    return Sequence(
        submit(tokens=tokens, num_emitted=num_emitted, **sampling),
        origin=Origin(0),
        arrival=0,
        eos_token_ids=(EOS,),
        tokens_max=LONG,
    )


def budget(**changes: int) -> StepBudget:
    sizes = {"step_tokens_max": 4096, "prefill_chunk_tokens": 4096, "mixed_prefill_tokens": 512}
    return StepBudget(limits(**(sizes | changes)), StepShares(NO_LIMIT))


def tokens(of: StepBudget) -> list[int]:
    return [chunk.num_tokens for chunk in of.chunks]


def decode() -> tuple[Sequence, ProjectedState]:
    return sequence_of((1, 2)), ProjectedState(2, 1)


def prefill(num_computed: int = 0) -> tuple[Sequence, ProjectedState]:
    return sequence_of((1,)), ProjectedState(LONG, num_computed)


def test_a_prompt_alone_has_the_whole_step() -> None:
    alone = budget()
    alone.add_prefill(*prefill())
    assert tokens(alone) == [4096]
    assert alone.is_spent


def test_beside_decodes_a_prompt_takes_less_the_longer_it_is() -> None:
    taken = []
    for num_computed in (0, 4096, 32_768):
        mixed = budget()
        mixed.add_decodes([decode()], ())
        mixed.add_prefill(*prefill(num_computed))
        taken.append(tokens(mixed)[1])
    assert taken == [512, 256, 56]


def test_prompts_beside_decodes_share_their_part_and_the_first_gets_on_always() -> None:
    mixed = budget(mixed_prefill_tokens=1)
    mixed.add_decodes([decode()], ())
    assert not mixed.is_spent
    mixed.add_prefill(*prefill(32_768))
    assert tokens(mixed) == [1, 1]
    mixed = budget(prefill_chunk_tokens=300)
    mixed.add_decodes([decode()], ())
    for _ in range(3):
        mixed.add_prefill(*prefill())
    assert tokens(mixed) == [1, 300, 212]
    assert mixed.is_spent


def test_what_a_death_made_a_rank_compute_again_is_not_held_back_beside_decodes() -> None:
    mixed = budget(mixed_prefill_tokens=128)
    mixed.add_decodes([decode()], ())
    for _ in range(2):
        mixed.add_prefill(sequence_of((1, 2), num_emitted=1), ProjectedState(300, 0))
    assert not mixed.is_spent
    mixed.add_prefill(*prefill())
    assert tokens(mixed) == [1, 300, 300, 128]
    assert mixed.is_spent


def test_a_step_has_so_many_sequences_at_most() -> None:
    full = budget(step_sequences_max=2)
    for _ in range(3):
        full.add_prefill(sequence_of((1, 2)), ProjectedState(2, 0))
    assert tokens(full) == [2, 2]
    assert full.is_spent


def test_rows_that_are_scored_count_as_sequences_do() -> None:
    scored = sequence_of(tuple(range(1, 9)), prompt_logprobs=1)
    full = budget(step_sequences_max=5)
    full.add_decodes([decode()], ())
    full.add_prefill(scored, current_state(scored))
    assert tokens(full) == [1, 4]
