"""The checkpoint's tokenizer and chat template, and the errors if they are broken."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.chat_template import ChatOptions
from gateway.text_encoder import SHORT_CHARS_MAX
from gateway.tokenizer import ModelTokenizer
from gateway.tokenizer_loader import TokenizerOptions, load_tokenizer
from shared.clock import SystemClock
from shared.errors import CheckpointError, RequestError
from tests.support.tiny_tokenizer import write_tokenizer

USER = [{"role": "user", "content": "Grow <b>"}]


def load(folder: Path, **options: Any) -> ModelTokenizer:
    return load_tokenizer(folder, SystemClock(), TokenizerOptions(**options))


async def test_long_and_short_texts_give_the_tokenizers_ids(tmp_path: Path) -> None:
    reference = write_tokenizer(tmp_path)
    loaded = load(tmp_path)
    for text in ("The starfish", "grün 🌊 " * SHORT_CHARS_MAX):
        ids = await loaded.encode(text, tokens_max=10**6)
        assert list(ids) == reference.encode(text).ids
    loaded.close()


async def longest_share_of_a_turn(loaded: ModelTokenizer) -> float:
    """Of the time in which a long text is encoded, how much the longest turn of the loop takes."""
    clock = SystemClock()
    encoding = asyncio.ensure_future(loaded.encode("grün 🌊 " * 40_000, tokens_max=10**6))
    turns_at = [clock.now()]
    while not encoding.done():
        await asyncio.sleep(0)
        turns_at.append(clock.now())
    longest_turn = max(b - a for a, b in itertools.pairwise(turns_at))
    return longest_turn / (turns_at[-1] - turns_at[0])


async def test_other_tasks_go_on_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    """If the loop were blocked, one turn would take nearly all of the time whenever it is tried. A
    busy machine may hold the loop up as well, but not each time."""
    write_tokenizer(tmp_path)
    loaded = load(tmp_path)
    await loaded.encode("warm " * SHORT_CHARS_MAX, tokens_max=10**6)
    shares: list[float] = []
    while not shares or (min(shares) >= 0.5 and len(shares) < 20):
        shares.append(await longest_share_of_a_turn(loaded))
    assert min(shares) < 0.5, shares
    loaded.close()


async def test_a_chat_is_rendered_and_its_special_tokens_are_tokens(tmp_path: Path) -> None:
    reference = write_tokenizer(tmp_path)
    loaded = load(tmp_path)
    ids = await loaded.encode_chat(USER, ChatOptions(), tokens_max=1000)
    assert ids[0] == reference.token_to_id("<|begin|>")
    text = "<|begin|>user\nGrow <b><|end|>\n<|begin|>assistant\n"
    assert reference.decode(list(ids), skip_special_tokens=False) == text
    loaded.close()


async def test_a_text_that_cannot_fit_is_refused_by_its_length_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    loaded = load(tmp_path)
    with pytest.raises(RequestError) as caught:
        await loaded.encode("x" * 1_000_000, tokens_max=10)
    assert caught.value.code == "context_length_exceeded"
    loaded.close()


async def test_special_tokens_longer_than_all_others_may_fill_the_context(tmp_path: Path) -> None:
    reference = write_tokenizer(tmp_path)
    reference.add_special_tokens(["<|" + "long" * 20 + "|>"])
    reference.save(str(tmp_path / "tokenizer.json"))
    loaded = load(tmp_path)
    text = ("<|" + "long" * 20 + "|>") * 10
    assert len(await loaded.encode(text, tokens_max=10)) == 10
    loaded.close()


async def test_without_a_template_chats_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    loaded = load(tmp_path)
    with pytest.raises(RequestError, match="no chat template"):
        await loaded.encode_chat(USER, ChatOptions(), tokens_max=1000)
    loaded.close()


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model": 3}'])
def test_a_missing_or_broken_tokenizer_is_a_checkpoint_error(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load(tmp_path)


def write_config(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


async def chat_text(folder: Path, **options: Any) -> str:
    """The prompt of a chat, decoded."""
    tools = [{"type": "function"}] if options.pop("with_tools", False) else None
    loaded = load(folder, **options)
    ids = await loaded.encode_chat(USER, ChatOptions(tools=tools), tokens_max=1000)
    loaded.close()
    return loaded.token_bytes.join(ids).decode()


async def test_a_jinja_file_wins_over_the_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    write_config(tmp_path, chat_template="config")
    assert await chat_text(tmp_path) == "config"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert await chat_text(tmp_path) == "file Grow <b>"


async def test_the_gateways_own_template_wins_over_all(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "mine.jinja").write_text("mine")
    assert await chat_text(tmp_path, chat_template=tmp_path / "mine.jinja") == "mine"
    with pytest.raises(CheckpointError, match="absent"):
        load(tmp_path, chat_template=tmp_path / "absent")


@pytest.mark.parametrize("in_files", [False, True])
async def test_a_template_named_for_tools_is_for_chats_with_tools(
    tmp_path: Path, in_files: bool
) -> None:
    write_tokenizer(tmp_path)
    sources = {"default": "plain", "tool_use": "with tools", "rag": "with documents"}
    if in_files:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "chat_template.jinja").write_text(sources.pop("default"))
        for name, source in sources.items():
            (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(source)
    else:
        named = [{"name": name, "template": source} for name, source in sources.items()]
        write_config(tmp_path, chat_template=named)
    assert await chat_text(tmp_path) == "plain"
    assert await chat_text(tmp_path, with_tools=True) == "with tools"


async def test_without_a_default_template_chats_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    write_config(tmp_path, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(RequestError, match="rag") as caught:
        await chat_text(tmp_path)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", ["{% if %}", "{{ x | unknown_filter }}", "{% generation %}"])
async def test_a_template_that_does_not_compile_leaves_completions(
    tmp_path: Path, source: str
) -> None:
    write_tokenizer(tmp_path)
    write_config(tmp_path, chat_template=source)
    loaded = load(tmp_path)
    assert await loaded.encode("arm", tokens_max=10)
    assert list(loaded.template_problems) == ["default"]
    with pytest.raises(RequestError, match=r"does not compile.*/v1/completions") as caught:
        await loaded.encode_chat(USER, ChatOptions(), tokens_max=10)
    assert caught.value.param == "messages"
    loaded.close()


@pytest.mark.parametrize("num_messages", [1, 3_000])
async def test_chats_give_the_same_ids_on_a_thread(tmp_path: Path, num_messages: int) -> None:
    reference = write_tokenizer(tmp_path)
    loaded = load(tmp_path)
    ids = await loaded.encode_chat(USER * num_messages, ChatOptions(), tokens_max=10**6)
    text = "<|begin|>user\nGrow <b><|end|>\n" * num_messages + "<|begin|>assistant\n"
    assert list(ids) == reference.encode(text).ids
    loaded.close()


async def test_other_tasks_go_on_while_a_long_chat_is_rendered(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    loaded = load(tmp_path)
    messages = [{"role": "user", "content": ""}] * 20_000
    encoding = asyncio.ensure_future(loaded.encode_chat(messages, ChatOptions(), tokens_max=10**6))
    turns = 0
    while not encoding.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10  # if the loop were blocked: 2
    loaded.close()
