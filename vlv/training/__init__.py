"""Training: the one loop that both stages and the pretraining of the tiny parts go through."""
