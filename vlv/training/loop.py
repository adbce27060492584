"""The only training loop: both stages and the pretraining of the tiny parts use it.

A step's loss is the mean over the whole batch. Its samples and random numbers are the same for any number of
processes and micro-batches.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode

from vlv.config import Training
from vlv.io import files
from vlv.io.progress import meter
from vlv.io.stopping import Stopped
from vlv.training import blocks, distributed, optim, state
from vlv.training.ledger import Ledger

log = logging.getLogger(__name__)

OnLog = Callable[[int, dict[str, float]], None]


@runtime_checkable
class WeightedLoss(Protocol):
    """A module whose loss is a mean over items other than samples, such as tokens."""

    def loss_weight(self, batch: Any) -> int:
        """The number of items over which the loss of this micro-batch is a mean."""
        ...


class DivergedError(RuntimeError):
    """The loss is no longer finite."""


class OutOfMemoryError(RuntimeError):
    """A step does not fit into memory."""


def train(
    module: nn.Module,
    batches: Callable[[int], Iterator[object]],
    settings: Training,
    folder: Path,
    input_hash: str,
    on_log: OnLog = lambda step, values: None,
    title: str = "Training",
) -> None:
    """Train `module` in place for `settings.steps` optimizer steps, or from its newest checkpoint to there.

    With several processes, each of them calls this function and the main one writes. Where parameters were sharded,
    the main process has full ones afterwards, to be saved; the module of the other processes is of no use then.

    Args:
        module: `module(batch, generator)` returns the mean loss of a micro-batch (a scalar). It takes all random
            numbers from `generator` (torch.Generator). Parameters with `requires_grad` are trained.
        batches: `batches(step)` yields this process's micro-batches from the first one of `step` (0-based) on,
            always the same ones.
        folder: holds the checkpoints, the lock, the run's record and the ledger.
        input_hash: hash of everything that decides the result. A checkpoint with another hash is refused.
        on_log: called in the main process every `log_every` steps with the number of finished steps and the values
            loss (mean since the last call), learning_rate and samples_per_second.
        title: name of this training in the progress bar and in errors.

    Raises:
        LockHeldError: another process trains in `folder`.
        CheckpointError: `folder` holds checkpoints of another training.
        Stopped: SIGTERM, SIGUSR1 or Ctrl-C. The state is saved, and the same call resumes the training.
        DivergedError: the loss became NaN or infinite.
        OutOfMemoryError: a step does not fit; the message says what helps.
    """
    lock = files.folder_lock(folder, title) if distributed.is_main() else contextlib.nullcontext()
    with lock, distributed.stop_signal() as stop:
        _Loop(module, settings, folder, input_hash, title).run(batches, on_log, stop)


class _Loop:
    """Model, optimizer and weight averages of one training, as this process holds them."""

    def __init__(self, module: nn.Module, settings: Training, folder: Path, input_hash: str, title: str) -> None:
        self.module, self.settings, self.title, self.input_hash = module, settings, title, input_hash
        self.checkpoints = folder / "checkpoints"
        self.accelerator = distributed.accelerator(settings)
        self.device: torch.device = self.accelerator.device
        if settings.gradient_checkpointing:
            recomputed = blocks.recompute(module)
            log.info("%s: %d blocks recompute their activations", title, recomputed)
        if settings.frozen_precision == "bf16":
            blocks.store_frozen_in_bf16(module)
        parameters = optim.trainable(module)
        optimizer = optim.build(parameters, settings.optimizer)
        found = self._found()
        if found:
            state.restore_weights(parameters, found.weights)
        self.model, self.optimizer = self._prepare(optimizer)
        # Sharding replaced the parameters in the module and in the optimizer.
        self.parameters = optim.trainable(module)
        self.raw_optimizer = optimizer
        self.average = optim.WeightAverage(self.parameters, settings.optimizer.ema_decay)
        self.start = self.saved = 0
        if found:
            state.restore_optimizer(self.raw_optimizer, self.parameters, found.optimizer)
            self.average.restore(found.averages)
            self.start = self.saved = found.step
            log.info("%s: resuming from step %d of %d", title, self.start, settings.steps)
        self.ledger = Ledger(folder, distributed.world_size()) if distributed.is_main() else None
        new = self.ledger is not None and self.ledger.flops_per_step is None
        self.uncounted = distributed.all_reduce([new], self.device)[0] > 0

    def _found(self) -> state.Checkpoint | None:
        """The newest checkpoint. The main process looks for it, and all processes load the same one."""
        mine = state.newest(self.checkpoints) if distributed.is_main() else 0
        step = int(distributed.all_reduce([mine], self.device)[0])
        return state.load(self.checkpoints, step, self.input_hash) if step else None

    def _prepare(self, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        cast(Any, self.module)._no_split_modules = blocks.names(self.module)  # what accelerate shards as a whole
        model, prepared = self.accelerator.prepare(self.module, optimizer)
        if self.device.type == "cpu":
            for part in self.module.modules():
                if isinstance(part, FSDPModule):
                    part.set_force_sum_reduction_for_comms(True)  # gloo has no average
        return model, prepared

    def run(self, batches: Callable[[int], Iterator[object]], on_log: OnLog, stop: list[int]) -> None:
        s = self.settings
        source = batches(self.start)
        losses: list[float] = []
        last = time.monotonic()
        with meter(self.title, s.steps, silent=not distributed.is_main()) as progress:
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
                        f"{self.title}: stopped and saved at step {done} of {s.steps}; run it again to continue."
                    )
        self.average.copy_to_weights()
        distributed.unshard(self.module)

    @contextlib.contextmanager
    def _fitting(self, step: int) -> Iterator[None]:
        """Turn an out-of-memory error into one that names remedies."""
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
        """One optimizer step; returns its mean loss over the whole batch, and whether any process was asked to stop."""
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
            with between, blocks.autocast(self.device, s.precision):
                loss = self.model(part, distributed.part_generator(s, step, number)) * share
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        mine = sum(torch.stack(losses).tolist()) / distributed.world_size()
        total, stopping = distributed.all_reduce([mine, float(bool(stop))], self.device)
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
        """The weight of each micro-batch's mean loss in the mean over the whole batch.

        Gradients are averaged over the processes, so the weights of all processes add up to the world size.
        """
        if not isinstance(self.module, WeightedLoss):
            return [1 / len(parts)] * len(parts)
        weights = [self.module.loss_weight(part) for part in parts]
        (total,) = distributed.all_reduce([sum(weights)], self.device)
        return [weight * distributed.world_size() / total for weight in weights]

    def _count(self, part: object, step: int) -> None:
        """Count the operations of one micro-batch. The others are assumed to cost the same.

        Its gradients are discarded: some operations round differently under the counter, and a training that was
        killed before its first checkpoint would differ from one that was not. All processes take part, because
        sharded parameters need every process.
        """
        counter = FlopCounterMode(display=False) if self.ledger is not None else contextlib.nullcontext()
        self.accelerator.sync_gradients = True
        with blocks.autocast(self.device, self.settings.precision), counter:
            self.accelerator.backward(self.model(part, distributed.part_generator(self.settings, step, 0)))
        self.optimizer.zero_grad()
        if self.ledger is not None and isinstance(counter, FlopCounterMode):
            micro_batches = self.settings.accumulation * distributed.world_size()
            self.ledger.flops_per_step = counter.get_total_flops() * micro_batches
        self.uncounted = False

    def _log(self, on_log: OnLog, step: int, loss: float, rate: float) -> None:
        if self.ledger is None:
            return
        self.ledger.write()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        on_log(step, {"loss": loss, "learning_rate": learning_rate, "samples_per_second": rate})

    def _save(self, step: int) -> None:
        """Write a checkpoint: all processes gather the tensors, the main one writes them."""
        weights = distributed.gather_to_main(self.parameters)
        optimizer = distributed.gather_to_main(state.optimizer_tensors(self.raw_optimizer, self.parameters))
        averages = distributed.gather_to_main(self.average.tensors)
        if self.ledger is not None:
            self.ledger.write()
            state.save(self.checkpoints, state.Checkpoint(step, self.input_hash, weights, optimizer, averages))
        self.saved = step
