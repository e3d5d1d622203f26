"""A guided text that spells special tokens comes as text, of ordinary tokens; a grammar that names
special tokens gets these."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gateway.parsers.call_grammar import CallGrammar, joined
from gateway.parsers.formats import TOOL_FORMATS
from shared.errors import GrammarError
from shared.grammars.compiler import GrammarCompiler
from shared.grammars.messages import GrammarKind
from shared.grammars.sources import grammar_of
from shared.grammars.spelt_tokens import plain_tokenizer, with_ids
from tests.support.tiny_tokenizer_fallback import build_fallback_tokenizer

FILE = Path(__file__).parents[4] / "models" / "starling-14m" / "tokenizer.json"
NUM_PIECES = 4096
NEXT_ID = NUM_PIECES + 2
ADDED = ("<tool_call>", "</tool_call>", "[TOOL]")
"""Not special in the file; the library takes those between < and > for special."""


def added_token(token: int, content: str) -> dict[str, Any]:
    options = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False}
    return {"id": token, "content": content, "special": False, **options}


def byte_level() -> dict[str, Any]:
    """Some of its special tokens are in the model's own vocabulary, some are not; a merge makes one
    of them."""
    file: dict[str, Any] = json.loads(FILE.read_bytes())
    tokens = [added_token(NEXT_ID + at, content) for at, content in enumerate(ADDED)]
    file["added_tokens"] += tokens
    file["model"]["vocab"] |= {"<|": NUM_PIECES, "im_end|>": NUM_PIECES + 1}
    file["model"]["merges"].append(["<|", "im_end|>"])
    return file


FILES = {
    "byte level": byte_level(),
    "byte fallback": json.loads(build_fallback_tokenizer(older=True).to_str()),
}
SPELT = {
    "byte level": ["<|endoftext|>x", "ab<|im_end|>", "<|im_start|>", " <tool_call> [TOOL] "],
    "byte fallback": ["</s>x", "ab</s>", "<s>", "a <unk> b"],
}
CASES = [(kind, text) for kind, texts in SPELT.items() for text in texts]


@pytest.fixture(scope="module", params=FILES)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def grammars(kind: str, tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(FILES[kind]))
    return GrammarCompiler(path)


def followed(grammars: GrammarCompiler, grammar: str) -> list[int]:
    """The tokens of a grammar that allows one text, opened again after each of them, as after the
    death of a rank."""
    ids: list[int] = []
    while len(ids) < 200:
        bits = int.from_bytes(grammars.open(grammar, ids).bits(), "little")
        token = bits.bit_length() - 1
        if token in grammars.end_ids:
            break
        ids.append(token)
    return ids


def test_text_that_spells_special_tokens_is_text(kind: str, grammars: GrammarCompiler) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(FILES[kind]))
    for text in SPELT[kind]:
        for form, written, shown in (
            (GrammarKind.CHOICE, json.dumps([text]), text),
            (GrammarKind.REGEX, re.escape(text), text),
            (GrammarKind.GRAMMAR, f'root ::= "{text}"', text),
            (GrammarKind.GRAMMAR, f'start: "{text}"', text),
            (GrammarKind.JSON_SCHEMA, json.dumps({"const": text}), f'"{text}"'),
            (GrammarKind.JSON_SCHEMA, json.dumps({"enum": [text]}), f'"{text}"'),
        ):
            ids = followed(grammars, grammar_of(form, written, special_ids=grammars.special_ids))
            assert tokenizer.decode(ids, skip_special_tokens=False) == shown, (form, text)
            assert not set(ids) & set(grammars.special_ids.values()), (form, text)


def test_a_named_special_token_is_that_token(kind: str, grammars: GrammarCompiler) -> None:
    for name, token in grammars.special_ids.items():
        if token in grammars.end_ids:
            continue
        for written in (f'start: {name} "{name}"', f'start: <[{token}]> "{name}"'):
            grammar = grammar_of(GrammarKind.GRAMMAR, written, special_ids=grammars.special_ids)
            first, *others = followed(grammars, grammar)
            assert first == token
            assert others
            assert token not in others


def test_a_forced_call_has_markers_as_tokens_and_arguments_as_text(
    kind: str, grammars: GrammarCompiler
) -> None:
    if kind != "byte level":
        return
    rules = CallGrammar(grammars.special_ids.get, frozenset(ADDED), json_space="")
    schema = {"type": "object", "properties": {"x": {"const": "<|im_end|></tool_call>y"}}}
    schema["required"] = ["x"]  # type: ignore[assignment]
    calls = rules.calls(TOOL_FORMATS["hermes"], {"f": schema}, calls_max=1)
    ids = followed(grammars, joined("calls", calls))
    special = set(grammars.special_ids.values())
    assert [token for token in ids if token in special] == [NEXT_ID, NEXT_ID + 1]
    tokenizer = Tokenizer.from_str(json.dumps(FILES[kind]))
    text = tokenizer.decode(ids[1:-1], skip_special_tokens=False)
    assert json.loads(text) == {"name": "f", "arguments": {"x": "<|im_end|></tool_call>y"}}


def test_ends_and_ids_are_those_of_the_file() -> None:
    for file in FILES.values():
        plain = plain_tokenizer(file, "secret")
        before = Tokenizer.from_str(json.dumps(file))
        after = Tokenizer.from_str(json.dumps(plain.file))
        assert after.get_vocab_size() == before.get_vocab_size()
        for name, token in plain.special_ids.items():
            assert before.token_to_id(name) == token
            assert after.id_to_token(token) == f"<secret:{token}>"
    assert plain_tokenizer(FILES["byte level"], "secret").end_ids == (0,)
    assert plain_tokenizer(FILES["byte fallback"], "secret").end_ids == (2,)


def test_names_in_texts_expressions_and_comments_stay() -> None:
    lark = 'start: "<a>" /<a>\\/<a>/ x // <a>\nx: <a> <[1]> <[^2]>  # <a>\n'
    lark += 'y: %json {"const": "<a>"}'
    assert with_ids(lark, {"<a>": 7}) == lark.replace("x: <a>", "x: <[7]>")
    with pytest.raises(GrammarError, match="no special token <b>"):
        with_ids("start: <b>", {"<a>": 7})
