"""How a checkpoint stores one tensor of a model: as plain floats, or quantised in two parts.
Recognises and checks the form by headers and config.json alone, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_worker.checkpoint.quantisation import (
    MXFP4_GROUP,
    MXFP4_GROUP_BYTES,
    Codes,
    Floats,
    check_fp8,
    check_mxfp4,
    decode_fp8_blocks,
    decode_mxfp4,
    decode_mxfp4_bits,
)
from gpu_worker.checkpoint.shards import Shape, StoredTensor
from shared.errors import CheckpointError

MXFP4 = "MXFP4"
_SERVED_METHODS = (None, "fp8", "mxfp4")

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "U8": np.dtype("u1"),
}
_PLAIN = ("F32", "F16", "BF16")
_SCALES = ("F32", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredForm:
    """`dtype` is that of the values: MXFP4, or the dtype in the header. Plain floats have no
    `scales`."""

    dtype: str
    values: StoredTensor
    scales: StoredTensor | None = None
    block: tuple[int, int] = (0, 0)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return (self.values,) if self.scales is None else (self.values, self.scales)

    @property
    def shape(self) -> Shape:
        """The shape of the decoded tensor."""
        if self.dtype != MXFP4:
            return self.values.shape
        *leading, rows, groups, _ = self.values.shape
        return (*leading, groups * MXFP4_GROUP, rows)

    @property
    def is_bfloat16(self) -> bool:
        """Whether `decode_bits` loses nothing."""
        return self.dtype in ("BF16", MXFP4)

    def decode(self, raw_values: Codes, raw_scales: Codes | None, leading: int) -> Floats:
        """A new float32 array, from the bytes of the whole tensor, or (with `leading` 1) of one
        index of its leading axis. Raises ValueError if the bytes are invalid."""
        values = _view(self.values, raw_values, leading)
        if self.scales is None or raw_scales is None:
            return _as_floats(self.values.dtype, values)
        scales = _view(self.scales, raw_scales, leading)
        if self.dtype == MXFP4:
            return np.swapaxes(decode_mxfp4(values, scales), -1, -2)
        return decode_fp8_blocks(values, _as_floats(self.scales.dtype, scales), self.block)

    def copy_codes(
        self,
        raw_values: Codes,
        raw_scales: Codes | None,
        leading: int,
        codes: Codes,
        scales: Floats,
    ) -> None:
        """Copies the parts of a tensor in FP8. Raises ValueError if the bytes are invalid."""
        assert self.scales is not None, f"{self.values.name} has no scales"
        assert raw_scales is not None, f"{self.values.name} has no scales"
        codes[...] = _view(self.values, raw_values, leading)
        scales[...] = _as_floats(self.scales.dtype, _view(self.scales, raw_scales, leading))
        check_fp8(codes, scales)

    def copy_groups(
        self,
        raw_values: Codes,
        raw_scales: Codes | None,
        leading: int,
        blocks: Codes,
        scales: Codes,
    ) -> None:
        """Copies the parts of a tensor in MXFP4. Raises ValueError if the bytes are invalid."""
        assert self.scales is not None, f"{self.values.name} has no scales"
        assert raw_scales is not None, f"{self.values.name} has no scales"
        blocks[...] = _view(self.values, raw_values, leading)
        scales[...] = _view(self.scales, raw_scales, leading)
        check_mxfp4(scales)

    def decode_bits(
        self, raw_values: Codes, raw_scales: Codes | None, leading: int
    ) -> NDArray[np.uint16]:
        """Like `decode`, as bfloat16 bits."""
        assert self.is_bfloat16, f"{self.values.name} is {self.dtype}"
        values = _view(self.values, raw_values, leading)
        if self.scales is None or raw_scales is None:
            return values.copy()
        scales = _view(self.scales, raw_scales, leading)
        return np.swapaxes(decode_mxfp4_bits(values, scales), -1, -2)


def _view(tensor: StoredTensor, raw: Codes, leading: int) -> NDArray[Any]:
    return raw.view(_DTYPES[tensor.dtype]).reshape(tensor.shape[leading:])


def _as_floats(dtype: str, values: NDArray[Any]) -> Floats:
    if dtype != "BF16":
        return values.astype(np.float32)
    bits = values.astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32)


def check_method(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a quantisation that is not supported."""
    quantisation = config.get("quantization_config") or {}
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    if method not in _SERVED_METHODS:
        raise CheckpointError(
            f"{folder}: quantised weights of quant_method {method!r} are not served; take the "
            "model's checkpoint in bf16, block-scaled fp8 or mxfp4"
        )


