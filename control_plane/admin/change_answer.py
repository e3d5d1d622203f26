"""Which changes may be asked for at `/v1/…`, and what is answered to one that was taken."""

from __future__ import annotations

import msgspec

from control_plane.admin.bodies import (
    ChangeBody,
    DrainBody,
    PauseBody,
    RebalanceBody,
    ReplaceBody,
    RestartBody,
    ResumeBody,
    ScaleBody,
    UndrainBody,
)
from shared.desired_state import DesiredState


class ChangeAnswer(msgspec.Struct, kw_only=True):
    """`change` is its number; `changed` is false if everything was so already, or, as `repeated`
    says, this very request was answered before. `ranks`: how many ranks shall exist after it."""

    request_id: str
    change: int
    changed: bool
    repeated: bool
    ranks: int
    message: str


CHANGES: tuple[tuple[str, type[ChangeBody], str], ...] = (
    ("scale", ScaleBody, "more or fewer ranks"),
    ("drain", DrainBody, "take ranks, or a node, out of service"),
    ("undrain", UndrainBody, "take them back into service"),
    ("replace", ReplaceBody, "move a rank to another node"),
    ("restart", RestartBody, "a new process for every rank, one after the other"),
    ("pause", PauseBody, "no verdicts, but on processes that have ended"),
    ("resume", ResumeBody, "verdicts again"),
    ("rebalance", RebalanceBody, "move experts to where they are worth most, now"),
)

WITHOUT_BODY = (RestartBody, PauseBody, ResumeBody, RebalanceBody)
"""Those that ask for something without any field."""


def answer_of(
    desired: DesiredState, request_id: str, num_ranks: int, *, changed: bool, repeated: bool
) -> ChangeAnswer:
    """`desired` is what the request has made of it, or has left. `num_ranks` is the spec's."""
    known = desired.known_request(request_id)  # None: an older release took it
    return ChangeAnswer(
        request_id=request_id,
        change=desired.change if known is None else known.change,
        changed=changed,
        repeated=repeated,
        ranks=len(desired.rank_ids(num_ranks)) if known is None else known.num_ranks,
        message=_message(changed=changed, repeated=repeated),
    )


def _message(*, changed: bool, repeated: bool) -> str:
    if changed:
        return "accepted; /v1/status says how far it is"
    if repeated:
        return "this request was taken before, with this request_id: nothing is changed again"
    return "nothing to change: it is so already"
