"""The text sides of the frozen decoders: prompts or caption embeddings -> what the denoiser is conditioned on.

They stand apart from denoiser and VAE because the captioner needs them without those. Why embeddings enter each
decoder as they do: docs/decoders.md.
"""
