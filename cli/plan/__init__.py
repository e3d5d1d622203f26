"""`starfish plan`: placements of clusters that need not exist."""
