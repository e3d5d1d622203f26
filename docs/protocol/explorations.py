"""What is explored: the protocol as it is under several kinds of faults, and the same with a rule
broken, which must be noticed."""

from __future__ import annotations

from dataclasses import dataclass

from docs.protocol.model import Budget, Rule, Rules

NEVER = "the client can never get its whole answer"
WRONG = "a client got a token that an undisturbed run would not have given"
TWICE = "a client got the positions (0, 0)"
GROWTH = "etcd's epochs do not grow"
SAME_EPOCH = "two ranks run different maps under the same epoch"


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """`problem` is how the sentence begins that must be found; empty: there must be none. `is_long`
    ones take minutes, and are left out of the tests."""

    name: str
    rules: Rules
    budget: Budget
    problem: str = ""
    is_long: bool = False


def _broken(*rules: Rule) -> frozenset[Rule]:
    return frozenset(rules)


EXPLORATIONS = (
    Exploration(
        name="a rank is killed",
        rules=Rules(num_tokens=2),
        budget=Budget(kills=1),
    ),
    Exploration(
        name="a rank is killed and starts again",
        rules=Rules(num_tokens=2),
        budget=Budget(kills=1, restarts=1),
        is_long=True,
    ),
    Exploration(
        name="a healthy rank is judged dead",
        rules=Rules(num_tokens=1),
        budget=Budget(false_verdicts=1),
    ),
    Exploration(
        name="a healthy rank is judged dead, the session also moves for no reason",
        rules=Rules(num_tokens=1),
        budget=Budget(false_verdicts=1, moves=1),
        is_long=True,
    ),
    Exploration(
        name="a rank is killed, the leader loses its lease and does not know",
        rules=Rules(num_tokens=1),
        budget=Budget(kills=1, lost_leases=1),
    ),
    Exploration(
        name="a healthy rank is judged dead, the leader loses its lease",
        rules=Rules(num_tokens=1),
        budget=Budget(false_verdicts=1, lost_leases=1),
        is_long=True,
    ),
    Exploration(
        name="a rank is killed while etcd is away for ever, the leader offers the map",
        rules=Rules(num_tokens=1, offers=True, etcd_returns=False),
        budget=Budget(kills=1, outages=1),
    ),
    Exploration(
        name="maps alone: outage, kill, lost lease",
        rules=Rules(num_tokens=0, offers=True),
        budget=Budget(kills=1, outages=1, lost_leases=1),
    ),
    Exploration(
        name="maps alone: outage, kill, lost lease, a healthy rank is judged dead",
        rules=Rules(num_tokens=0, offers=True),
        budget=Budget(kills=1, outages=1, lost_leases=1, false_verdicts=1),
        is_long=True,
    ),
    Exploration(
        name="outage, kill, lost lease",
        rules=Rules(num_tokens=1, offers=True),
        budget=Budget(kills=1, outages=1, lost_leases=1),
        is_long=True,
    ),
    # With rules broken.
    Exploration(
        name="nobody offers a map while etcd is away",
        rules=Rules(num_tokens=1, etcd_returns=False),
        budget=Budget(kills=1, outages=1),
        problem=NEVER,
    ),
    Exploration(
        name="only new maps are offered",
        rules=Rules(
            num_tokens=1,
            offers=True,
            etcd_returns=False,
            broken=_broken(Rule.PUBLISHED_MAPS_ARE_OFFERED_TOO),
        ),
        budget=Budget(kills=1, outages=1),
        problem=NEVER,
    ),
    Exploration(
        name="a new leader numbers its maps on from the newest that it knows",
        rules=Rules(num_tokens=0, offers=True, broken=_broken(Rule.NEW_TERM_SKIPS_EPOCHS)),
        budget=Budget(outages=1, lost_leases=1, false_verdicts=2),
        problem=SAME_EPOCH,
    ),
    Exploration(
        name="a transaction compares nothing",
        rules=Rules(
            num_tokens=0,
            broken=_broken(Rule.TRANSACTION_COMPARES_LEADER, Rule.TRANSACTION_COMPARES_MAP),
        ),
        budget=Budget(kills=1, lost_leases=1),
        problem=GROWTH,
    ),
    Exploration(
        name="a step goes on without the dead",
        rules=Rules(num_tokens=1, broken=_broken(Rule.STEP_WAITS_FOR_ALL)),
        budget=Budget(kills=1),
        problem=WRONG,
    ),
    Exploration(
        name="a peer's data are taken whatever their epoch",
        rules=Rules(num_tokens=1, broken=_broken(Rule.STAMP_HAS_EPOCH)),
        budget=Budget(false_verdicts=1),
        problem=WRONG,
    ),
    Exploration(
        name="a continuation begins from the prompt",
        rules=Rules(num_tokens=2, broken=_broken(Rule.CONTINUATION_BEGINS_AT_THE_NEXT)),
        budget=Budget(kills=1),
        problem=TWICE,
    ),
    Exploration(
        name="the gateway takes tokens of a former attempt",
        rules=Rules(num_tokens=2, broken=_broken(Rule.TOKEN_IS_OF_THE_ATTEMPT)),
        budget=Budget(kills=1),
        problem=TWICE,
    ),
)
