"""What a training will cost before it runs: FLOPs by module, memory by kind, time, money. No GPU, no weights."""
