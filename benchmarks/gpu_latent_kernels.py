"""Measures the kernels of latent attention with different tiles, over the layers of a large model,
so that neither KV cache nor weights are in the card's cache. Part of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu_kernels import graph_ms
from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.cuda.kernels import latent
from gpu_worker.cuda.kernels.paging import Paging
from gpu_worker.cuda.kernels.splits import Partials
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import DecoderWeights, MlaWeights

BLOCK_TOKENS = 16


class LatentSweep:
    """Rates in TB/s: bytes of the KV cache or of the weights that are read, divided by the time."""

    def __init__(self, sizes: DecoderSizes, weights: DecoderWeights) -> None:
        assert isinstance(sizes.attention, MlaShape), "this sweep is latent attention's"
        self._shape = sizes.attention
        layers = [layer.attention for layer in weights.layers]
        self._weights = [own for own in layers if isinstance(own, MlaWeights)]
        self._device = weights.device

    def attention(self, tokens: int, context: int = 544) -> dict[str, float]:
        shape, device, num_layers = self._shape, self._device, len(self._weights)
        blocks = -(-context // BLOCK_TOKENS)
        cached = (num_layers, tokens * blocks, BLOCK_TOKENS)
        latents = self._random(*cached, shape.rank)
        keys = self._random(*cached, shape.qk_rope_head_dim)
        q_latent = self._random(tokens, shape.num_heads, shape.rank)
        q_rotated = self._random(tokens, shape.num_heads, shape.qk_rope_head_dim)
        rows = torch.arange(tokens, dtype=torch.int32, device=device)
        tables = torch.arange(tokens * blocks, dtype=torch.int32, device=device)
        where = Paging(
            torch.full_like(rows, context - 1), rows, tables.view(tokens, blocks), None, 1
        )
        splits = (tokens, shape.num_heads, latent.num_splits(context))
        partials = Partials(
            torch.empty(*splits, shape.rank, device=device),
            torch.empty(splits, device=device),
            torch.empty(splits, device=device),
        )
        out = torch.empty_like(q_latent)
        caches = [latent.LatentCache(*pair) for pair in zip(latents, keys, strict=True)]

        def run(tile: latent.LatentTile) -> None:
            for cache in caches:
                latent.attend_latents(
                    q_latent, q_rotated, cache, where, partials, out, scale=0.07, tile=tile
                )

        nbytes = num_layers * tokens * context * (shape.rank + shape.qk_rope_head_dim) * 2
        rates = {
            "x".join(map(str, tile)): nbytes / graph_ms(partial(run, tile)) / 1e9
            for tile in latent_tiles()
        }
        return dict(sorted(rates.items(), key=lambda item: -item[1]))

    def heads(self, tokens: int) -> dict[str, float]:
        """Projects queries to the latent space, and sums of latents to values."""
        shape, size = self._shape, self._shape.qk_nope_head_dim + self._shape.qk_rope_head_dim
        q = torch.randn(4, tokens, shape.q_size, device=self._device)
        q_latent = self._random(tokens, shape.num_heads, shape.rank)
        out = self._random(tokens, shape.heads_size)

        def into() -> None:
            for own in self._weights:
                latent.multiply_heads(q, latent.HeadColumns(0, size), own.w_uk_ARF, q_latent)

        def out_of() -> None:
            sums = q_latent.view(1, tokens, -1)
            for own in self._weights:
                latent.multiply_heads(sums, latent.HeadColumns(0, shape.rank), own.w_uv_AGR, out)

        into_bytes = sum(own.w_uk_ARF.nbytes for own in self._weights)
        out_bytes = sum(own.w_uv_AGR.nbytes for own in self._weights)
        return {
            "into_tb_per_s": into_bytes / graph_ms(into) / 1e9,
            "out_of_tb_per_s": out_bytes / graph_ms(out_of) / 1e9,
        }

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self._device, dtype=torch.bfloat16)


def latent_tiles() -> Iterator[latent.LatentTile]:
    yield latent.LATENT_TILE
    yield latent.LatentTile(16, 32, 4, 2, 2048)
    yield latent.LatentTile(16, 64, 8, 2, 2048)
    yield latent.LatentTile(32, 32, 8, 2, 2048)
    yield latent.LatentTile(32, 32, 8, 1, 1024)
    yield latent.LatentTile(32, 64, 8, 2, 1024)
