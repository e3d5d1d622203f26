"""CPU kernels of a rank: every floating-point operation between the token ids and the logits. They
own no buffer and no weight. `arithmetic` explains why they are batch-invariant."""
