"""Readers of image sets: one for each format, all giving the same kind of record (vlv.data.readers.found)."""
