"""Experts of a card rank: their slots, and where their weights come from."""
