"""`starfish plan` reports what the planner does with loads from a file or generated ones, and
rejects impossible flags in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from cli.plan.command import plan
from shared.expert_bytes import expert_bytes
from shared.model_spec import read_model_spec

SMALL = ["--ranks", "4", "--nodes", "2", "--layers", "3", "--experts", "16", "--redundant", "16"]


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, list(arguments))


def report(*arguments: str) -> dict[str, object]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, object] = json.loads(result.stdout)
    return parsed


def test_a_second_copy_of_everything_survives_each_death_without_a_load() -> None:
    answer = report(*SMALL)
    assert answer["survives"]["rank_failures"] == 1  # type: ignore[index]
    deaths = [*answer["rank_deaths"], *answer["node_deaths"]]  # type: ignore[misc]
    assert len(deaths) == 4 + 2
    for death in deaths:
        assert (death["lost"], death["moved"], death["load_bytes"]) == (0, 0, 0)


def test_memory_counts_filled_and_spare_slots_of_every_layer() -> None:
    memory = report(*SMALL, "--slots", "10", "--expert-mib", "2")["memory"]
    assert memory == {
        "bytes_per_expert": 2 * 2**20,
        "filled_bytes_per_rank_max": 3 * 8 * 2 * 2**20,
        "slot_bytes_per_rank": 3 * 10 * 2 * 2**20,
    }


@pytest.mark.parametrize("suffix", ["npy", "json", "csv"])
def test_loads_come_from_a_file_and_decide_layers_and_experts(tmp_path: Path, suffix: str) -> None:
    loads = np.array([[8.0, 1.0, 1.0, 1.0], [1.0, 1.0, 8.0, 1.0]])
    file = tmp_path / f"loads.{suffix}"
    if suffix == "npy":
        np.save(file, loads)
    elif suffix == "json":
        file.write_text(json.dumps(loads.tolist()))
    else:
        np.savetxt(file, loads, delimiter=",")
    answer = report("--loads", str(file), "--ranks", "2", "--nodes", "1", "--redundant", "2")
    assert (answer["layers"], answer["experts"]) == (2, 4)
    assert answer["balance"]["max"] < 1.3  # type: ignore[index,operator]


def test_too_few_slots_say_how_many_experts_stay_out() -> None:
    answer = report(*SMALL, "--slots", "3")
    assert answer["left_in_host_memory"] == 3 * (16 - 12)


def test_the_table_names_what_is_survived() -> None:
    result = run(*SMALL)
    assert result.exit_code == 0
    assert "any 1 rank failure" in result.stdout
    assert "If one node dies" in result.stdout


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.png"
    assert run(*SMALL, "--png", str(file), "--death", "1").exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ranks", "2", "--nodes", "3"], "3 nodes need at least as many ranks"),
        (["--loads", "/nowhere/loads.npy"], "cannot read /nowhere/loads.npy"),
        (["--model", "/nowhere"], "/nowhere is not a folder"),
        ([*SMALL, "--png", "x.png", "--death", "9"], "--death a rank below 4"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(arguments: list[str], sentence: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("starfish: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "loads.json"
    file.write_text('{"a": 1}')
    result = run("--loads", str(file))
    assert result.exit_code == 1
    assert "is not a table of numbers" in result.stderr


def test_impossible_loads_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "loads.csv"
    file.write_text("1,2,-3\n")
    result = run("--loads", str(file), "--ranks", "2", "--nodes", "1", "--redundant", "0")
    assert result.exit_code == 1
    assert "must be finite and not negative" in result.stderr


def checkpoint(folder: Path, other_bytes: int = 0, **entries: object) -> Path:
    """DeepSeek-V3's sizes in Qwen3's names, with 8 layers: bytes are all that counts here."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": 8,
        "hidden_size": 7168,
        "vocab_size": 1000,
        "num_attention_heads": 8,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "max_position_embeddings": 4096,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config | entries))
    num_bytes = bytes_per_expert(folder) * 8 * 256 + other_bytes
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(num_bytes)
    return folder


def bytes_per_expert(folder: Path) -> int:
    return expert_bytes(read_model_spec(folder))


def fp8(edge: int) -> dict[str, object]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": [edge, edge]}}


def test_the_bytes_of_an_expert_follow_from_the_format_of_the_checkpoint(tmp_path: Path) -> None:
    codes, scales = 3 * 7168 * 2048, 3 * 56 * 16
    assert bytes_per_expert(checkpoint(tmp_path)) == 2 * codes
    assert bytes_per_expert(checkpoint(tmp_path, **fp8(128))) == codes + 4 * scales
    assert bytes_per_expert(checkpoint(tmp_path, **fp8(64))) == 2 * codes, "widened on load"
    answer = report("--model", str(tmp_path), "--ranks", "16", "--nodes", "2", "--redundant", "0")
    assert answer["memory"]["bytes_per_expert"] == 2 * codes  # type: ignore[index]
    mxfp4 = {"quantization_config": {"quant_method": "mxfp4"}}
    assert bytes_per_expert(checkpoint(tmp_path, **mxfp4)) == codes // 2 + codes // 32
    odd = checkpoint(tmp_path, moe_intermediate_size=2040, **mxfp4)
    assert bytes_per_expert(odd) == 2 * 3 * 7168 * 2040, "no whole groups"


def test_cards_that_are_too_small_are_refused_with_the_ranks_that_would_do(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, other_bytes=10 * 2**30)
    flags = ("--model", str(folder), "--nodes", "1", "--redundant", "0", "--card-gib", "20")
    refused = run(*flags, "--ranks", "8")
    assert refused.exit_code == 1
    assert "32 slots on each rank take 21.0 GiB, and the other weights 10.0 GiB" in refused.stderr
    assert "15 slots fit, which takes --ranks 18 for 256 slots" in refused.stderr
    assert run(*flags, "--ranks", "17").exit_code == 1
    assert run(*flags, "--ranks", "18").exit_code == 0
    checkpoint(tmp_path, other_bytes=10 * 2**30, **fp8(128))
    assert run(*flags, "--ranks", "9").exit_code == 0


def test_cards_that_do_not_even_hold_the_other_weights_are_told_so(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, other_bytes=30 * 2**30)
    refused = run("--model", str(folder), "--ranks", "8", "--nodes", "1", "--card-gib", "20")
    assert refused.exit_code == 1
    assert "take larger cards" in refused.stderr
