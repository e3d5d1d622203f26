"""What `benchmarks.wide` runs is what the benchmarks understand, and its tables say what they
found."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import msgspec
import pytest

from benchmarks import gpu_serve, gpu_server
from benchmarks.gpu_serve_fault import FaultResult
from benchmarks.gpu_server_rates import Floor, ServerRow
from benchmarks.gpu_shapes import sizes_of
from benchmarks.random_checkpoint import entries_of
from benchmarks.wide import V32_SHAPE, Run, parse, runs_of
from benchmarks.wide_report import save_picture, tables
from cli.bench.stats import Spread
from gpu_worker.model_tools.seeded_configs import SEEDED_CONFIGS
from shared.errors import ConfigError

PARTS = ("deaths", "shared-cards", "overhead", "growth")


def runs(part: str, *flags: str) -> list[Run]:
    return list(runs_of(parse([part, "--out", "out", *flags])))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("cards", [2, 8])
@pytest.mark.parametrize("part", PARTS)
def test_the_benchmarks_understand_every_run(part: str, cards: int, device: str) -> None:
    found = runs(part, "--cards", str(cards), "--device", device)
    assert len({run.name for run in found}) == len(found) > 0
    for run in found:
        _, _, module, *argv = run.command(Path("out"))
        if module == "benchmarks.gpu_serve":
            serve = gpu_serve.parse(argv)
            assert gpu_serve.faults_of(serve.faults, serve.ranks)
            entries_of(serve.config)
        else:
            assert module == "benchmarks.gpu_server"
            gpu_server.parse(argv)


def test_eight_cards_lose_up_to_four_and_thirty_two_ranks_up_to_sixteen() -> None:
    (deaths,), (shared,) = runs("deaths"), runs("shared-cards")
    serve = gpu_serve.parse(list(deaths.arguments))
    faults = gpu_serve.faults_of(serve.faults, serve.ranks)
    assert len(faults) == 12
    assert {fault.num_ranks for fault in faults if fault.number is signal.SIGKILL} == {1, 2, 3, 4}
    serve = gpu_serve.parse(list(shared.arguments))
    assert (serve.ranks, serve.no_cuda_mps) == (32, True)
    assert serve.faults == ["KILL:1", "KILL:2", "KILL:4", "KILL:8", "KILL:16"]


def test_v32s_shape_is_one_that_card_ranks_hold(tmp_path: Path) -> None:
    shape = V32_SHAPE | {"num_hidden_layers": 8, "moe_intermediate_size": 512}
    config = SEEDED_CONFIGS["deepseek_v32"] | shape
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = sizes_of(tmp_path)
    assert sizes is not None
    assert (sizes.num_experts, sizes.inner_size, len(sizes.moe_layers)) == (256, 512, 7)


def test_a_folder_without_results_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no results"):
        tables(tmp_path)


def test_deaths_become_a_table(tmp_path: Path) -> None:
    spread = Spread(count=9, p50=12.4, p99=20.6, max=31.0)
    result = FaultResult(
        fault="KILL:2",
        struck_at=5.0,
        victims=(1, 2),
        gap_ms=spread,
        gap_on_victims_ms=None,
        gap_on_survivors_ms=None,
        usual_gap_p99_ms=3.25,
        first_token_ms=None,
        tokens_per_s_before=20_000.0,
        tokens_per_s_after=15_000.0,
        surviving_share=0.75,
        recovered_ms=840.0,
        streams=300,
        failed=("a stream",),
        checked=120,
        wrong=(),
        epochs=(),
        worst=(),
        phases=(),
        rejoined_s=None,
        in_place=(),
        rejoin_gap_ms=None,
        rejoin_first_token_ms=None,
    )
    faults = {"faults": msgspec.to_builtins([result])}
    (tmp_path / "deaths.json").write_text(json.dumps(faults))
    assert tables(tmp_path).splitlines()[-1] == (
        "| KILL:2 | 12 / 21 / 31 | 3.2 | 20,000 → 15,000 | 0.75 | 0.8 | 300 | 1 / 0 of 120 "
        "| never | - |"
    )


def rate_row(tokens_per_s: float, batch: int = 8, ranks: int = 2) -> ServerRow:
    spread = Spread(count=9, p50=10.0, p99=20.0, max=30.0)
    return ServerRow(
        ranks=ranks,
        cards=ranks,
        batch=batch,
        rounds=1,
        errors=(),
        ttft_ms=spread,
        itl_ms=spread,
        steady_s=1.0,
        tokens_per_s=tokens_per_s,
        step_ms=4.0,
        context=100.0,
        floor=Floor(gigabytes=1.0, step_ms=2.0, share=0.5),
    )


def write_rates(file: Path, *rows: ServerRow) -> None:
    file.write_text(json.dumps({"rows": msgspec.to_builtins(list(rows))}))


def test_kinds_are_compared_by_the_medians_of_their_rounds(tmp_path: Path) -> None:
    for index, (elastic, static) in enumerate([(990.0, 1000.0), (980.0, 990.0), (900.0, 1010.0)]):
        write_rates(tmp_path / f"overhead-elastic-{index}.json", rate_row(elastic))
        write_rates(tmp_path / f"overhead-static-{index}.json", rate_row(static))
    lines = tables(tmp_path).splitlines()
    assert lines[-2:] == [
        "| 8 | elastic | 980 | 0.980 | 10.0 | 10.00 |",
        "| 8 | static | 1,000 | 1.000 | 10.0 | 10.00 |",
    ]


def test_growth_is_a_table_and_a_picture(tmp_path: Path) -> None:
    rows = [rate_row(1000.0 * ranks, ranks=ranks) for ranks in (1, 2, 4)]
    write_rates(tmp_path / "growth-qwen3-30b.json", *rows)
    assert "| 4 | 8 | 4,000 | 4.00 | 50% | 10.0 | 10.00 / 20.00 |" in tables(tmp_path)
    save_picture(tmp_path, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
