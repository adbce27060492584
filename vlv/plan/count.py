"""What each stage costs, counted on stand-ins: by module, and the most memory a step takes at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlv.config import Config, Paths, Training
from vlv.plan import models, steps
from vlv.plan.counting import Cost, Counter, LiveBytes, Parts, Recorder, Run, straight
from vlv.plan.stand_ins import Target, on_target

# Gradient checkpointing covers what learns or passes gradients; the others keep nothing anyway.
RECOMPUTED = (
    steps.BART_ENCODER, steps.BART_DECODER, steps.TEXT, steps.UNET, steps.TRANSFORMER, steps.LLM,
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Bytes as a function of the samples in a micro-batch: what is there anyway, and what each sample adds."""

    fixed: int
    each: int

    def at(self, samples: int) -> int:
        return self.fixed + self.each * samples

    @staticmethod
    def through(first: tuple[int, int], second: tuple[int, int]) -> "Line":
        """From the bytes at two numbers of samples."""
        each = (second[1] - first[1]) // (second[0] - first[0])
        return Line(first[1] - each * first[0], each)


@dataclass(frozen=True)
class Module:
    """One module of a stage; see `Cost`. `kept_whole` and `kept_recomputed`: bytes kept for the backward pass."""

    cost: Cost
    kept_whole: Line
    kept_recomputed: Line

    @property
    def kept(self) -> Line:
        return self.kept_recomputed if self.cost.recompute else self.kept_whole


@dataclass(frozen=True)
class Stage:
    """A stage, counted.

    Attributes:
        modules: in the order they run; a sample is one image with its draws (Stage 1), one pair (Stage 2).
        settings: the stage's section of the configuration.
        samples: encoded images or pairs in one optimizer step, over all processes.
        weights: bytes of all parameters and buffers on a GPU. learning: parameters that learn.
        live: the most bytes that a step (forward and backward) holds at once beside weights and optimizer. Exact at
            the micro-batch that was asked for and at half of it; a line between and beyond.
    """

    name: str
    modules: list[Module]
    settings: Training
    samples: int
    weights: int
    learning: int
    live: Line

    @property
    def flops(self) -> int:
        """FLOPs of one sample in a step."""
        return sum(m.cost.flops for m in self.modules)

    @property
    def prepared_flops(self) -> int:
        """FLOPs of one image before the training, for the caches."""
        return sum(m.cost.forward for m in self.modules if m.cost.prepared)

    @property
    def stored(self) -> int:
        """Bytes that one image takes in the caches."""
        return sum(m.cost.stored for m in self.modules)


