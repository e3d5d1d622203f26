"""The kernels alone: their sums are right, and their bits hang on nothing but their own inputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from gpu_worker.cpu.expert_slots import MlpWeights
from gpu_worker.cpu.kernels import arithmetic, experts, linear, router
from gpu_worker.cpu.kernels.warm_up import compile_all
from gpu_worker.cpu.mlp import MlpRunner
from gpu_worker.cpu.registry import COMMON_KERNELS
from tests.support.panels import into_panels


@njit
def exp_all(x, out):
    for i in range(x.shape[0]):
        out[i] = arithmetic.exp32(x[i])


@njit
def chain(x, w, out):
    """The definition: k ascending, one rounding a term."""
    for n in range(w.shape[1]):
        total = np.float32(0.0)
        for k in range(x.shape[0]):
            total = arithmetic.fma(x[k], w[k, n], total)
        out[n] = total


def test_exp_is_as_exact_as_float32_allows() -> None:
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    out = np.empty_like(x)
    exp_all(x, out)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(out - exact) / exact) < 1.2e-7


def test_exp_stays_finite_beyond_its_range() -> None:
    x = np.array([-1e30, -200, 200, 1e30], dtype=np.float32)
    out = np.empty_like(x)
    exp_all(x, out)
    assert np.isfinite(out).all()
    assert out[0] < 1e-37


def test_exp_has_the_same_bits_in_a_vector_and_alone() -> None:
    x = np.random.default_rng(0).uniform(-20, 20, 1003).astype(np.float32)
    out, alone = np.empty_like(x), np.empty(1, dtype=np.float32)
    exp_all(x, out)
    for i in range(0, x.size, 7):
        exp_all(x[i : i + 1], alone)
        assert alone[0] == out[i]


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Cut off, as uint16."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@settings(deadline=None, max_examples=120)
@given(
    layout=st.sampled_from(["plain", "panels", "bfloat16 panels"]),
    rows=st.integers(0, 14),
    inputs=st.integers(1, 41),
    outputs=st.sampled_from([1, 3, 16, 37, 52, 64, 128, 170, 1023, 1024, 1030, 2051]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_linear_output_is_one_chain_in_order_of_k(
    layout: str, rows: int, inputs: int, outputs: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows + 1, inputs), dtype=np.float32)
    w = rng.standard_normal((inputs, outputs), dtype=np.float32)
    weights = w
    if layout == "panels":
        weights = into_panels(w)
    elif layout == "bfloat16 panels":
        w = widened(bfloat16_bits(w))
        weights = into_panels(bfloat16_bits(w))
    out = np.full((rows + 1, outputs), np.nan, dtype=np.float32)
    linear.linear(x, weights, np.zeros(outputs, dtype=np.float32), out, rows)
    expected = np.empty(outputs, dtype=np.float32)
    for m in range(rows):
        chain(x[m], w, expected)
        assert np.array_equal(out[m], expected)
    assert np.isnan(out[rows]).all(), "rows beyond num_rows must not be touched"


@pytest.mark.parametrize("layout", [np.ascontiguousarray, into_panels])
def test_linear_starts_from_the_bias(layout: Callable[[np.ndarray], np.ndarray]) -> None:
    x = np.ones((5, 3), dtype=np.float32)
    w = layout(np.ones((3, 2), dtype=np.float32))
    out = np.empty((5, 2), dtype=np.float32)
    linear.linear(x, w, np.array([10, 20], dtype=np.float32), out, 5)
    assert out.tolist() == [[13, 23]] * 5


def route(logits: list[float], top_k: int, normalise: bool) -> tuple[list[int], list[float]]:
    """Routes one token whose router logits are `logits`."""
    num_experts = len(logits)
    x = np.ones((1, 1), dtype=np.float32)
    experts = np.empty((1, top_k), dtype=np.int32)
    weights = np.empty((1, top_k), dtype=np.float32)
    router.route_softmax(
        x,
        np.array([logits], dtype=np.float32),
        np.zeros(num_experts, dtype=np.float32),
        normalise,
        np.empty((1, num_experts), dtype=np.float32),
        experts,
        weights,
        1,
    )
    return experts[0].tolist(), weights[0].tolist()


def test_equal_logits_go_to_the_lower_expert() -> None:
    assert route([1, 3, 2, 3, 3, 2], top_k=4, normalise=True)[0] == [1, 3, 4, 2]


@pytest.mark.parametrize("normalise", [True, False])
def test_router_weights_are_softmax_probabilities(normalise: bool) -> None:
    logits = [0.5, -1.0, 2.0, 1.0]
    probabilities = np.exp(logits) / np.exp(logits).sum()
    expected = probabilities[[2, 3]]
    experts, weights = route(logits, top_k=2, normalise=normalise)
    assert experts == [2, 3]
    assert weights == pytest.approx(expected / (expected.sum() if normalise else 1), rel=1e-6)


def run_experts(x, rows, slots, gate_up, down) -> np.ndarray:
    num_slots, inner, hidden = down.shape
    runner = MlpRunner(
        hidden_size=hidden, inner_size=inner, num_mlps=num_slots, activation=experts.SWIGLU
    )
    weights = MlpWeights(
        w_gate_up=np.stack([into_panels(w) for w in gate_up]),
        w_down=np.stack([into_panels(w) for w in down]),
        b_gate_up_SJ=np.zeros((num_slots, 2 * inner), dtype=np.float32),
        b_down_SH=np.zeros((num_slots, hidden), dtype=np.float32),
    )
    return runner.run(
        x, np.array(rows, dtype=np.int32), np.array(slots, dtype=np.int32), weights
    ).copy()


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_a_pair_has_the_same_bits_alone_and_in_any_group(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_slots, num_rows, hidden, inner = 4, 5, 9, 6
    x = rng.standard_normal((num_rows, hidden), dtype=np.float32)
    gate_up = rng.standard_normal((num_slots, hidden, 2 * inner), dtype=np.float32)
    down = rng.standard_normal((num_slots, inner, hidden), dtype=np.float32)
    pair = st.tuples(st.integers(0, num_rows - 1), st.integers(0, num_slots - 1))
    pairs = data.draw(st.lists(pair, min_size=1, max_size=24))
    y = run_experts(x, [r for r, _ in pairs], [s for _, s in pairs], gate_up, down)
    for n, (row, slot) in enumerate(pairs):
        alone = run_experts(x, [row], [slot], gate_up, down)
        assert np.array_equal(y[n], alone[0])
        gate, up = np.split(x[row].astype(np.float64) @ gate_up[slot], 2)
        expected = (gate / (1 + np.exp(-gate)) * up) @ down[slot]
        assert y[n] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_call_with_other_types_fails_in_place_of_compiling() -> None:
    compile_all(COMMON_KERNELS)
    with pytest.raises(TypeError):
        linear.add_rows(np.zeros((1, 1)), np.zeros((1, 1)), 1)


def test_read_only_inputs_are_taken() -> None:
    compile_all(COMMON_KERNELS)
    x = np.ones((2, 3), dtype=np.float32)
    y = np.ones((2, 1, 3), dtype=np.float32)
    y.setflags(write=False)
    experts.add_weighted(x, y, np.full((2, 1), 2, dtype=np.float32), 2)
    assert (x == 3).all()


def test_kernel_files_import_only_what_the_cache_is_named_by() -> None:
    """Else numba would run old code after a change."""
    folder = Path(arithmetic.__file__).parent
    for path in folder.glob("*.py"):
        imported = re.findall(
            r"^from gpu_worker\.model\.kernels\.(\w+) import", path.read_text(), re.M
        )
        compiled = {f"{name}.py" for name in imported} - {"warm_up.py"}
        assert compiled <= set(arithmetic.SHARED_SOURCES), path.name
