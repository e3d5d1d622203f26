"""Whether most ranks have lost the control plane that leads. Pure. A standby then takes its key:
that is as safe as its lease's end, since every write of a leader compares the key, and it is
earlier, since etcd grants no lease of less than two seconds."""

from __future__ import annotations

from control_plane.cluster_state import ClusterState


def lost_leader(state: ClusterState) -> int | None:
    """The revision of the leader key, if more than half of the members that can tell do not hear
    whoever holds it. Members that somebody suspects cannot: those of a lost host do not say that
    its control plane is lost, too. None if there is no leader, or not enough members doubt it."""
    leader, expert_map = state.leader, state.expert_map
    if not state.leader_doubts or leader is None or expert_map is None:
        return None  # at once, in peace: this is asked after every event
    revision = state.revision_of(state.keys.leader)
    suspected = {suspicion.member for suspicion in state.suspicions.values()}
    voters = [
        member
        for member in expert_map.members
        if member not in suspected and member not in state.verdicts
    ]
    doubting = [
        member
        for member in voters
        if (doubt := state.leader_doubts.get(member)) is not None
        and doubt.control_plane == leader.control_plane
        and state.revision_of(state.keys.leader_doubt(doubt.rank, doubt.incarnation)) > revision
    ]
    return revision if 2 * len(doubting) > len(voters) else None
