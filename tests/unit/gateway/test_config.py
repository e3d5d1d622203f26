"""The gateway's configuration: an impossible value stops it with a sentence."""

from __future__ import annotations

import pytest

from control_plane.config import ControlPlaneConfig
from gateway.config import GatewayConfig
from shared.config import load_config
from shared.errors import ConfigError


def load(**flags: str) -> GatewayConfig:
    config = load_config(GatewayConfig, section="gateway", file=None, environ={}, flags=flags)
    config.check()
    return config


def test_the_defaults_are_possible() -> None:
    assert load() == GatewayConfig()


def test_the_patience_outlasts_an_outage_in_which_ranks_keep_coming() -> None:
    formation = ControlPlaneConfig()
    slowest_s = formation.formation_window_s + formation.first_formation_grace_s
    assert GatewayConfig().no_rank_timeout_s > 3 * slowest_s


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("port", "70000"),
        ("port", "http"),
        ("sessions_max", "0"),
        ("tokens_in_flight_max", "-1"),
        ("connections_max", "0"),
        ("connections_per_address_max", "0"),
        ("header_timeout_s", "0"),
        ("idle_timeout_s", "-1"),
        ("no_rank_timeout_s", "0"),
        ("drain_s", "-1"),
        ("log_level", "loud"),
        ("lease_ttl_s", "0.01"),
    ],
)
def test_impossible_values_are_refused(flag: str, value: str) -> None:
    with pytest.raises(ConfigError):
        load(**{flag: value})
