"""What all checkpoints have in common, read for a CUDA rank's decoder, and the refusal of configs
that such a decoder does not serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gpu_worker.checkpoint.common_tensors import (
    FINAL_NORM_NAME,
    dense_size,
    head_name,
)
from gpu_worker.checkpoint.gqa_shape import GqaShape
from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.checkpoint.rope import read_rope
from gpu_worker.checkpoint.tied_head import EMBEDDING_NAME
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes, Routing
from gpu_worker.cuda.weights.decoder_weights import (
    DecoderWeights,
    GqaWeights,
    LayerWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
)
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.errors import CheckpointError
from shared.model_spec import ModelSpec

_TILE = 16


def read_decoder(
    reader: WeightReader, spec: ModelSpec, read_layer: Callable[[int], LayerWeights]
) -> DecoderWeights:
    """Raises CheckpointError."""
    embedding_VH = reader.read(EMBEDDING_NAME)
    head = head_name(spec)
    return DecoderWeights(
        embedding_VH=embedding_VH,
        layers=tuple(read_layer(layer) for layer in range(spec.num_layers)),
        final_norm_H=reader.read(FINAL_NORM_NAME),
        w_head_VH=embedding_VH if head == EMBEDDING_NAME else reader.read(head),
    )


def read_layer(
    reader: WeightReader,
    layer: int,
    attention: GqaWeights | MlaWeights,
    mlp: MoeWeights | MlpWeights,
) -> LayerWeights:
    """Adds the layer's norms and output projection. Raises CheckpointError."""
    prefix = f"model.layers.{layer}"
    return LayerWeights(
        input_norm_H=reader.read(f"{prefix}.input_layernorm.weight"),
        attention=attention,
        w_o_HO=reader.read_matrix(f"{prefix}.self_attn.o_proj.weight"),
        mlp_norm_H=reader.read(f"{prefix}.post_attention_layernorm.weight"),
        mlp=mlp,
    )


def decoder_sizes(
    spec: ModelSpec,
    *,
    attention: GqaShape | MlaShape,
    routing: Routing,
    shared_size: int = 0,
    rotates_partly: bool = False,
    windows: tuple[int, ...] = (),
    clamped_experts: bool = False,
) -> DecoderSizes:
    """`rotates_partly`: the family may rotate a part of each head. Raises CheckpointError for a
    rotary embedding that CUDA ranks do not serve, and for more experts a token than there are."""
    too_many = f"top-{spec.top_k} of {spec.num_experts} experts"
    raise_if_unsupported_on_cuda({too_many: spec.top_k > spec.num_experts})
    has_dense = len(spec.moe_layers) < spec.num_layers
    return DecoderSizes(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        attention=attention,
        rope=read_rope(spec.raw, kinds=("default", "yarn"), may_be_partial=rotates_partly),
        moe_layers=spec.moe_layers,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        inner_size=spec.moe_intermediate_size,
        routing=routing,
        shared_size=shared_size,
        dense_size=dense_size(spec) if has_dense else 0,
        windows=windows,
        clamped_experts=clamped_experts,
        norm_eps=float(spec.raw.get("rms_norm_eps", 1e-6)),
    )


def read_mlp(reader: WeightReader, prefix: str) -> MlpWeights:
    return MlpWeights(
        w_gate_up_JH=reader.read_matrix(
            f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", in_parts=False
        ),
        w_down_HI=reader.read_matrix(f"{prefix}.down_proj.weight"),
    )


def raise_if_unsupported_on_cuda(reasons: Mapping[str, bool]) -> None:
    """Raises CheckpointError for the first reason that applies."""
    for reason, applies in reasons.items():
        if applies:
            raise CheckpointError(
                f"config.json asks for {reason}, which CUDA ranks do not serve; start the ranks "
                "with --device cpu"
            )


def raise_if_not_silu(spec: ModelSpec) -> None:
    """Raises CheckpointError if MLPs have another activation."""
    act = spec.raw.get("hidden_act", "silu")
    raise_if_unsupported_on_cuda({f"activation {act!r} (hidden_act)": act not in ("silu", "swish")})


def check_tiles(sizes: DecoderSizes) -> None:
    """Raises CheckpointError if the kernels' tiles do not divide the matrices evenly, or if their
    blocks do not hold a head."""
    even = {
        "a hidden size": sizes.hidden_size,
        "experts": sizes.inner_size,
        "shared experts": sizes.shared_size,
        "dense layers": sizes.dense_size,
    }
    shape = sizes.attention
    if isinstance(shape, MlaShape):
        even |= {"a q_lora_rank": shape.q_lora_rank, "values": shape.v_head_dim}
        even |= {"heads that are not rotated": shape.qk_nope_head_dim}
        whole = {"a kv_lora_rank": shape.rank, "rotated heads": shape.qk_rope_head_dim}
        if shape.num_index_heads:
            whole |= {"an indexer's heads": shape.index_head_dim}
    else:
        whole = {"heads": shape.head_dim}
    raise_if_unsupported_on_cuda(
        {f"{what} of {n}, no multiple of {_TILE}": n % _TILE > 0 for what, n in even.items()}
        | {
            f"{what} of {n}, no power of two from {_TILE}": n < _TILE or n & (n - 1) > 0
            for what, n in whole.items()
        }
    )
