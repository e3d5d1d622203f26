"""The chat templates of a checkpoint: where its files keep them, and which one a chat takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gateway.chat_template import ChatTemplate
from shared.clock import Clock
from shared.errors import CheckpointError, RequestError

DEFAULT, FOR_TOOLS = "default", "tool_use"
TEMPLATE_FILE = "chat_template.jinja"
NAMED_FOLDER = "additional_chat_templates"

_ADVICE = "use /v1/completions, or start the gateway with --chat-template FILE"


class ChatTemplates:
    """By name. Those that do not compile are in `problems`, with the reason; a chat that needs one
    is refused."""

    def __init__(
        self, sources: Mapping[str, str], variables: Mapping[str, str], clock: Clock
    ) -> None:
        self._templates: dict[str, ChatTemplate] = {}
        self.problems: dict[str, str] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = ChatTemplate(source, variables, clock)
            except CheckpointError as error:
                self.problems[name] = str(error)

    @property
    def literal_text(self) -> str:
        """What the templates themselves write, apart from variables. A line between two texts
        keeps them apart."""
        texts = (text for each in self._templates.values() for text in each.literals())
        return "\n".join(texts)

    @property
    def source(self) -> str:
        """The sources of all of them."""
        return "\n".join(each.source for each in self._templates.values())

    def choose(self, *, has_tools: bool) -> ChatTemplate:
        """As transformers: a template named for tools is for chats with tools. Raises
        RequestError."""
        names = (FOR_TOOLS, DEFAULT) if has_tools else (DEFAULT,)
        for name in names:
            if name in self._templates:
                return self._templates[name]
            if name in self.problems:
                raise _refusal(f"this model's chat template cannot be used: {self.problems[name]}")
        if self._templates:
            raise _refusal(
                f"this model's chat templates ({', '.join(sorted(self._templates))}) have no "
                "default"
            )
        raise _refusal("this model has no chat template")


def read_template_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Source by name. Files of their own replace what tokenizer_config.json (`config`) has. Raises
    CheckpointError."""
    named = sorted((folder / NAMED_FOLDER).glob("*.jinja"))
    files = {path.name.removesuffix(".jinja"): path for path in named}
    if (folder / TEMPLATE_FILE).exists():
        files.setdefault(DEFAULT, folder / TEMPLATE_FILE)
    if files:
        return {name: read_template(path) for name, path in files.items()}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        return {DEFAULT: inline}
    if isinstance(inline, Mapping):
        return {str(name): str(source) for name, source in inline.items()}
    entries = [entry for entry in inline or [] if isinstance(entry, Mapping)]
    return {str(entry.get("name")): str(entry.get("template")) for entry in entries}


def read_template(path: Path) -> str:
    """Raises CheckpointError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8; it must be a Jinja template") from error


def _refusal(reason: str) -> RequestError:
    return RequestError(f"{reason}; {_ADVICE}", param="messages")
