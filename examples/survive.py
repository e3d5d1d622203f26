"""Shows on a running instance (`make up`) that a stream survives the death of its rank.

Streams a story, sends SIGKILL to the rank that serves it after some tokens, and lets the story
continue. Then it requests the same story undisturbed and compares the two.

    .venv/bin/python examples/survive.py [--url http://127.0.0.1:8000] [--prompt "Once upon a time"]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable

KILL_AFTER_TOKENS = 40
NUM_TOKENS = 120


def stream(url: str, prompt: str, on_token: Callable[[int, str, int], None]) -> str:
    """Returns the whole text. Calls `on_token(count, piece, rank)` for each chunk."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as models:
        name = json.load(models)["data"][0]["id"]
    body = {
        "model": name,
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 11,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    text = ""
    with urllib.request.urlopen(request, timeout=60) as response:
        rank = int(response.headers["x-starfish-rank"])
        for count, line in enumerate(line for line in response if line.startswith(b"data: {")):
            piece = json.loads(line[6:])["choices"][0]["text"]
            text += piece
            on_token(count, piece, rank)
    return text


class Watcher:
    """Prints the stream, kills its rank once, and measures the longest gap after that."""

    def __init__(self, pids: dict[int, int]) -> None:
        self._pids = pids
        self._last_at = time.monotonic()
        self._killed = False
        self.longest_gap_s = 0.0

    def __call__(self, count: int, piece: str, rank: int) -> None:
        now = time.monotonic()
        if self._killed:
            self.longest_gap_s = max(self.longest_gap_s, now - self._last_at)
        self._last_at = now
        print(piece, end="", flush=True)
        if count == KILL_AFTER_TOKENS:
            os.kill(self._pids[rank], signal.SIGKILL)
            self._killed = True
            print(f" [kill -9 rank {rank}] ", end="", flush=True)


def pids_of_ranks(run_dir: str | None) -> dict[int, int]:
    """Process ids of all ranks, from `starfish status`."""
    where = ["--run-dir", run_dir] if run_dir else []
    command = [sys.executable, "-m", "cli", "status", "--json", *where]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        sys.exit(f"{told.stderr.strip() or 'no instance answers'}\nstart one first: make up")
    status = json.loads(told.stdout)
    return {rank["rank"]: rank["pid"] for rank in status["ranks"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--run-dir", help="as given to `starfish up`")
    options = parser.parse_args()
    watcher = Watcher(pids_of_ranks(options.run_dir))
    print(options.prompt, end="")
    disturbed = stream(options.url, options.prompt, watcher)
    print(f"\n\nlongest wait after the kill: {watcher.longest_gap_s * 1000:.0f} ms")
    undisturbed = stream(options.url, options.prompt, lambda count, piece, rank: None)
    print(f"same text as without the kill: {disturbed == undisturbed}")
    return 0 if disturbed == undisturbed else 1


if __name__ == "__main__":
    sys.exit(main())
