"""What each stage may train: one table for each stage. A new choice of `learn` is one row here.

A row names the parts that the choice trains. The sections `stage1` and `stage2` check `learn` against the tables and
answer questions about it by properties (`trains_encoder` and so on), so that no other code compares names of choices.

A new part is a name here and its modules in `set_trainable`, of vlv/models/encoder.py (Stage 1) or of
vlv/models/captioner.py (Stage 2). A name that `set_trainable` of the captioner does not know trains nothing.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

Parts = frozenset[str]

# Stage 1: parts of Florence-2. The queries and the projection are always trained.
VISION_TOWER = "vision tower"  # with the projection of its features
TEXT_ENCODER = "text encoder"  # of the language model (BART)
TEXT_DECODER = "text decoder"

STAGE1: Mapping[str, Parts] = {
    "language_model": Parts({TEXT_ENCODER, TEXT_DECODER}),  # the released script's choice
    "decoder_only": Parts({TEXT_DECODER}),
    "all": Parts({VISION_TOWER, TEXT_ENCODER, TEXT_DECODER}),
    "queries_only": Parts(),
}

# Stage 2: parts of the captioner. The prefix is always trained.
LANGUAGE_MODEL = "language model"
ADAPTERS = "adapters"  # in the frozen language model (LoRA)
ENCODER = "encoder"  # the parts of it that Stage 1 trains

STAGE2: Mapping[str, Parts] = {
    "mlp": Parts(),
    "mlp+llm": Parts({LANGUAGE_MODEL}),
    "mlp+lora": Parts({ADAPTERS}),
    "mlp+llm+encoder": Parts({LANGUAGE_MODEL, ENCODER}),  # the paper's best
}


def _check(table: Mapping[str, Parts], choice: str) -> str:
    if choice not in table:
        raise ValueError(f"{choice!r} is not one of: {', '.join(table)}")
    return choice


Stage1Choice = Annotated[
    str, AfterValidator(partial(_check, STAGE1)), WithJsonSchema({"type": "string", "enum": list(STAGE1)})
]
Stage2Choice = Annotated[
    str, AfterValidator(partial(_check, STAGE2)), WithJsonSchema({"type": "string", "enum": list(STAGE2)})
]
