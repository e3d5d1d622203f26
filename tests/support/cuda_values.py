"""Inputs and comparisons for the tests of the kernels: on a CUDA device in bf16, elsewhere for
Triton's interpreter in float32."""

from __future__ import annotations

import torch

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32


def random(*shape: int, dtype: torch.dtype = DTYPE, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def poison(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Closeness:
    """How close results must be in one file of tests. `tolerance` bounds the relative error."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance

    def assert_close(
        self, out: torch.Tensor, reference: torch.Tensor, tolerance: float | None = None
    ) -> None:
        error = (out.double() - reference.double()).norm() / reference.double().norm()
        limit = self._tolerance if tolerance is None else tolerance
        assert error.item() < limit, f"relative error {error.item():.2e}"

    def assert_same(self, out: torch.Tensor, other: torch.Tensor) -> None:
        """Compares bits. The interpreter multiplies with numpy, whose rounding depends on the
        shape, so there it compares values."""
        if ON_CUDA:
            assert torch.equal(out, other)
        else:
            self.assert_close(out, other)
