"""The frozen text-to-image decoders: one module for each kind, behind the interface in `base`."""
