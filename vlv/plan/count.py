"""FLOPs and memory of a stage's training step, counted on the real model with fake tensors.

The step runs the model's own loss, forward and backward, and recomputes the same activations as the trainer. A
multiply-add is two FLOPs, as in torch.utils.flop_counter, which counts matrix products, convolutions and attention,
but no element-wise work. The backward pass counts only what is computed: gradients of activations that lead to
trainable parameters, and gradients of trainable weights.
"""

import bisect
import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vlv.config import Config, Paths, Training
from vlv.models.autoencoder import Autoencoder
from vlv.plan import step
from vlv.plan.fake_tensors import Target, backward, fake_like, make_fake, on_target, use_fused_attention
from vlv.plan.step import StageName
from vlv.training import blocks

Phase = Literal["forward", "recomputed", "backward"]
Flops = dict[tuple[str, Phase], int]  # by part and phase

# The parts of both models in the order in which they run, by prefixes of their modules' names. The longest prefix
# counts.
PARTS = {
    "decoder.vae": "VAE encoder",
    "encoder.florence.model.vision_tower": "vision tower",
    "encoder.florence.model.multi_modal_projector": "vision tower",
    "encoder.florence.model.language_model.shared": "BART encoder",
    "encoder.florence.model.language_model.encoder": "BART encoder",
    "encoder": "BART decoder, queries, projection",
    "decoder.conditioner": "text encoder",
    "conditioner": "text encoder",
    "decoder": "denoiser",
    "prefix": "prefix MLP",
    "language_model": "language model",
    "language_model.lm_head": "word head",
}
OTHER = "other"  # work of no such module: noise, the loss


def part_of(name: str) -> str:
    """Return the part that a module or parameter of this name belongs to."""
    found = [start for start in PARTS if f"{name}.".startswith(f"{start}.")]
    return PARTS[max(found, key=len)] if found else OTHER


@dataclass(frozen=True)
class Part:
    """One part of a stage's model.

    Attributes:
        parameters, trainable: numbers of parameters.
        prepared: FLOPs for one image before the training, for the caches.
        forward, recomputed, backward: FLOPs of one sample in a step.
        kept: bytes that a micro-batch holds between the forward and the backward pass.
    """

    name: str
    parameters: int
    trainable: int
    prepared: int
    forward: int
    recomputed: int
    backward: int
    kept: int

    @property
    def flops(self) -> int:
        """FLOPs of one sample in a step."""
        return self.forward + self.recomputed + self.backward


@dataclass(frozen=True)
class Activations:
    """Bytes of one step besides weights and optimizer.

    Attributes:
        samples: number in the micro-batch.
        kept: held between the forward and the backward pass.
        peak: the most that forward and backward hold at once, gradients included.
    """

    samples: int
    kept: int
    peak: int


@dataclass(frozen=True)
class Stage:
    """The counts of a stage.

    Attributes:
        parts: in the order in which they run. A sample is one image with its noise draws (Stage 1) or one
            image-caption pair (Stage 2).
        settings: the stage's section of the configuration.
        samples: number in one optimizer step, over all processes.
        weights: bytes of all parameters and buffers on a GPU.
        trainable: number of trainable parameters.
        cached: bytes that one image takes in the caches.
        activations: those of the requested micro-batch.
        half: those of half of that micro-batch; None if not counted.
        with_recomputation: those of the same micro-batch with gradient checkpointing; None if not counted.
    """

    name: StageName
    parts: list[Part]
    settings: Training
    samples: int
    weights: int
    trainable: int
    cached: int
    activations: Activations
    half: Activations | None = None
    with_recomputation: Activations | None = None

    @property
    def flops(self) -> int:
        """FLOPs of one sample in a step."""
        return sum(part.flops for part in self.parts)

    @property
    def prepared_flops(self) -> int:
        """FLOPs of one image before the training, for the caches."""
        return sum(part.prepared for part in self.parts)


