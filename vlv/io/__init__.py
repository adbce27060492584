"""Files, images, assets: how bytes come in and go out."""
