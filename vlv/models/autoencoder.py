"""The auto-encoder of Stage 1: image -> caption embeddings -> frozen diffusion decoder -> the same image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlv import config, rng
from vlv.config import Config, Paths
from vlv.io import images
from vlv.io.images import Preprocessing
from vlv.models import build, saved
from vlv.models.decoders.base import Context, Decoder
from vlv.models.encoder import CaptionEncoder
from vlv.rng import Masks

KIND = "autoencoder"
PARTS = ["encoder", "decoder"]


@dataclass(frozen=True)
class Stage1Batch:
    """B images for Stage 1: their pixels, or the cached outputs of the frozen parts.

    Attributes:
        images: (B, 3, H, W) uint8; None where features and latents are cached.
        features: (B, T, D), the vision tower's, if cached.
        latent_mean, latent_std: (B, c, h, w), the VAE's, if cached.
    """

    images: torch.Tensor | None
    features: torch.Tensor | None = None
    latent_mean: torch.Tensor | None = None
    latent_std: torch.Tensor | None = None

    def __len__(self) -> int:
        known = self.images if self.images is not None else self.features
        assert known is not None
        return len(known)


class Autoencoder(nn.Module):
    """Encoder and frozen decoder; its forward is the Stage 1 loss.

    Args:
        settings: Stage 1's, for the loss; None for a model that only reconstructs.
    """

    def __init__(self, encoder: CaptionEncoder, decoder: Decoder[Any], settings: config.Stage1 | None = None) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder.requires_grad_(False)
        self.settings = settings

    @property
    def device(self) -> torch.device:
        return self.encoder.queries.device

    def forward(self, batch: Stage1Batch, generator: torch.Generator) -> torch.Tensor:
        """Mean denoising loss; each image is encoded once and denoised `noise_samples_per_image` times."""
        assert self.settings is not None, "built without training settings"
        masks = self.encoder.masks(generator, len(batch))
        features = batch.features.to(self.device) if batch.features is not None else self._features(batch, masks)
        context = self.decoder.condition(self.encoder(features.float(), masks).float())
        mean, std = self._latents(batch)
        repeats = self.settings.noise_samples_per_image
        mean, std, context = (x.repeat_interleave(repeats, 0) for x in (mean, std, context))
        latents = mean + std * rng.normal(mean.shape, generator).to(mean)
        return self.decoder.loss(
            latents, context, generator, self.settings.timesteps, self.settings.loss, self.settings.same_noise
        ).mean()

    def _features(self, batch: Stage1Batch, masks: Masks | None) -> torch.Tensor:
        assert batch.images is not None
        return self.encoder.features(batch.images, masks)

    @torch.no_grad()
    def _latents(self, batch: Stage1Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if batch.latent_mean is not None and batch.latent_std is not None:
            return batch.latent_mean.to(self.device).float(), batch.latent_std.to(self.device).float()
        assert batch.images is not None
        mean, std = self.decoder.encode(batch.images)
        return mean.float(), std.float()

    @torch.no_grad()
    def context(self, batch: torch.Tensor) -> torch.Tensor | Context:
        """Squares (B, 3, S, S) uint8 -> the decoder's context: (B, Q, C), or a Context of these lengths."""
        context: torch.Tensor | Context = self.decoder.condition(self.encoder(self.encoder.features(batch)).float())
        return context

    def reconstruct(
        self,
        pictures: Sequence[images.Pixels],
        steps: int = 50,
        guidance: float = 2.0,
        seed: int = 42,
        batch_size: int = 50,
    ) -> list[images.Pixels]:
        """Reconstruct pictures (H, W, 3) uint8 of any size from their embeddings, as (S, S, 3) uint8.

        Picture i uses the seed `seed + i`, so the result does not depend on the batch size.
        """
        result: list[images.Pixels] = []
        for i in range(0, len(pictures), batch_size):
            squares = self.encoder.preprocessing.cut(pictures[i : i + batch_size])
            seeds = [seed + i + k for k in range(len(squares))]
            drawn = self.decoder.sample(self.context(squares), seeds, steps, guidance)
            result += images.to_arrays(drawn)
        return result

    def save(self, folder: Path, settings: Config, paths: Paths, card: str) -> None:
        """Write the trained tensors and the names of the frozen parts."""
        learned = {n: p for n, p in self.encoder.named_parameters() if p.requires_grad}
        saved.save(folder, KIND, settings, paths, PARTS, learned, card)

    @staticmethod
    def build(settings: Config, paths: Paths) -> "Autoencoder":
        """Pretrained parts with new queries and projection, seeded by stage1.seed."""
        torch.manual_seed(settings.stage1.seed)
        decoder = build.decoder(settings.decoder, paths)
        encoder = build_encoder(settings, decoder.conditioner.width, paths)
        encoder.set_trainable(settings.stage1.trained_parts)
        return Autoencoder(encoder, decoder, settings.stage1)

    @staticmethod
    def load(folder: Path, paths: Paths | None = None) -> "Autoencoder":
        """Load strictly from a folder that `save` or `saved.bundle` wrote.

        Raises:
            ModelFolderError: the wrong kind of folder, keys or pretrained parts.
        """
        found = saved.read(folder, KIND)
        root = saved.parts_root(folder, found, paths or Paths(folder))
        model = Autoencoder.build(found.config, root)
        learned = {n for n, p in model.encoder.named_parameters() if p.requires_grad}
        saved.restore(model.encoder, learned, folder)
        return model.requires_grad_(False).eval()


def build_encoder(settings: Config, width: int, paths: Paths) -> CaptionEncoder:
    """The encoder with new queries and a new projection, which starts on the text side if configured so."""
    statistics = None
    if settings.encoder.start_on_text_side:
        statistics = build.text_statistics(settings.decoder, paths, settings.encoder.queries)
    return build.encoder(settings.encoder, Preprocessing.of(settings), width, paths, statistics)
