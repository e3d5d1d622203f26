"""Makes a random checkpoint of any family from a seed, in the standard Hugging Face format: the
default model of Starfish, and the small models of tests.

Its text is nonsense, but depends on the whole context, as that of a trained model does. With plain
random weights a greedy continuation soon repeats one token, which would hide a lost or a doubled
one."""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker.checkpoint.checkpoint import INDEX_FILE, SINGLE_FILE, Shape
from gpu_worker.checkpoint.draft_tensors import draft_names, draft_shapes
from gpu_worker.checkpoint.safetensors_file import SafetensorsFile
from gpu_worker.cpu.registry import family_class
from gpu_worker.model_tools import fp8_blocks, mxfp4_groups
from gpu_worker.model_tools.seeded_configs import DEFAULT_FAMILY, SEEDED_CONFIGS, Config
from gpu_worker.model_tools.seeded_drafts import Guesses, SeededDrafts
from gpu_worker.model_tools.seeded_tokenizer import END_OF_TEXT, END_OF_TURN, write_tokenizer
from shared.errors import CheckpointError
from shared.model_spec import NUM_DRAFT_LAYERS, read_model_spec, with_drafts

# Found by trial: of 96 greedy tokens after a prompt 94 to 96 are distinct, and float32 rounding is
# amplified so little that logits agree with other implementations to 6e-5.
_EMBEDDING_STD = 1.0
_QUERY_GAIN = 2.0  # attention picks a few positions in place of averaging all
_EXPERT_GAIN = 4.0  # experts outweigh the embedding: the last token alone decides nothing
_LOGITS_STD = 3.0


def create_seeded_checkpoint(
    folder: Path,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    num_shards: int = 2,
    family: str = DEFAULT_FAMILY,
    dtype: torch.dtype = torch.float32,
    guesses: Guesses | None = None,
    **changes: Any,
) -> None:
    """Writes a temporary folder and renames it to `folder`. If another process makes `folder`
    meanwhile, that one stays. `changes` are entries of config.json. With `dtype` float8_e4m3fn,
    projections are block-scaled FP8, as DeepSeek publishes them, and the rest is bfloat16; with
    float4_e2m1fn_x2, gpt-oss's experts are MXFP4, of sizes rounded up to whole groups. `guesses`:
    it gets a layer of multi-token prediction. Raises CheckpointError if `folder` has a checkpoint
    of another family, or if the family has no such layer or format."""
    config = SEEDED_CONFIGS[family] | changes
    if dtype is mxfp4_groups.CODES:
        if family != "gpt_oss":
            raise CheckpointError(f"no checkpoint of {family} is in MXFP4; choose another dtype")
        config = mxfp4_groups.with_whole_groups(config)
    if guesses is not None:
        config |= {NUM_DRAFT_LAYERS: 1}
    if (folder / "config.json").exists():
        there = read_model_spec(folder).architecture
        if there not in config["architectures"]:
            raise CheckpointError(f"{folder} is a checkpoint of {there}; choose another folder")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_config(aside, config | _dtype_entries(dtype))
        _write_weights(aside, seed, num_shards, dtype, guesses, on_progress)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _dtype_entries(dtype: torch.dtype) -> Config:
    """Of config.json."""
    for quantised in (fp8_blocks, mxfp4_groups):
        if dtype is quantised.CODES:
            return {"dtype": "bfloat16", "quantization_config": quantised.CONFIG}
    return {"dtype": str(dtype).removeprefix("torch.")}


def _write_config(folder: Path, config: Config) -> None:
    special = write_tokenizer(
        folder,
        vocab_size=config["vocab_size"],
        context_tokens=config["max_position_embeddings"],
    )
    ends = [special[END_OF_TURN], special[END_OF_TEXT]]
    config |= {"bos_token_id": special[END_OF_TEXT], "eos_token_id": special[END_OF_TURN]}
    generation = {
        "bos_token_id": special[END_OF_TEXT],
        "pad_token_id": special[END_OF_TEXT],
        "eos_token_id": ends,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)


