"""Every tile of a matrix multiplication, compiled for an H100, adds 16 positions at a time: that of
decode by one instruction of a warp, that of a large step by one of a warp group. Batch invariance
rests on this; that both round alike, only a device can show (test_prefill_kernels). The conversion
from fp8 uses the card's own instruction. Needs Triton's compiler, but no device."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks.gpu_kernels import dense_tiles, down_tiles, up_tiles  # noqa: E402
from gpu_worker.checkpoint.gqa_shape import (  # noqa: E402
    QK_NORM_HEAD,
    QK_NORM_NONE,
    QK_NORM_WHOLE,
)
from gpu_worker.cuda.kernels import (  # noqa: E402
    attention,
    chunk_attention,
    experts,
    indexer,
    latent,
    linear,
    mxfp4_experts,
    projected_heads,
    residual,
    scaled_experts,
    scaled_rows,
    tall_experts,
)

pytestmark = pytest.mark.gpu

H100 = GPUTarget("cuda", 90, 32)
ONE_INSTRUCTION = {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}
OF_WARP_GROUPS = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16")
HIDDEN, INNER = 7168, 2048
CHOICE = ["*fp32", "*i32", "*i32", "*fp32", "fp32"]
LINEAR = ["*bf16", "*bf16", "*fp32", "i32"]
EXPERTS = ["*bf16", "*bf16", "*i64", "*i32", "*i32", "*i32", "*bf16"]
PLAIN_EXPERTS, GPT_OSS_EXPERTS = ({"BIASED": on, "CLAMPED": on} for on in (False, True))


def instructions(
    kernel: Any, arguments: list[str], constants: dict[str, Any], warps: int, stages: int
) -> set[str]:
    """The instructions of the matrix multiplications that `kernel` compiles to."""
    text = compiled(kernel, arguments, constants, warps, stages)
    return set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)[.\w]*", text))


def compiled(
    kernel: Any, arguments: list[str], constants: dict[str, Any], warps: int, stages: int
) -> str:
    """The kernel's PTX, with aligned pointers."""
    return str(assembled(kernel, arguments, constants, warps, stages)["ptx"])


def assembled(
    kernel: Any, arguments: list[str], constants: dict[str, Any], warps: int, stages: int
) -> Any:
    """The output of each stage of the compiler."""
    kinds = iter(arguments)
    signature = {n: "constexpr" if n in constants else next(kinds) for n in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=H100, options=options).asm


def summed(kernel: Any, arguments: list[str], constants: dict[str, Any], warps: int) -> list[str]:
    """The layouts over threads of the tensors that `kernel` sums. They determine a sum's order."""
    text = assembled(kernel, arguments, constants, warps, 1)["ttgir"]
    reductions = re.findall(r'"tt\.reduce"(.*?)\}\) : \((tensor<.*?>)[,)]', text, re.DOTALL)
    sums = [tensor for body, tensor in reductions if "arith.addf" in body]
    return sorted(spelled_out(sums, text))


def multiplied(
    kernel: Any, arguments: list[str], constants: dict[str, Any], warps: int
) -> list[str]:
    """The layouts of the operands of each dot product of `kernel`, without the distribution of rows
    and columns over warps. They determine which positions an instruction adds."""
    text = assembled(kernel, arguments, constants, warps, 1)["ttgir"]
    products = re.findall(r"tt\.dot .*? : (tensor<.*?) loc", text)
    layouts = spelled_out(products, text)
    return [re.sub(r"warpsPerCTA = \[\d+, \d+\]", "", each) for each in layouts]


