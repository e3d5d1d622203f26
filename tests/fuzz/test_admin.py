"""The admin API and whatever is posted to it: an answer of the right shape, never a crash, and
a desired state that every reader understands."""

from __future__ import annotations

import json
from typing import Any

import pytest

from control_plane.admin.admin_app import BODY_BYTES_MAX
from shared.desired_state import DesiredState
from shared.records import pack_record, unpack_record
from tests.fuzz.budget import Fuzzing
from tests.fuzz.mutator import Mutator
from tests.support.admin_api import FakeControl, admin_api
from tests.support.fake_clock import FakeClock
from tests.unit.control_plane.desired import agent, state_of

BODIES: dict[str, dict[str, Any]] = {
    "/v1/scale": {"ranks": 5, "node": "a", "grace_s": 1.5, "request_id": "r"},
    "/v1/drain": {"ranks": [1, 2], "grace_s": 0},
    "/v1/undrain": {"node": "b"},
    "/v1/replace": {"rank": 1, "node": "b", "grace_s": 30},
    "/v1/restart": {"rolling": True, "ranks": [0, 3], "stop": False},
    "/v1/pause": {"request_id": "x"},
    "/v1/resume": {},
    "/v1/rebalance": {"request_id": ""},
    "/scale_elastic_ep": {"new_ep_size": 5, "drain_timeout": 120},
    "/v1/fault_tolerance/apply": {
        "instruction": "scale_down",
        "request_id": "q",
        "params": {"removed_dp_ranks": [3], "drain_timeout": 1},
    },
}
STATUSES = {200, 202, 400, 409, 413}


def body(mutator: Mutator, path: str) -> bytes:
    fields: Any = dict(BODIES[path])
    for _ in range(mutator.rng.choice((0, 1, 1, 2, 3))):
        fields = mutator.value(fields)
    if isinstance(fields, dict):
        fields.pop("new_data_parallel_size", None)  # its answer comes only once it is done
    try:
        data = json.dumps(fields).encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        data = b"{}"
    data = mutator.data(data) if mutator.rng.random() < 0.2 else data
    return data[:BODY_BYTES_MAX]  # of a longer one the connection is closed while it is sent


@pytest.mark.timeout(0)
async def test_every_body_gets_an_answer_and_leaves_a_readable_state() -> None:
    fuzzing, clock = Fuzzing("admin"), FakeClock()
    mutator = Mutator(fuzzing.rng)
    agents = (agent("a", 0, 1, ranks_max=8), agent("b", 2, 3))
    control = FakeControl(state_of(*agents), clock)
    paths = sorted(BODIES)
    num_changes = 0
    async with admin_api(control, clock) as client:
        for data in fuzzing.corpus():
            for path in paths:
                assert (await client.post(path, data)).status in STATUSES
        for number in fuzzing.rounds():
            if number % 50 == 0:
                control.state = state_of(*agents)
            path = mutator.rng.choice(paths)
            data = body(mutator, path)
            with fuzzing.kept_on_failure(data):
                answer = await client.post(path, data)
                assert answer.status in STATUSES, (path, answer)
                assert ("error" in answer.body) == (answer.status >= 400)
                desired = control.state.desired
                assert unpack_record(pack_record(desired), DesiredState) == desired
                assert (await client.get("/v1/status")).status == 200
                num_changes += answer.status == 202
    assert fuzzing.num_inputs > 5
    assert num_changes > 0
