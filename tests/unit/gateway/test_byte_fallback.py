"""Tokens of a vocabulary with byte fallback: their texts joined equal what the tokenizer makes of
all ids, however the stream is cut, and a continued text keeps its spaces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gateway.api.logprobs import CompletionLogprobs
from gateway.detokenizer import Detokenizer, TokenBytes, TokenNames
from gateway.token_decoder import read_token_decoder
from gateway.tokenizer_loader import TokenizerOptions, load_tokenizer
from shared.clock import SystemClock
from shared.errors import CheckpointError
from shared.wire import TokenLogprob
from tests.support.tiny_tokenizer_fallback import build_fallback_tokenizer

TOKENIZERS = {
    "older": build_fallback_tokenizer(older=True),
    "newer": build_fallback_tokenizer(older=False),
    "without a space": build_fallback_tokenizer(older=False, prefix_space=False),
}
SPECIAL_IDS = {0, 1, 2}
BYTE_IDS = {byte: 3 + byte for byte in range(256)}
NUM_IDS = TOKENIZERS["older"].get_vocab_size()
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)


def token_bytes(kind: str) -> TokenBytes:
    tokenizer = TOKENIZERS[kind]
    decoder = read_token_decoder(json.loads(tokenizer.to_str()))
    return TokenBytes(tokenizer.get_vocab(), SPECIAL_IDS, decoder)


BYTES = {kind: token_bytes(kind) for kind in TOKENIZERS}


def streamed(kind: str, ids: list[int], cut: int, follows: list[int]) -> str:
    detokenizer = Detokenizer(BYTES[kind], follows=follows)
    parts = [detokenizer.feed(ids[i : i + cut]) for i in range(0, len(ids), cut)]
    return "".join(parts) + detokenizer.flush()


@KINDS
@given(
    ids=st.lists(
        st.one_of(
            st.integers(0, NUM_IDS + 3),
            st.sampled_from([BYTE_IDS[byte] for byte in "é🌵".encode()]),
        ),
        max_size=30,
    ),
    cut=st.integers(1, 7),
)
def test_any_ids_give_what_the_tokenizer_gives(kind: str, ids: list[int], cut: int) -> None:
    assert streamed(kind, ids, cut, []) == TOKENIZERS[kind].decode(ids, skip_special_tokens=True)


@KINDS
@given(text=st.text(alphabet="the star fish arm 🌵\u0301é\n\u2126", max_size=30))
def test_any_text_survives_the_way_through_tokens_at_every_split(kind: str, text: str) -> None:
    ids = TOKENIZERS[kind].encode(text, add_special_tokens=False).ids
    whole = TOKENIZERS[kind].decode(ids)
    assert whole == text or text.startswith(" ")  # the newer form loses this space
    for split in range(len(ids) + 1):
        detokenizer = Detokenizer(BYTES[kind])
        first = detokenizer.feed(ids[:split])
        assert whole.startswith(first)
        assert first + detokenizer.feed(ids[split:]) + detokenizer.flush() == whole


def test_a_completion_keeps_the_space_before_its_first_word() -> None:
    prompt, rest = (TOKENIZERS["older"].encode(text).ids for text in ("the star", "arm"))
    assert streamed("older", rest[1:], 1, prompt) == " arm"
    assert streamed("older", rest[1:], 1, [1]) == "arm"  # a prompt without text


def test_a_character_comes_with_the_token_after_its_bytes() -> None:
    ids = [BYTE_IDS[byte] for byte in "🌵".encode()]
    arm = TOKENIZERS["newer"].encode("arm", add_special_tokens=False).ids
    detokenizer = Detokenizer(BYTES["newer"], follows=arm)
    assert [detokenizer.feed([token]) for token in (*ids, *arm)] == ["", "", "", "", "🌵 arm"]


async def test_offsets_count_characters_behind_a_run_of_bytes() -> None:
    ids = [BYTE_IDS[byte] for byte in "é🌵".encode()]
    arm = TOKENIZERS["newer"].encode("arm", add_special_tokens=False).ids
    names = TokenNames(BYTES["newer"], BYTES["newer"])
    scored = [(token, TokenLogprob(logprob=-1.0, rank=1, top=())) for token in (*ids, *arm)]
    for cut in (1, 4, 9):
        shaped = CompletionLogprobs(names, 0, follows=arm)
        offsets: list[int] = []
        for begin in range(0, len(scored), cut):
            part = json.loads(bytes(await shaped.next(scored[begin : begin + cut])))
            offsets += part["text_offset"]
        assert offsets == [0] * 6 + [2]


@KINDS
async def test_such_a_tokenizer_is_served(kind: str, tmp_path: Path) -> None:
    reference = TOKENIZERS[kind]
    reference.save(str(tmp_path / "tokenizer.json"))
    for trusts in (True, False):
        options = TokenizerOptions(trust_special_tokens=trusts)
        loaded = load_tokenizer(tmp_path, SystemClock(), options)
        for text in ("the star fish 🌵", " arm", "arm</s"):
            assert list(await loaded.encode(text, tokens_max=99)) == reference.encode(text).ids
        loaded.close()


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Metaspace(),
        decoders.Sequence([decoders.ByteFallback(), decoders.CTC()]),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.ByteFallback()]),
    ],
    ids=str,
)
def test_a_tokenizer_of_another_kind_is_refused(
    tmp_path: Path, decoder: decoders.Decoder | None
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is neither byte-level"):
        load_tokenizer(tmp_path, SystemClock(), TokenizerOptions())


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model", "tekken.json"])
def test_a_folder_with_another_format_alone_says_how_to_convert_it(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(b"\x0a")
    with pytest.raises(CheckpointError, match=f"{name} but no tokenizer.json.*save_pretrained"):
        load_tokenizer(tmp_path, SystemClock(), TokenizerOptions())
