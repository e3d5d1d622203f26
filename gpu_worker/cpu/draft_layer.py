"""The parts of the layer of multi-token prediction that no other layer has: its input, made of a
decoder's last hidden state and the token after it, and its head. The rest is a decoder layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_worker.checkpoint.checkpoint import Checkpoint
from gpu_worker.checkpoint.draft_tensors import DraftNames
from gpu_worker.cpu.family import Floats
from gpu_worker.cpu.kernels import draft as kernels
from gpu_worker.cpu.step_scratch import next_capacity
from gpu_worker.cpu.weights import Weights, read_panels, read_vector


class DraftLayer:
    """`embedding_VH` and `w_head` are the decoder's memory if the layer has the same ones."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: DraftNames,
        *,
        embedding_VH: Floats,
        w_head: Weights,
        final_norm_H: Floats,
        norm_eps: np.float32,
    ) -> None:
        """The arrays are the decoder's. Raises CheckpointError."""
        self.norm_H = read_vector(checkpoint, names.final_norm)
        self.w_head = w_head
        self._embedding_VH = embedding_VH
        if checkpoint.has(names.head):
            self.w_head = _shared(read_panels(checkpoint, names.head), w_head)
        if checkpoint.has(names.embedding):
            own_VH = read_vector(checkpoint, names.embedding)
            self._embedding_VH = _shared(own_VH, embedding_VH)
        self._decoder_norm_H = final_norm_H
        self._hidden_norm_H = read_vector(checkpoint, names.hidden_norm)
        self._token_norm_H = read_vector(checkpoint, names.token_norm)
        self._w_joint = read_panels(checkpoint, names.joint)
        self._zeros_H: Floats = np.zeros(final_norm_H.shape[0], dtype=np.float32)
        self._eps = norm_eps
        self._both_TI: Floats = np.empty((0, 2 * final_norm_H.shape[0]), dtype=np.float32)

    def join(self, x_TH: Floats, next_ids_T: NDArray[np.int32], scratch_TH: Floats) -> None:
        """Turns the outputs of the decoder's last layer into the inputs of this one, in place.
        `next_ids_T[t]` is the token after row t."""
        num_tokens = next_ids_T.shape[0]
        if num_tokens > self._both_TI.shape[0]:
            width = self._both_TI.shape[1]
            self._both_TI = np.empty((next_capacity(num_tokens), width), dtype=np.float32)
        np.take(self._embedding_VH, next_ids_T, axis=0, out=scratch_TH[:num_tokens])
        kernels.join(
            x_TH,
            scratch_TH,
            self._decoder_norm_H,
            self._hidden_norm_H,
            self._token_norm_H,
            self._eps,
            self._w_joint,
            self._zeros_H,
            self._both_TI,
            num_tokens,
        )


def _shared(own: Weights, decoders: Weights) -> Weights:
    """The decoder's if the two are equal, as they are in published checkpoints."""
    return decoders if np.array_equal(own, decoders) else own
