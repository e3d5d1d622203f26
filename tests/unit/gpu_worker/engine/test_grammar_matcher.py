"""A guided answer follows its grammar whatever the logits say, and a matcher opened after some of
its tokens goes on as the one that saw them come."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import grammar_from
from tokenizers import Tokenizer

from gpu_worker.engine.draw import Draw
from gpu_worker.engine.grammar_matcher import GrammarCompiler
from gpu_worker.engine.sampler import sample
from gpu_worker.engine.sequence import Origin, Sequence
from shared.errors import CheckpointError, GrammarError
from shared.types import Attempt, FinishReason, SamplingParams, SessionId
from shared.wire import Submit

MODEL = Path(__file__).parents[4] / "models" / "starling-14m"
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
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars() -> GrammarCompiler:
    return GrammarCompiler(MODEL, vocab_size=VOCAB, eos_token_ids=EOS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def generate(
    grammars: GrammarCompiler, grammar: str, seed: int, *, cut: int | None = None
) -> list[int]:
    """Draws from random logits that depend on (seed, position) alone; the matcher is made again
    after `cut` tokens."""
    matcher = grammars.compile(grammar, ())
    emitted: list[int] = []
    while len(emitted) < 300:
        if len(emitted) == cut:
            matcher = grammars.compile(grammar, emitted)
        logits = np.random.default_rng((seed, len(emitted))).normal(0, 4, (1, VOCAB))
        draw = Draw(
            SamplingParams(temperature=1.0, seed=seed), len(emitted), allowed=matcher.allowed
        )
        (token,) = sample(logits.astype(np.float32), [draw])
        if token in EOS:
            break
        matcher.accept_token(token)
        emitted.append(token)
    return emitted


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 40))
def test_random_logits_give_json_of_the_schema_and_a_cut_changes_nothing(
    grammars: GrammarCompiler, tokenizer: Tokenizer, seed: int, cut: int
) -> None:
    grammar = grammar_from("json_schema", json.dumps(PERSON))
    ids = generate(grammars, grammar, seed)
    value = json.loads(tokenizer.decode(ids))
    assert set(value) == {"name", "age", "kind"}
    assert isinstance(value["age"], int)
    assert 0 <= value["age"] <= 150
    assert value["kind"] in ("cat", "dog")
    assert generate(grammars, grammar, seed, cut=cut) == ids


def test_a_regular_expression_is_matched_to_its_end(
    grammars: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    for seed in range(10):
        ids = generate(grammars, grammar_from("regex", "(ab|c){3}[0-9]{2}"), seed)
        assert re.fullmatch("(ab|c){3}[0-9]{2}", tokenizer.decode(ids))


def test_a_choice_is_complete_once_chosen(grammars: GrammarCompiler, tokenizer: Tokenizer) -> None:
    texts = {
        tokenizer.decode(generate(grammars, grammar_from("choice", '["yes", "no"]'), seed))
        for seed in range(20)
    }
    assert texts == {"yes", "no"}


def test_end_tokens_are_allowed_only_where_the_text_may_end(grammars: GrammarCompiler) -> None:
    def may_end(emitted: str) -> bool:
        ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(emitted).ids
        word = int(grammars.compile(grammar_from("regex", "a+b*"), ids).allowed[0])
        return bool(word >> EOS[0] & 1)

    assert not may_end("")
    assert may_end("aab")


def test_tokens_that_the_grammar_forbids_are_an_error(grammars: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match="cannot be followed"):
        grammars.compile(grammar_from("regex", "[0-9]+"), [70, 71, 72])


def test_a_grammar_that_is_none_is_an_error(grammars: GrammarCompiler) -> None:
    with pytest.raises(GrammarError):
        grammars.compile('start: "a" nothing', ())


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        GrammarCompiler(tmp_path, vocab_size=8, eos_token_ids=())


def test_a_guided_text_ends_by_an_end_token_even_where_the_client_ignores_it(
    grammars: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """The last token of the text itself is no end: it would be left out of the text."""
    grammar = grammar_from("choice", '["yes"]')
    submit = Submit(
        session=SessionId("s"),
        attempt=Attempt(0),
        tokens=(5, 6),
        num_emitted=0,
        sampling=SamplingParams(max_tokens=50, ignore_eos=True, grammar=grammar),
    )
    sequence = Sequence(submit, origin=Origin(1), arrival=1, eos_token_ids=EOS, tokens_max=VOCAB)
    sequence.set_matcher(grammars.compile(grammar, ()))
    for token in tokenizer.encode("yes").ids:
        assert sequence.append(token) is None
    assert sequence.matcher is not None
    bits = np.unpackbits(sequence.matcher.allowed.view(np.uint8), bitorder="little")
    assert tuple(np.flatnonzero(bits)) == EOS
    assert sequence.append(EOS[0]) is FinishReason.STOP
