"""Measures one rank's decoder on one CUDA card.

    python -m benchmarks.gpu --out FOLDER

It has random bf16 weights of Qwen3-30B-A3B's shape, of gpt-oss-20b's, or of DeepSeek-V3's with
small experts (`--shape`). It measures decode tokens/s by batch size as a share of the roofline, the
cost of batch invariance, prefill, loads of slots beside decode, and tiles of kernels; for Qwen3
also transformers' generate on the same weights. Correctness is tested in tests/gpu.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_shapes import SHAPES
from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.cuda.experts.expert_form import NumberFormat
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes

CONTEXT = 512
NEW_TOKENS_MAX = 128
BLOCK_TOKENS = 16
BATCHES = (1, 8, 32, 64, 128)
SPARE_SLOTS = 4
HOST_STEPS = 40


class GpuBench:
    def __init__(
        self,
        sizes: DecoderSizes,
        *,
        slots: CudaSlots | None = None,
        number_format: NumberFormat = NumberFormat.PLAIN,
        scaled_shared: bool = False,
    ) -> None:
        """`number_format` is that of the experts, unless `slots` has them already; with
        `scaled_shared`, the shared weights that checkpoints quantise are in FP8, too."""
        from gpu_worker.cuda.weights.random_weights import random_weights

        self.device = torch.device("cuda")
        torch.manual_seed(0)
        self.sizes = sizes
        is_gpt_oss = sizes.clamped_experts
        self.weights = random_weights(
            self.sizes, self.device, torch.bfloat16, scaled=scaled_shared, biased=is_gpt_oss
        )
        if slots is not None:
            self.slots = slots
            return
        self.slots = CudaSlots(
            num_layers=sizes.num_moe_layers,
            slots_per_rank=self.sizes.num_experts + SPARE_SLOTS,
            hidden_size=self.sizes.hidden_size,
            inner_size=self.sizes.inner_size,
            device=self.device,
            number_format=number_format,
            biased=is_gpt_oss,
        )
        self.slots.fill_randomly(self.sizes.num_experts, std=0.02)

    def decoder(
        self,
        ladder: tuple[int, ...],
        *,
        prefill_tokens: int = CONTEXT,
        context: int = CONTEXT + NEW_TOKENS_MAX,
        **options: Any,
    ) -> Any:
        from gpu_worker.cuda.decoder import Decoder, DecoderOptions
        from gpu_worker.cuda.stages.moe_stage import LocalMoe

        settings = DecoderOptions(
            kv_blocks=max(*ladder, 1) * context // BLOCK_TOKENS,
            block_tokens=BLOCK_TOKENS,
            context_tokens_max=context,
            decode_batch_sizes=ladder,
            prefill_tokens=prefill_tokens,
            prefill_sequences=1,
            **options,
        )
        moe = LocalMoe(
            self.slots,
            top_k=self.sizes.top_k,
            step_tokens_max=prefill_tokens,
            clamped=self.sizes.clamped_experts,
        )
        decoder = Decoder(self.sizes, self.weights, moe, settings)
        table = np.arange(self.sizes.num_experts, dtype=np.int32)
        decoder.use_slots(np.tile(table, (self.sizes.num_moe_layers, 1, 1)))
        for cache in decoder.attention.cache():
            cache.normal_()
        decoder.capture()
        return decoder


def batch_at(position: int, ids_T: np.ndarray) -> Any:
    from gpu_worker.engine.step_batch import StepBatch

    count = len(ids_T)
    rows = np.arange(count, dtype=np.int32)
    width = (CONTEXT + NEW_TOKENS_MAX) // BLOCK_TOKENS
    return StepBatch(
        token_ids_T=ids_T.astype(np.int32),
        position_T=np.full(count, position, dtype=np.int32),
        sequence_T=rows,
        block_tables_SB=np.arange(count * width, dtype=np.int32).reshape(count, width),
        logits_rows_R=rows,
    )


def random_ids(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 100_000, count)


def copy_rate(nbytes: int = 4 << 30) -> float:
    """TB/s of a copy on the card, read plus written."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * nbytes / median_ms(lambda: target.copy_(source)) / 1e9


