"""A guided answer follows its grammar whatever the logits say, to the byte, and a matcher opened
after some of its tokens goes on as the one that saw them come."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shared.errors import CheckpointError, GrammarError
from shared.grammars.closed_schema import JSON_SPACE, NO_SPACE
from shared.grammars.compiler import GrammarCompiler, client_words
from shared.grammars.messages import GrammarKind
from shared.grammars.sources import grammar_of

FILE = Path(__file__).parents[4] / "models" / "starling-14m" / "tokenizer.json"
VOCAB = 4096
EOS = (2,)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
}
NOT_NFC = ["5 \u2126", "e\u0301 end", "a\u030a", "\u1100\u1161", "\uf900"]


@pytest.fixture(scope="module")
def grammars() -> GrammarCompiler:
    return GrammarCompiler(FILE, vocab_size=VOCAB, eos_token_ids=EOS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FILE))


def allowed(bits: bytes) -> list[int]:
    return [token for token in range(len(bits) * 8) if bits[token // 8] >> token % 8 & 1]


def generate(
    grammars: GrammarCompiler, grammar: str, seed: int, *, cut: int | None = None
) -> list[int]:
    """Draws that depend on (seed, position) alone; the matcher is made again after `cut` tokens."""
    matcher = grammars.open(grammar, ())
    emitted: list[int] = []
    while len(emitted) < 300:
        if len(emitted) == cut:
            matcher = grammars.open(grammar, emitted)
        token = random.Random(f"{seed}/{len(emitted)}").choice(allowed(matcher.bits()))
        if token in EOS:
            break
        matcher.accept((token,))
        emitted.append(token)
    return emitted


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 40))
def test_any_draws_give_json_of_the_schema_and_a_cut_changes_nothing(
    grammars: GrammarCompiler, tokenizer: Tokenizer, seed: int, cut: int
) -> None:
    grammar = grammar_of(GrammarKind.JSON_SCHEMA, json.dumps(PERSON))
    ids = generate(grammars, grammar, seed)
    value = json.loads(text_of(tokenizer, ids))
    assert set(value) == {"name", "age", "kind"}, "the schema names no others"
    assert 0 <= value["age"] <= 150
    assert value["kind"] in ("cat", "dog")
    assert generate(grammars, grammar, seed, cut=cut) == ids


def most_space(grammars: GrammarCompiler, tokenizer: Tokenizer, grammar: str) -> str:
    """The text of a model that leaves space wherever it may."""
    matcher = grammars.open(grammar, ())
    ids: list[int] = []
    while len(ids) < 2000:
        spaces, others = [], []
        for token in allowed(matcher.bits()):
            text = tokenizer.decode([token])
            (others if text.strip() or token in EOS else spaces).append((len(text), -token))
        token = -max(spaces)[1] if spaces else -max(others)[1]
        if token in EOS:
            break
        matcher.accept((token,))
        ids.append(token)
    return text_of(tokenizer, ids)


@pytest.mark.parametrize(
    ("space", "longest"),
    [(JSON_SPACE, 33), (NO_SPACE, 0), ("[ ]{0,3}", 3)],
)
def test_json_has_as_much_white_space_as_is_said(
    grammars: GrammarCompiler, tokenizer: Tokenizer, space: str, longest: int
) -> None:
    """Strings apart, in which space is text."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1]}, "b": {"type": "array", "items": {"enum": [True]}}},
        "required": ["a", "b"],
    }
    schema["properties"]["b"] |= {"minItems": 2, "maxItems": 2}  # type: ignore[index]
    grammar = grammar_of(GrammarKind.JSON_SCHEMA, json.dumps(schema), json_space=space)
    text = most_space(grammars, tokenizer, grammar)
    assert json.loads(text) == {"a": 1, "b": [True, True]}
    runs = [len(run) for run in re.findall(r"\s+", text)]
    assert max(runs, default=0) == longest


