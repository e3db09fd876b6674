"""Features of pictures by a network: what makes them, their weights, their cache."""
