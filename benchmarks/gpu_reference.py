"""transformers' Qwen3-MoE with views of our decoder's weights: the reference for its logits and its
speed. Part of `benchmarks.gpu`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu_worker.checkpoint.gqa_shape import GqaShape
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import DecoderWeights, GqaWeights, MoeWeights
from gpu_worker.cuda.weights.scaled_blocks import plain


def reference_model(
    sizes: DecoderSizes,
    weights: DecoderWeights,
    slots: CudaSlots,
    *,
    context: int,
    dtype: torch.dtype | None = None,
) -> Any:
    """Expert e must be in slot e. If `dtype` is None the weights are views, else converted
    copies."""
    import transformers

    shape = sizes.attention
    assert isinstance(shape, GqaShape), "Qwen3-MoE's"
    # transformers takes every entry of a config.json, and types only some.
    config = transformers.Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.inner_size,
        moe_intermediate_size=sizes.inner_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=sizes.routing.normalise,
        rms_norm_eps=sizes.norm_eps,
        rope_theta=sizes.rope.theta,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    tensors = _tensors(sizes, shape, weights, slots)
    return filled_model(
        transformers.Qwen3MoeForCausalLM, config, tensors, weights.device, dtype or weights.dtype
    )


def filled_model(
    kind: Any, config: Any, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Any:
    """A model of transformers with these parameters and buffers."""
    with torch.device("meta"):
        model = kind._from_config(config, dtype=dtype)
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config=config).to(device)
    for name, value in tensors.items():
        owner, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue  # the other form of experts
        if leaf in module._buffers:
            setattr(module, leaf, value)
        elif hasattr(module, leaf):
            setattr(module, leaf, torch.nn.Parameter(value.to(dtype), requires_grad=False))
    parts = (*model.named_parameters(), *model.named_buffers())
    left = [name for name, value in parts if value.is_meta]
    assert not left, f"transformers has parameters that nobody filled: {left[:3]}"
    return model.eval()


def _tensors(
    sizes: DecoderSizes, shape: GqaShape, weights: DecoderWeights, slots: CudaSlots
) -> dict[str, Tensor]:
    tensors = {
        "model.embed_tokens.weight": weights.embedding_VH,
        "model.norm.weight": weights.final_norm_H,
        "lm_head.weight": weights.w_head_VH,
    }
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        own, mlp = layer.attention, layer.mlp
        assert isinstance(own, GqaWeights), "Qwen3-MoE's"
        assert isinstance(mlp, MoeWeights), "Qwen3-MoE's"
        q, k, v = plain(own.w_qkv_CH).split([shape.q_size, shape.kv_size, shape.kv_size])
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": q,
            f"{prefix}.self_attn.k_proj.weight": k,
            f"{prefix}.self_attn.v_proj.weight": v,
            f"{prefix}.self_attn.o_proj.weight": plain(layer.w_o_HO),
            f"{prefix}.self_attn.q_norm.weight": own.q_norm,
            f"{prefix}.self_attn.k_norm.weight": own.k_norm,
            f"{prefix}.input_layernorm.weight": layer.input_norm_H,
            f"{prefix}.post_attention_layernorm.weight": layer.mlp_norm_H,
            f"{prefix}.mlp.gate.weight": mlp.w_router_EH,
        } | expert_tensors(f"{prefix}.mlp.experts", sizes, slots, index)
    return tensors


def expert_tensors(
    prefix: str, sizes: DecoderSizes, slots: CudaSlots, index: int
) -> dict[str, Tensor]:
    """The experts of one MoE layer, in both forms that versions of transformers use."""
    gate_up = slots.w_gate_up_LSJH[index, : sizes.num_experts]
    down = slots.w_down_LSHI[index, : sizes.num_experts]
    tensors = {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down}
    for expert in range(sizes.num_experts):
        one = f"{prefix}.{expert}"
        tensors[f"{one}.gate_proj.weight"] = gate_up[expert, : sizes.inner_size]
        tensors[f"{one}.up_proj.weight"] = gate_up[expert, sizes.inner_size :]
        tensors[f"{one}.down_proj.weight"] = down[expert]
    return tensors
