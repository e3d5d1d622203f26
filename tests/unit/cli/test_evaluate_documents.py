"""Held-out texts become tokens: they begin as in training and are cut to the context; their bytes
are counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cli.evaluate.documents import read_documents
from cli.evaluate.scoring import score_of
from shared.errors import ConfigError

MODEL = Path(__file__).parents[3] / "models" / "starling-14m"
END_OF_TEXT = 0


def write(path: Path, *texts: str) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n")
    return path


def test_a_text_is_opened_and_measured_in_bytes(tmp_path: Path) -> None:
    (document,) = read_documents(write(tmp_path / "d", "Ève sings."), MODEL, 2048)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert document.tokens == (END_OF_TEXT, *tokenizer.encode("Ève sings.").ids)
    assert document.num_bytes == 11


def test_a_long_text_is_cut_to_the_context_and_so_are_its_bytes(tmp_path: Path) -> None:
    (document,) = read_documents(write(tmp_path / "d", "word " * 500), MODEL, 32)
    assert len(document.tokens) == 32
    assert document.num_bytes < 5 * 40


@pytest.mark.parametrize("line", ["not json", '{"words": "x"}', "[1]"])
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "d").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ConfigError, match=r"d:2"):
        read_documents(tmp_path / "d", MODEL, 2048)


def test_nothing_to_score_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no text"):
        read_documents(write(tmp_path / "d", ""), MODEL, 2048)


def test_bits_per_byte_is_nats_over_bytes(tmp_path: Path) -> None:
    documents = read_documents(write(tmp_path / "d", "abc", "defg"), MODEL, 2048)
    score = score_of([0.6931471805599453, 2 * 0.6931471805599453], documents)
    assert score.bits_per_byte == pytest.approx(3 / 7)
