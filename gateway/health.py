"""Whether this gateway can serve, and if not, why: for load balancers and for people."""

from __future__ import annotations

from gateway.cluster_view import ClusterView
from gateway.model_loader import ModelLoader
from gateway.session_driver import SessionDriver
from shared.types import RankState


class Health:
    """A gateway that answers at all is live. It is ready if there are no reasons against it."""

    def __init__(self, driver: SessionDriver, models: ModelLoader) -> None:
        self._driver = driver
        self._models = models
        self.draining = False

    def reasons_not_ready(self) -> list[str]:
        """What is being waited for, one sentence each. A gateway that has just started knows
        nothing of the instance yet, and does not say of anything that it does not exist."""
        reasons = ["shutting down"] if self.draining else []
        view = self._driver.view
        if not view.is_read:
            return [*reasons, "this gateway has just started and has not read etcd yet"]
        if view.spec is None:
            reasons.append("the control plane has written no spec yet")
        elif self._models.served is None:
            reasons.append("the tokenizer is loading")
        if not view.members:
            reasons.append(f"no expert map is published yet: {_progress(view)}")
        elif not self._driver.live_ranks():
            reasons.append(
                f"none of the {len(view.members)} ranks of the map is connected: {_progress(view)}"
            )
        return reasons


def _progress(view: ClusterView) -> str:
    registered = {record.rank for record in view.ranks.values()}
    ready = {r.rank for r in view.ranks.values() if r.state is RankState.READY}
    num_ranks = f" of {view.spec.num_ranks}" if view.spec is not None else ""
    return f"{len(registered)}{num_ranks} ranks are registered, {len(ready)} of them ready"
