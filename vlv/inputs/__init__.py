"""Hashes of the code that decides a result: the code that a function reaches."""
