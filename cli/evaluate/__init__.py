"""`starfish eval`: how well the served model predicts held-out text, and whether faults matter."""
