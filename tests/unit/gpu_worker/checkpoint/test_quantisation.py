"""FP8 and MXFP4 are decoded to the bit: against their published definitions, and other readers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from gpu_worker.checkpoint.quantisation import (
    decode_fp8_blocks,
    decode_mxfp4,
    decode_mxfp4_bits,
)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NOT_NAN = [code for code in range(256) if code & 0x7F != 0x7F]


def e4m3(code: int) -> float:
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = (
        math.ldexp(mantissa / 8, -6)
        if exponent == 0
        else math.ldexp(1 + mantissa / 8, exponent - 7)
    )
    return -magnitude if code & 0x80 else magnitude


def e2m1(code: int) -> float:
    return -E2M1[code & 7] if code & 8 else E2M1[code & 7]


def bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values).view(np.uint32)


def test_every_fp8_code_is_what_torch_makes_of_it() -> None:
    codes = np.array([NOT_NAN], dtype=np.uint8)
    scale = np.ones((1, 1), dtype=np.float32)
    read = decode_fp8_blocks(codes, scale, (128, 256))
    other = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(bits(read), bits(other))
    assert read[0].tolist() == [e4m3(code) for code in NOT_NAN]
    assert read.max() == 448


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_an_fp8_nan_is_refused(code: int) -> None:
    codes = np.zeros((3, 5), dtype=np.uint8)
    codes[2, 4] = code
    with pytest.raises(ValueError, match="NaN"):
        decode_fp8_blocks(codes, np.ones((1, 1), dtype=np.float32), (128, 128))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_an_fp8_scale_that_is_not_finite_is_refused(scale: float) -> None:
    scales = np.array([[1.0, scale]], dtype=np.float32)
    with pytest.raises(ValueError, match="not finite"):
        decode_fp8_blocks(np.zeros((2, 6), dtype=np.uint8), scales, (2, 3))


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_fp8_value_is_its_code_times_the_scale_of_its_block(
    shape: tuple[int, int, int], block: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.choice(np.array(NOT_NAN, dtype=np.uint8), shape)
    grid = (shape[0], -(-shape[1] // block[0]), -(-shape[2] // block[1]))
    scales = rng.lognormal(-7, 3, grid).astype(np.float32)
    read = decode_fp8_blocks(codes, scales, block)
    assert read.dtype == np.float32
    for e, n, k in np.ndindex(shape):
        scale = scales[e, n // block[0], k // block[1]]
        assert read[e, n, k] == np.float32(e4m3(int(codes[e, n, k]))) * scale


@given(groups=st.integers(1, 3), rows=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_every_mxfp4_value_is_its_nibble_times_two_to_its_group(
    groups: int, rows: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, groups, 16), dtype=np.uint8)
    scales = rng.integers(0, 253, (rows, groups), dtype=np.uint8)
    read = decode_mxfp4(blocks, scales)
    assert read.shape == (rows, 32 * groups)
    for row, k in np.ndindex(*read.shape):
        byte = int(blocks[row, k // 32, k % 32 // 2])
        nibble = byte >> 4 if k % 2 else byte & 15
        assert read[row, k] == math.ldexp(e2m1(nibble), int(scales[row, k // 32]) - 127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp4_is_what_transformers_makes_of_it(dtype: torch.dtype) -> None:
    """Every byte under every scale."""
    scales = np.arange(255, dtype=np.uint8)
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (255, 1, 1))
    all_scales = np.repeat(scales[:, np.newaxis], 16, axis=1)
    read = torch.from_numpy(decode_mxfp4(blocks, all_scales))
    other = convert_moe_packed_tensors(
        torch.from_numpy(blocks)[None], torch.from_numpy(all_scales)[None], dtype=dtype
    )
    ours = read.to(dtype).T[None]
    assert ours.shape == other.shape == (1, 512, 255)
    raw = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(ours.contiguous().view(raw), other.view(raw))


def test_mxfp4_loses_nothing_in_bfloat16() -> None:
    """Every byte under every scale."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (255, 1, 1))
    all_scales = np.repeat(np.arange(255, dtype=np.uint8)[:, np.newaxis], 16, axis=1)
    exact = bits(decode_mxfp4(blocks, all_scales))
    short = decode_mxfp4_bits(blocks, all_scales)
    assert np.array_equal(short.astype(np.uint32) << 16, exact)


@pytest.mark.parametrize("decode", [decode_mxfp4, decode_mxfp4_bits])
def test_an_mxfp4_scale_that_is_nan_is_refused(
    decode: Callable[[NDArray[np.uint8], NDArray[np.uint8]], object],
) -> None:
    scales = np.array([[127, 255]], dtype=np.uint8)
    with pytest.raises(ValueError, match="NaN"):
        decode(np.zeros((1, 2, 16), dtype=np.uint8), scales)


def test_matrices_beyond_what_is_decoded_at_once_are_the_same() -> None:
    """The blocks of rows and the pieces of the work cut each other."""
    rng = np.random.default_rng(4)
    codes = rng.choice(np.array(NOT_NAN, dtype=np.uint8), (300, 2000))
    scales = rng.random((3, 16), dtype=np.float32)
    read = decode_fp8_blocks(codes, scales, (128, 128))
    table = np.array([e4m3(code) for code in range(256)], dtype=np.float32)
    by_value = scales.repeat(128, axis=0).repeat(128, axis=1)[:300, :2000]
    assert np.array_equal(bits(read), bits(table[codes] * by_value))
    blocks = rng.integers(0, 256, (17_000, 16), dtype=np.uint8)
    exponents = rng.integers(100, 150, 17_000, dtype=np.uint8)
    whole = decode_mxfp4(blocks, exponents).reshape(17_000, 32)
    for row in (0, 16383, 16384, 16999):
        one = decode_mxfp4(blocks[row : row + 1], exponents[row : row + 1])
        assert np.array_equal(bits(whole[row]), bits(one))