def _write_weights(
    folder: Path,
    seed: int,
    num_shards: int,
    dtype: torch.dtype,
    guesses: Guesses | None,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    spec = with_drafts(read_model_spec(folder), 0 if guesses is None else 1)
    shapes = family_class(spec.architecture)(spec).tensor_shapes() | draft_shapes(spec)
    drafts: SeededDrafts | None = None
    if guesses is not None and (draft := draft_names(spec)) is not None:
        drafts = SeededDrafts(spec, draft, guesses)
    shards = _split(shapes, num_shards)
    weight_map: dict[str, str] = {}
    with ExitStack() as stack:
        files: dict[str, SafetensorsFile] = {}
        for index, names in enumerate(shards):
            file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            path = folder / (file_name if len(shards) > 1 else SINGLE_FILE)
            of_file = {
                stored: part
                for name in names
                for stored, part in _stored_parts(name, shapes[name], dtype).items()
            }
            file = SafetensorsFile(
                path,
                {name: part.shape for name, part in of_file.items()},
                {name: part.dtype for name, part in of_file.items()},
            )
            files |= dict.fromkeys(of_file, stack.enter_context(file))
            weight_map |= dict.fromkeys(of_file, file_name)

        def write(name: str) -> int:
            source = name if drafts is None else drafts.source_of(name)
            drawn = _random_tensor(source, shapes[name], seed)
            if drafts is not None:
                drawn = drafts.edited(name, drawn)
            parts = _stored_parts(name, shapes[name], dtype)
            values = _stored_values(torch.from_numpy(drawn), parts)
            return sum(files[s].write(s, v) for s, v in zip(parts, values, strict=True))

        total_bytes = 0
        writing = stack.enter_context(closing(_on_all_cores(write, list(shapes))))
        for done, nbytes in enumerate(writing, start=1):
            total_bytes += nbytes
            if on_progress is not None:
                on_progress(done, len(shapes))
    if len(shards) > 1:
        index_json = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(folder / INDEX_FILE, index_json)


class _Part(NamedTuple):
    """A tensor in a file."""

    shape: Shape
    dtype: torch.dtype


def _stored_parts(name: str, shape: Shape, dtype: torch.dtype) -> dict[str, _Part]:
    """What stands for a tensor of the model in a checkpoint that is published in `dtype`."""
    if name.endswith("correction_bias"):
        return {name: _Part(shape, torch.float32)}
    if dtype is fp8_blocks.CODES and fp8_blocks.is_quantised(name, shape):
        scales = _Part(fp8_blocks.scales_shape(shape), torch.float32)
        return {name: _Part(shape, dtype), fp8_blocks.scales_name(name): scales}
    if dtype is mxfp4_groups.CODES and mxfp4_groups.is_quantised(name):
        scales = _Part(mxfp4_groups.scales_shape(shape), torch.uint8)
        blocks = _Part(mxfp4_groups.blocks_shape(shape), torch.uint8)
        return {mxfp4_groups.blocks_name(name): blocks, mxfp4_groups.scales_name(name): scales}
    is_code = dtype in (fp8_blocks.CODES, mxfp4_groups.CODES)
    return {name: _Part(shape, torch.bfloat16 if is_code else dtype)}


def _stored_values(values: torch.Tensor, parts: dict[str, _Part]) -> tuple[torch.Tensor, ...]:
    """The values of `parts`, in their order."""
    first = next(iter(parts.values())).dtype
    if len(parts) == 1:
        return (values.to(first),)
    return (
        fp8_blocks.quantise(values) if first is fp8_blocks.CODES else mxfp4_groups.quantise(values)
    )


def _on_all_cores(write: Callable[[str], int], names: list[str]) -> Generator[int, None, None]:
    """Yields results in order; after `close` no thread writes any more. Numpy draws without the
    GIL. Torch gets one thread in each worker, because its own pool would multiply the threads."""
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(write, names)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


def _split(shapes: dict[str, Shape], num_shards: int) -> list[list[str]]:
    """Names in order, divided so that all shards have about the same size."""
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    shards: list[list[str]] = [[] for _ in range(num_shards)]
    before = 0
    for name, shape in shapes.items():
        shards[min(before * num_shards // total, num_shards - 1)].append(name)
        before += int(np.prod(shape))
    return [names for names in shards if names]


def _random_tensor(name: str, shape: Shape, seed: int) -> NDArray[np.float32]:
    """Each tensor has its own generator, so its values do not depend on other tensors."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values: NDArray[np.float32] = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        mean = _QUERY_GAIN if name.endswith("q_norm.weight") else 1.0
        return np.float32(mean) + np.float32(0.1) * values
    if name.endswith("bias"):
        return np.float32(0.1) * values
    if name.endswith("sinks"):
        return values
    stored_by_inputs = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    values *= np.float32(_std(name, fan_in=shape[-2 if stored_by_inputs else -1]))
    return values


def _std(name: str, fan_in: int) -> float:
    if name.endswith("embed_tokens.weight"):
        return _EMBEDDING_STD
    plain = name.removesuffix(".weight")
    if plain == "lm_head":
        return _LOGITS_STD / math.sqrt(fan_in)
    is_last = plain.endswith(("down_proj", ".w2"))
    return (_EXPERT_GAIN if is_last else 1.0) / math.sqrt(fan_in)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
