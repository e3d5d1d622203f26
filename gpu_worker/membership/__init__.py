"""How a rank belongs to the instance: its record, its links, its assigned slots, its fencing."""
