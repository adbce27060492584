"""Converters: weights that people hold in other layouts -> the folders that this project reads."""
