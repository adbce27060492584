"""Forecasts what a training will cost: FLOPs by module, memory by kind, time, money. Needs no GPU, no weights."""
