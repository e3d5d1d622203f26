"""The clients for Node: OpenAI's, and the AI SDK. Their tests are in `node/`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NODE_TESTS = Path(__file__).parent / "node"
pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed"),
    pytest.mark.skipif(
        not (NODE_TESTS / "node_modules").exists(), reason="`npm ci` has not been run"
    ),
]


@pytest.mark.parametrize("module", ["openai.test.mjs", "ai_sdk.test.mjs", "ai_sdk_agents.test.mjs"])
def test_clients_for_node(module: str) -> None:
    done = subprocess.run(
        ["node", "--test", "--test-timeout=100000", module],
        cwd=NODE_TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
