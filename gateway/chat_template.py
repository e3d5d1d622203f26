"""Turns the messages of a chat into the prompt text that the model was trained on, by the
checkpoint's own Jinja template in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import CheckpointError, RequestError
from shared.model_spec import read_json


class ChatTemplate:
    """Compiled once; `render` is thread-safe."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error
        self._variables = dict(variables)

    def render(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
    ) -> str:
        """`options` may add template variables but not replace ours. Raises RequestError if the
        template rejects the messages."""
        ours = {"messages": messages, "add_generation_prompt": True, **self._variables}
        try:
            return self._template.render({**(options or {}), **ours})
        # The template runs on whatever a client sends, so its failures are the request's.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
            raise RequestError(
                f"the model's chat template rejects these messages: {error}", param="messages"
            ) from error


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """None if the checkpoint has no template. Raises CheckpointError."""
    config = _tokenizer_config(folder)
    source = _template_source(folder, config)
    if source is None:
        return None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    variables = {name: _token_text(config[name]) for name in names if config.get(name)}
    return ChatTemplate(source, variables)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    has_one = (folder / "tokenizer_config.json").exists()
    return read_json(folder, "tokenizer_config.json") if has_one else {}


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # named templates
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """Replaces Jinja's own filter, which escapes HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
