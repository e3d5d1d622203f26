"""A model that calls tools, as a function of its prompt: it reads the calls and the results of the
history as Qwen3's chat template writes them, so its answers tell what of them has come back, and in
which order."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from tests.support.published_templates import TEMPLATES
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import EOS

STARS = ("Vega", "Mira 🌟")
THOUGHT = "Two stars."
_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)
_QUESTION = "<|im_start|>user\nCompare"


def write_agent_model(folder: Path) -> Callable[[Sequence[int]], Sequence[int]]:
    """The tokenizer, with Qwen3's template, into `folder`; returns a `ToyRank.script_of`."""
    tokenizer = write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": TEMPLATES["qwen3"]}))
    return lambda prompt: _script(tokenizer, prompt)


def _script(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    said = answer_to(tokenizer.decode(list(prompt), skip_special_tokens=False))
    return [*tokenizer.encode(said).ids, EOS]


def answer_to(prompt: str) -> str:
    """To "Compare …": first two calls of `colour`, one for each star; then one of `compare`, with
    the colours; then what all of them have given, and whether the reasoning has come back. A prompt
    that ends in closed reasoning gets none."""
    turns = prompt.rpartition(_QUESTION)[2]
    called = [json.loads(text)["arguments"] for text in _CALL.findall(turns)]
    results = _RESULT.findall(turns)
    match len(results):
        case 0:
            calls = [_call("colour", star=star) for star in STARS]
            thoughts = "" if prompt.endswith("</think>\n\n") else _thoughts()
            return f"{thoughts}I look." + "\n".join(calls)
        case 2:
            return _call("compare", first=results[0], second=results[1])
    found = zip((each["star"] for each in called[:2]), results[:2], strict=True)
    colours = ", ".join(f"{star} is {colour}" for star, colour in found)
    thought = THOUGHT if _thoughts() in turns else "No thought."
    return f"{colours}: {results[2]} {thought}"


def _thoughts() -> str:
    return f"<think>\n{THOUGHT}\n</think>\n\n"


def _call(name: str, **arguments: str) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"
