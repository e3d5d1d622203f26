"""The checkpoint's tokenizer and chat template, and the errors if they are broken."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from gateway.chat_template import ChatTemplate, load_chat_template
from gateway.tokenizer import INLINE_CHARS_MAX, load_tokenizer
from shared.clock import SystemClock
from shared.errors import CheckpointError, RequestError
from tests.support.tiny_tokenizer import write_tokenizer

USER = [{"role": "user", "content": "Grow <b>"}]


async def test_long_and_short_texts_give_the_tokenizers_ids(tmp_path: Path) -> None:
    reference = write_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in ("The starfish", "grün 🌊 " * INLINE_CHARS_MAX):
        ids = await loaded.encode(text, tokens_max=10**6)
        assert list(ids) == reference.encode(text).ids
    loaded.close()


async def test_other_tasks_go_on_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path)
    await loaded.encode("warm " * INLINE_CHARS_MAX, tokens_max=10**6)
    clock = SystemClock()
    encoding = asyncio.ensure_future(loaded.encode("grün 🌊 " * 40_000, tokens_max=10**6))
    turns_at = [clock.now()]
    while not encoding.done():
        await asyncio.sleep(0)
        turns_at.append(clock.now())
    longest_turn = max(b - a for a, b in itertools.pairwise(turns_at))
    assert (
        longest_turn < (turns_at[-1] - turns_at[0]) / 2
    )  # if the loop were blocked, nearly all of it
    loaded.close()


async def test_a_chat_is_rendered_and_its_special_tokens_are_tokens(tmp_path: Path) -> None:
    reference = write_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path)
    ids = await loaded.encode_chat(USER, None, tokens_max=1000)
    assert ids[0] == reference.token_to_id("<|begin|>")
    text = "<|begin|>user\nGrow <b><|end|>\n<|begin|>assistant\n"
    assert reference.decode(list(ids), skip_special_tokens=False) == text
    loaded.close()


async def test_a_text_that_cannot_fit_is_refused_by_its_length_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path)
    with pytest.raises(RequestError) as caught:
        await loaded.encode("x" * 1_000_000, tokens_max=10)
    assert caught.value.code == "context_length_exceeded"
    loaded.close()


async def test_without_a_template_chats_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    loaded = load_tokenizer(tmp_path)
    with pytest.raises(RequestError, match="no chat template"):
        await loaded.encode_chat(USER, None, tokens_max=1000)
    loaded.close()


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model": 3}'])
def test_a_missing_or_broken_tokenizer_is_a_checkpoint_error(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="byte-level"):
        load_tokenizer(tmp_path)


def test_a_jinja_file_wins_over_the_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render(USER) == "file Grow <b>"


def test_tojson_writes_no_html_escapes() -> None:
    assert ChatTemplate("{{ messages[0] | tojson }}", {}).render(USER) == json.dumps(USER[0])


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('no') }}", "{{ messages[0].content + 1 }}", "{{ nothing.at.all }}"],
)
def test_a_template_that_refuses_is_the_requests_fault(source: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate(source, {}).render(USER)


@pytest.mark.parametrize(
    "source",
    ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ ''.format.__globals__ }}"],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        ChatTemplate(source + "{{ raise_exception('empty') }}", {}).render(USER)


def test_a_client_may_add_template_variables_but_not_replace_ours() -> None:
    template = ChatTemplate("{{ eos_token }}{{ thinking }}", {"eos_token": "E"})
    assert template.render(USER, {"thinking": "T", "eos_token": "X"}) == "ET"


def test_a_template_that_does_not_compile_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError):
        ChatTemplate("{% if %}", {})
