"""From any picture to what the vision tower sees: one chain for training and for every use of the model.

A picture is cut to the square of the training data (what `vlv data import` stores and a training loads), and the
square is brought to the tower's size. Both sizes and the way of scaling are in the configuration, which a saved model
keeps. Skipping the square shows the tower finer pictures than any it learned from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlv.config import Config, Resize
from vlv.io import images
from vlv.io.images import Pixels


@dataclass(frozen=True)
class Preprocessing:
    """The chain of one model.

    Attributes:
        square: pixels, side of the training data's squares (data.image_size).
        resize: how a picture is brought to that square (data.resize).
        tower: pixels, side of the vision tower's input (encoder.image_size).
    """

    square: int
    resize: Resize
    tower: int

    @staticmethod
    def of(settings: Config) -> "Preprocessing":
        """As a configuration says; a saved model has its own."""
        return Preprocessing(settings.data.image_size, settings.data.resize, settings.encoder.image_size)

    def cut(self, pictures: Sequence[Pixels]) -> torch.Tensor:
        """Pictures (H, W, 3) uint8 of any size -> a batch (B, 3, S, S) uint8 of the training data's squares."""
        return images.to_batch([images.resize_crop(picture, self.square, self.resize) for picture in pictures])

    def for_tower(self, batch: torch.Tensor) -> torch.Tensor:
        """Squares (B, 3, S, S) uint8 -> (B, 3, T, T) uint8.

        Raises:
            ValueError: other images than squares of the training data's size.
        """
        if batch.shape[2:] != (self.square, self.square):
            raise ValueError(
                f"images of {batch.shape[3]}x{batch.shape[2]} pixels: this model takes squares of {self.square}, as it "
                "was trained on; cut them with Preprocessing.cut"
            )
        return images.scale(batch, self.tower)
