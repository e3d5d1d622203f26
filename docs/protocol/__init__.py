"""The protocol of verdicts, epochs, incarnations and attempts as a model that is explored
exhaustively: `python -m docs.protocol`."""