def spelled_out(tensors: list[str], text: str) -> list[str]:
    """Replaces the name of each layout by its definition in `text`."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", text, re.MULTILINE))
    return [re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), t) for t in tensors]


def linear_instructions(tile: linear.LinearTile) -> set[str]:
    constants = {
        "INNER": HIDDEN,
        "COLUMNS": 2112,
        "PART": HIDDEN // 4,
        "BLOCK_T": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
    }
    return instructions(linear._linear_parts, LINEAR, constants, tile.warps, tile.stages)


@pytest.mark.parametrize("rows", [1, 17, 33, 512])
def test_dense_tiles_take_the_one_instruction(rows: int) -> None:
    for tile in (linear._tile_for(rows), *dense_tiles(rows)):
        assert linear_instructions(tile) == ONE_INSTRUCTION


def assert_of_warp_groups(found: set[str]) -> None:
    assert found
    assert all(OF_WARP_GROUPS.fullmatch(name) for name in found), found


@pytest.mark.parametrize("tile", linear._WHOLE_TILES)
def test_whole_products_are_left_to_warp_groups(tile: linear.LinearTile) -> None:
    constants = {
        "INNER": HIDDEN,
        "COLUMNS": 2112,
        "STEPS": HIDDEN // 4 // tile.depth,
        "BLOCK_T": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "ABREAST": 8,
    }
    kinds = [described(tile.rows, tile.depth), described(tile.columns, tile.depth), "*fp32", "i32"]
    found = instructions(linear._linear_whole, kinds, constants, tile.warps, tile.stages)
    assert_of_warp_groups(found)


def described(rows: int, columns: int) -> str:
    return f"tensordesc<bf16[{rows}, {columns}]>"


def test_tall_tiles_of_experts_are_left_to_warp_groups() -> None:
    sizes = {"HIDDEN": HIDDEN, "INNER": INNER, "BLOCK_T": tall_experts.TALL_ROWS, "BLOCK_K": 64}
    for kernel, columns, of_kernel in (
        (tall_experts._gate_up_tall, tall_experts._GATE_UP_COLUMNS, {"DIVISOR": 8} | PLAIN_EXPERTS),
        (tall_experts._down_tall, tall_experts._DOWN_COLUMNS, {"PADDED": False, "BIASED": False}),
    ):
        kinds = ["*bf16", described(columns, 64), "*i32", "*i32", "*i32", "*bf16", "*bf16"]
        constants = sizes | {"BLOCK_N": columns} | of_kernel
        found = instructions(kernel, kinds, constants, tall_experts._WARPS, tall_experts._STAGES)
        assert_of_warp_groups(found)
    rows = experts._MANY_ROWS
    assert_of_warp_groups(gate_up_instructions(experts._GATE_UP_MANY, rows))
    assert_of_warp_groups(expert_instructions(experts._down, experts._DOWN_MANY, rows))


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_expert_tiles_take_the_one_instruction(rows: int) -> None:
    lone = [experts.dense_mlp_tile(rows, inner) for inner in (INNER, 18_432)]
    routed = [] if rows == 64 else [experts._GATE_UP_GROUPED, *up_tiles()]
    for tile in (*lone, *routed):
        assert gate_up_instructions(tile, rows) == ONE_INSTRUCTION
    for tile in () if rows == 64 else (experts._DOWN_GROUPED, *down_tiles()):
        assert expert_instructions(experts._down, tile, rows) == ONE_INSTRUCTION


def test_lone_pairs_that_choose_for_themselves_take_the_one_instruction() -> None:
    alone = {"GROUPED": False, "EXPERTS": 128, "BLOCK_E": 128, "CHUNK": 32, "NORMALISE": True}
    assert gate_up_instructions(experts._GATE_UP_UNGROUPED, 16, **alone) == ONE_INSTRUCTION


def gate_up_instructions(tile: experts.ExpertTile, rows: int, **more: int) -> set[str]:
    given = {"DIVISOR": 8, "EXPERTS": 0, "BLOCK_E": 1, "CHUNK": 1, "NORMALISE": False}
    given |= PLAIN_EXPERTS
    return expert_instructions(experts._gate_up, tile, rows, **(given | more))


def expert_instructions(kernel: Any, tile: experts.ExpertTile, rows: int, **more: int) -> set[str]:
    constants = {
        "HIDDEN": HIDDEN,
        "INNER": INNER,
        "ROW": HIDDEN,
        "BLOCK_T": rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "GROUPED": True,
        "PADDED": False,
        "BIASED": False,
        **more,
    }
    kinds = [*EXPERTS, *(CHOICE if "EXPERTS" in constants else []), "*bf16"]
    return instructions(kernel, kinds, constants, tile.warps, tile.stages)


def test_experts_with_biases_and_another_activation_take_the_same_instructions() -> None:
    sizes = GPT_OSS_EXPERTS | {"HIDDEN": 2880, "INNER": 2880, "BLOCK_K": 64}
    rows_apart = {"ROW": 3072}
    for tile, rows in ((experts._GATE_UP_UNGROUPED, 16), (experts._GATE_UP_GROUPED, 16)):
        assert gate_up_instructions(tile, rows, **sizes, **rows_apart) == ONE_INSTRUCTION
    biased = {"HIDDEN": 2880, "INNER": 2880, "BLOCK_K": 64, "BIASED": True}
    assert (
        expert_instructions(experts._down, experts._DOWN_GROUPED, 16, **biased) == ONE_INSTRUCTION
    )
    many = experts._GATE_UP_MANY, experts._MANY_ROWS
    assert_of_warp_groups(gate_up_instructions(*many, **sizes))
    many_down = experts._DOWN_MANY._replace(columns=64), experts._MANY_ROWS
    assert_of_warp_groups(expert_instructions(experts._down, *many_down, **biased))
    kinds = ["*bf16", described(64, 64), "*i32", "*i32", "*i32", "*bf16", "*bf16"]
    tall = {"BLOCK_T": tall_experts.TALL_ROWS, "BLOCK_N": 64}
    for kernel, of_kernel in (
        (tall_experts._gate_up_tall, sizes | {"DIVISOR": 4}),
        (tall_experts._down_tall, biased | {"PADDED": False}),
    ):
        found = instructions(kernel, kinds, tall | of_kernel, tall_experts._WARPS, 4)
        assert_of_warp_groups(found)


SCALED = ["*bf16", "*fp8e4nv", "*fp32", "*i64", "*i32", "*i32", "*i32", "*bf16"]


@pytest.mark.parametrize(
    ("rows", "grouped"),
    [(16, False), (16, True), (32, True), (64, True), (scaled_experts._TALL_ROWS, True)],
)
def test_scaled_experts_are_left_to_warp_groups_and_widened_in_pairs(
    rows: int, grouped: bool
) -> None:
    """All tiles alike: those of one row, too. The rate of the compiler's own conversion to bfloat16
    would set the pace."""
    sizes = {"HIDDEN": HIDDEN, "INNER": INNER, "ROW": HIDDEN, "BLOCK_T": rows}
    sizes |= {"BLOCK_K": 128, "IN_PAIRS": True}
    halved = rows >= scaled_experts._TALL_ROWS
    shape = sizes | {"GROUPED": grouped, "PADDED": False, "HALVED": halved}
    choice = {"EXPERTS": 0, "BLOCK_E": 1, "CHUNK": 1, "NORMALISE": False}
    if not grouped:
        choice = {"EXPERTS": 256, "BLOCK_E": 256, "CHUNK": 32, "NORMALISE": True}
    for kernel, kinds, tile, more in (
        (scaled_experts._gate_up, [*SCALED, *CHOICE], scaled_experts._GATE_UP_GROUPED, choice),
        (scaled_experts._down, SCALED, scaled_experts._DOWN_GROUPED, {}),
    ):
        tile = scaled_experts._TALL if halved else tile
        constants = shape | {"BLOCK_C": tile.columns, "UNROLL": tile.unroll} | more
        if "EXPERTS" in more:
            constants["DIVISOR"] = 8
        text = compiled(kernel, kinds, constants, tile.warps, tile.stages)
        found = set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)[.\w]*", text))
        assert_of_warp_groups(found)
        assert "cvt.rn.f16x2.e4m3x2" in text
        assert "cvt.rn.bf16x2.f32" in text
        assert "cvt.rn.bf16.f32" not in text


MXFP4 = ["*bf16", "*i32", "*i32", "*i64", "*i32", "*i32", "*i32", "*bf16"]


@pytest.mark.parametrize(
    ("rows", "grouped"),
    [(16, False), (16, True), (32, True), (64, True), (mxfp4_experts._TALL_ROWS, True)],
)
def test_mxfp4_experts_are_left_to_warp_groups_and_widened_where_they_are_multiplied(
    rows: int, grouped: bool
) -> None:
    """A thread reads the words whose codes it multiplies, and what it widens stays with it."""
    halved = rows >= mxfp4_experts._TALL_ROWS
    shape = {"HIDDEN": 2880, "INNER": 2880, "ROW": 3072, "BLOCK_T": rows, "GROUPED": grouped}
    shape |= {"PADDED": False, "HALVED": halved, "BIASED": True, "BY_CARD": True}
    choice = {"EXPERTS": 0, "BLOCK_E": 1, "CHUNK": 1, "NORMALISE": False}
    if not grouped:
        choice = {"EXPERTS": 32, "BLOCK_E": 32, "CHUNK": 32, "NORMALISE": True}
    tile = mxfp4_experts._GROUPED if grouped else mxfp4_experts._UNGROUPED
    tile = mxfp4_experts._TALL if halved else tile
    shape |= {"BLOCK_C": tile.columns, "BLOCK_K": tile.depth}
    for kernel, kinds, more in (
        (mxfp4_experts._gate_up, [*MXFP4, *CHOICE, "*bf16"], choice | {"DIVISOR": 4}),
        (mxfp4_experts._down, [*MXFP4, "*bf16"], {}),
    ):
        constants = shape | more | ({"CLAMPED": True} if more else {})
        found = assembled(kernel, kinds, constants, tile.warps, tile.stages)
        assert_of_warp_groups(
            set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)[.\w]*", found["ptx"]))
        )
        assert "fma.rn.bf16x2" in found["ptx"]
        moved = re.findall(r"ttg.convert_layout .* : tensor<(\w+),", found["ttgir"])
        assert f"{tile.columns}x{tile.depth}xbf16" not in moved


@pytest.mark.parametrize("rows", [16, 32])
def test_products_by_heads_take_the_one_instruction(rows: int) -> None:
    into = {"PARTS": 4, "COLUMNS": 24_576, "STRIDE": 192, "SIZE": 512, "INNER": 128, "BLOCK_K": 64}
    out_of = {"PARTS": 1, "COLUMNS": 65_536, "STRIDE": 512, "SIZE": 128, "INNER": 512}
    for constants in (into, out_of | {"BLOCK_K": 128}):
        constants = {"FIRST": 0, "HEADS": 128, "BLOCK_T": rows, "BLOCK_N": 64, **constants}
        kinds = ["*fp32" if constants["PARTS"] > 1 else "*bf16", "*bf16", "*bf16", "i32", "i32"]
        assert instructions(latent._multiply_heads, kinds, constants, 4, 2) == ONE_INSTRUCTION


@pytest.mark.parametrize("rows", [16, 32])
def test_products_by_heads_take_a_whole_product_as_they_take_parts(rows: int) -> None:
    """Large steps hand them one part, small ones four."""
    sizes = {"COLUMNS": 24_576, "STRIDE": 192, "SIZE": 512, "INNER": 128, "BLOCK_K": 64}
    sizes |= {"FIRST": 0, "HEADS": 128, "BLOCK_T": rows, "BLOCK_N": 64}
    kinds = ["*fp32", "*bf16", "*bf16", "i32", "i32"]
    kernel = latent._multiply_heads
    whole, parts = (multiplied(kernel, kinds, sizes | {"PARTS": parts}, 4) for parts in (1, 4))
    assert whole == parts
    assert len(whole) == 1


def test_rows_of_fp8_are_widened_by_the_cards_own_conversion() -> None:
    kinds = ["*fp8e4nv", "*fp32", "*i32", "*bf16", "i32", "i32", "i32"]
    constants = {"ROWS_OF_SLOT": 512, "PROGRAMS": 16, "GROUPS": 56, "BLOCK_G": 64, "SIZE": 128}
    text = compiled(scaled_rows._dequantise, kinds, constants, 8, 3)
    assert "cvt.rn.f16x2.e4m3x2" in text
    assert "ld.global.v4.b32" in text


CACHES = ["*bf16", "*fp8e4nv"]
of_every_cache = pytest.mark.parametrize("cache", CACHES, ids=["bf16", "fp8"])


@of_every_cache
@pytest.mark.parametrize("top_k", [0, 2048])
def test_latent_attention_takes_the_one_instruction(top_k: int, cache: str) -> None:
    tile = latent.LATENT_TILE
    constants = {
        "HEADS": 128,
        "RANK": 512,
        "ROTATED": 64,
        "BLOCK_A": tile.heads,
        "STEP": tile.step_tokens,
        "SPLIT": latent.SPLIT_TOKENS,
        "SPLITS_MAX": latent.SPLITS_MAX,
        "DOUBLINGS": 0,
        "BLOCK_TOKENS": 16,
        "TOP_K": top_k,
    }
    kinds = ["*bf16", "*bf16", cache, "*bf16", *["*i32"] * 3, *["*fp32"] * 3, "fp32", "i32", "i32"]
    kernel = latent._attend_latents
    assert instructions(kernel, kinds, constants, tile.warps, tile.stages) == ONE_INSTRUCTION


GQA = {"HEADS": 32, "KV_HEADS": 4, "ROWS": 16, "BLOCK_TOKENS": 16, "HEAD_DIM": 128, "GROUP": 8}
PROJECTED = ["*fp32", "*bf16", "*bf16", "*fp32", "*fp32", "*fp32", "*fp32", "fp32", "fp32"]
SEEN = {"WINDOW": 0, "SINKS": False}
NORMED = {"ROTATED": 128, "NORM": QK_NORM_HEAD, "BIASED": False, "CLIPPED": False}
QWEN3 = GQA | SEEN | NORMED
FAMILIES = {
    "Qwen3": QWEN3,
    "GLM": QWEN3 | {"HEADS": 96, "KV_HEADS": 8, "GROUP": 16, "ROTATED": 64, "BIASED": True},
    "gpt-oss": QWEN3
    | {"HEADS": 64, "KV_HEADS": 8, "HEAD_DIM": 64, "ROTATED": 64, "NORM": QK_NORM_NONE}
    | {"BIASED": True, "WINDOW": 128, "SINKS": True},
    "OLMoE": QWEN3
    | {"HEADS": 16, "KV_HEADS": 16, "GROUP": 1, "NORM": QK_NORM_WHOLE, "CLIPPED": True},
}
of_every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
TURNING_WARPS = projected_heads.ROTATION_WARPS


@of_every_cache
@of_every_family
def test_attention_takes_the_one_instruction(family: dict[str, Any], cache: str) -> None:
    given, warps = attending(0, family, cache), attention.ATTENTION_TILE.warps
    assert instructions(attention._attend_splits, *given, warps, 1) == ONE_INSTRUCTION
    turning = attending(4, family, cache)
    assert instructions(attention._attend_splits, *turning, TURNING_WARPS, 1) == ONE_INSTRUCTION


@of_every_cache
@of_every_family
def test_attention_of_chunks_is_left_to_warp_groups_and_stores_no_split(
    family: dict[str, Any], cache: str
) -> None:
    tile = chunk_attention.CHUNK_TILE
    kinds = ["*bf16", cache, cache, *["*i32"] * 4, *["*fp32"] * 4, "*bf16", "fp32", "i32", "i32"]
    constants = {name: value for name, value in family.items() if name in GQA | SEEN}
    constants |= {"ROWS": 64, "SPLIT": 64, "SPAN": 16, "APART": False}
    kernel = chunk_attention._attend_chunks
    assert_of_warp_groups(instructions(kernel, kinds, constants, tile.warps, tile.stages))


@of_every_cache
@of_every_family
def test_attention_sums_alike_whether_or_not_it_turns_its_own_queries(
    family: dict[str, Any], cache: str
) -> None:
    """With a joined operand, the dot products of queries once took positions in other groups of
    four. From a cache of fp8 they take the same as of bf16, and so as the warp groups of chunks."""
    warps, kernel = attention.ATTENTION_TILE.warps, attention._attend_splits
    given = multiplied(kernel, *attending(0, family), warps)
    assert given == multiplied(kernel, *attending(0, family, cache), warps)
    assert given == multiplied(kernel, *attending(4, family, cache), TURNING_WARPS)
    assert len(given) == 3


@of_every_family
def test_heads_are_normed_in_one_order_by_attention_and_before_it(family: dict[str, Any]) -> None:
    constants = {name: value for name, value in family.items() if name in GQA | NORMED}
    constants |= {"PARTS": 4}
    del constants["GROUP"]
    kinds = [*PROJECTED, "*i32", "*i32", "*i32", "*bf16", "*bf16", "*bf16", "i32", "i32"]
    before = summed(projected_heads._rotate_and_store, kinds, constants, TURNING_WARPS)
    assert before == summed(attention._attend_splits, *attending(4, family), TURNING_WARPS)
    assert len(before) == (2 if family["NORM"] == QK_NORM_HEAD else 0)


def test_the_router_sums_alike_in_the_norm_before_it_and_by_itself() -> None:
    hidden, warps = 2048, residual._router_warps(2048)
    shape = {"HIDDEN": hidden, "BLOCK_H": hidden, "EXPERTS": 128, "BLOCK_E": 8}
    kinds = ["*fp32", "*fp32", "*bf16", "*fp32", "*bf16", "*fp32", "*bf16", "*fp32", "*fp32"]
    more = {"PARTS": 4, "BIASED": False, "ROUTER_BIASED": False}
    fused = summed(residual._add_norm, [*kinds, "fp32", "i32"], shape | more, warps)
    scores = [tensor for tensor in fused if "8x2048" in tensor]
    assert len(scores) == 1
    for by_four in (False, True):
        constants = shape | {"BLOCK_T": 32, "BY_FOUR": by_four, "BIASED": False}
        kinds = ["*bf16", "*bf16", "*fp32", "*fp32", "i32"]
        assert summed(residual._score_rows, kinds, constants, warps) == scores


def test_a_last_arrival_sees_what_all_have_stored_before_theirs() -> None:
    text = compiled(attention._attend_splits, *attending(4, QWEN3), TURNING_WARPS, 1)
    order = re.findall(r"st\.global|bar\.sync|atom\S+|ld\.global", text)
    added = [place for place, name in enumerate(order) if name.startswith("atom")]
    assert [order[place] for place in added] == ["atom.global.gpu.acq_rel.add.u32"] * 2
    for place in added:
        assert order[place - 1] == "bar.sync"
        assert order[place + 1] == "bar.sync"


def attending(
    parts: int, family: dict[str, Any], cache: str = "*bf16"
) -> tuple[list[str], dict[str, Any]]:
    constants = family | {"PARTS": parts, "SPLIT": 64, "SPAN": 16, "TILED": False}
    pointers = ["*bf16", cache, cache] + ["*i32"] * 4 + ["*fp32"] * 3
    merging = ["*fp32", "*fp32", "*fp32", "*i32", "*fp32", "*bf16"]
    more = ["fp32", "i32", "i32", "i32", "i32"]
    return [*pointers, *PROJECTED, *merging, *more], constants


INDEXER = {"HEADS": 64, "SIZE": 128}
PAGING = ["*i32", "*i32", "*i32"]


def test_the_indexers_scores_take_one_instruction() -> None:
    tile = indexer.SCORE_TILE
    more = {"BLOCK_Y": 64, "STEP": tile.step_tokens, "BLOCK_TOKENS": 16, "TOP_K": 2048}
    kinds = ["*bf16", "*fp32", "*bf16", *PAGING, "*fp32", "i32", "i32"]
    kernel = indexer._score_positions
    assert len(instructions(kernel, kinds, INDEXER | more, tile.warps, tile.stages)) == 1


def test_what_is_around_the_indexers_scores_compiles_and_multiplies_no_matrices() -> None:
    keys = {"PARTS": 4, "COLUMNS": 192, "BLOCK_Y": 64, "HALF": 32, "BLOCK_TOKENS": 16}
    kinds = ["*fp32"] * 5 + [*PAGING, "*bf16", "*fp32", "fp32", "fp32", "i32", "i32"]
    assert not instructions(indexer._norm_and_store_keys, kinds, INDEXER | keys, 4, 3)
    queries = {"PARTS": 4, "HALF": 32, "BLOCK_Y": indexer._HEADS_AT_ONCE, "TOP_K": 2048}
    kinds = ["*fp32"] * 3 + ["*i32", "*bf16", "i32"]
    assert not instructions(indexer._rotate_index_queries, kinds, INDEXER | queries, 4, 3)
    choice = {
        "TOP_K": 2048,
        "BLOCK_TOKENS": 16,
        "BLOCK_C": indexer._CHOICE_TOKENS,
        "BITS": indexer._DIGIT_BITS,
    }
    kinds = ["*fp32", *PAGING, "*i32", "*i32", "i32", "i32"]
    kernel = indexer._select_positions
    assert not instructions(kernel, kinds, choice, indexer._CHOICE_WARPS, 3)
