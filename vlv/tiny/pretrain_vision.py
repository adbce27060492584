"""The tiny profile's parts that look at scenes: its Florence-2, and the recogniser that judges reconstructions.

The Florence-2 learns a task like detection: background and cells are read from its encoder's states, and its decoder
writes "light blue dog <loc_0> ...", as Florence-2 itself learned regions and labels in public data. It sees scenes of
the training split's specifications and their labels; no caption, and nothing of the teacher. The recogniser
(vlv.tiny.recogniser) learns from real scenes with a little noise.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

from vlv.config import Optimizer, Training
from vlv.io import images
from vlv.io.images import Preprocessing
from vlv.models.encoder import CaptionEncoder, Projection
from vlv.tiny import scenes
from vlv.tiny.pretrain_text import tokenizer
from vlv.tiny.recogniser import SceneRecogniser
from vlv.tiny.scene_pool import Pool, indices
from vlv.training import loop

WIDTH = 128
PLACE_SIGNS = tuple(f"<loc_{i}>" for i in range(9))
SIGNS = ("<image>", *PLACE_SIGNS)
MEAN = STD = [0.5, 0.5, 0.5]

ENCODER = Training(
    steps=1000, batch_size=64, precision="bf16", seed=15, checkpoint_every=300, log_every=50,
    optimizer=Optimizer(
        learning_rate=1.5e-3, betas=[0.9, 0.98], weight_decay=0.01, warmup_steps=50,
        schedule="hold_then_linear", hold_share=0.4, final_rate_share=0.02, clip_norm=1.0,
    ),
)  # fmt: skip


def build_encoder(vocabulary: int) -> Florence2ForConditionalGeneration:
    """The architecture with new weights: a two-stage DaViT tower and a 2+2-layer BART."""
    torch.manual_seed(ENCODER.seed)
    vision = Florence2VisionConfig(
        depths=(1, 1), patch_size=(7, 3), patch_stride=(4, 2), patch_padding=(3, 1), patch_prenorm=(False, True),
        embed_dim=(64, 128), num_heads=(2, 4), num_groups=(2, 4), window_size=4, projection_dim=WIDTH,
        drop_path_rate=0.0, max_position_embeddings=8, max_temporal_embeddings=4,
    )  # fmt: skip
    bart = BartConfig(
        vocab_size=vocabulary, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=4 * WIDTH, decoder_ffn_dim=4 * WIDTH,
        max_position_embeddings=128, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    words = tokenizer(SIGNS)
    return Florence2ForConditionalGeneration(
        Florence2Config(
            vision_config=vision.to_dict(), text_config=bart.to_dict(),
            image_token_id=words.convert_tokens_to_ids("<image>"), attn_implementation="eager",
        )
    )  # fmt: skip


def label(scene: scenes.Scene) -> str:
    """ "light blue dog <loc_0> cat <loc_4>" """
    objects = " ".join(f"{scenes.NAMES[kind]} {PLACE_SIGNS[place]}" for place, kind in scene.objects)
    return f"{scenes.COLOURS[scene.background]} {objects}"


class _Detection(nn.Module):
    """Background and cells from the encoder's states; the label string from the decoder."""

    def __init__(self, florence: Florence2ForConditionalGeneration) -> None:
        super().__init__()
        self.florence = florence
        # Only its features and encode are used here; queries and projection belong to Stage 1.
        as_drawn = Preprocessing(scenes.SIZE, "bicubic", scenes.SIZE)
        encoder = CaptionEncoder(florence, [], as_drawn, MEAN, STD, queries=1, projection=Projection(WIDTH, 1, 1))
        self._encoder = [encoder]
        self.cells = nn.Linear(WIDTH * 9, len(scenes.NAMES) + 1)
        self.background = nn.Linear(WIDTH, len(scenes.COLOURS))

    def read(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encoder states (B, 65, D), background logits (B, 8), cell logits (B, 9, 25)."""
        states = self._encoder[0].encode(self._encoder[0].features(pixels))
        grid = states[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        grid = F.interpolate(grid, size=(9, 9), mode="bilinear")
        cells = F.unfold(grid, 3, stride=3).transpose(1, 2)
        return states, self.background(states[:, 0]), self.cells(cells)

    def forward(
        self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], generator: torch.Generator
    ) -> torch.Tensor:
        pixels, background, cells, labels = batch
        states, seen_background, seen_cells = self.read(pixels)
        start = torch.full((len(labels), 1), 2)
        decoded = self.florence.model.language_model.decoder(
            input_ids=torch.cat([start, labels[:, :-1].clamp(min=0)], 1),
            encoder_hidden_states=states,
            use_cache=False,
        ).last_hidden_state
        logits = self.florence.lm_head(decoded)
        return (
            F.cross_entropy(seen_background.float(), background)
            + 3 * F.cross_entropy(seen_cells.float().flatten(0, 1), cells.flatten())
            + F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        )


def pretrain_encoder(
    pool: Pool, held_out: Pool, folder: Path
) -> tuple[Florence2ForConditionalGeneration, dict[str, float]]:
    """Train in `folder`; figures: held-out scenes whose background and cells are all right."""
    words = tokenizer(SIGNS)
    model = build_encoder(len(words))
    objective = _Detection(model)
    backgrounds, cells = (torch.from_numpy(np.asarray(a)) for a in scenes.targets(pool.scenes))
    encoded = words([label(s) for s in pool.scenes], padding=True, return_tensors="pt")["input_ids"][:, 1:]
    labels = torch.where(encoded == 0, -100, encoded)

    def batches(start: int) -> Iterator[object]:
        step = start
        while True:
            chosen = indices(len(pool), ENCODER.batch_size, ENCODER.seed, step)
            yield pool.pixels[chosen], backgrounds[chosen], cells[chosen], labels[chosen]
            step += 1

    model.train()
    loop.train(objective, batches, ENCODER, folder, "encoder-1", title="Encoder")
    objective.eval()
    with torch.no_grad():
        parts = [objective.read(p)[1:] for p in held_out.pixels.split(100)]
    seen = [(b, c) for bs, cs in parts for b, c in zip(bs.argmax(-1), cs.argmax(-1), strict=True)]
    right = [scenes.from_targets(int(b), c.numpy()) == s for (b, c), s in zip(seen, held_out.scenes, strict=True)]
    return model, {"scenes_exact": round(float(np.mean(right)), 4)}


# -- recogniser ----------------------------------------------------------------------------------------

RECOGNISER = Training(
    steps=900, batch_size=48, precision="bf16", seed=14, checkpoint_every=200, log_every=50,
    optimizer=Optimizer(
        learning_rate=2e-3, betas=[0.9, 0.999], weight_decay=0.01, warmup_steps=30,
        schedule="hold_then_linear", hold_share=0.4, final_rate_share=0.01, clip_norm=10.0,
    ),
)  # fmt: skip


class _Recognition(nn.Module):
    def __init__(self, model: SceneRecogniser) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], generator: torch.Generator
    ) -> torch.Tensor:
        pixels, background, cells = batch
        x = images.to_model(pixels)
        # Reconstructions are a little noisy; the judge must read objects, not the lack of noise.
        strength = 0.1 * torch.randn(len(x), 1, 1, 1, generator=generator).abs()
        seen_background, seen_cells = self.model(x + strength * torch.randn(x.shape, generator=generator))
        return F.cross_entropy(seen_background.float(), background) + 2 * F.cross_entropy(
            seen_cells.float().flatten(0, 1), cells.flatten()
        )


def pretrain_recogniser(pool: Pool, held_out: Pool, folder: Path) -> tuple[SceneRecogniser, dict[str, float]]:
    """Train in `folder`; figures: held-out scenes read exactly."""
    torch.manual_seed(RECOGNISER.seed)
    model = SceneRecogniser()
    backgrounds, cells = (torch.from_numpy(np.asarray(a)) for a in scenes.targets(pool.scenes))

    def batches(start: int) -> Iterator[object]:
        step = start
        while True:
            chosen = indices(len(pool), RECOGNISER.batch_size, RECOGNISER.seed, step)
            yield pool.pixels[chosen], backgrounds[chosen], cells[chosen]
            step += 1

    model.train()
    loop.train(_Recognition(model), batches, RECOGNISER, folder, "recogniser-1", title="Recogniser")
    right = [a == b for a, b in zip(model.read(held_out.pixels), held_out.scenes, strict=True)]
    return model, {"scenes_exact": round(float(np.mean(right)), 4)}
