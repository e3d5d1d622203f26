"""Triton kernels of the decoder, one file per stage, each with the function that launches it.

All kernels are batch-invariant: the bits of a row do not depend on the other rows, on their number,
or on the tile that the row is in. This rests on five things:

- Reductions run over ranges that the model fixes (split-K parts, attention splits by position), in
  rising order.
- Matrix multiplications add 16 positions at a time, in rising order, whatever the tile. Small tiles
  do so by one instruction of a warp (mma.sync m16n8k16). Tiles of large steps, with 64 rows or more
  for each four warps, do so by that of warp groups (wgmma m64nNk16), which alone reaches the card's
  rate. On Hopper both round alike, for either operand on either side: tests/gpu compares the bits
  on the card. Which positions are added together depends on how the compiler lays operands out;
  tests/gpu/test_instructions.py compares that.
- Products with block-scaled FP8 weights are all left to warp groups, whatever the tile: see
  `scaled_experts`. A block's sum is scaled and added by itself, in the order of blocks. Those with
  MXFP4 weights are, too, and add as bfloat16 does: see `mxfp4_experts`.
- What a small step does in several programs, and a large one in one, is added in the same order:
  split-K parts, splits of attention.
- Row-wise sums always have the same block shape and number of warps. Latent attention and its
  indexer have one tile shape each.

Shape letters: T tokens, K top-k, N = T·K pairs, E experts, S slots, H hidden, I inner size, Q query
heads, J KV heads, G = Q/J, D head size, U tokens per block, B blocks, P split-K parts, V
vocabulary.
"""