def find_form(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    name: str,
    shape: Shape,
) -> StoredForm:
    """Raises CheckpointError if the tensor is missing, or stored in an unsupported form."""
    blocks = tensors.get(f"{name}_blocks")
    if name not in tensors and blocks is not None:
        return _mxfp4_form(tensors, blocks, name, shape)
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(
            f"{folder}: tensor {name} is missing; fetch the checkpoint again, or check config.json"
        )
    _check_shape(tensor, shape)
    if tensor.dtype == "F8_E4M3":
        return _fp8_form(tensors, tensor, _block_size(folder, config, tensor))
    if tensor.dtype not in _PLAIN:
        raise CheckpointError(
            f"{tensor.path}: tensor {name} is stored as {tensor.dtype}; convert the checkpoint to "
            f"one of {', '.join(_PLAIN)}, or F8_E4M3 with block scales"
        )
    return StoredForm(dtype=tensor.dtype, values=tensor)


def _fp8_form(
    tensors: Mapping[str, StoredTensor], tensor: StoredTensor, block: tuple[int, int]
) -> StoredForm:
    scales = _scales_of(tensors, tensor, f"{tensor.name}_scale_inv", _SCALES)
    grid = tuple(-(-size // edge) for size, edge in zip(tensor.shape[-2:], block, strict=True))
    _check_shape(scales, (*tensor.shape[:-2], *grid))
    return StoredForm(dtype=tensor.dtype, values=tensor, scales=scales, block=block)


def _mxfp4_form(
    tensors: Mapping[str, StoredTensor], blocks: StoredTensor, name: str, shape: Shape
) -> StoredForm:
    """Groups run along the input axis, which is the second to last of the logical shape."""
    if blocks.dtype != "U8":
        raise CheckpointError(
            f"{blocks.path}: tensor {blocks.name} is stored as {blocks.dtype} in place of U8; "
            "fetch the checkpoint again"
        )
    scales = _scales_of(tensors, blocks, f"{name}_scales", ("U8",))
    if len(shape) < 2 or shape[-2] % MXFP4_GROUP:
        raise CheckpointError(
            f"{blocks.path}: tensor {name} of {list(shape)} cannot be MXFP4: its input axis is no "
            f"multiple of {MXFP4_GROUP}; check config.json"
        )
    grid = (*shape[:-2], shape[-1], shape[-2] // MXFP4_GROUP)
    _check_shape(blocks, (*grid, MXFP4_GROUP_BYTES))
    _check_shape(scales, grid)
    return StoredForm(dtype=MXFP4, values=blocks, scales=scales)


def _scales_of(
    tensors: Mapping[str, StoredTensor],
    tensor: StoredTensor,
    name: str,
    dtypes: tuple[str, ...],
) -> StoredTensor:
    scales = tensors.get(name)
    if scales is None:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} is quantised ({tensor.dtype}), but its scales "
            f"{name} are missing; fetch the checkpoint again"
        )
    if scales.dtype not in dtypes:
        raise CheckpointError(
            f"{scales.path}: tensor {name} is stored as {scales.dtype} in place of "
            f"{' or '.join(dtypes)}; convert the checkpoint"
        )
    return scales


def _block_size(folder: Path, config: Mapping[str, Any], tensor: StoredTensor) -> tuple[int, int]:
    quantisation = config.get("quantization_config") or {}
    block = quantisation.get("weight_block_size")
    if len(tensor.shape) >= 2 and isinstance(block, list) and len(block) == 2:
        rows, columns = block
        if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
            return rows, columns
    raise CheckpointError(
        f"{folder}: tensor {tensor.name} is FP8, but config.json has no weight_block_size of two "
        "numbers in its quantization_config; only block-scaled FP8 matrices are served"
    )


def _check_shape(tensor: StoredTensor, shape: Shape) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, but config.json "
            f"asks for {list(shape)}; one of the two files belongs to another model"
        )
