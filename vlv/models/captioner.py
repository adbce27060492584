"""The captioner: context -> MLP -> prefix of a causal language model (arXiv 2507.07104)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlv.config import Config, Generation, Paths, Stage1, Stage2, trainable
from vlv.io import images
from vlv.models import build, language_model, saved
from vlv.models.autoencoder import build_encoder
from vlv.models.caption_tokens import IGNORED
from vlv.models.decoders.base import Conditioner
from vlv.models.encoder import CaptionEncoder
from vlv.rng import Masks

KIND = "captioner"
PARTS = ["encoder", "decoder", "language_model"]


@dataclass(frozen=True)
class Stage2Batch:
    """B image-caption pairs, their images in one of three forms.

    Attributes:
        context: (B, Q, C) if the encoder is frozen; None if it is trainable.
        ids: token ids (B, T).
        labels: (B, T).
        images: (B, 3, H, W) uint8; None if context or features are given.
        features: the frozen vision tower's (B, S, D), if cached.
    """

    context: torch.Tensor | None
    ids: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor | None = None
    features: torch.Tensor | None = None


class Prefix(nn.Module):
    """Linear-GELU-Linear plus position embeddings: context (B, Q, C) -> prefix embeddings (B, Q, E).

    Args:
        positions: False: only the MLP, as in the released model.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, queries: int, inputs: int, hidden: int, outputs: int, *, positions: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
        self.positions = nn.Parameter(torch.randn(1, queries, outputs) * 0.02) if positions else None
        self.register_buffer("mean", torch.zeros(queries, inputs))
        self.register_buffer("std", torch.ones(queries, inputs))

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def standardise(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Standardise the context with its mean and std, each (Q, C), from now on.

        Most of a context is the same for all images; the difference between images is small. Without standardisation
        the prefix learns the difference late.
        """
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(1e-2))

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.layers((context - self.mean) / self.std)
        return projected if self.positions is None else projected + self.positions


class Captioner(nn.Module):
    """Encoder, conditioner, prefix and language model. The prefix is trainable; encoder and language model may be.

    Args:
        conditioner: the text side of the frozen decoder, which turns caption embeddings into the context.
        tokenizer: None for an architecture without one: the model can be trained, but it cannot write.
        generation: settings for writing; they may be replaced at any time.
        max_caption_tokens: length of the longest caption, unless `generation` sets another maximum.
    """

    def __init__(
        self,
        encoder: CaptionEncoder,
        conditioner: Conditioner[Any],
        prefix: Prefix,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        generation: Generation,
        max_caption_tokens: int,
    ) -> None:
        super().__init__()
        self.encoder, self.conditioner, self.prefix = encoder, conditioner, prefix
        self.language_model, self._tokenizer = language_model, tokenizer
        self.generation, self.max_caption_tokens = generation, max_caption_tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's tokenizer.

        Raises:
            ValueError: built from an architecture without a tokenizer.
        """
        if self._tokenizer is None:
            raise ValueError("this language model was built from its architecture alone, without a tokenizer")
        return self._tokenizer

    def set_trainable(self, parts: trainable.Parts, of_encoder: trainable.Parts, *, queries: bool = True) -> None:
        """Train the prefix and `parts` (a row of `trainable.STAGE2`); freeze everything else.

        If the encoder is among `parts`, `of_encoder` (a row of `trainable.STAGE1`) and `queries` say what is trained
        in it. The conditioner always stays frozen.
        """
        self.requires_grad_(False)
        if trainable.ENCODER in parts:
            self.encoder.set_trainable(of_encoder, queries=queries)
        self.prefix.requires_grad_(True)
        if trainable.LANGUAGE_MODEL in parts:
            self.language_model.requires_grad_(True)
        if trainable.ADAPTERS in parts:
            language_model.train_adapters(self.language_model)

    def choose(self, stage1: Stage1, stage2: Stage2) -> None:
        """Set what Stage 2 trains, as the configuration says."""
        self.set_trainable(stage2.trained_parts, stage1.trained_parts, queries=stage2.queries_learn)

    @torch.no_grad()
    def context(self, batch: torch.Tensor) -> torch.Tensor:
        """Squares (B, 3, S, S) uint8 -> context (B, Q, C), without gradient."""
        return self._context(self.encoder.features(batch))

    def _context(self, features: torch.Tensor, masks: Masks | None = None) -> torch.Tensor:
        return self.conditioner.states(self.encoder(features, masks).float())

    def forward(self, batch: Stage2Batch, generator: torch.Generator) -> torch.Tensor:
        """Mean cross-entropy of the labelled tokens. The seed of `generator` determines the dropout masks of an encoder
        that is computed here; no numbers are drawn from it.

        Token t is predicted from the prefix and the tokens before it, the first token from the prefix alone.
        Logits are computed only at positions with a label.
        """
        device = self.prefix.device
        labels = batch.labels.to(device)
        prefix = self.prefix(self._context_of(batch, generator).to(device).float())
        words = self.language_model.get_input_embeddings()(batch.ids.to(device))
        states = self.language_model.base_model(
            inputs_embeds=torch.cat([prefix.to(words.dtype), words], 1), use_cache=False
        ).last_hidden_state
        predicting = states[:, prefix.shape[1] - 1 : -1]
        labelled = labels != IGNORED
        logits = self.language_model.get_output_embeddings()(predicting[labelled])
        return F.cross_entropy(logits.float(), labels[labelled])

    def _context_of(self, batch: Stage2Batch, generator: torch.Generator) -> torch.Tensor:
        if batch.context is not None:
            return batch.context
        masks = self.encoder.masks(generator, len(batch.ids))
        if batch.features is not None:
            return self._context(batch.features.to(self.encoder.queries.device).float(), masks)
        assert batch.images is not None
        return self._context(self.encoder.features(batch.images, masks), masks)

    def loss_weight(self, batch: Stage2Batch) -> int:
        """The number of tokens over which the loss of `batch` is a mean."""
        return int((batch.labels != IGNORED).sum())

    @torch.no_grad()
    def write(self, context: torch.Tensor | None, count: int = 1) -> list[str]:
        """Captions for contexts (B, Q, C), written as `generation` says; by default greedily, each up to its <eos>.

        Without a context (None) the language model samples `count` captions: the baseline without an image.
        """
        how = self.generation
        table = self.language_model.get_input_embeddings()
        begin = None if how.begin == "prefix" and context is not None else self.tokenizer.bos_token_id
        own_end = self.language_model.generation_config.eos_token_id
        end = self.tokenizer.eos_token_id if how.end == "tokenizer" else own_end
        beams = 1 if context is None else how.beams
        rows = count if context is None else len(context)
        start = [] if begin is None else [table(torch.full((rows, 1), begin, device=table.weight.device))]
        prefix = [] if context is None else [self.prefix(context).to(table.weight.dtype)]
        inputs = torch.cat([*prefix, *start], 1)
        written = self.language_model.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device),
            max_new_tokens=how.max_tokens or self.max_caption_tokens,
            do_sample=context is None,
            num_beams=beams,
            early_stopping=beams > 1,  # as in the release: stop when there are as many finished captions as beams
            eos_token_id=end,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        )
        texts: list[str] = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [language_model.clean_up(text) if how.clean_up else text.strip() for text in texts]

    def caption(self, pictures: Sequence[images.Pixels], batch_size: int = 50) -> list[str]:
        """Caption pictures (H, W, 3) uint8 of any size, preprocessed as in training."""
        result: list[str] = []
        for i in range(0, len(pictures), batch_size):
            squares = self.encoder.preprocessing.cut(pictures[i : i + batch_size])
            result += self.write(self.context(squares))
        return result

    def save(self, folder: Path, settings: Config, paths: Paths, card: str) -> None:
        """Write the tensors that both stages trained, and the names of the frozen parts."""
        saved.save(folder, KIND, settings, paths, PARTS, self.trained(settings), card)

    def trained(self, settings: Config) -> dict[str, torch.Tensor]:
        """The tensors, by name, that Stage 1 or Stage 2 trained; a saved captioner holds them."""
        self.encoder.set_trainable(settings.stage1.trained_parts)
        by_stage_1 = {f"encoder.{n}": p for n, p in self.encoder.named_parameters() if p.requires_grad}
        self.choose(settings.stage1, settings.stage2)
        statistics = {"prefix.mean": self.prefix.mean, "prefix.std": self.prefix.std}
        return by_stage_1 | {n: p for n, p in self.named_parameters() if p.requires_grad} | statistics

    @staticmethod
    def build(settings: Config, paths: Paths) -> "Captioner":
        """Pretrained parts, a new encoder side and a new prefix, seeded by stage2.seed."""
        torch.manual_seed(settings.stage2.seed)
        conditioner = build.conditioner(settings.decoder, paths)
        encoder = build_encoder(settings, conditioner.width, paths)
        section = settings.language_model
        writer = language_model.build(section, paths)
        width = writer.get_input_embeddings().weight.shape[1]
        queries = settings.encoder.queries
        prefix = Prefix(queries, conditioner.width, section.prefix_width, width, positions=section.prefix_positions)
        words = language_model.tokenizer(section, paths)
        tokens = settings.stage2.max_caption_tokens
        if settings.stage2.trains_adapters:
            language_model.insert_adapters(writer, settings.stage2.lora)
        captioner = Captioner(encoder, conditioner, prefix, writer, words, section.generation, tokens)
        captioner.choose(settings.stage1, settings.stage2)
        return captioner

    @staticmethod
    def load(folder: Path, paths: Paths | None = None) -> "Captioner":
        """Load strictly from a folder that `save` or `saved.bundle` wrote.

        Raises:
            ModelFolderError: the wrong kind of folder, keys or pretrained parts.
        """
        found = saved.read(folder, KIND)
        root = saved.parts_root(folder, found, paths or Paths(folder))
        model = Captioner.build(found.config, root)
        saved.restore(model, set(model.trained(found.config)), folder)
        return model.requires_grad_(False).eval()
