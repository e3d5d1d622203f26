"""A client whose stream outlives ranks and gateways: when its connection breaks, it comes back with
the id of the last event that it has, and goes on with what would have followed.

    .venv/bin/python examples/resume.py [--url http://127.0.0.1:8000] [--prompt "Once upon a time"]

STARFISH_API_KEY in the environment is the API key, if the gateways want one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import time
from collections.abc import Iterator
from typing import Any

LAST_TYPES = ("message_stop", "response.completed", "response.incomplete")
"""Of `/v1/messages` and `/v1/responses`, which have no `[DONE]`."""


def stream(urls: list[str], path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events. Tries the gateways in turn for as long as it takes; raises ValueError if one
    refuses the request."""
    last_id = ""
    for attempt in range(10_000):
        host = urls[attempt % len(urls)].removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=30)
        try:
            key = os.environ.get("STARFISH_API_KEY", "none")
            headers = {"Authorization": f"Bearer {key}", "Last-Event-ID": last_id}
            connection.request("POST", path, json.dumps({**body, "stream": True}), headers)
            response = connection.getresponse()
            if response.status in (400, 401, 403, 404):
                raise ValueError(response.read().decode())
            event_id = last_id
            for line in response if response.status == 200 else ():
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name == "id":
                    event_id = value
                elif value == "[DONE]":
                    return
                elif name == "data" and event_id != last_id:
                    last_id = event_id
                    yield (event := json.loads(value))
                    if event.get("type") in LAST_TYPES:
                        return
        except (OSError, http.client.HTTPException):
            pass  # the gateway is gone: another one, or its successor, goes on
        finally:
            connection.close()
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", action="append", help="a gateway; may be repeated")
    parser.add_argument("--prompt", default="Once upon a time")
    options = parser.parse_args()
    body = {"prompt": options.prompt, "max_tokens": 200, "ignore_eos": True}
    for event in stream(options.url or ["http://127.0.0.1:8000"], "/v1/completions", body):
        print(event["choices"][0]["text"], end="", flush=True)
    print()


if __name__ == "__main__":
    main()
