"""Reading of checkpoints, which CPU and card ranks share."""
