"""What the processes of a small instance may do, one atomic action at a time: ranks that step in
lockstep, control planes that judge and publish, a gateway with one session, and etcd.

Time does not exist here. A process may act at any moment or never, so each order of events is
among the explored ones: a rank that is stopped, a watch that lags, a leader that does not know that
it leads no more. What may happen only so often is in the `Budget`, which keeps the number of states
finite. `Rules` are those of the system; each of them may be broken, to see that it is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

Member = tuple[int, int]
"""(rank, incarnation)"""
Members = tuple[Member, ...]


class ExpertMap(NamedTuple):
    epoch: int
    members: Members


class Rank(NamedTuple):
    """`expert_map` is None until the incarnation has adopted one. `step` counts within its epoch;
    `arrived` says that the rank's data for that step are in its peers' memory. `attempt` and
    `position` are those of the session that it serves, -1 if it has none."""

    incarnation: int = 1
    alive: bool = True
    expert_map: ExpertMap | None = None
    step: int = 0
    arrived: bool = False
    attempt: int = -1
    position: int = 0


class ControlPlane(NamedTuple):
    """`term` is 0 if it does not believe that it leads. `known` is the newest map that it knows;
    `published` the number of maps that it has made in its term."""

    term: int = 0
    known: ExpertMap | None = None
    dead: Members = ()
    published: int = 0


class Etcd(NamedTuple):
    available: bool = True
    leader: int = -1  # index of a control plane; -1: the key is gone
    term: int = 0
    maps: tuple[ExpertMap, ...] = ()  # all that were ever written; the last one counts
    verdicts: Members = ()


class Gateway(NamedTuple):
    """`received` are the positions that the client has got, in order."""

    attempt: int = 0
    target: Member = (0, 0)
    received: tuple[int, ...] = ()
    wrong: bool = False  # a token that no undisturbed run would give


class Submit(NamedTuple):
    attempt: int
    target: Member
    position: int


class Token(NamedTuple):
    attempt: int
    position: int
    right: bool


class Budget(NamedTuple):
    """How often each of these may still happen."""

    kills: int = 0
    false_verdicts: int = 0
    lost_leases: int = 0  # of a leader that lives
    restarts: int = 0
    moves: int = 0  # of a session whose rank lives, beyond those after a verdict
    outages: int = 0  # of etcd


class State(NamedTuple):
    ranks: tuple[Rank, ...]
    control_planes: tuple[ControlPlane, ...]
    etcd: Etcd
    gateway: Gateway
    wire: frozenset[Submit | Token]
    offers: frozenset[ExpertMap]  # maps that leaders gave to ranks while etcd was away
    budget: Budget


class Rule(Enum):
    """A rule of the protocol, which may be broken."""

    TRANSACTION_COMPARES_LEADER = auto()
    TRANSACTION_COMPARES_MAP = auto()
    STEP_WAITS_FOR_ALL = auto()  # of the epoch, until another epoch ends the wait
    STAMP_HAS_EPOCH = auto()
    CONTINUATION_BEGINS_AT_THE_NEXT = auto()  # position that the client has not got
    TOKEN_IS_OF_THE_ATTEMPT = auto()  # the gateway takes none of another attempt
    PUBLISHED_MAPS_ARE_OFFERED_TOO = auto()  # a rank may not have read them before the outage
    NEW_TERM_SKIPS_EPOCHS = auto()  # so that no two leaders ever choose the same number


@dataclass(frozen=True, kw_only=True)
class Rules:
    """`offers`: a leader that cannot write to etcd gives the map without the dead to the ranks. A
    term has fewer than `epochs_per_term` maps that are offered. With `num_tokens` 0 there is no
    session and no step: maps alone, so that more faults can be explored."""

    broken: frozenset[Rule] = frozenset()
    offers: bool = False
    etcd_returns: bool = True
    num_tokens: int = 2
    epochs_per_term: int = 4

    def hold(self, rule: Rule) -> bool:
        return rule not in self.broken


Step = tuple[str, State]
"""What happened, and the state after it."""


NUM_RANKS, NUM_CONTROL_PLANES = 3, 2


def first_state(rules: Rules, budget: Budget) -> State:
    """All ranks are members of the first map, control plane 0 leads, the session is submitted."""
    expert_map = ExpertMap(1, tuple((rank, 1) for rank in range(NUM_RANKS)))
    leader = ControlPlane(term=1, known=expert_map, published=1)
    target = (0, 1)
    return State(
        ranks=(Rank(expert_map=expert_map),) * NUM_RANKS,
        control_planes=(leader,) + (ControlPlane(),) * (NUM_CONTROL_PLANES - 1),
        etcd=Etcd(leader=0, term=1, maps=(expert_map,)),
        gateway=Gateway(target=target),
        wire=frozenset({Submit(0, target, 0)} if rules.num_tokens else ()),
        offers=frozenset(),
        budget=budget,
    )


def next_steps(state: State, rules: Rules) -> Iterator[Step]:
    """Everything that may happen next."""
    yield from _steps_of_etcd(state, rules)
    for index in range(len(state.control_planes)):
        yield from _steps_of_control_plane(state, rules, index)
    for rank in range(len(state.ranks)):
        yield from _steps_of_rank(state, rules, rank)
    yield from _steps_of_gateway(state, rules)


def violation(state: State) -> str | None:
    """Which invariant the state breaks."""
    if state.gateway.wrong:
        return "a client got a token that an undisturbed run would not have given"
    received = state.gateway.received
    if received != tuple(range(len(received))):
        return f"a client got the positions {received}"
    epochs = [each.epoch for each in state.etcd.maps]
    if any(later <= earlier for earlier, later in itertools.pairwise(epochs)):
        return f"etcd's epochs do not grow: {epochs}"
    running = {r.expert_map for r in state.ranks if r.alive and r.expert_map is not None}
    if len({each.epoch for each in running}) < len(running):
        return "two ranks run different maps under the same epoch"
    return None


def is_finished(state: State, rules: Rules) -> bool:
    """The client has its whole answer."""
    return 0 < rules.num_tokens == len(state.gateway.received)


# etcd.


def _steps_of_etcd(state: State, rules: Rules) -> Iterator[Step]:
    etcd, budget = state.etcd, state.budget
    if not etcd.available:
        if rules.etcd_returns:
            yield "etcd is back", state._replace(etcd=etcd._replace(available=True))
        return
    if budget.outages:
        yield (
            "etcd goes away",
            state._replace(
                etcd=etcd._replace(available=False),
                budget=budget._replace(outages=budget.outages - 1),
            ),
        )
    if etcd.leader >= 0 and budget.lost_leases:
        yield (
            "the leader's lease expires",
            state._replace(
                etcd=etcd._replace(leader=-1),
                budget=budget._replace(lost_leases=budget.lost_leases - 1),
            ),
        )


# Control planes.


def _steps_of_control_plane(state: State, rules: Rules, index: int) -> Iterator[Step]:
    own, etcd = state.control_planes[index], state.etcd
    if etcd.available and etcd.leader < 0:
        won = ControlPlane(term=etcd.term + 1, known=etcd.maps[-1])
        yield (
            f"control plane {index} is elected",
            _with_control_plane(
                state._replace(etcd=etcd._replace(leader=index, term=etcd.term + 1)), index, won
            ),
        )
    if not own.term or own.known is None:
        return
    if etcd.available and (etcd.leader != index or etcd.term != own.term):
        yield (
            f"control plane {index} learns that it leads no more",
            _with_control_plane(state, index, ControlPlane()),
        )
    yield from _news(state, index)
    yield from _verdicts(state, index)
    yield from _publications(state, rules, index)


def _news(state: State, index: int) -> Iterator[Step]:
    """The control plane reads etcd, or a rank tells it under which map it runs."""
    own = state.control_planes[index]
    assert own.known is not None
    newest = state.etcd.maps[-1]
    if state.etcd.available and newest.epoch > own.known.epoch:
        yield (
            f"control plane {index} reads epoch {newest.epoch}",
            _with_control_plane(state, index, own._replace(known=newest)),
        )
    for number, rank in enumerate(state.ranks):
        if rank.alive and rank.expert_map and rank.expert_map.epoch > own.known.epoch:
            yield (
                f"rank {number} tells control plane {index} of epoch {rank.expert_map.epoch}",
                _with_control_plane(state, index, own._replace(known=rank.expert_map)),
            )


def _verdicts(state: State, index: int) -> Iterator[Step]:
    own, budget = state.control_planes[index], state.budget
    assert own.known is not None
    for member in own.known.members:
        if member in own.dead:
            continue
        rank = state.ranks[member[0]]
        is_dead = not rank.alive or rank.incarnation != member[1]
        if not is_dead and not budget.false_verdicts:
            continue
        if not is_dead:
            budget = budget._replace(false_verdicts=budget.false_verdicts - 1)
        condemned = own._replace(dead=tuple(sorted({*own.dead, member})))
        yield (
            f"control plane {index} judges {member} dead{'' if is_dead else ', wrongly'}",
            _with_control_plane(state._replace(budget=budget), index, condemned),
        )
        budget = state.budget


def _publications(state: State, rules: Rules, index: int) -> Iterator[Step]:
    own = state.control_planes[index]
    assert own.known is not None
    remaining = tuple(m for m in own.known.members if m not in own.dead)
    if remaining and remaining != own.known.members:
        yield from _publish(state, rules, index, remaining)
        if rules.offers and not state.etcd.available:
            yield from _offer(state, rules, index, remaining)
    if (
        rules.offers
        and rules.hold(Rule.PUBLISHED_MAPS_ARE_OFFERED_TOO)
        and not state.etcd.available
        and own.known not in state.offers
    ):
        yield (
            f"control plane {index} offers the published epoch {own.known.epoch}",
            state._replace(offers=state.offers | {own.known}),
        )
    if remaining and state.etcd.available and own.known.epoch > state.etcd.maps[-1].epoch:
        yield from _publish(state, rules, index, remaining, known=True)
    for number, rank in enumerate(state.ranks):
        newcomer = (number, rank.incarnation)
        if rank.alive and rank.expert_map is None and newcomer not in own.known.members:
            if newcomer in state.etcd.verdicts or not remaining:
                continue
            if all(m[0] != number for m in remaining):
                yield from _publish(state, rules, index, tuple(sorted((*remaining, newcomer))))


def _next_epoch(own: ControlPlane, rules: Rules) -> int:
    """The first map of a later term skips as many epochs as a term may have."""
    assert own.known is not None
    skips = own.term > 1 and not own.published and rules.hold(Rule.NEW_TERM_SKIPS_EPOCHS)
    return own.known.epoch + (rules.epochs_per_term if skips and rules.offers else 1)


def _publish(
    state: State, rules: Rules, index: int, members: Members, *, known: bool = False
) -> Iterator[Step]:
    """A transaction: nothing happens if what it compares has changed."""
    own, etcd = state.control_planes[index], state.etcd
    assert own.known is not None
    if not etcd.available:
        return
    if rules.hold(Rule.TRANSACTION_COMPARES_LEADER) and (etcd.leader, etcd.term) != (
        index,
        own.term,
    ):
        return
    newest = etcd.maps[-1]
    if rules.hold(Rule.TRANSACTION_COMPARES_MAP) and newest.epoch > own.known.epoch:
        return
    expert_map = own.known if known else ExpertMap(_next_epoch(own, rules), members)
    verdicts = tuple(sorted({*etcd.verdicts, *(m for m in own.dead if m not in members)}))
    after = own._replace(known=expert_map, dead=(), published=own.published + 1)
    yield (
        f"control plane {index} publishes epoch {expert_map.epoch}: {members}",
        _with_control_plane(
            state._replace(etcd=etcd._replace(maps=(*etcd.maps, expert_map), verdicts=verdicts)),
            index,
            after,
        ),
    )


def _offer(state: State, rules: Rules, index: int, members: Members) -> Iterator[Step]:
    """A leader that most members answer, none of them under a newer map than its own, gives them
    the next map itself."""
    own = state.control_planes[index]
    assert own.known is not None
    if own.published + 1 >= rules.epochs_per_term:
        return
    answering = [
        m for m in members if state.ranks[m[0]].alive and state.ranks[m[0]].incarnation == m[1]
    ]
    if 2 * len(answering) <= len(own.known.members):
        return
    expert_map = ExpertMap(_next_epoch(own, rules), members)
    after = own._replace(known=expert_map, published=own.published + 1)
    yield (
        f"control plane {index} offers epoch {expert_map.epoch}: {members}",
        _with_control_plane(state._replace(offers=state.offers | {expert_map}), index, after),
    )


def _with_control_plane(state: State, index: int, own: ControlPlane) -> State:
    planes = state.control_planes
    return state._replace(control_planes=(*planes[:index], own, *planes[index + 1 :]))


# Ranks.


def _steps_of_rank(state: State, rules: Rules, number: int) -> Iterator[Step]:
    rank, budget = state.ranks[number], state.budget
    if not rank.alive:
        if budget.restarts and state.etcd.available:
            after = state._replace(budget=budget._replace(restarts=budget.restarts - 1))
            yield f"rank {number} starts again", _reborn(after, number)
        return
    if budget.kills:
        after = state._replace(budget=budget._replace(kills=budget.kills - 1))
        yield f"rank {number} is killed", _with_rank(after, number, rank._replace(alive=False))
    yield from _adoptions(state, number)
    yield from _submissions(state, number)
    yield from _forward(state, rules, number)


def _adoptions(state: State, number: int) -> Iterator[Step]:
    rank = state.ranks[number]
    member = (number, rank.incarnation)
    seen = (*state.etcd.maps, *state.offers) if state.etcd.available else tuple(state.offers)
    current = rank.expert_map.epoch if rank.expert_map else 0
    for expert_map in seen:
        if expert_map.epoch <= current:
            continue
        if member in expert_map.members:
            adopted = rank._replace(expert_map=expert_map, step=0, arrived=False)
            yield (
                f"rank {number} adopts epoch {expert_map.epoch}",
                _with_rank(state, number, adopted),
            )
        elif rank.expert_map is not None and state.etcd.available:
            yield f"rank {number} is fenced", _reborn(state, number)


def _reborn(state: State, number: int) -> State:
    """The next incarnation: outside the map, with regions that nobody has written to."""
    rank = state.ranks[number]
    return _with_rank(state, number, Rank(incarnation=rank.incarnation + 1))


def _submissions(state: State, number: int) -> Iterator[Step]:
    rank = state.ranks[number]
    for submit in state.wire:
        if (
            isinstance(submit, Submit)
            and submit.target == (number, rank.incarnation)
            and submit.attempt > rank.attempt
            and rank.expert_map is not None
        ):
            taken = rank._replace(attempt=submit.attempt, position=submit.position)
            after = state._replace(wire=state.wire - {submit})
            yield f"rank {number} takes attempt {submit.attempt}", _with_rank(after, number, taken)


def _forward(state: State, rules: Rules, number: int) -> Iterator[Step]:
    rank = state.ranks[number]
    has_work = any(
        r.expert_map == rank.expert_map and r.attempt >= 0 and r.position < rules.num_tokens
        for r in state.ranks
    )
    if rank.expert_map is None or not has_work:
        return  # all sleep until one of them has work
    if not rank.arrived:
        arrived = rank._replace(arrived=True)
        yield f"rank {number} sends step {rank.step}", _with_rank(state, number, arrived)
        return
    right = True
    for peer, incarnation in rank.expert_map.members:
        if peer == number:
            continue
        arrival = _arrival(state, rules, rank, peer, incarnation)
        if arrival is None:
            if rules.hold(Rule.STEP_WAITS_FOR_ALL) or state.ranks[peer].alive:
                return
            right = False
        else:
            right = right and arrival
    wire, position = state.wire, rank.position
    if rank.attempt >= 0 and position < rules.num_tokens:
        wire = wire | {Token(rank.attempt, position, right)}
        position += 1
    committed = rank._replace(step=rank.step + 1, arrived=False, position=position)
    yield (
        f"rank {number} completes step {rank.step} of epoch {rank.expert_map.epoch}",
        _with_rank(state._replace(wire=wire), number, committed),
    )


def _arrival(
    state: State, rules: Rules, rank: Rank, peer_number: int, incarnation: int
) -> bool | None:
    """Whether the peer's data for this step are there (None: not yet), and are what they should be.
    Data of a dead process stay until its successor has come."""
    peer = state.ranks[peer_number]
    if peer.expert_map is None or rank.expert_map is None:
        return None
    sent = peer.step if peer.arrived else peer.step - 1
    if peer.incarnation != incarnation:
        return None  # each incarnation has regions of its own
    if rules.hold(Rule.STAMP_HAS_EPOCH) and peer.expert_map.epoch != rank.expert_map.epoch:
        return None
    if sent < rank.step:
        return None
    return peer.expert_map == rank.expert_map


def _with_rank(state: State, number: int, rank: Rank) -> State:
    ranks = state.ranks
    return state._replace(ranks=(*ranks[:number], rank, *ranks[number + 1 :]))


# The gateway.


def _steps_of_gateway(state: State, rules: Rules) -> Iterator[Step]:
    gateway = state.gateway
    if not rules.num_tokens or is_finished(state, rules):
        return
    tokens = sorted(each for each in state.wire if isinstance(each, Token))
    for earlier, token in zip([None, *tokens], tokens, strict=False):
        if earlier is None or earlier.attempt != token.attempt:  # a connection keeps its order
            yield from _receive(state, rules, token)
    target_rank = state.ranks[gateway.target[0]]
    gone = not target_rank.alive or target_rank.incarnation != gateway.target[1]
    judged = gateway.target in state.etcd.verdicts
    budget = state.budget
    if not gone and not judged:
        if not budget.moves:
            return
        budget = budget._replace(moves=budget.moves - 1)
    for number, rank in enumerate(state.ranks):
        target = (number, rank.incarnation)
        if not rank.alive or rank.expert_map is None or target == gateway.target:
            continue
        moved = gateway._replace(attempt=gateway.attempt + 1, target=target)
        begins_at_next = rules.hold(Rule.CONTINUATION_BEGINS_AT_THE_NEXT)
        submit = Submit(moved.attempt, target, len(gateway.received) if begins_at_next else 0)
        yield (
            f"the gateway moves the session to {target}",
            state._replace(gateway=moved, wire=state.wire | {submit}, budget=budget),
        )


def _receive(state: State, rules: Rules, token: Token) -> Iterator[Step]:
    gateway = state.gateway
    after = state._replace(wire=state.wire - {token})
    is_own = token.attempt == gateway.attempt or not rules.hold(Rule.TOKEN_IS_OF_THE_ATTEMPT)
    if is_own:
        taken = gateway._replace(
            received=(*gateway.received, token.position),
            wrong=gateway.wrong or not token.right,
        )
        after = after._replace(gateway=taken)
    yield f"the gateway gets position {token.position} of attempt {token.attempt}", after
