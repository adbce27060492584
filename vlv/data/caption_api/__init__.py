"""Captions from a large model behind an OpenAI-compatible API: `vlv data caption`."""
