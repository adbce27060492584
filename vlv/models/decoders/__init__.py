"""The frozen text-to-image decoders behind one small interface (`base.Decoder`)."""
