"""Triton kernels of the decoder, one file per stage, each with the function that launches it.

All kernels are batch-invariant: the bits of a row do not depend on the other rows, on their number,
or on the tile that the row is in. This rests on three things:

- Reductions run over ranges that the model fixes (split-K parts, attention splits by position), in
  rising order.
- Matrix multiplications use one instruction, m16n8k16, whose rounding does not depend on the tile.
  Therefore tiles have fewer than 64 rows or run on two warps. Which positions are added together
  depends on how the compiler lays operands out; tests/gpu/test_instructions.py compares that.
- Row-wise sums always have the same block shape and number of warps. Latent attention and its
  indexer have one tile shape each.

Shape letters: T tokens, K top-k, N = T·K pairs, E experts, S slots, H hidden, I inner size, Q query
heads, J KV heads, G = Q/J, D head size, U tokens per block, B blocks, P split-K parts, V
vocabulary.
"""
