"""VLV: the Vision-Language-Vision auto-encoder (arXiv 2507.07104) as a reproducible pipeline."""

__version__ = "0.1.0"
