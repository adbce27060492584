"""Training: one loop for both stages and for the pretraining of the tiny parts."""
