"""The control plane: verdicts on ranks, placement of experts, publication of maps."""
