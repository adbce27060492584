"""The models: vision encoder, frozen text-to-image decoder, auto-encoder, captioner."""