def link_rate(nbytes: int = 1 << 30) -> float:
    """GB/s of a copy from pinned memory to the card."""
    source = torch.empty(nbytes, dtype=torch.uint8).pin_memory()
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    return nbytes / median_ms(lambda: target.copy_(source, non_blocking=True)) / 1e6


def median_ms(run: Callable[[], Any], repeats: int = 7) -> float:
    run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def decode_rates(bench: GpuBench, decoder: Any, batch: int, copy_tb_per_s: float) -> dict[str, Any]:
    """Times of whole steps, from input arrays to tokens: `step_ms` if each step is enqueued before
    the tokens of the previous one are read, `waiting_step_ms` if it needs them."""
    sizes = bench.sizes
    ids, times, distinct = random_ids(batch), [], []
    for step in range(HOST_STEPS // 2):
        began = time.perf_counter()
        ids = decoder.launch(batch_at(CONTEXT + step, ids)).ids()
        times.append(time.perf_counter() - began)
        if step % 4 == 0:
            slots_LTK = decoder.slots_of_last_step()[:, :batch].flatten(1)
            distinct.append(sum(len(layer.unique()) for layer in slots_LTK.cpu()))
    waiting_step_ms = float(np.median(times) * 1e3)
    pending = decoder.launch(batch_at(CONTEXT + HOST_STEPS // 2, ids))
    former_rows = -1 - np.arange(batch)
    times = []
    for step in range(HOST_STEPS // 2 + 1, HOST_STEPS):
        began = time.perf_counter()
        following = decoder.launch(batch_at(CONTEXT + step, former_rows))
        ids = pending.ids()
        pending = following
        times.append(time.perf_counter() - began)
    pending.ids()
    step_ms = float(np.median(times) * 1e3)
    from benchmarks.gpu_kernels import replay_ms

    graph_ms = replay_ms(graph_of(decoder, batch), 9)
    kv_bytes = 2 * batch * (CONTEXT + HOST_STEPS / 2) * sizes.kv_values_per_token
    shared_bytes = bench.weights.num_bytes - bench.weights.embedding_VH.nbytes
    nbytes = np.mean(distinct) * bench.slots.form.num_bytes + shared_bytes + kv_bytes
    floor_ms = float(nbytes / copy_tb_per_s / 1e9)
    return {
        "batch": batch,
        "tokens_per_s": batch / step_ms * 1e3,
        "step_ms": step_ms,
        "waiting_step_ms": waiting_step_ms,
        "graph_ms": graph_ms,
        "floor_ms": floor_ms,
        "share_of_roofline": floor_ms / step_ms,
        "distinct_experts_per_layer": float(np.mean(distinct)) / sizes.num_moe_layers,
        "gigabytes": float(nbytes / 1e9),
        "distinct_tokens": len(set(ids.tolist())),
    }


def graph_of(decoder: Any, batch: int) -> torch.cuda.CUDAGraph:
    return next(g for size, g in decoder._graphs.items() if size.decode and size.tokens == batch)


def invariance(decoder: Any, batch: int = 32) -> dict[str, Any]:
    """Whether the logits of a row have the same bits alone and among other rows, at the full
    size."""
    ids = random_ids(batch)
    crowd = decoder.launch(batch_at(CONTEXT, ids))
    crowd.ids()
    logits = crowd.logits_RV.clone()
    alone = decoder.launch(batch_at(CONTEXT, ids[:1]))
    alone.ids()
    difference = (alone.logits_RV[0].float() - logits[0].float()).abs().max().item()
    return {
        "bits_equal": bool(torch.equal(alone.logits_RV[0], logits[0])),
        "largest_difference": difference,
        "logits_std": logits.float().std().item(),
    }


def refill(bench: GpuBench, decoder: Any, link_gb_per_s: float) -> dict[str, Any]:
    """Loads of the spare slots of all layers, alone and beside decode at batch 8, whose bits must
    not change."""
    import threading

    from gpu_worker.cuda.experts.slots import SlotUpload

    num_values = bench.slots.form.num_bytes // 2
    values = torch.empty(16, num_values, dtype=torch.bfloat16).normal_().pin_memory()
    values = values.view(bench.slots.form.flat_dtype)
    uploads = [
        SlotUpload(layer, bench.sizes.num_experts + spare, spare, values[(layer + spare) % 16])
        for layer in range(bench.sizes.num_moe_layers)
        for spare in range(SPARE_SLOTS)
    ]
    gigabytes = len(uploads) * bench.slots.form.num_bytes / 1e9

    def rate() -> float:
        began = time.perf_counter()
        for _ in range(3):
            bench.slots.load(uploads)
        return 3 * gigabytes / (time.perf_counter() - began)

    rate()
    alone = rate()
    batch = batch_at(CONTEXT, random_ids(8))
    quiet = decoder.launch(batch)
    quiet.ids()
    logits = quiet.logits_RV.clone()
    beside: list[float] = []
    thread = threading.Thread(target=lambda: beside.append(rate()))
    thread.start()
    steps, bits_equal, began = 0, True, time.perf_counter()
    while thread.is_alive():
        pending = decoder.launch(batch)
        pending.ids()
        steps += 1
        if steps % 4 == 0:
            bits_equal &= bool(torch.equal(pending.logits_RV, logits))
    step_ms = (time.perf_counter() - began) / max(steps, 1) * 1e3
    thread.join()
    return {
        "gigabytes": gigabytes,
        "gb_per_s": alone,
        "share_of_link": alone / link_gb_per_s,
        "beside_decode_gb_per_s": beside[0],
        "beside_decode_share_of_link": beside[0] / link_gb_per_s,
        "decode_step_ms_meanwhile": step_ms,
        "steps_meanwhile": steps,
        "bits_equal": bits_equal,
    }


def transformers_rate(bench: GpuBench, batch: int) -> dict[str, Any]:
    """Tokens/s of decode alone: the time of 10 new tokens minus that of 2, divided by 8."""
    import transformers

    from benchmarks.gpu_reference import reference_model

    model = reference_model(bench.sizes, bench.weights, bench.slots, context=1024)
    ids = torch.from_numpy(random_ids(batch * CONTEXT).reshape(batch, CONTEXT)).cuda()

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - began

    with torch.no_grad():
        seconds(2)
        step_ms = (seconds(10) - seconds(2)) / 8 * 1e3
    return {
        "version": transformers.__version__,
        "step_ms": step_ms,
        "tokens_per_s": batch / step_ms * 1e3,
    }


def profile(decoder: Any, batch: int) -> dict[str, float]:
    """Microseconds of a step by kernel, from a trace."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(2):
            graph_of(decoder, batch).replay()
        torch.cuda.synchronize()
    rows = {e.key[:40]: e.device_time_total / 2 for e in trace.key_averages()}
    return dict(sorted(rows.items(), key=lambda row: -row[1])[:16])


class Report:
    """The results. They are written after every section, so that a later failure loses nothing."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "gpu.json"
        self.results: dict[str, Any] = {}
        self._began = time.perf_counter()

    def run(self, name: str, section: Callable[[], Any]) -> Any:
        try:
            self.results[name] = section()
        except Exception as error:  # noqa: BLE001 — the other sections are worth their device time
            traceback.print_exc()
            self.results[name] = {"error": repr(error)[:300]}
            torch.cuda.empty_cache()
        elapsed = time.perf_counter() - self._began
        print(f"[{elapsed:5.0f} s] {name}: {json.dumps(self.results[name])}"[:1500], flush=True)
        self._path.write_text(json.dumps(self.results, indent=1))
        return self.results[name]

    def table(self) -> str:
        lines = ["batch  tokens/s  step ms  waiting  graph ms  floor ms  share"]
        for name, r in self.results.items():
            if name.startswith("decode") and "error" not in r:
                lines.append(
                    f"{r['batch']:5}  {r['tokens_per_s']:8.0f}  {r['step_ms']:7.2f}  "
                    f"{r['waiting_step_ms']:7.2f}  {r['graph_ms']:8.2f}  {r['floor_ms']:8.2f}  "
                    f"{r['share_of_roofline']:5.1%}  {name}"
                )
        return "\n".join(lines)


def measure(report: Report, sizes: DecoderSizes, sections: set[str]) -> None:
    properties = torch.cuda.get_device_properties(0)
    report.run("card", lambda: {"name": properties.name, "torch": torch.__version__})
    copy = report.run("copy_tb_per_s", copy_rate)
    link = report.run("link_gb_per_s", link_rate)
    torch.cuda.empty_cache()
    bench = GpuBench(sizes)
    if "decode" in sections:
        _measure_decode(report, bench, copy, link)
    if "prefill" in sections:
        _measure_prefill(report, bench)
    if "free" in sections:
        _measure_free(report, bench, copy)
    is_latent = isinstance(sizes.attention, MlaShape)
    is_qwen = not is_latent and not sizes.clamped_experts
    if "kernels" in sections:
        (_measure_latent_kernels if is_latent else _measure_kernels)(report, bench)
    if "transformers" in sections and is_qwen:
        report.run("transformers_32", lambda: transformers_rate(bench, 32))


def _measure_decode(report: Report, bench: GpuBench, copy: float, link: float) -> None:
    began = time.perf_counter()
    decoder = bench.decoder(BATCHES)
    report.run("capture_s", lambda: time.perf_counter() - began)
    for batch in BATCHES:
        report.run(f"decode_{batch}", partial(decode_rates, bench, decoder, batch, copy))
    for batch in (1, 8, 128):
        report.run(f"profile_{batch}", partial(profile, decoder, batch))
    report.run("invariance", lambda: invariance(decoder))
    report.run("refill", lambda: refill(bench, decoder, link))


def _measure_prefill(report: Report, bench: GpuBench) -> None:
    from benchmarks.gpu_prefill import LENGTHS, prefill_rates

    context = LENGTHS[-1] + BLOCK_TOKENS
    decoder = bench.decoder((1,), prefill_tokens=LENGTHS[-1], context=context)
    report.run("prefill", lambda: prefill_rates(decoder, BLOCK_TOKENS, median_ms))


def _measure_free(report: Report, bench: GpuBench, copy: float) -> None:
    """Decode rates with the library's dense products, to show the cost of batch invariance."""
    decoder = bench.decoder(BATCHES, invariant=False)
    for batch in BATCHES:
        report.run(f"decode_free_{batch}", partial(decode_rates, bench, decoder, batch, copy))
    report.run("invariance_free", lambda: invariance(decoder))


def _measure_kernels(report: Report, bench: GpuBench) -> None:
    from benchmarks.gpu_kernels import KernelSweep

    sweep = KernelSweep(bench.sizes, bench.weights, bench.slots)
    for tokens in (1, 8, 32, 128):
        report.run(f"attention_{tokens}", partial(sweep.attention, tokens))
        report.run(f"experts_{tokens}", partial(sweep.experts, tokens))
        report.run(f"grouped_mm_{tokens}", partial(sweep.grouped_mm, tokens))
        report.run(f"dense_{tokens}", partial(sweep.dense, tokens))


def _measure_latent_kernels(report: Report, bench: GpuBench) -> None:
    from benchmarks.gpu_latent_kernels import LatentSweep

    sweep = LatentSweep(bench.sizes, bench.weights)
    for tokens in (1, 8, 32, 128):
        report.run(f"attention_{tokens}", partial(sweep.attention, tokens))
        report.run(f"heads_{tokens}", partial(sweep.heads, tokens))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("var/bench"))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-30b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument(
        "--sections", default="decode,prefill,free,kernels,transformers", help="comma-separated"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: no CUDA device here; this measures one")
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out)
    sizes = SHAPES[options.shape](options.layers)
    measure(report, sizes, set(options.sections.split(",")))
    print(report.table())


if __name__ == "__main__":
    main()
