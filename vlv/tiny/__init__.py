"""The toy world of emoji scenes: pictures whose truth is known, and the parts that are pretrained on them."""
