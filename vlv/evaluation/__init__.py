"""Evaluation: the table of metrics, their intervals and networks, and the plots and cards made of them."""