def test_a_regular_expression_is_matched_to_its_end(
    grammars: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    for seed in range(10):
        ids = generate(grammars, grammar_of(GrammarKind.REGEX, "(ab|c){3}[0-9]{2}"), seed)
        assert re.fullmatch("(ab|c){3}[0-9]{2}", text_of(tokenizer, ids))


def test_a_choice_is_complete_once_chosen(grammars: GrammarCompiler, tokenizer: Tokenizer) -> None:
    choices = ["yes", "yes, sir", 'no "way"', "a\nb", "tab\t/\\"]
    grammar = grammar_of(GrammarKind.CHOICE, json.dumps(choices))
    texts = {text_of(tokenizer, generate(grammars, grammar, seed)) for seed in range(80)}
    assert texts == set(choices)


@pytest.mark.parametrize("text", NOT_NFC)
@pytest.mark.parametrize(
    ("kind", "form", "shown"),
    [
        (GrammarKind.CHOICE, '["%s"]', "%s"),
        (GrammarKind.REGEX, "%s", "%s"),
        (GrammarKind.GRAMMAR, 'root ::= "%s"', "%s"),
        (GrammarKind.GRAMMAR, 'start: "%s"', "%s"),
        (GrammarKind.JSON_SCHEMA, '{"const": "%s"}', '"%s"'),
        (GrammarKind.JSON_SCHEMA, '{"enum": ["%s"]}', '"%s"'),
    ],
)
def test_text_that_is_not_nfc_comes_as_it_was_asked_for(
    grammars: GrammarCompiler,
    tokenizer: Tokenizer,
    text: str,
    kind: GrammarKind,
    form: str,
    shown: str,
) -> None:
    grammar = grammar_of(kind, form % text)
    for seed in range(5):
        assert text_of(tokenizer, generate(grammars, grammar, seed)) == shown % text


def test_a_key_that_is_not_nfc_is_kept(grammars: GrammarCompiler, tokenizer: Tokenizer) -> None:
    schema = {"properties": {text: {"const": 1} for text in NOT_NFC}, "required": NOT_NFC}
    grammar = grammar_of(GrammarKind.JSON_SCHEMA, json.dumps({"type": "object", **schema}))
    assert list(json.loads(text_of(tokenizer, generate(grammars, grammar, 1)))) == NOT_NFC


def test_end_tokens_are_allowed_only_where_the_text_may_end(
    grammars: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = grammar_of(GrammarKind.REGEX, "a+b*")
    assert EOS[0] not in allowed(grammars.open(grammar, ()).bits())
    after = grammars.open(grammar, tokenizer.encode("aab").ids)
    assert EOS[0] in allowed(after.bits())


def test_tokens_that_the_grammar_forbids_are_an_error(grammars: GrammarCompiler) -> None:
    with pytest.raises(GrammarError):
        grammars.open(grammar_of(GrammarKind.REGEX, "[0-9]+"), [70, 71, 72])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GrammarKind.JSON_SCHEMA, '{"$ref": "#"}'),
        (
            GrammarKind.JSON_SCHEMA,
            '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"},'
            ' "b": {"$ref": "#/$defs/a"}}}',
        ),
        (GrammarKind.JSON_SCHEMA, '{"type": "nonsense"}'),
        (GrammarKind.JSON_SCHEMA, "{not json"),
        (GrammarKind.JSON_SCHEMA, "[" * 100_000),
        (GrammarKind.GRAMMAR, 'start: "a" nothing'),
        (GrammarKind.GRAMMAR, "start: a\na: a"),
        (GrammarKind.GRAMMAR, "start: " + "(" * 60_000 + '"a"' + ")" * 60_000),
        (GrammarKind.GRAMMAR, "root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000),
        (GrammarKind.GRAMMAR, 'start: (("a"{1000}){1000}){1000}'),
        (GrammarKind.REGEX, "(" * 60_000 + "a" + ")" * 60_000),
        (GrammarKind.REGEX, "(a"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_a_few_words(
    grammars: GrammarCompiler, kind: GrammarKind, text: str
) -> None:
    with pytest.raises(GrammarError) as refused:
        grammars.try_out(grammar_of(kind, text))
    words = str(refused.value)
    assert 0 < len(words) <= 300
    assert not re.search(r"state|Python|recursion", words)
    assert "\n" not in words


@pytest.mark.parametrize(
    "text", ['start: ""', 'start: a\na: a "x" | "x"', 'root ::= root "b" | "a"']
)
def test_an_empty_grammar_and_left_recursion_are_followed(
    grammars: GrammarCompiler, text: str
) -> None:
    grammars.try_out(grammar_of(GrammarKind.GRAMMAR, text))


def test_the_schema_true_is_any_json(grammars: GrammarCompiler) -> None:
    grammar = grammar_of(GrammarKind.JSON_SCHEMA, "true", json_space="")
    assert grammar == grammar_of(GrammarKind.JSON_SCHEMA, "{}", json_space="")
    grammars.try_out(grammar)


def test_the_librarys_state_is_not_shown() -> None:
    assert client_words("lexer error: too big\n<state>\nTokens: secret") == "lexer error: too big"
    assert client_words("NoExtensionBias\n<state>") == "no text follows it"
    assert len(client_words("x" * 1000)) == 200


def test_the_cache_is_bounded_in_bytes_and_keeps_what_was_used_last() -> None:
    grown = itertools.count(0, 1 << 20)  # a compilation is seen to take a MiB
    compiler = GrammarCompiler(
        FILE, vocab_size=VOCAB, cache_bytes_max=4 << 20, resident_bytes=lambda: next(grown)
    )
    texts = [f"{c}[0-9]{{3}}" for c in "abcdefghij"]
    kept = grammar_of(GrammarKind.REGEX, "kept")
    for text in texts:
        compiler.open(kept, ())
        compiler.open(grammar_of(GrammarKind.REGEX, text), ())
    assert compiler.cached_bytes == 4 << 20
    assert compiler.has_cached(kept)
    assert not compiler.has_cached(grammar_of(GrammarKind.REGEX, texts[0]))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        GrammarCompiler(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="guided decoding"):
        GrammarCompiler(tmp_path / "tokenizer.json")
