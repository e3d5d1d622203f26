"""What the servers of `run` are to a client: where they are, what is said there, and what is in
flight. It imports only what every client's environment has."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

QUESTION: Any = [{"role": "user", "content": "What is a starfish?"}]
PARAMETERS: Any = {
    "type": "object",
    "properties": {
        "arms": {"type": "integer", "minimum": 0, "maximum": 9},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["arms", "note"],
    "additionalProperties": False,
}
GROW: Any = {
    "type": "function",
    "function": {"name": "grow", "description": "Grows arms.", "parameters": PARAMETERS},
}
SAID_TEXT = "Let me grow."
SAID_REASONING = "How many arms?"
SAID_ARGUMENTS = {"arms": 5, "note": "fünf 🌟"}
COMPARE = "Compare Vega and Mira."
COLOURS = {"Vega": "white", "Mira 🌟": "crimson"}
TEXT: Any = {"type": "string"}
STAR_TOOLS: Any = {
    "colour": {"type": "object", "properties": {"star": TEXT}, "required": ["star"]},
    "compare": {
        "type": "object",
        "properties": {"first": TEXT, "second": TEXT},
        "required": ["first", "second"],
    },
}
LONG = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "stream": True}
MODEL_DIR = Path(__file__).parents[2] / "models" / "starling-14m"
WAIT_S = 30.0


def colour(star: str) -> str:
    """The colour of a star."""
    return COLOURS[star]


def compare(first: str, second: str) -> str:
    """Compares two colours."""
    return f"{first} differs from {second}."


def run_tool(name: str, arguments: dict[str, Any]) -> str:
    """What an agent does with a call."""
    return {"colour": colour, "compare": compare}[name](**arguments)


def compared(*, thought: bool) -> str:
    """The answer at the end. `thought`: the client has sent the reasoning back."""
    found = "Vega is white, Mira 🌟 is crimson: white differs from crimson."
    return f"{found} {'Two stars.' if thought else 'No thought.'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """`url`: an instance of the shipped model; of `narrow_key` it runs one request at a time.
    `scripted_url`: every answer is SAID_REASONING, SAID_TEXT and a call of `grow`. `agent_url`: to
    COMPARE two calls of `colour` come at once, then one of `compare`, then `compared`; there, too,
    the model is `scripted_model`."""

    url: str
    model: str
    key: str
    narrow_key: str
    scripted_url: str
    scripted_model: str
    agent_url: str

    @property
    def api(self) -> str:
        return self.url + "/v1"

    @property
    def scripted_api(self) -> str:
        return self.scripted_url + "/v1"

    @property
    def agent_api(self) -> str:
        return self.agent_url + "/v1"

    def sessions(self) -> int:
        """In flight at the instance."""
        load: int = json.loads(self._read("/load"))["server_load"]
        return load

    def wait_busy(self) -> None:
        self._wait(lambda: self.sessions() > 0)

    def wait_idle(self) -> None:
        """Raises TimeoutError if a session stays that its client has left."""
        self._wait(lambda: self.sessions() == 0)

    def refused(self) -> int:
        """How many answers were a 429 so far."""
        lines = self._read("/metrics").splitlines()
        counts = [line for line in lines if "_requests_total{" in line and 'status="429"' in line]
        return sum(int(float(line.split()[-1])) for line in counts)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The one request that `narrow_key` may have in flight runs."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=WAIT_S)
        headers = {"Authorization": f"Bearer {self.narrow_key}"}
        connection.request("POST", "/v1/completions", json.dumps(LONG), headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        try:
            yield
        finally:
            response.close()
            connection.close()
            self.wait_idle()

    @contextmanager
    def busy_until_refused(self) -> Iterator[None]:
        """The same, until somebody has got a 429: whoever asks once more gets an answer. Fails if
        nobody got one."""
        before = self.refused()
        is_held, over = threading.Event(), threading.Event()

        def hold() -> None:
            with self.busy():
                is_held.set()
                while self.refused() == before and not over.is_set():
                    sleep(0.02)

        holder = threading.Thread(target=hold)
        holder.start()
        try:
            assert is_held.wait(WAIT_S)
            yield
            assert self.refused() > before
        finally:
            over.set()
            holder.join()

    def _read(self, path: str) -> str:
        request = Request(self.url + path, headers={"Authorization": f"Bearer {self.key}"})
        with urlopen(request, timeout=WAIT_S) as response:
            body: bytes = response.read()
        return body.decode()

    def _wait(self, holds: Any) -> None:
        deadline = monotonic() + WAIT_S
        while not holds():
            if monotonic() > deadline:
                raise TimeoutError("the sessions in flight are not as they should be")
            sleep(0.02)


def served_from_environment() -> Served:
    return Served(**json.loads(os.environ["STARFISH_SERVED"]))
