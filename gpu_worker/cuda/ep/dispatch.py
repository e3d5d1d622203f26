"""What fp8 dispatch asks of an instance's sizes: Mooncake's kernels lay scales out for four rows at
a time."""

from __future__ import annotations

from gpu_worker.config import DispatchForm, ExchangeKind
from gpu_worker.cuda.ep.exchange import EpShape
from shared.errors import ConfigError

_ROWS_UNIT = 4


def exchange_kind(form: DispatchForm) -> ExchangeKind:
    """Ranks of different kinds lay out each other's tokens differently."""
    return ExchangeKind.EP_FP8 if form is DispatchForm.FP8 else ExchangeKind.EP


def check_dispatch(shape: EpShape) -> None:
    """Raises ConfigError where the kernels have no fp8 for it."""
    if not shape.fp8:
        return
    if shape.received_rows_max % _ROWS_UNIT:
        raise ConfigError(
            f"--ep-dispatch fp8 takes a --step-tokens-max that is a multiple of {_ROWS_UNIT}, "
            f"and this one is {shape.step_tokens_max}"
        )
