"""The vision encoder: images -> caption embeddings (arXiv 2507.07104).

The decoder of Florence-2 reads learnable queries instead of words. Its states, projected to the width of the text
encoder, are the caption embeddings.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Florence2ForConditionalGeneration, PreTrainedTokenizerBase

from vlv.config import trainable
from vlv.io import files, images
from vlv.io.images import Preprocessing
from vlv.rng import DropPath, Masks, dropping


class Projection(nn.Module):
    """Linear-GELU-Linear from the width of Florence-2 to that of the text side.

    Args:
        statistics: per-position mean and std, each (Q, W), of the text side's input. The projection's output is then
            normalised and starts as `mean + gain * std * normalised`; mean and std are trainable. Without this the
            frozen decoder ignores the embeddings at first, and training stays on a plateau.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
        gain: float = 0.5,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
        self.normalise = statistics is not None
        if statistics is not None:
            mean, std = statistics
            self.mean = nn.Parameter(mean.detach().clone().float())
            self.std = nn.Parameter(std.detach().clone().float() * gain)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(B, Q, inputs) -> (B, Q, outputs)."""
        projected: torch.Tensor = self.layers(states)
        if not self.normalise:
            return projected
        normalised = F.layer_norm(projected.float(), projected.shape[-1:])
        return self.mean + self.std * normalised


class CaptionEncoder(nn.Module):
    """Florence-2 with learnable queries and a projection.

    Args:
        florence: the pretrained model.
        prompt_ids: ids of the task prompt that follows the image features; it may be empty.
        preprocessing: how a picture is prepared for the vision tower.
        mean, std: the image processor's, for three channels of pixels in [0, 1].
        query_std: std of the initial queries.
        drop_rate: dropout in the language model; drop_path: stochastic depth in the vision tower. Both act only if
            the forward pass gets masks, as in training.
    """

    mean: torch.Tensor
    std: torch.Tensor
    prompt_ids: torch.Tensor

    def __init__(
        self,
        florence: Florence2ForConditionalGeneration,
        prompt_ids: list[int],
        preprocessing: Preprocessing,
        mean: list[float],
        std: list[float],
        *,
        queries: int,
        projection: Projection,
        query_std: float = 0.5,
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.florence = florence
        self.preprocessing = preprocessing
        width = florence.config.text_config.d_model
        self.queries = nn.Parameter(torch.randn(1, queries, width) * query_std)
        self.projection = projection
        self.drop_rate, self.drop_path = drop_rate, drop_path
        if drop_path:
            _put_drop_path(florence.model.vision_tower, drop_path)
        self.register_buffer("prompt_ids", torch.tensor(prompt_ids, dtype=torch.long), persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def set_trainable(self, parts: trainable.Parts, *, queries: bool = True) -> None:
        """Train `parts` (a row of `trainable.STAGE1`), the queries and the projection; freeze everything else.

        Word embeddings are trained only with the text encoder, and only where a prompt uses them. The word head is
        never trained, because nothing uses its output. `queries`: False keeps queries and projection frozen.
        """
        self.requires_grad_(False)
        model = self.florence.model
        modules = {
            trainable.VISION_TOWER: (model.vision_tower, model.multi_modal_projector),
            trainable.TEXT_ENCODER: (model.language_model.encoder,),
            trainable.TEXT_DECODER: (model.language_model.decoder,),
        }
        for part in parts:
            for module in modules[part]:
                module.requires_grad_(True)
        words = len(self.prompt_ids) > 0 and trainable.TEXT_ENCODER in parts
        self.florence.get_input_embeddings().requires_grad_(words)
        if not words:
            self.florence.lm_head.requires_grad_(False)
        self.queries.requires_grad_(queries)
        self.projection.requires_grad_(queries)

    def masks(self, generator: torch.Generator, samples: int) -> Masks | None:
        """The dropout masks of this training step; None where there is no dropout."""
        return Masks(generator, samples) if self.drop_rate or self.drop_path else None

    def features(self, batch: torch.Tensor, masks: Masks | None = None) -> torch.Tensor:
        """Squares of the training data's size (B, 3, S, S) uint8 -> the vision tower's projected features (B, T, D).

        Raises:
            ValueError: the images have another size.
        """
        pixels = self.preprocessing.for_tower(batch.to(self.queries.device))
        normalised = images.to_processor(pixels, self.mean, self.std)
        tower_dtype = next(self.florence.model.vision_tower.parameters()).dtype
        with dropping(masks, 0.0):
            features: torch.Tensor = self.florence.model.get_image_features(normalised.to(tower_dtype)).pooler_output
        return features

    def encode(self, features: torch.Tensor, masks: Masks | None = None) -> torch.Tensor:
        """Features (B, T, D) -> BART encoder states (B, T + P, D), with a prompt of P tokens appended."""
        states = features
        if len(self.prompt_ids):
            words = self.florence.get_input_embeddings()(self.prompt_ids)
            states = torch.cat([states, words.expand(len(states), -1, -1).to(states.dtype)], 1)
        with dropping(masks, self.drop_rate):
            encoded: torch.Tensor = self.florence.model.language_model.encoder(inputs_embeds=states).last_hidden_state
        return encoded

    def forward(self, features: torch.Tensor, masks: Masks | None = None) -> torch.Tensor:
        """Features (B, T, D) -> caption embeddings (B, Q, W)."""
        return self.decode(self.encode(features, masks), masks)

    def decode(self, encoded: torch.Tensor, masks: Masks | None = None) -> torch.Tensor:
        """BART encoder states (B, T + P, D) -> caption embeddings (B, Q, W)."""
        with dropping(masks, self.drop_rate):
            decoded = self.florence.model.language_model.decoder(
                inputs_embeds=self.queries.to(encoded.dtype).expand(len(encoded), -1, -1),
                encoder_hidden_states=encoded,
                use_cache=False,
            ).last_hidden_state
        embeddings: torch.Tensor = self.projection(decoded)
        return embeddings


def _put_drop_path(tower: nn.Module, last: float) -> None:
    """Set the drop-path rates of the tower's half blocks: evenly from 0 to `last`, as Florence-2 was trained."""
    halves = [part for part in tower.modules() if hasattr(part, "drop_path1")]
    for half, rate in zip(halves, torch.linspace(0, last, len(halves), device="cpu").tolist(), strict=True):
        half.drop_path1, half.drop_path2 = DropPath(rate), DropPath(rate)


def processor_statistics(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and std of `folder`/preprocessor_config.json; ImageNet's (Florence-2's own) if it has none."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    config = files.read_json_object(path)
    found: list[list[float]] = []
    for values in (config.get("image_mean"), config.get("image_std")):
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
            raise files.FileError(f"{path}: image_mean and image_std must be three numbers each. Restore it.")
        found.append(values)
    return found[0], found[1]


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase | None, prompt: str) -> list[int]:
    """Ids of the prompt with the tokenizer's own special tokens; none for an empty prompt."""
    if not prompt:
        return []
    if tokenizer is None:
        raise ValueError("encoder.prompt is set, but the pretrained encoder has no tokenizer")
    return list(tokenizer(prompt)["input_ids"])
