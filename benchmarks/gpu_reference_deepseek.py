"""DeepSeek-V2 or V3 of transformers with our decoder's weights: the reference for its logits. V3 if
routing is by sigmoid. Part of `benchmarks.gpu`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_reference import expert_tensors, filled_model
from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import (
    DecoderWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
)
from gpu_worker.cuda.weights.scaled_blocks import plain


def deepseek_reference(
    sizes: DecoderSizes,
    weights: DecoderWeights,
    slots: CudaSlots,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """Expert e must be in slot e; dense layers come first. If `dtype` is None it is that of the
    weights."""
    import transformers

    kind = "DeepseekV3" if sizes.routing.sigmoid else "DeepseekV2"
    config = getattr(transformers, f"{kind}Config")(**_config(sizes))
    tensors = {
        "model.embed_tokens.weight": weights.embedding_VH,
        "model.norm.weight": weights.final_norm_H,
        "lm_head.weight": weights.w_head_VH,
    }
    shape = sizes.attention
    assert isinstance(shape, MlaShape), "DeepSeek's attention"
    for layer, own in enumerate(weights.layers):
        prefix = f"model.layers.{layer}"
        assert isinstance(own.attention, MlaWeights), "DeepSeek's attention"
        tensors |= {
            f"{prefix}.input_layernorm.weight": own.input_norm_H,
            f"{prefix}.post_attention_layernorm.weight": own.mlp_norm_H,
            f"{prefix}.self_attn.o_proj.weight": plain(own.w_o_HO),
        }
        tensors |= _attention(f"{prefix}.self_attn", shape, own.attention)
        if isinstance(own.mlp, MlpWeights):
            tensors |= _mlp(f"{prefix}.mlp", own.mlp)
        else:
            index = sizes.moe_layers.index(layer)
            tensors |= _moe(f"{prefix}.mlp", own.mlp)
            tensors |= expert_tensors(f"{prefix}.mlp.experts", sizes, slots, index)
    model_kind = getattr(transformers, f"{kind}ForCausalLM")
    return filled_model(model_kind, config, tensors, weights.device, dtype or weights.dtype)


def _config(sizes: DecoderSizes) -> dict[str, Any]:
    shape, routing = sizes.attention, sizes.routing
    assert isinstance(shape, MlaShape), "DeepSeek's attention"
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.dense_size,
        "moe_intermediate_size": sizes.inner_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads,
        "n_shared_experts": sizes.shared_size // sizes.inner_size,
        "n_routed_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.top_k,
        "routed_scaling_factor": routing.factor,
        "n_group": routing.num_groups,
        "topk_group": routing.topk_group,
        "topk_method": "noaux_tc" if routing.sigmoid else "group_limited_greedy",
        "norm_topk_prob": routing.normalise,
        "kv_lora_rank": shape.rank,
        "q_lora_rank": shape.q_lora_rank or None,
        "qk_rope_head_dim": shape.qk_rope_head_dim,
        "qk_nope_head_dim": shape.qk_nope_head_dim,
        "v_head_dim": shape.v_head_dim,
        "rope_interleave": shape.interleaved,
        "first_k_dense_replace": sizes.num_layers - sizes.num_moe_layers,
        "rms_norm_eps": sizes.norm_eps,
        "max_position_embeddings": sizes.rope.context_tokens_max,
        "rope_parameters": {
            **sizes.rope.scaling,
            "rope_type": sizes.rope.kind,
            "rope_theta": sizes.rope.theta,
        },
        "tie_word_embeddings": False,
    }


def _attention(prefix: str, shape: MlaShape, own: MlaWeights) -> dict[str, Tensor]:
    q_size = shape.q_lora_rank or shape.q_size
    q_in, kv_a = plain(own.w_in_CH).split([q_size, shape.rank + shape.qk_rope_head_dim])
    kv_b_AER = torch.cat([own.w_uk_ARF.transpose(1, 2), own.w_uv_AGR], dim=1)
    tensors = {
        f"{prefix}.kv_a_proj_with_mqa.weight": kv_a,
        f"{prefix}.kv_a_layernorm.weight": own.kv_norm_R,
        f"{prefix}.kv_b_proj.weight": kv_b_AER.reshape(-1, shape.rank),
    }
    if own.q_norm_M is None or own.w_q_NM is None:
        return tensors | {f"{prefix}.q_proj.weight": q_in}
    return tensors | {
        f"{prefix}.q_a_proj.weight": q_in,
        f"{prefix}.q_a_layernorm.weight": own.q_norm_M,
        f"{prefix}.q_b_proj.weight": plain(own.w_q_NM),
    }


def _mlp(prefix: str, own: MlpWeights) -> dict[str, Tensor]:
    gate, up = plain(own.w_gate_up_JH).chunk(2)
    return {
        f"{prefix}.gate_proj.weight": gate,
        f"{prefix}.up_proj.weight": up,
        f"{prefix}.down_proj.weight": plain(own.w_down_HI),
    }


def _moe(prefix: str, own: MoeWeights) -> dict[str, Tensor]:
    tensors = {f"{prefix}.gate.weight": own.w_router_EH}
    if own.correction_E is not None:
        tensors[f"{prefix}.gate.e_score_correction_bias"] = own.correction_E
    if own.shared is not None:
        tensors |= _mlp(f"{prefix}.shared_experts", own.shared)
    return tensors
