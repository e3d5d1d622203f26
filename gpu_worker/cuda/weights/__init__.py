"""Weights of a model in a card's memory, but for those of experts."""
