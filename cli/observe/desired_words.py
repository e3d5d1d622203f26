"""What has changed in the desired state, in words. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from shared.desired_state import AfterDrain, DesiredState, Drain

_BEGUN = {
    AfterDrain.STAY: "is to be drained",
    AfterDrain.RESTART: "is to be restarted",
    AfterDrain.LEAVE: "is to leave",
}
_ENDED = {
    AfterDrain.STAY: "is to serve again",
    AfterDrain.RESTART: "has a new process",
    AfterDrain.LEAVE: "has left",
}


def changes_in_words(old: DesiredState, new: DesiredState) -> tuple[str, ...]:
    """Empty if nothing that matters to people has changed."""
    return tuple(_changes(old, new))


def _changes(old: DesiredState, new: DesiredState) -> Iterator[str]:
    yield from _ranks(old, new)
    for drain in new.drains:
        before = old.drain_of(drain.rank)
        if before is None or before.after is not drain.after:
            yield f"rank {drain.rank} {_begun(drain)}"
    for drain in old.drains:
        if new.drain_of(drain.rank) is None:
            yield f"rank {drain.rank} {_ENDED[drain.after]}"
    if new.restart is not None and old.restart is None:
        names = ", ".join(str(rank) for rank in new.restart.ranks)
        yield f"ranks {names} are to be restarted, one after the other"
    if new.restart is None and old.restart is not None:
        yield "no rank waits for its restart any more"
    if new.verdicts_paused != old.verdicts_paused:
        yield "verdicts are paused" if new.verdicts_paused else "verdicts are given again"
    if new.rebalances != old.rebalances:
        yield "experts are to be rebalanced"


def _ranks(old: DesiredState, new: DesiredState) -> Iterator[str]:
    """Of ranks that were not named before, nothing is known."""
    if not old.ranks:
        if new.ranks:
            names = ", ".join(str(each.rank) for each in new.ranks)
            yield f"ranks {names} are wanted"
        return
    before = {each.rank: each.node for each in old.ranks}
    after = {each.rank: each.node for each in new.ranks}
    for rank, node in after.items():
        where = f" on {node}" if node else ""
        if rank not in before:
            yield f"rank {rank} is wanted{where}"
        elif node != before[rank]:
            yield f"rank {rank} is to run{where or ' anywhere'}"
    for rank in before:
        if rank not in after:
            yield f"rank {rank} is wanted no more"


def _begun(drain: Drain) -> str:
    return f"{_BEGUN[drain.after]}: its sessions may finish there for {drain.grace_s:g} s"
