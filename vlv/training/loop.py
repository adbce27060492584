"""The training loop. Both stages and the pretraining of the tiny parts go through it; there is no other.

A step's loss is the mean over the whole batch, and its samples and draws are the same, whatever the number of
processes and micro-batches that share it.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode

from vlv.config import Training
from vlv.io import files
from vlv.io.progress import meter
from vlv.io.stopping import Stopped
from vlv.training import blocks, checkpoint, optim, parallel, runtime, zero
from vlv.training.ledger import Ledger

log = logging.getLogger(__name__)

BatchT = TypeVar("BatchT", contravariant=True)
OnLog = Callable[[int, dict[str, float]], None]


class Learner(Protocol[BatchT]):
    """A module whose forward gives the loss; only parameters with `requires_grad` learn."""

    def __call__(self, batch: BatchT, generator: torch.Generator) -> torch.Tensor:
        """The mean loss of a micro-batch (scalar). All randomness comes from `generator`."""
        ...


@runtime_checkable
class Weighing(Protocol):
    """A learner whose loss is a mean over something else than samples, such as tokens."""

    def loss_weight(self, batch: Any) -> int:
        """Over how many the loss of this micro-batch is a mean."""
        ...


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


def train(
    module: nn.Module,
    batches: Callable[[int], Iterator[object]],
    settings: Training,
    folder: Path,
    fingerprint: str,
    on_log: OnLog = lambda step, values: None,
    title: str = "Training",
) -> None:
    """Train `module` (a `Learner`) in place for `settings.steps` optimizer steps, from where it last was.

    With several processes each calls it; the main one writes. Where parameters were sharded, they are whole in
    the main process afterwards, to be saved, and the others' are of no use.

    Args:
        batches: `batches(step)` yields this process's micro-batches from the first one of `step` on, always the
            same.
        folder: holds the checkpoints, the lock, the run's record and the ledger.
        fingerprint: hash of everything that decides the result; a checkpoint of another one is refused.
        on_log: called in the main process every `log_every` steps with the mean loss, the rate and the speed.

    Raises:
        LockHeldError: another process trains in `folder`.
        CheckpointError: `folder` holds checkpoints of another training.
        Stopped: SIGTERM or Ctrl-C; saved, the same call goes on.
        DivergedError: the loss became NaN or infinite.
        OutOfMemoryError: a step does not fit; the message says what helps.
    """
    alone = files.folder_lock(folder, title) if runtime.is_main() else contextlib.nullcontext()
    with alone, runtime.stop_signal() as stop:
        _Loop(module, settings, folder, fingerprint, title).run(batches, on_log, stop)


class OutOfMemoryError(RuntimeError):
    """A step does not fit into memory."""


class _Loop:
    """Model, optimizer and averages of one training, as they lie in this process."""

    def __init__(self, module: nn.Module, settings: Training, folder: Path, fingerprint: str, title: str) -> None:
        self.module, self.settings, self.title, self.fingerprint = module, settings, title, fingerprint
        self.checkpoints = folder / "checkpoints"
        self.accelerator = runtime.accelerator(settings)
        self.device: torch.device = self.accelerator.device
        if settings.gradient_checkpointing:
            recomputed = blocks.recompute(module)
            log.info("%s: %d blocks compute their activations again", title, recomputed)
        if settings.frozen_precision == "bf16":
            blocks.store_frozen_in_bf16(module)
        parameters = optim.trainable(module)
        optimizer = optim.build(parameters, settings.optimizer)
        found = self._found()
        if found:
            checkpoint.restore_weights(parameters, found.weights)
        self.model, self.optimizer = self._prepare(optimizer)
        # Sharding has put others in the place of the parameters, in the module and in the optimizer.
        self.parameters = optim.trainable(module)
        self.deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.raw_optimizer: Any = self.optimizer if self.deepspeed else optimizer
        self.average = optim.WeightAverage(self.parameters, settings.optimizer.ema_decay)
        self.start = self.saved = 0
        if found:
            restore = zero.restore_optimizer if self.deepspeed else checkpoint.restore_optimizer
            restore(self.raw_optimizer, self.parameters, found.optimizer)
            self.average.restore(found.averages)
            self.start = self.saved = found.step
            log.info("%s: going on from step %d of %d", title, self.start, settings.steps)
        self.ledger = Ledger(folder, runtime.world()) if runtime.is_main() else None
        new = self.ledger is not None and self.ledger.flops_per_step is None
        # Not under DeepSpeed, whose backward pass is a step as well.
        self.uncounted = parallel.agree([new], self.device)[0] > 0 and not self.deepspeed

    def _found(self) -> checkpoint.Checkpoint | None:
        """The newest checkpoint. The main process looks for it, and all take the same."""
        mine = checkpoint.newest(self.checkpoints) if runtime.is_main() else 0
        step = int(parallel.agree([mine], self.device)[0])
        return checkpoint.load(self.checkpoints, step, self.fingerprint) if step else None

    def _prepare(self, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        cast(Any, self.module)._no_split_modules = blocks.names(self.module)  # what accelerate shards as one
        model, prepared = self.accelerator.prepare(self.module, optimizer)
        if self.device.type == "cpu":
            for part in self.module.modules():
                if isinstance(part, FSDPModule):
                    part.set_force_sum_reduction_for_comms(True)  # gloo knows no average
        return model, prepared

    def run(self, batches: Callable[[int], Iterator[object]], on_log: OnLog, stop: list[int]) -> None:
        s = self.settings
        source = batches(self.start)
        losses: list[float] = []
        last = time.monotonic()
        with meter(self.title, s.steps, silent=not runtime.is_main()) as progress:
            progress.skip(self.start)
            for done in range(self.start + 1, s.steps + 1):
                with self._fitting(done):
                    loss, stopping = self._step(done - 1, source, stop)
                losses.append(loss)
                mean = sum(losses) / len(losses)
                progress.advance(note=f"loss {mean:.4f}")
                if done % s.log_every == 0:
                    now = time.monotonic()
                    rate = len(losses) * s.batch_size / (now - last)
                    self._log(on_log, done, mean, rate)
                    losses, last = [], now
                if done % s.checkpoint_every == 0 or done == s.steps or stopping:
                    self._save(done)
                if stopping and done < s.steps:
                    raise Stopped(
                        f"{self.title}: stopped and saved at step {done} of {s.steps}; run it again to go on."
                    )
        self.average.copy_to_weights()
        parallel.unshard(self.module)

    @contextlib.contextmanager
    def _fitting(self, step: int) -> Iterator[None]:
        """Say what helps where a step does not fit."""
        try:
            yield
        except RuntimeError as error:
            # A CPU's allocator has no error class of its own.
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            s = self.settings
            knobs = [] if s.gradient_checkpointing else ["gradient_checkpointing: true"]
            knobs.append(f"accumulation: {2 * s.accumulation}")
            knobs += ["frozen_precision: bf16"] if s.frozen_precision == "fp32" and s.precision == "bf16" else []
            raise OutOfMemoryError(
                f"{self.title}: step {step} does not fit into the memory of {self.device}. What helps: "
                f"{', '.join(knobs)}; how much each of them frees: vlv plan. The last good state is step {self.saved}. "
                f"({str(error).splitlines()[0]})"
            ) from error

    def _step(self, step: int, source: Iterator[object], stop: list[int]) -> tuple[float, bool]:
        """One optimizer step: its mean loss over the whole batch, and whether any process was asked to stop."""
        s = self.settings
        optim.set_rate(self.optimizer, optim.rate_share(s.optimizer, step, s.steps))
        parts = [next(source) for _ in range(s.accumulation)]
        if self.uncounted:
            self._count(parts[0], step)
        losses = []
        for number, (part, share) in enumerate(zip(parts, self._shares(parts), strict=True)):
            self.accelerator.sync_gradients = number + 1 == len(parts)
            between = (
                contextlib.nullcontext() if self.accelerator.sync_gradients else self.accelerator.no_sync(self.model)
            )
            bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=s.precision == "bf16")
            with between, bf16:
                loss = self.model(part, runtime.part_generator(s, step, number)) * share
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        mine = sum(torch.stack(losses).tolist()) / runtime.world()
        total, stopping = parallel.agree([mine, float(bool(stop))], self.device)
        if not math.isfinite(total):
            raise DivergedError(
                f"{self.title}: the loss is {total} at step {step}. Lower the learning rate; "
                f"the last good state is step {self.saved}."
            )
        self.accelerator.clip_grad_norm_(self.parameters.values(), s.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(step + 1)
        if self.ledger is not None:
            self.ledger.add_step(s.batch_size)
        return total, stopping > 0

    def _shares(self, parts: list[object]) -> list[float]:
        """What each micro-batch's mean counts in this process's share of the whole batch's mean.

        Gradients are averaged over the processes, so the shares of all processes add up to their number.
        """
        if not isinstance(self.module, Weighing):
            return [1 / len(parts)] * len(parts)
        weights = [self.module.loss_weight(part) for part in parts]
        (total,) = parallel.agree([sum(weights)], self.device)
        return [weight * runtime.world() / total for weight in weights]

    def _count(self, part: object, step: int) -> None:
        """Count the operations of a micro-batch; the others are taken to cost the same.

        Its gradients are thrown away: under the counter some operations round otherwise, and a training that was
        killed at its first checkpoint would differ from one that was not. Processes with shards of a parameter
        need each other, so all of them take part.
        """
        counter = FlopCounterMode(display=False) if self.ledger is not None else contextlib.nullcontext()
        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")
        self.accelerator.sync_gradients = True
        with bf16, counter:
            self.accelerator.backward(self.model(part, runtime.part_generator(self.settings, step, 0)))
        self.optimizer.zero_grad()
        if self.ledger is not None and isinstance(counter, FlopCounterMode):
            self.ledger.flops_per_step = counter.get_total_flops() * self.settings.accumulation * runtime.world()
        self.uncounted = False

    def _log(self, on_log: OnLog, step: int, loss: float, rate: float) -> None:
        if self.ledger is None:
            return
        self.ledger.write()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        on_log(step, {"loss": loss, "learning_rate": learning_rate, "samples_per_second": rate})

    def _save(self, step: int) -> None:
        """Gather and write a checkpoint; all processes take part, the main one writes."""
        weights = parallel.gather(self.parameters)
        read = zero.optimizer_tensors if self.deepspeed else checkpoint.optimizer_tensors
        state = parallel.gather(read(self.raw_optimizer, self.parameters))
        averages = parallel.gather(self.average.tensors)
        if self.ledger is not None:
            self.ledger.write()
            checkpoint.save(self.checkpoints, checkpoint.Checkpoint(step, self.fingerprint, weights, state, averages))
        self.saved = step
