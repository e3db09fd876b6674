"""Training of packed layers, end to end, against the pictures they draw."""
