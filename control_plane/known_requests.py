"""What the desired state remembers of the requests that were answered, so that one that is repeated
changes nothing. Pure."""

from __future__ import annotations

from dataclasses import replace

from shared.desired_state import DesiredState, KnownRequest

REQUESTS_MAX = 64


def why_reused(desired: DesiredState, request_id: str, digest: str) -> str:
    """Empty if the id is new, or that of the same request. `digest` is of all that it asks for."""
    known = desired.known_request(request_id)
    if known is None or known.digest == digest:
        return ""
    return (
        f"the request_id {request_id!r} was used before, for something else (by change "
        f"{known.change})"
    )


def with_request(
    desired: DesiredState, request_id: str, digest: str, *, num_ranks: int
) -> DesiredState:
    """`desired` is what the request has made of it. `num_ranks` is the spec's."""
    request = KnownRequest(
        request_id=request_id,
        digest=digest,
        change=desired.change,
        num_ranks=len(desired.rank_ids(num_ranks)),
    )
    return replace(
        desired,
        requests=(*desired.requests, request_id)[-REQUESTS_MAX:],
        known=(*desired.known, request)[-REQUESTS_MAX:],
    )
