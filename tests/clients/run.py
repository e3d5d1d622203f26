"""Runs the tests of this folder in each of the clients' environments, against servers that are
started once: an instance of the shipped model, a gateway whose answers are known, and one whose
model calls tools and reads their results. It runs in the project's environment:
`python -m tests.clients.run .venv-clients/*`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from shared.logs import configure_logs
from tests.support.agent_model import write_agent_model
from tests.support.cluster import running_cluster
from tests.support.gateway_harness import MODEL, running_gateway
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import EOS

HERE = Path(__file__).parent
MODEL_DIR = HERE.parents[1] / "models" / "starling-14m"
KEY = "sk-starfish-of-the-tests"
NARROW_KEY = "sk-starfish-one-request-at-a-time"
KEY_FILE = """
[keys.wide]
hash = "sha256:{wide}"

[keys.narrow]
hash = "sha256:{narrow}"
requests_max = 1
"""
SAID = (
    "<think>\nHow many arms?\n</think>\n\nLet me grow.<tool_call>\n"
    '{"name": "grow", "arguments": {"arms": 5, "note": "fünf 🌟"}}\n</tool_call>'
)


async def main(folder: Path, environments: Sequence[str]) -> int:
    """The first exit status that is not 0."""
    failed = 0
    async with _servers(folder) as where:
        for environment in environments:
            print(f"\n-- {environment}", flush=True)
            status = await _run(Path(environment), {**os.environ, "STARFISH_SERVED": where})
            failed = failed or status
    return failed


async def _run(environment: Path, variables: dict[str, str]) -> int:
    process = await asyncio.create_subprocess_exec(
        *(environment / "bin" / "python", "-m", "pytest", "-q"),
        *("-c", HERE / "pytest.ini", "-p", "no:cacheprovider", HERE),
        env=variables,
        stdin=asyncio.subprocess.DEVNULL,
    )
    return await process.wait()


@asynccontextmanager
async def _servers(folder: Path) -> AsyncIterator[str]:
    """Fields of `served.Served`, as JSON."""
    toy, agent = folder / "toy", folder / "agent"
    for each in (toy, agent):
        each.mkdir()
    tokenizer = write_tokenizer(toy)
    script_of = write_agent_model(agent)
    flags = ("--api-key-file", str(_write_keys(folder)))
    formats = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    async with (
        running_cluster(folder / "run", MODEL_DIR, ranks=2, flags=flags, api_key=KEY) as cluster,
        running_gateway(toy, **formats) as scripted,
        running_gateway(agent, context_tokens_max=8192) as agents,
    ):
        for rank in scripted.ranks:
            rank.script = [*tokenizer.encode(SAID).ids, EOS]
        for rank in agents.ranks:
            rank.script_of = script_of
        where = {
            "url": cluster.url,
            "model": await cluster.model_name(),
            "key": KEY,
            "narrow_key": NARROW_KEY,
            "scripted_url": scripted.url,
            "scripted_model": MODEL,
            "agent_url": agents.url,
        }
        yield json.dumps(where)


def _write_keys(folder: Path) -> Path:
    path = folder / "keys.toml"
    path.write_text(KEY_FILE.format(wide=_digest(KEY), narrow=_digest(NARROW_KEY)))
    path.chmod(0o600)
    return path


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


if __name__ == "__main__":
    configure_logs(service="clients", level="error")
    with tempfile.TemporaryDirectory(prefix="starfish-clients-") as name:
        sys.exit(asyncio.run(main(Path(name), sys.argv[1:])))
