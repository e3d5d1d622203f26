"""Every state that a model can reach, breadth first: which of them break an invariant, and from
which of them the client can never get its whole answer."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from docs.protocol.model import (
    Budget,
    Rules,
    State,
    first_state,
    is_finished,
    next_steps,
    violation,
)

Progress = Callable[[int, int], None]
"""Is told the number of states and the depth."""


@dataclass(slots=True, kw_only=True)
class Found:
    """`num_states` have been seen, all of them if `is_whole`. `trace` is a shortest way to the
    first state that is wrong, and `problem` says what is wrong with it."""

    num_states: int
    depth: int
    is_whole: bool
    problem: str = ""
    trace: list[str] = field(default_factory=list)


def explore(
    rules: Rules,
    budget: Budget,
    *,
    depth_max: int = 10_000,
    states_max: int = 10_000_000,
    on_progress: Progress = lambda states, depth: None,
) -> Found:
    """Ends at the first state that breaks an invariant. If all states were seen and none does, each
    must have a way to one in which the client has everything, without another fault."""
    graph = _Graph()
    graph.add(first_state(rules, budget), -1, "")
    finished = array("Q")
    begin, depth = 0, 0
    while begin < len(graph.states):
        end = len(graph.states)
        if depth == depth_max or end > states_max:
            return Found(num_states=end, depth=depth, is_whole=False)
        for index in range(begin, end):
            state = graph.states[index]
            problem = violation(state)
            if problem is not None:
                return Found(
                    num_states=len(graph.states),
                    depth=depth,
                    is_whole=False,
                    problem=problem,
                    trace=graph.trace(index),
                )
            if is_finished(state, rules):
                finished.append(index)
                continue
            for label, after in next_steps(state, rules):
                is_fault = after.budget != state.budget and after.budget.restarts == (
                    state.budget.restarts
                )
                graph.add(after, index, label, is_way=not is_fault)
        begin, depth = end, depth + 1
        on_progress(end, depth)
    stuck = graph.first_without_a_way_to(finished) if rules.num_tokens else None
    found = Found(num_states=len(graph.states), depth=depth, is_whole=True)
    if stuck is not None:
        found.problem = "the client can never get its whole answer"
        found.trace = graph.trace(stuck)
    return found


class _Graph:
    """States by number. Equal parts of different states are one object, or a million states would
    not fit into memory."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self._number_of: dict[State, int] = {}
        self._parts: dict[Any, Any] = {}
        self._parents = array("q")
        self._labels: list[str] = []
        self._texts: dict[str, str] = {}
        self._sources = array("Q")
        self._targets = array("Q")

    def add(self, state: State, parent: int, label: str, *, is_way: bool = True) -> None:
        number = self._number_of.get(state)
        if number is None:
            number = len(self.states)
            kept = State(*(self._parts.setdefault(part, part) for part in state))
            self.states.append(kept)
            self._number_of[kept] = number
            self._parents.append(parent)
            self._labels.append(self._texts.setdefault(label, label))
        if is_way and parent >= 0:
            self._sources.append(parent)
            self._targets.append(number)

    def trace(self, number: int) -> list[str]:
        return list(reversed([*self._labels_to(number)]))

    def _labels_to(self, number: int) -> Iterator[str]:
        while self._parents[number] >= 0:
            yield self._labels[number]
            number = self._parents[number]

    def first_without_a_way_to(self, goals: array[int]) -> int | None:
        """The number of the earliest state from which no way leads to any of `goals`."""
        first, following = self._edges_by_target()
        reached = bytearray(len(self.states))
        waiting = list(goals)
        for goal in goals:
            reached[goal] = 1
        while waiting:
            edge = first[waiting.pop()]
            while edge >= 0:
                source = self._sources[edge]
                if not reached[source]:
                    reached[source] = 1
                    waiting.append(source)
                edge = following[edge]
        stuck = reached.find(0)
        return None if stuck < 0 else stuck

    def _edges_by_target(self) -> tuple[array[int], array[int]]:
        """Linked lists: the first edge into each state, and the next one into the same."""
        first = array("q", bytes(8 * len(self.states)))
        for number in range(len(first)):
            first[number] = -1
        following = array("q", bytes(8 * len(self._targets)))
        for edge, target in enumerate(self._targets):
            following[edge] = first[target]
            first[target] = edge
        return first, following
