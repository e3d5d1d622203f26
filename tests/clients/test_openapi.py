"""Schemathesis against what the gateway says of itself: no status 5xx, and every answer as
`/openapi.json` describes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from served import Served

pytestmark = pytest.mark.timeout(900)  # some 1,500 requests

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


def test_answers_are_as_described(served: Served, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "schemathesis"), "run"),
            *(f"{served.url}/openapi.json", "--header", f"Authorization: Bearer {served.key}"),
            *("--max-examples", "5", "--seed", "1", "--no-shrink", "--request-timeout", "60"),
            *("--phases", "examples,coverage,fuzzing", "--checks", ",".join(CHECKS)),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr


def test_a_key_is_asked_for_wherever_the_document_says(served: Served, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "schemathesis"), "run"),
            *(f"{served.scripted_url}/openapi.json", "--url", served.url),
            *("--max-examples", "1", "--seed", "1", "--no-shrink", "--phases", "fuzzing"),
            *("--checks", "not_a_server_error,response_schema_conformance"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
