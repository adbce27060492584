"""Evaluation: captions counted against the known truth, reconstructions against ceilings and floors."""
