"""Makes hostile inputs: random values of a type, and changed copies of values and of bytes. All of
it follows from one seed."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import types
import typing
from enum import Enum
from typing import Any

import msgspec

INTEGERS = (0, 1, -1, 2, 63, 64, 255, 256, 1 << 15, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 62)
INTEGERS_LARGE = (*INTEGERS, -(1 << 63), (1 << 63) - 1, (1 << 64) - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e308, -1e308, 5e-324, 0.5, 2.0, 1e9)
TEXTS = (
    "",
    "x",
    "a" * 300,
    "\0",
    "\ud7ff",
    "é",
    "😀",
    "../../passwd",
    "%s%n",
    "{{7*7}}",
    "a/b",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
)
DEPTH_MAX = 3
REPEATED_WEIGHT_MAX = 1 << 20
"""About as many bytes a list may have after it was repeated: beyond the limits on most messages and
bodies. Without this, repeated lists of repeated lists of long texts took gigabytes."""


class Mutator:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def sample(self, hint: Any, depth: int = 0) -> Any:
        """A random value of this type."""
        rng = self.rng
        if hasattr(hint, "__supertype__"):
            return self.sample(hint.__supertype__, depth)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is typing.Annotated:
            return self._sample_within(*arguments)
        if origin in (typing.Union, types.UnionType):
            return self.sample(rng.choice(arguments), depth)
        if origin in (tuple, list):
            if origin is tuple and (len(arguments) != 2 or arguments[1] is not Ellipsis):
                return tuple(self.sample(argument, depth + 1) for argument in arguments)
            count = rng.choice((0, 1, 2, 5)) if depth < DEPTH_MAX else 0
            return origin(self.sample(arguments[0], depth + 1) for _ in range(count))
        if isinstance(hint, type) and issubclass(hint, Enum):
            return rng.choice(list(hint))
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            hints = typing.get_type_hints(hint, include_extras=True)
            return hint(
                **{f.name: self.sample(hints[f.name], depth + 1) for f in dataclasses.fields(hint)}
            )
        if isinstance(hint, type) and hasattr(hint, "__struct_fields__"):
            hints = typing.get_type_hints(hint, include_extras=True)
            names = hint.__struct_fields__
            return hint(**{name: self.sample(hints[name], depth + 1) for name in names})
        return self._sample_plain(hint)

    def _sample_within(self, hint: Any, bounds: msgspec.Meta) -> Any:
        """A value at the bounds or between them."""
        if bounds.pattern is not None:
            fitting = [text for text in TEXTS if re.search(bounds.pattern, text)]
            return self.rng.choice(fitting)
        if hint in (str, bytes):
            return self._sample_plain(hint)[: bounds.max_length]
        if typing.get_origin(hint) is tuple:
            return self.sample(hint)[: bounds.max_length]
        least = -math.inf if bounds.ge is None else bounds.ge
        most = math.inf if bounds.le is None else bounds.le
        values = INTEGERS if hint is int else FLOATS
        ends = [hint(end) for end in (bounds.ge, bounds.le) if end is not None]
        return self.rng.choice([*(v for v in values if least <= v <= most), *ends])

    def _sample_plain(self, hint: Any) -> Any:
        rng = self.rng
        if hint is bool:
            return rng.random() < 0.5
        if hint is int:
            return rng.choice(INTEGERS)
        if hint is float:
            return rng.choice(FLOATS)
        if hint is str:
            return rng.choice(TEXTS)
        if hint is bytes:
            return rng.randbytes(rng.choice((0, 1, 16, 32, 200)))
        assert hint in (None, type(None)), f"no values of {hint} can be made"
        return None

    def value(self, value: Any) -> Any:
        """A copy with something, somewhere within it, changed."""
        rng = self.rng
        if isinstance(value, dict) and value and rng.random() < 0.85:
            changed = dict(value)
            key = rng.choice(list(changed))
            match rng.randrange(8):
                case 0:
                    del changed[key]
                case 1:
                    changed[rng.choice(TEXTS)] = self.junk()
                case _:
                    changed[key] = self.value(changed[key])
            return changed
        if isinstance(value, list | tuple) and value and rng.random() < 0.85:
            items = list(value)
            place = rng.randrange(len(items))
            match rng.randrange(6):
                case 0:
                    del items[place]
                case 1:
                    count = rng.choice((2, 50, 500))
                    if not is_heavier(items, REPEATED_WEIGHT_MAX // count):
                        items *= count
                case 2:
                    items.insert(place, self.junk())
                case _:
                    items[place] = self.value(items[place])
            return items
        return self.junk()

    def junk(self, depth: int = 0) -> Any:
        rng = self.rng
        kind = rng.randrange(9 if depth < DEPTH_MAX else 6)
        match kind:
            case 0:
                return rng.choice(INTEGERS_LARGE)
            case 1:
                return rng.choice(FLOATS)
            case 2:
                return rng.choice(TEXTS)
            case 3:
                return rng.choice((None, True, False))
            case 4:
                return rng.choice(TEXTS) * rng.choice((1, 30, 1000))
            case 5:
                return [rng.choice(INTEGERS)] * rng.choice((0, 1, 3, 1000))
            case 6:
                return {rng.choice(TEXTS): self.junk(depth + 1) for _ in range(rng.randrange(4))}
            case 7:
                return [self.junk(depth + 1) for _ in range(rng.randrange(4))]
            case _:
                nested: Any = 1
                for _ in range(rng.choice((3, 40, 400, 900, 950, 980))):
                    nested = [nested] if rng.random() < 0.5 else {"a": nested}
                return nested

    def data(self, data: bytes) -> bytes:
        """A copy with some bytes changed, cut, doubled or put in."""
        rng, changed = self.rng, bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            place = rng.randrange(len(changed) + 1)
            match rng.randrange(5):
                case 0 if changed:
                    changed[place % len(changed)] ^= 1 << rng.randrange(8)
                case 1:
                    del changed[place : place + rng.choice((1, 4, 64))]
                case 2:
                    changed[place:place] = rng.randbytes(rng.choice((1, 4, 64)))
                case 3:
                    changed[place:place] = changed[: rng.choice((4, 64, 4096))]
                case _ if changed:
                    changed[place % len(changed)] = rng.choice((0, 0x7F, 0x80, 0xC1, 0xDD, 0xFF))
        return bytes(changed)


def is_heavier(value: Any, weight: int) -> bool:
    """A value weighs one, and a text or bytes one more for each character."""
    rest, found = [value], 0
    while rest and found <= weight:
        part = rest.pop()
        found += 1
        if isinstance(part, str | bytes):
            found += len(part)
        elif isinstance(part, dict):
            rest += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            rest += part
    return found > weight
