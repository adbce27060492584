"""How MLflow serves an autoencoder: column "image" (base64 of an image file) -> "image" (base64 of a PNG)."""

import base64
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext


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
        rows = enumerate(model_input["image"])
        pictures = [images.decode_base64(text, f"row {row}") for row, text in rows]
        drawn = self.autoencoder.reconstruct(
            pictures,
            steps=int(chosen["steps"]),
            guidance=float(chosen["guidance"]),
            seed=int(chosen["seed"]),
        )
        return pd.DataFrame({"image": [base64.b64encode(images.encode_png(one)).decode() for one in drawn]})


mlflow.models.set_model(AutoencoderModel())
