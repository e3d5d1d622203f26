"""Compares number formats on one CUDA card, of the same shape and in turn in one run: bfloat16,
experts in block-scaled FP8, and all in it that checkpoints quantise; for gpt-oss's shape bfloat16
and experts in MXFP4.

    python -m benchmarks.gpu_formats --out FOLDER
    python -m benchmarks.gpu_formats --out FOLDER --sections decode,prefill,tiles --layers 24
    python -m benchmarks.gpu_formats --out FOLDER --shape gpt-oss-20b --batches 1,32

Decode is measured at batches 1, 8, 32 and 128 with a context of 512, prefill with a prompt of 4,096
tokens in one step; decode as the median of several rounds that alternate between the formats. The
experts are random, so tokens spread over them evenly. `tiles` compares tiles of the kernels of FP8
or MXFP4.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import BLOCK_TOKENS, GpuBench, Report, copy_rate, decode_rates, invariance
from benchmarks.gpu import median_ms as card_median_ms
from benchmarks.gpu_shapes import SHAPES
from gpu_worker.cuda.experts.expert_form import NumberFormat
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes

BATCHES = (1, 8, 32, 128)
ROUNDS = 3
PREFILL_ROUNDS = 1


def decode_by_format(
    benches: dict[str, GpuBench], decoders: dict[str, Any], batch: int, copy: float
) -> dict[str, Any]:
    """The median round of each format, and how many times faster than bfloat16 it is."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in benches}
    for _ in range(ROUNDS):
        for name, bench in benches.items():
            rounds[name].append(decode_rates(bench, decoders[name], batch, copy))
    result: dict[str, Any] = {}
    for name, of_format in rounds.items():
        row = sorted(of_format, key=lambda row: row["step_ms"])[ROUNDS // 2]
        kept = ("tokens_per_s", "step_ms", "graph_ms", "floor_ms", "share_of_roofline", "gigabytes")
        result[name] = {key: round(row[key], 4) for key in kept}
    for row in result.values():
        row["speed_up"] = round(result["bf16"]["step_ms"] / row["step_ms"], 3)
        row["speed_up_by_bytes"] = round(result["bf16"]["gigabytes"] / row["gigabytes"], 3)
    return result


def prefill_by_format(decoders: dict[str, Any]) -> dict[str, Any]:
    """Of one prompt in one step. `bits_equal`: the logits of the last token are those after chunks,
    and those of a decode."""
    from benchmarks.gpu_prefill import prefill_rates

    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in decoders}
    for _ in range(PREFILL_ROUNDS):
        for name, decoder in decoders.items():
            rounds[name].append(prefill_rates(decoder, BLOCK_TOKENS, card_median_ms))
    result: dict[str, Any] = {}
    for name, of_format in rounds.items():
        tokens = [key for key in of_format[0] if key != "bits_equal"]
        result[name] = {
            "bits_equal": all(row["bits_equal"] for row in of_format),
            "ms": {n: round(float(np.median([r[n]["ms"] for r in of_format])), 2) for n in tokens},
        }
    return result


def measure(
    report: Report, sizes: DecoderSizes, sections: set[str], batches: tuple[int, ...]
) -> None:
    from benchmarks.gpu_prefill import LENGTHS

    properties = torch.cuda.get_device_properties(0)
    report.run("card", lambda: {"name": properties.name, "torch": torch.__version__})
    copy = report.run("copy_tb_per_s", copy_rate)
    torch.cuda.empty_cache()
    if "tiles" in sections:
        (_measure_mxfp4_tiles if sizes.clamped_experts else _measure_tiles)(report, sizes)
    benches = _benches(sizes) if sections - {"tiles"} else {}
    if "decode" in sections:
        decoders = {name: bench.decoder(batches) for name, bench in benches.items()}
        for batch in batches:
            report.run(f"decode_{batch}", partial(decode_by_format, benches, decoders, batch, copy))
        for name, decoder in decoders.items():
            rows = min(32, max(batches))
            report.run(f"invariance_{name}", partial(invariance, decoder, rows))
        del decoders
    if "prefill" in sections:
        context = LENGTHS[-1] + BLOCK_TOKENS
        decoders = {
            name: bench.decoder((1,), prefill_tokens=LENGTHS[-1], context=context)
            for name, bench in benches.items()
        }
        report.run("prefill", partial(prefill_by_format, decoders))


def _benches(sizes: DecoderSizes) -> dict[str, GpuBench]:
    """gpt-oss's experts have biases, which those in FP8 have not."""
    if sizes.clamped_experts:
        return {
            "bf16": GpuBench(sizes),
            "mxfp4": GpuBench(sizes, number_format=NumberFormat.MXFP4),
        }
    with_experts = GpuBench(sizes, number_format=NumberFormat.FP8)
    return {
        "bf16": GpuBench(sizes),
        "fp8_experts": with_experts,
        "fp8": GpuBench(sizes, slots=with_experts.slots, scaled_shared=True),
    }


def _measure_mxfp4_tiles(report: Report, sizes: DecoderSizes) -> None:
    from benchmarks.gpu_mxfp4_kernels import HEIGHTS, Mxfp4Sweep

    sweep = Mxfp4Sweep(sizes, GpuBench(sizes, number_format=NumberFormat.MXFP4).slots)
    for tokens, height in HEIGHTS:
        report.run(f"tiles_{tokens}_{height}", partial(sweep.tiles, tokens, height))


def _measure_tiles(report: Report, sizes: DecoderSizes) -> None:
    from benchmarks.gpu_scaled_kernels import ScaledSweep

    bench = GpuBench(sizes, number_format=NumberFormat.FP8, scaled_shared=True)
    sweep = ScaledSweep(bench.sizes, bench.slots)
    outputs = [layer.w_o_HO for layer in bench.weights.layers]
    for tokens in (*BATCHES, 4096):
        report.run(f"tiles_{tokens}", partial(sweep.tiles, tokens))
        report.run(f"linear_{tokens}", partial(sweep.linear, tokens, outputs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("var/bench"))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-30b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--sections", default="decode,prefill", help="comma-separated")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="of decode")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu_formats: no CUDA device here; this measures one")
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out)
    sizes, sections = SHAPES[options.shape](options.layers), set(options.sections.split(","))
    measure(report, sizes, sections, tuple(map(int, options.batches.split(","))))
    for name, result in report.results.items():
        if name.startswith("decode_") and "error" not in result:
            print(name, {form: row["speed_up"] for form, row in result.items()})


if __name__ == "__main__":
    main()
