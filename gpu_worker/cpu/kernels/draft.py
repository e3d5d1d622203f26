"""What joins the layer of multi-token prediction to the decoder."""

from __future__ import annotations

from typing import Any

from gpu_worker.cpu.kernels.arithmetic import kernel
from gpu_worker.cpu.kernels.linear import linear, rms_norm
from gpu_worker.cpu.kernels.warm_up import FLOAT, FLOATS_1D, FLOATS_2D, INT, PANELS, EntryPoint


@kernel
def join(
    x_TH: Any, next_TH: Any, final_norm_H: Any, hidden_norm_H: Any, token_norm_H: Any, eps: Any,
    w_joint: Any, zeros_H: Any, both_TI: Any, num_rows: int,
) -> None:  # fmt: skip
    """x = [norm(next), norm(final norm(x))] @ w_joint for the first `num_rows` rows: `x_TH` are the
    outputs of the decoder's last layer, `next_TH` the embeddings of the tokens after these rows.
    `both_TI`, two hidden sizes wide, is scratch."""
    size = x_TH.shape[1]
    for t in range(num_rows):
        hidden = both_TI[t, size:]
        rms_norm(next_TH[t], token_norm_H, eps, both_TI[t, :size])
        rms_norm(x_TH[t], final_norm_H, eps, hidden)
        rms_norm(hidden, hidden_norm_H, eps, hidden)
    linear(both_TI, w_joint, zeros_H, x_TH, num_rows)


ENTRY_POINTS: list[EntryPoint] = [
    (
        join,
        (
            FLOATS_2D, FLOATS_2D, FLOATS_1D, FLOATS_1D, FLOATS_1D, FLOAT,
            PANELS, FLOATS_1D, FLOATS_2D, INT,
        ),
    ),
]  # fmt: skip