def stage(
    settings: Config, paths: Paths, name: StageName, target: Target, micro_batch: int = 1, *, knobs: bool = False
) -> Stage:
    """Count one step of the stage for a micro-batch of `samples` samples.

    Args:
        knobs: also count half of the micro-batch, and the step with gradient checkpointing.
    """
    simulation = Simulation(settings, paths, name, target)
    half = with_recomputation = None
    parts, activations, cached = simulation.step(micro_batch)
    if knobs and micro_batch > 1:
        half = simulation.step(micro_batch // 2)[1]
    if knobs and not simulation.section.gradient_checkpointing:
        blocks.recompute(simulation.model)
        with_recomputation = simulation.step(micro_batch)[1]
    model = simulation.model
    return Stage(
        name=name, parts=parts, settings=simulation.section, samples=step.samples_in_step(settings, name),
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        cached=cached // micro_batch, activations=activations, half=half,
        with_recomputation=with_recomputation,
    )  # fmt: skip


class Simulation:
    """A stage's model as the trainer prepares it, on fake tensors."""

    def __init__(self, settings: Config, paths: Paths, name: StageName, target: Target) -> None:
        self.settings, self.target, self.section = settings, target, step.section(settings, name)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.model = step.build(settings, paths, name)
        if self.section.gradient_checkpointing:
            blocks.recompute(self.model)
        if self.section.frozen_precision == "bf16":
            blocks.store_frozen_in_bf16(self.model)
        if target == "gpu":
            use_fused_attention(self.model)
        make_fake(self.model, self.mode)
        if isinstance(self.model, Autoencoder):
            schedule = vars(self.model.decoder.scheduler)
            schedule |= {k: fake_like(v, self.mode) for k, v in schedule.items() if isinstance(v, torch.Tensor)}

    def step(self, samples: int) -> tuple[list[Part], Activations, int]:
        """Run one micro-batch forward and backward; the last number is the bytes of its images in the caches."""
        size = self.settings.data.image_size
        prepared, counter = StepCounter(self.model), StepCounter(self.model)
        with self.mode, on_target(self.target, self.section.precision):
            images = torch.empty(samples, 3, size, size, dtype=torch.uint8)
            with prepared:
                batch = step.batch(self.model, self.settings, images)
            with counter:
                loss = self.model(batch, torch.Generator())
                kept = counter.living()
                backward(loss)
        self.model.zero_grad()
        parts = self._parts(prepared.flops, counter.flops, kept, samples)
        return parts, Activations(samples, sum(kept.values()), counter.peak), step.cached_bytes(batch)

    def _parts(self, prepared: Flops, flops: Flops, kept: dict[str, int], samples: int) -> list[Part]:
        parameters, trainable = Counter[str](), Counter[str]()
        for name, parameter in self.model.named_parameters():
            parameters[part_of(name)] += parameter.numel()
            trainable[part_of(name)] += parameter.numel() * parameter.requires_grad
        found = [
            Part(
                part, parameters[part], trainable[part], prepared[part, "forward"] // samples,
                flops[part, "forward"] // samples, flops[part, "recomputed"] // samples,
                flops[part, "backward"] // samples, kept.get(part, 0),
            )
            for part in dict.fromkeys([*PARTS.values(), OTHER])
        ]  # fmt: skip
        return [part for part in found if part.parameters or part.flops or part.prepared]


class StepCounter(TorchDispatchMode):
    """Counts a step of `model`: FLOPs by part and phase, and the bytes that are allocated and not yet freed.

    Attributes:
        peak: the most bytes that were allocated at once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Flops = defaultdict(int)
        self.peak = self._now = 0
        self._living: dict[int, tuple[str, int, weakref.ref[Any]]] = {}
        attention = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        counter = FlopCounterMode(display=False, custom_mapping={attention: _attention_backward})
        self._functions = counter.flop_registry
        self._parts = {module: part_of(name) for name, module in model.named_modules()}
        # Which part runs from which autograd sequence number on. A node of the backward pass has the number that it got
        # in the forward pass. (torch's own ModuleTracker looks only at positional arguments.)
        self._running, self._numbers, self._owners = [OTHER], [0], [OTHER]
        self._hooks: list[Any] = []

    def __enter__(self) -> "StepCounter":
        module = nn.modules.module
        self._hooks = [
            module.register_module_forward_pre_hook(self._begin),
            module.register_module_forward_hook(self._end, always_call=True),  # recomputation ends with an exception
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._running.append(self._parts.get(module, self._running[-1]))
        self._note_part()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        self._note_part()

    def _note_part(self) -> None:
        if torch._C._current_graph_task_id() == -1 and self._running[-1] != self._owners[-1]:
            self._numbers.append(torch._C._autograd._get_sequence_nr())
            self._owners.append(self._running[-1])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if flops := self._functions.get(func._overloadpacket):
            self.flops[self._where()] += flops(*args, **kwargs, out_val=result)
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and _storage(made) not in given:
                self._allocated(made)
        return result

    def _where(self) -> tuple[str, Phase]:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._running[-1], "forward"
        part = self._owners[bisect.bisect_right(self._numbers, node._sequence_nr()) - 1]
        # Autograd computes no gradients of gradients here, so what it records in the backward pass is recomputation.
        return part, "recomputed" if torch.is_grad_enabled() else "backward"

    def _allocated(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if key in self._living:
            return
        size = storage.nbytes()

        def freed(_: object) -> None:
            del self._living[key]
            self._now -= size

        self._living[key] = self._running[-1], size, weakref.ref(storage, freed)
        self._now += size
        self.peak = max(self.peak, self._now)

    def living(self) -> dict[str, int]:
        """Return the bytes that are now allocated, by the part that allocated them."""
        found: dict[str, int] = defaultdict(int)
        for part, size, _ in self._living.values():
            found[part] += size
        return dict(found)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _attention_backward(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """Count the four products of plain attention, without the scores that the fused kernel computes again."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * 2 * (width + value[3])
