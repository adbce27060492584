"""How MLflow serves a captioner: column "image" (base64 of any image file) -> column "caption"."""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class CaptionerModel(PythonModel):
    """One caption a row; an unreadable image is an error that names its row."""

    def load_context(self, context: PythonModelContext) -> None:
        from vlv.models import saved
        from vlv.models.captioner import Captioner

        self.captioner = Captioner.load(Path(context.artifacts["model"])).to(saved.inference_device())

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        from vlv.io import images

        rows = enumerate(model_input["image"])
        pictures = [images.decode_base64(text, f"row {row}") for row, text in rows]
        return pd.DataFrame({"caption": self.captioner.caption(pictures)})


mlflow.models.set_model(CaptionerModel())
