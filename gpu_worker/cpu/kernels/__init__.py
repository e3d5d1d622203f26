"""CPU kernels of a rank. They own every floating-point operation between the token ids and the
logits, and no buffer and no weight. How they are batch-invariant is told in `arithmetic`."""
