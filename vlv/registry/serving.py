"""How MLflow serves a registered version: the code that it stores with the version and runs.

A captioner takes the column "image" (base64 of any image file) and gives the column "caption". An autoencoder takes the
same column and gives "image" (base64 of a PNG). MLflow runs this file by itself ("models from code"), so the library is
imported only inside the functions, from the package that is stored with the version.
"""

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

if TYPE_CHECKING:
    from vlv.io.images import Pixels


class CaptionerModel(PythonModel):
    """One caption a row. An image that cannot be read is an error that names its row."""

    def load_context(self, context: PythonModelContext) -> None:
        from vlv.models import saved
        from vlv.models.captioner import Captioner

        self.captioner = Captioner.load(Path(context.artifacts["model"])).to(saved.inference_device())

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        return pd.DataFrame({"caption": self.captioner.caption(_pictures(model_input))})


class AutoencoderModel(PythonModel):
    """One reconstruction a row. Parameters: `steps` of the sampler, `guidance`, `seed`."""

    def load_context(self, context: PythonModelContext) -> None:
        from vlv.models import saved
        from vlv.models.autoencoder import Autoencoder

        self.autoencoder = Autoencoder.load(Path(context.artifacts["model"])).to(saved.inference_device())

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        from vlv.io import images

        chosen = {"steps": 50, "guidance": 2.0, "seed": 42, **(params or {})}
        drawn = self.autoencoder.reconstruct(
            _pictures(model_input),
            steps=int(chosen["steps"]),
            guidance=float(chosen["guidance"]),
            seed=int(chosen["seed"]),
        )
        return pd.DataFrame({"image": [base64.b64encode(images.encode_png(one)).decode() for one in drawn]})


def _pictures(model_input: pd.DataFrame) -> "list[Pixels]":
    from vlv.io import images

    return [images.decode_base64(text, f"row {row}") for row, text in enumerate(model_input["image"])]


KINDS: dict[str, type[CaptionerModel] | type[AutoencoderModel]] = {
    "captioner": CaptionerModel,
    "autoencoder": AutoencoderModel,
}


class ServedModel(PythonModel):
    """The one of `KINDS` that the version was registered as."""

    def load_context(self, context: PythonModelContext) -> None:
        self.model: CaptionerModel | AutoencoderModel = KINDS[context.model_config["kind"]]()
        self.model.load_context(context)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        return self.model.predict(context, model_input, params)


mlflow.models.set_model(ServedModel())
