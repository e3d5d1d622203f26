"""What an output parser makes of a model's text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's reasoning. `begin` is its place in the model's whole text, in characters;
    -1 if it is not in there."""

    text: str
    begin: int = -1


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of the tool `name` begins. Later arguments belong to it."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of the arguments' JSON text."""

    text: str


Event = Content | Reasoning | CallStart | CallArguments


def merged(events: list[Event]) -> list[Event]:
    """The same events, with neighbours of one kind joined and empty ones left out."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        match last, event:
            case (_, Content("") | Reasoning("") | CallArguments("")):
                pass
            case (Content(before), Content(text)):
                result[-1] = Content(before + text)
            case (Reasoning(before, begin), Reasoning(text)):
                result[-1] = Reasoning(before + text, begin)
            case (CallArguments(before), CallArguments(text)):
                result[-1] = CallArguments(before + text)
            case _:
                result.append(event)
    return result
