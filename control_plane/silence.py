"""For how long a suspected member may be silent before that alone makes it dead. Pure.

Silence says little: a process that loads weights, waits for a CPU or lies in a paused host says
nothing, too, and will go on. What its kernel says, through its node agent, says more:

    the node agent says                 its host        a member may be silent for
    ----------------------------------+---------------+--------------------------------------
    stopped (SIGSTOP)                   others answer   `stopped_s`: nothing wakes it by itself
    stopped                             silent as well  `host_pause_s`
    running, starved, sleeping          any             `hung_s`
    nothing, or not lately              others answer   `unseen_s`: cut off, or its host is paused
    nothing, or not lately              silent as well  `host_pause_s`

A member that is not stopped may also be silent for as long as what it announced may take
(`announced_s`), but no longer than `announced_max_s`: a load, or the mapping of a peer's memory.
Whoever announces without end, or dies at it unseen, is not excused for longer.

A host is silent if all of its members that were asked are, and they are at least two, or if its
node agent has itself stood still. So are the hosts of stopped members if most members of the map
are stopped, or the only one is. All but `stopped_s` grow, up to `hung_s`, with the slowest
answers that this instance gives when all is well (`Rhythm`). Every one of them but `stopped_s` is
longer than a second: a pause of up to a second ends no incarnation.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.config import LONGEST_ANNOUNCED_S, LONGEST_LEARNT_SILENCE_MS
from shared.types import ProcessState

_TIMES_USUAL = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SilenceTimings:
    """`override_s`: if above 0, the same patience for all, in place of what is learnt."""

    stopped_s: float = 0.12
    host_pause_s: float = 1.5
    hung_s: float = LONGEST_LEARNT_SILENCE_MS / 1000
    unseen_s: float = 1.25
    announced_max_s: float = LONGEST_ANNOUNCED_S
    override_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SilenceEvidence:
    """`view`: what the node agent said lately, None if it said nothing. `usual_s`: of `Rhythm`.
    `announced_s`: from the last sign of life to the end of what the member announced, at most."""

    view: ProcessState | None
    is_host_silent: bool
    usual_s: float
    announced_s: float = 0.0


def patience_s(evidence: SilenceEvidence, timings: SilenceTimings) -> float:
    """How long the member may be silent, in seconds of attentive time."""
    is_stopped = evidence.view is ProcessState.STOPPED
    if is_stopped and not evidence.is_host_silent:
        return min(timings.stopped_s, timings.override_s or timings.stopped_s)
    unannounced_s = _unannounced_patience_s(evidence, timings)
    if is_stopped:
        return unannounced_s
    return max(unannounced_s, min(evidence.announced_s, timings.announced_max_s))


def _unannounced_patience_s(evidence: SilenceEvidence, timings: SilenceTimings) -> float:
    is_stopped = evidence.view is ProcessState.STOPPED
    if timings.override_s > 0:
        return timings.override_s
    if evidence.view is not None and not is_stopped:
        floor_s = timings.hung_s
    elif evidence.is_host_silent:
        floor_s = timings.host_pause_s
    else:
        floor_s = timings.unseen_s
    return max(floor_s, min(_TIMES_USUAL * evidence.usual_s, timings.hung_s))
