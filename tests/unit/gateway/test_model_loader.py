"""The model is loaded once, from the first spec, and flags replace the spec's values."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.cluster_view import ClusterView
from gateway.model_loader import ModelLoader
from shared.errors import CheckpointError
from tests.support.fake_clock import FakeClock
from tests.support.gateway_harness import MODEL, toy_spec
from tests.support.tiny_tokenizer import write_tokenizer


def loader(*, folder: Path | None = None, name: str = "") -> ModelLoader:
    return ModelLoader(folder=folder, name=name, clock=FakeClock())


async def test_the_first_spec_names_the_model(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    models = loader()
    running = asyncio.create_task(models.run())
    models.on_view(ClusterView())
    await asyncio.sleep(0)
    assert models.served is None
    models.on_view(ClusterView(spec=toy_spec(tmp_path)))
    models.on_view(ClusterView(spec=toy_spec(tmp_path / "another")))
    await running
    assert models.served is not None
    assert models.served.name == MODEL
    models.served.tokenizer.close()


async def test_a_request_waits_for_the_model_and_no_longer_than_it_says(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    models = loader()
    assert await models.wait(0) is None
    running = asyncio.create_task(models.run())
    waiting = asyncio.create_task(models.wait(60))
    models.on_view(ClusterView(spec=toy_spec(tmp_path)))
    await running
    assert await waiting is models.served
    assert models.served is not None
    models.served.tokenizer.close()


async def test_flags_replace_the_specs_folder_and_name(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    models = loader(folder=tmp_path, name="mine")
    models.on_view(ClusterView(spec=toy_spec(tmp_path / "elsewhere")))
    await models.run()
    assert models.served is not None
    assert models.served.name == "mine"
    models.served.tokenizer.close()


async def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    models = loader()
    models.on_view(ClusterView(spec=toy_spec(tmp_path)))
    with pytest.raises(CheckpointError, match="tokenizer"):
        await models.run()
    assert models.served is None
