"""What the admin API needs of a control plane (`Driver`)."""

from __future__ import annotations

from typing import Protocol

from control_plane.cluster_state import ClusterState
from control_plane.desired_changes import Change, Refusal
from control_plane.healing import RebalanceProgress
from control_plane.placement.topology import Floats
from shared.desired_state import DesiredState
from shared.types import Member
from shared.wire import Load


class AdminControl(Protocol):
    @property
    def state(self) -> ClusterState: ...

    @property
    def leads(self) -> bool: ...

    @property
    def frozen(self) -> bool: ...

    def load_of(self, member: Member) -> Load | None: ...

    def expert_loads(self) -> Floats | None: ...

    @property
    def rebalance(self) -> RebalanceProgress: ...

    async def change(
        self, change: Change, *, request_id: str = "", digest: str = ""
    ) -> DesiredState | Refusal: ...
