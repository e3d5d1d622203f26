"""A Hugging Face checkpoint: checked when it is opened, read tensor by tensor, and verified against
its hash manifest if there is one. Knows nothing of architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gpu_worker.checkpoint.manifest import Manifest, check_listed, has_parts, read_manifest, verify
from gpu_worker.checkpoint.quantisation import Codes, Floats
from gpu_worker.checkpoint.shards import (
    INDEX_FILE,
    SINGLE_FILE,
    MappedShards,
    Shape,
    StoredTensor,
    read_tensors,
)
from gpu_worker.checkpoint.stored_form import MXFP4, StoredForm, check_method, find_form
from gpu_worker.checkpoint.tied_head import check_tied_head
from shared.errors import CheckpointError
from shared.model_spec import read_json

__all__ = ["INDEX_FILE", "SINGLE_FILE", "Checkpoint", "OnRead", "Shape", "open_checkpoint"]

_Result = TypeVar("_Result")

ALWAYS_FLOAT32 = ("bias", ".gate.weight", ".router.weight", ".weights_proj.weight")
"""Name endings of small tensors that are always read with `read`, as tensors of one axis are:
biases, routers, and the weights of an indexer's heads. Some checkpoints store only these in F32."""

OnRead = Callable[[int], None]
"""Called with the number of bytes in the file, after each read."""


class Checkpoint:
    """The tensors of an opened folder, under the model's names for them, however they are stored.
    Several threads may read. Reads return arrays that the caller owns, and raise CheckpointError if
    the bytes do not match the manifest."""

    def __init__(
        self,
        folder: Path,
        forms: Mapping[str, StoredForm],
        manifest: Manifest | None,
        on_read: OnRead | None,
    ) -> None:
        self.folder = folder
        self._forms = forms
        self._manifest = manifest
        self._on_read = on_read
        self.is_bfloat16 = all(
            form.is_bfloat16
            for name, form in forms.items()
            if len(form.shape) > 1 and not name.endswith(ALWAYS_FLOAT32)
        )
        """Whether `read_bits` works for all matrices, except those that are always read as
        float32."""
        self._shards = MappedShards({part.path for form in forms.values() for part in form.parts})

    def fingerprint(self) -> str:
        """A hash of the files as they were when opened. It is equal for everyone who opens the
        same."""
        return self._shards.fingerprint()

    def has(self, name: str) -> bool:
        """Whether the tensor was requested when the checkpoint was opened."""
        return name in self._forms

    def shape(self, name: str) -> Shape:
        return self._forms[name].shape

    def stored_dtype(self, name: str) -> str:
        """F32, F16, BF16, F8_E4M3 or MXFP4."""
        return self._forms[name].dtype

    def read(self, name: str) -> NDArray[np.float32]:
        return self._decode(self._forms[name], None, StoredForm.decode)

    def read_part(self, name: str, index: int) -> NDArray[np.float32]:
        """One index of the leading axis. Does not read the others."""
        return self._decode(self._forms[name], index, StoredForm.decode)

    def read_bits(self, name: str) -> NDArray[np.uint16]:
        """A tensor stored in BF16 or MXFP4, as bfloat16 bits. Exact."""
        return self._decode(self._forms[name], None, StoredForm.decode_bits)

    def read_bits_part(self, name: str, index: int) -> NDArray[np.uint16]:
        return self._decode(self._forms[name], index, StoredForm.decode_bits)

    @contextmanager
    def stored_bytes(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """The bytes of a tensor stored in BF16, in the mapped file. The view must not be used after
        the `with` block. To copy them to memory that is there saves new memory, which would cost as
        much as the read."""
        form = self._forms[name]
        assert form.dtype == "BF16", f"{form.values.name} is {form.dtype}"
        with ExitStack() as views:
            yield self._view(form.values, None, views)

    def fp8_block(self, name: str) -> tuple[int, int] | None:
        """Rows and columns of the blocks that have a scale each; None if the tensor is not FP8."""
        form = self._forms[name]
        return form.block if form.dtype == "F8_E4M3" else None

    def copy_codes(self, name: str, codes: Codes, scales: Floats) -> None:
        """Copies a matrix stored in FP8 as it is: E4M3 codes, and the scales of blocks as float32,
        to the caller's memory of their shapes."""
        form = self._forms[name]
        assert form.dtype == "F8_E4M3", f"{form.values.name} is {form.dtype}"
        self._decode(form, None, partial(StoredForm.copy_codes, codes=codes, scales=scales))

    def copy_mxfp4_part(self, name: str, index: int, blocks: Codes, scales: Codes) -> None:
        """Copies one index of the leading axis of a tensor stored in MXFP4 as it is, to the
        caller's memory: `[N, G, 16]` and `[N, G]` for N outputs of 32 G inputs."""
        form = self._forms[name]
        assert form.dtype == MXFP4, f"{form.values.name} is {form.dtype}"
        self._decode(form, index, partial(StoredForm.copy_groups, blocks=blocks, scales=scales))

    def _decode(
        self,
        form: StoredForm,
        index: int | None,
        decode: Callable[[StoredForm, Codes, Codes | None, int], _Result],
    ) -> _Result:
        with ExitStack() as views:
            values, *scales = (self._view(part, index, views) for part in form.parts)
            try:
                return decode(form, values, scales[0] if scales else None, int(index is not None))
            except ValueError as error:
                raise CheckpointError(
                    f"{form.values.path}: tensor {form.values.name} {error}: it is damaged; fetch "
                    "this file again"
                ) from error

    def _view(self, tensor: StoredTensor, index: int | None, views: ExitStack) -> Codes:
        """The verified bytes of the tensor or of its part. Valid as long as `views` is open."""
        part = tensor if index is None else tensor.part(index)
        raw = views.enter_context(self._shards.bytes_of(part))
        if self._manifest is not None:
            if index is None or has_parts(tensor):
                verify(self._manifest, tensor, raw, index)
            else:
                whole = views.enter_context(self._shards.bytes_of(tensor))
                verify(self._manifest, tensor, whole)
        if self._on_read is not None:
            self._on_read(part.num_bytes)
        return raw


def open_checkpoint(
    folder: Path, shapes: Mapping[str, Shape], on_read: OnRead | None = None
) -> Checkpoint:
    """`shapes` are the tensors that must exist, with their shapes in the model; others are ignored.
    A quantised tensor X is stored as `X` and `X_scale_inv` (block-scaled FP8), or as `X_blocks` and
    `X_scales` (MXFP4, whose values are transposed). Raises CheckpointError if a shard is missing or
    truncated, or if a tensor is missing, has another shape, is stored in an unsupported form, or is
    not in the manifest."""
    tensors, manifest = read_tensors(folder), read_manifest(folder)
    config = read_json(folder, "config.json") if (folder / "config.json").exists() else {}
    check_method(folder, config)
    check_tied_head(config, tensors)
    forms = {
        name: find_form(folder, tensors, config, name, shape) for name, shape in shapes.items()
    }
    if manifest is not None:
        for form in forms.values():
            for part in form.parts:
                check_listed(manifest, part)
    return Checkpoint(folder, forms, manifest, on_read)
