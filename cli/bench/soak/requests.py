"""What the clients of a soak ask for: chats, long prompts, guided answers, and answers that nobody
waits for."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cli.bench.stream_client import random_prompts

_PER_KIND = 6
_TEMPERATURE = 0.8
_SUBJECTS = ("a lighthouse", "two foxes", "an old clock", "the sea", "a red kite", "snow in May")
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


class RequestKind(Enum):
    CHAT = "chat"
    LONG = "long prompt"
    GUIDED = "guided"
    LEFT = "left by its client"


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakRequest:
    kind: RequestKind
    path: str
    fields: Mapping[str, Any]


def soak_requests(seed: int, new_tokens: int, long_tokens: int) -> list[SoakRequest]:
    """As many of each kind, in turn. Half of each are greedy, half have a seed; what they generate
    is determined. Prompts of half of them are unique at each sending (`cache_salt`), which is the
    load's to add."""
    rng = random.Random(seed)
    long_prompts = random_prompts(seed, _PER_KIND, long_tokens)
    short_prompts = random_prompts(seed + 1, _PER_KIND, 32)
    found = []
    for number in range(_PER_KIND):
        chosen: dict[str, Any] = {"temperature": 0}
        if number % 2:
            chosen = {"temperature": _TEMPERATURE, "seed": rng.randrange(1 << 30)}
        subject = _SUBJECTS[number % len(_SUBJECTS)]
        limit = {"max_tokens": new_tokens}
        unending = {**limit, "ignore_eos": True}
        schema = {"type": "json_schema", "json_schema": {"name": "card", "schema": _SCHEMA}}
        found += [
            _chat(RequestKind.CHAT, f"Tell me about {subject}.", chosen | unending),
            _completion(RequestKind.LONG, long_prompts[number], chosen | unending),
            _chat(
                RequestKind.GUIDED,
                f"Describe {subject} as JSON.",
                chosen | limit | {"response_format": schema},
            ),
            _completion(RequestKind.LEFT, short_prompts[number], chosen | unending),
        ]
    return found


def _chat(kind: RequestKind, text: str, fields: Mapping[str, Any]) -> SoakRequest:
    messages = [{"role": "user", "content": text}]
    return SoakRequest(
        kind=kind, path="/v1/chat/completions", fields={**fields, "messages": messages}
    )


def _completion(kind: RequestKind, prompt: list[int], fields: Mapping[str, Any]) -> SoakRequest:
    return SoakRequest(kind=kind, path="/v1/completions", fields={**fields, "prompt": prompt})
