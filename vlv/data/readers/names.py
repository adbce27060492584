"""Names for what a person can choose; imports nothing, so that the command line can list them at once."""

from typing import Literal

Format = Literal["folder", "imagefolder", "table", "llava", "img2dataset", "parquet", "arrow", "coco", "shards"]
Rule = Literal["seeded", "first", "longest"]  # which of several captions
Encoding = Literal["png", "jpeg"]  # how cut images are stored

NONE = "none"  # as a caption column: there are no captions
