"""One data-parallel rank, on a CPU or a card, and the fork server that such ranks are copies of."""
