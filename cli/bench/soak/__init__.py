"""`starfish bench soak`: mixed load with a fault every few seconds, and nothing may grow."""
