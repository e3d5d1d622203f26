"""Whether this gateway can serve, and if not, why: for load balancers and for people."""

from __future__ import annotations

from gateway.model_loader import ModelLoader
from gateway.session_driver import SessionDriver


class Health:
    """A gateway that answers at all is live. It is ready if there are no reasons against it."""

    def __init__(self, driver: SessionDriver, models: ModelLoader) -> None:
        self._driver = driver
        self._models = models
        self.draining = False

    def reasons_not_ready(self) -> list[str]:
        reasons = []
        view = self._driver.view
        if self.draining:
            reasons.append("shutting down")
        if view.spec is None:
            reasons.append("the control plane has written no spec yet")
        elif self._models.served is None:
            reasons.append("the tokenizer is loading")
        if not view.members:
            reasons.append("no expert map is published yet")
        elif not self._driver.live_ranks():
            reasons.append(f"none of the {len(view.members)} ranks of the map is connected")
        return reasons
