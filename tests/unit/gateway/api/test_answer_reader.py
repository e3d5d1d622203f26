"""How many tokens of an answer are reasoning, told as it comes: those that begin in any of the
spans so far, however many these are."""

from __future__ import annotations

import random
import string
from functools import partial

from gateway.api.answer_reader import AnswerReader, CallIds
from gateway.api.token_offsets import TokenOffsets
from gateway.detokenizer import TokenBytes
from gateway.parsers.harmony import parse_harmony
from gateway.parsers.output_parser import OutputParser
from gateway.parsers.reasoning import parse_reasoning

PAIRS = [first + second for first in string.printable for second in ("", *"aeh|<>\n")]
IDS = {text: number for number, text in enumerate(PAIRS)}
TOKEN_BYTES = TokenBytes(
    {text.replace("\n", "Ċ").replace(" ", "Ġ"): n for text, n in IDS.items()}, frozenset()
)
MESSAGE = "<|channel|>analysis<|message|>hm, ah\nhe<|end|><|start|>assistant"


def cut(text: str, rng: random.Random) -> list[str]:
    """Tokens of one or two characters."""
    tokens: list[str] = []
    at = 0
    while at < len(text):
        pair = text[at : at + 2]
        tokens.append(pair if pair in IDS and rng.random() < 0.5 else text[at])
        at += len(tokens[-1])
    return tokens


def check(parser: OutputParser, text: str) -> None:
    reader = AnswerReader(
        parser,
        TokenOffsets(TOKEN_BYTES, follows=()),
        CallIds(answer="a", choice=0, form=None),
        shows_reasoning=True,
    )
    starts: list[int] = []
    at = 0
    for token in cut(text, random.Random(5)):
        starts.append(at)
        at += len(token)
        reader.feed(token, (IDS[token],), None)
        wanted = [s for s in starts for begin, end in parser.reasoning_spans if begin <= s < end]
        assert reader.num_reasoning_tokens == len(wanted)
    assert reader.num_reasoning_tokens > 0


def test_reasoning_in_many_messages() -> None:
    parse = partial(parse_harmony, calls=False)
    text = MESSAGE * 6 + "<|channel|>final<|message|>yes"
    check(OutputParser(first=parse, then=None, calls_max=None), text)


def test_reasoning_that_the_prompt_has_begun() -> None:
    parse = partial(parse_reasoning, start="<t>", end="</t>", opened=True)
    check(OutputParser(first=parse, then=None, calls_max=None), " hm  \n\n  he </t> yes ")
