"""Names for what a person can choose; imports nothing, so that the command line can list them at once."""

from typing import Literal

Format = Literal["folder", "img2dataset", "parquet", "coco", "shards"]
Rule = Literal["seeded", "first", "longest"]  # which of several captions
Encoding = Literal["png", "jpeg"]  # how cut images are stored
