"""Which of this folder's tests run here: those whose client is installed in this environment and
for which `run` has started the servers."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
from served import Served, served_from_environment

CLIENTS = {
    "test_openai.py": "openai",
    "test_openai_agents.py": "openai",
    "test_langchain.py": "langchain_openai",
    "test_litellm.py": "litellm",
    "test_llama_index.py": "llama_index",
    "test_instructor.py": "instructor",
    "test_anthropic.py": "anthropic",
    "test_anthropic_agents.py": "anthropic",
    "test_node.py": "schemathesis",
    "test_openapi.py": "schemathesis",
    "test_guidellm.py": "guidellm",
    "test_aiperf.py": "aiperf",
}
"""A module of tests → the Python package that its environment has."""


def _is_here(package: str) -> bool:
    return "STARFISH_SERVED" in os.environ and find_spec(package) is not None


collect_ignore = [module for module, package in CLIENTS.items() if not _is_here(package)]


@pytest.fixture(scope="session")
def served() -> Served:
    return served_from_environment()