def stage1(
    settings: Config,
    paths: Paths,
    target: Target,
    micro: int = 1,
    recompute: Sequence[str] | None = None,
    *,
    flops: bool = True,
) -> Stage:
    """Count Stage 1 for a micro-batch of `micro` samples.

    Args:
        recompute: names the modules that are computed twice (None: as configured).
        flops: False leaves FLOPs away and has memory at `micro` samples only; takes half of the time.
    """
    s = settings.stage1
    prepared = [n for n, cached in ((steps.VAE, s.cache_latents), (steps.TOWER, s.cache_features)) if cached]
    if recompute is None:
        recompute = RECOMPUTED if s.gradient_checkpointing else ()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = models.autoencoder(settings, paths, mode, target, s)
    size = settings.data.image_size

    def step(samples: int, at: Recorder) -> torch.Tensor:
        pictures = torch.empty(samples, 3, size, size, dtype=torch.uint8)
        return steps.stage1(model, s, pictures, at)

    subject = _Subject(
        step, mode, prepared, [model], lambda: models.recompute_autoencoder(model, target, s.precision)
    )  # fmt: skip
    modules, live = (_measure if flops else _measure_memory)(subject, target, s, micro, recompute)
    return Stage("stage1", modules, s, s.batch_size // s.draws_per_image, _bytes([model]), _learning([model]), live)


def stage2(
    settings: Config,
    paths: Paths,
    target: Target,
    micro: int = 1,
    caption_tokens: int | None = None,
    *,
    flops: bool = True,
) -> Stage:
    """Count Stage 2 with captions of `caption_tokens` (None: the longest that the configuration allows).

    `flops`: as in `stage1`.
    """
    s = settings.stage2
    recompute = RECOMPUTED if s.gradient_checkpointing else ()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    whole = models.autoencoder(settings, paths, mode, target, s)
    width = whole.decoder.conditioner.width
    prefix, language_model = models.language_side(settings, paths, width, mode, target)
    size, tokens = settings.data.image_size, caption_tokens or s.max_caption_tokens
    learns = s.trains_encoder
    prepared = [steps.CONTEXT] if not learns else [steps.TOWER] if s.cache_features else []

    def step(samples: int, at: Recorder) -> torch.Tensor:
        pictures = torch.empty(samples, 3, size, size, dtype=torch.uint8)
        context = steps.context_of(whole, pictures, at, learns=learns)
        ids = torch.empty(samples, tokens, dtype=torch.long)
        return steps.stage2(prefix, language_model, context, ids, at)

    def redo() -> None:
        models.recompute(language_model, target, s.precision)
        if learns:
            models.recompute_encoder(whole, target, s.precision)

    subject = _Subject(step, mode, prepared, [whole, prefix, language_model], redo)
    modules, live = (_measure if flops else _measure_memory)(subject, target, s, micro, recompute)
    held = [whole.encoder, whole.decoder.conditioner, prefix, language_model]
    return Stage("stage2", modules, s, s.batch_size, _bytes(held), _learning(held), live)


@dataclass(frozen=True)
class _Subject:
    """A stage to be measured: its step for so many samples, what is computed before, what learns.

    Attributes:
        redo: switches gradient checkpointing on.
    """

    step: Callable[[int, Recorder], torch.Tensor]
    mode: FakeTensorMode
    prepared: Sequence[str]
    learners: Sequence[nn.Module]
    redo: Callable[[], None]


def _measure(
    subject: _Subject, target: Target, settings: Training, micro: int, recompute: Sequence[str]
) -> tuple[list[Module], Line]:
    counters = [Counter(recompute, subject.prepared) for _ in (1, 2)]
    for samples, counter in enumerate(counters, 1):
        with subject.mode, on_target(target, settings.precision):
            subject.step(samples, counter)
    if settings.gradient_checkpointing:
        subject.redo()
    two_sizes = sorted({micro, (micro + 1) // 2} if micro > 1 else {1, 2})
    peaks = [(samples, _peak(subject, target, settings, samples, counters[0].outputs)) for samples in two_sizes]
    modules = [
        Module(
            one,
            Line.through((1, one.kept_whole), (2, two.kept_whole)),
            Line.through((1, one.kept_recomputed), (2, two.kept_recomputed)),
        )
        for one, two in zip(counters[0].costs, counters[1].costs, strict=True)
    ]
    return modules, Line.through(*peaks)


def _measure_memory(
    subject: _Subject, target: Target, settings: Training, micro: int, recompute: Sequence[str]
) -> tuple[list[Module], Line]:
    """As `_measure`, but bytes alone, and at `micro` samples alone."""
    counter = Counter(recompute, subject.prepared, flops=False)
    with subject.mode, on_target(target, settings.precision):
        subject.step(micro, counter)
    if settings.gradient_checkpointing:
        subject.redo()
    modules = [Module(cost, Line(cost.kept_whole, 0), Line(cost.kept_recomputed, 0)) for cost in counter.costs]
    return modules, Line(_peak(subject, target, settings, micro, counter.outputs), 0)


def _peak(subject: _Subject, target: Target, settings: Training, samples: int, outputs: dict[str, torch.Tensor]) -> int:
    """The most bytes that a step of `samples` (forward and backward) holds at once."""
    with subject.mode, LiveBytes() as live:
        with on_target(target, settings.precision):
            loss = subject.step(samples, _Cached(outputs))
        loss.backward()
        del loss
    for module in subject.learners:
        module.zero_grad()
    return int(live.peak)


class _Cached:
    """A `Recorder` that runs the step as it is, with the prepared modules' outputs there already."""

    def __init__(self, outputs: dict[str, torch.Tensor]) -> None:
        self._outputs = outputs

    def __call__(self, name: str, parts: Parts, run: Run, *inputs: torch.Tensor) -> torch.Tensor:
        if name in self._outputs:
            cached = self._outputs[name]  # of another number of samples
            return torch.empty(len(inputs[0]), *cached.shape[1:], dtype=cached.dtype)
        return straight(name, parts, run, *inputs)


def _tensors(modules: Sequence[nn.Module]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            found[id(tensor)] = tensor
    return list(found.values())


def _bytes(modules: Sequence[nn.Module]) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(modules))


def _learning(modules: Sequence[nn.Module]) -> int:
    return sum(t.numel() for t in _tensors(modules) if t.requires_grad)
