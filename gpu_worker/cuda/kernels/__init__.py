"""Triton kernels of the decoder, one file a stage, each with the function that launches it.

All are batch-invariant: a row's bits depend neither on the other rows, nor on how many there are,
nor on the tile it falls into. What that rests on: reductions run over ranges fixed by the model
(`split_k`, attention splits by position) and in rising order; matrix products use one instruction
(m16n8k16, hence tiles of fewer than 64 rows, or on two warps), whose rounding does not depend on
the tile, and take positions together alike, which hangs on how the compiler lays operands out
(tests/gpu/test_instructions.py compares that); row-wise sums always have the same block shape and
number of warps. Latent attention and its indexer have one shape of tile each.

Shape letters: T tokens, K top-k, N = T·K pairs, E experts, S slots, H hidden, I inner size, Q query
heads, J KV heads, G = Q/J, D head size, U tokens a block, B blocks, P split-K parts, V vocabulary.
"""
