"""A path of another server's says why it is not here."""

from __future__ import annotations

import json

import pytest

from control_plane.admin.change_answer import CHANGES
from gateway.api.errors import not_found


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("POST", "/scale_elastic_ep", "the control plane's admin API serves it"),
        ("POST", "/is_scaling_elastic_ep", "the control plane's admin API serves it"),
        ("GET", "/v1/fault_tolerance/status", "the control plane's admin API serves it"),
        ("POST", "/v1/embeddings", "has no embeddings"),
        ("POST", "/v1/audio/speech", "reads and writes text only"),
        *(
            ("POST", f"/v1/{name}", "the control plane's admin API serves it")
            for name in ("status", *(each[0] for each in CHANGES))
        ),
        ("GET", "/v1/nothing", "/v1/nothing is not served. Served: /v1/models"),
    ],
)
def test_a_path_of_another_server_says_why_it_is_not_here(
    method: str, path: str, said: str
) -> None:
    error = not_found(method, path, ["/v1/models"])
    assert error.status == 404
    assert said in json.loads(error.body)["error"]["message"]
