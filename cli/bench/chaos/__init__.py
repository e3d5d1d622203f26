"""`starfish bench chaos`: faults of every kind under load, and what clients notice of them."""
