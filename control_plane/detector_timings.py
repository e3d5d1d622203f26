"""How long the failure detector waits for what, in seconds of attentive time. For how long a member
may be silent is in `silence`."""

from __future__ import annotations

from dataclasses import dataclass

from control_plane.silence import SilenceTimings


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorTimings:
    silence: SilenceTimings = SilenceTimings()
    # What a node agent said of a process that is not stopped says nothing after this long.
    view_age_max_s: float = 0.3
    # The same for a stopped one, of which the node agent says so again while it is suspected.
    stopped_view_age_max_s: float = 3.0
    # A sign of life that is so much newer than a view which says "stopped" disproves it.
    answer_under_way_s: float = 0.05
    # A node agent that did not run for this long was paused or starved, and so was its host.
    host_gap_min_s: float = 0.1
    # A member that is probed at the urgent interval and has not answered for this long is quiet.
    quiet_s: float = 0.06
    # Most members have been quiet for this long: our own link is suspect.
    own_link_s: float = 0.25
    # Time to register again after a lost lease: a little more than a keep-alive interval.
    reregister_timeout_s: float = 2.0
    # The same, if most leases expired at once: as long as a lease lasts.
    mass_expiry_grace_s: float = 5.0
    # A member that is not suspected becomes so after this long without an answer.
    probe_silence_s: float = 1.2
    # Members have waited for an accused member for this long, and no step has completed. Then all
    # begin together; a member dies only if after that no step completes for as long again.
    stuck_s: float = 2.5
    # Two members that both answer us promptly, and of which one does not hear the other for this
    # long, are cut off from each other. Questions follow one another every 20 ms, so that TCP sends
    # at once again what was lost.
    cut_off_s: float = 0.16
    # Two signs of life that are further apart are not prompt. Less than half of the above, as both
    # may have paused for so long.
    prompt_gap_max_s: float = 0.06
    # The same, if they answer us without a pause, if not promptly.
    cut_off_slow_s: float = 0.4
    # Two signs of life that are further apart are not without a pause.
    answer_gap_max_s: float = 0.2
    # Time between two events beyond this is our own stall, and not attentive time.
    gap_max_s: float = 0.25
    gap_max_urgent_s: float = 0.03
