"""What choices of the code are worth in time, each beside its control."""
