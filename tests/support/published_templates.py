"""Small chat templates of our own that use the constructs of the published ones, and chats for
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES: dict[str, str] = {
    path.stem: path.read_text(encoding="utf-8").removesuffix("\n")
    for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
}
TEXT_ARGUMENTS = {"deepseek_v3", "deepseek_v31"}
"""Those that concatenate the arguments of a call, as text."""

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find_star",
            "description": "Finds a star <by> name & place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "description": "Der Name, z. B. \u2605"},
                    "kind": {"type": "string", "enum": ["giant", "dwarf"]},
                    "places": {"type": "array", "items": {"type": "number"}},
                    "limit": {"type": ["integer", "null"]},
                },
                "required": ["name"],
            },
        },
    }
]


def user(content: Any = "Wo ist der Stern? \u2605 <b>&'\"") -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: Any = " You are a starfish. ") -> dict[str, Any]:
    return {"role": "system", "content": content}


def assistant(content: Any = "It is here.\n", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: str, name: str = "find_star", number: int = 1) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(content: Any = '{"at": [1, 2.5]}', number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "content": content}


def text_parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


ONE_CALL = [
    user(),
    assistant("", tool_calls=[call('{"name": "\u2605", "places": [1, 2.5], "limit": null}')]),
    result(),
]
TWO_CALLS = [
    system(),
    user(),
    assistant(
        "Let me see.",
        tool_calls=[call('{"name": "a"}'), call('{"name": "b", "deep": {"x": [true]}}', number=2)],
    ),
    result("one"),
    result("two", number=2),
    assistant("Both."),
    user("Again"),
]
REASONED = [
    user(),
    assistant("Old.", reasoning_content="\nold thoughts\n"),
    user("More"),
    assistant("New.", reasoning_content="new thoughts"),
]
