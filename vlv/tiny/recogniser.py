"""A small network that reads scenes from pictures: the judge of reconstructions.

It reads the background and the nine cells. It is trained on real scenes only, never on the pictures that it judges.
"""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from vlv.io import images
from vlv.tiny import scenes


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True))


class SceneRecogniser(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> background logits (B, 8) and cell logits (B, 9, 25; the last: empty)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(12, 32, 1), _block(32, 64, 2), _block(64, 64, 1), _block(64, 128, 2), _block(128, 128, 1)
        )
        self.cells = nn.Linear(128 * 9, len(scenes.NAMES) + 1)
        self.background = nn.Linear(128, len(scenes.COLOURS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(F.pixel_unshuffle(x, 2))  # (B, 128, 8, 8)
        grid = F.interpolate(features, size=(9, 9), mode="bilinear")
        cells = F.unfold(grid, 3, stride=3).transpose(1, 2)  # (B, 9, 128 * 9)
        return self.background(features.mean((2, 3))), self.cells(cells)

    @torch.no_grad()
    def read(self, batch: torch.Tensor, size: int = 100) -> list[scenes.Scene]:
        """Scenes as seen in images (B, 3, 64, 64) uint8."""
        self.eval()
        result = []
        for part in batch.split(size):
            background, cells = self(images.to_model(part))
            pairs = zip(background.argmax(-1).tolist(), cells.argmax(-1).numpy(), strict=True)
            result += [scenes.from_targets(b, np.asarray(c)) for b, c in pairs]
        return result

    @staticmethod
    def load(folder: Path) -> "SceneRecogniser":
        """Strictly, from `folder`/model.safetensors."""
        model = SceneRecogniser()
        state = safetensors.torch.load_file(folder / "model.safetensors")
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        return model.eval()
