"""The training loop. Both stages and the pretraining of the tiny parts go through it; there is no other."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import nn

from vlv import files
from vlv.config import Training
from vlv.progress import meter
from vlv.training import checkpoint, optim, runtime

log = logging.getLogger(__name__)

BatchT = TypeVar("BatchT", contravariant=True)


class Learner(Protocol[BatchT]):
    """A module whose forward gives the loss; only parameters with `requires_grad` learn."""

    def __call__(self, batch: BatchT, generator: torch.Generator) -> torch.Tensor:
        """The mean loss of a micro-batch (scalar). All randomness comes from `generator`."""
        ...


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


def train(
    module: nn.Module,
    batches: Callable[[int], Iterator[object]],
    settings: Training,
    folder: Path,
    fingerprint: str,
    on_log: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    title: str = "Training",
) -> None:
    """Train `module` (a `Learner`) in place for `settings.steps` optimizer steps, from where it last was.

    Args:
        batches: `batches(step)` yields micro-batches from the first one of `step` on, always the same.
        folder: holds the checkpoints, the lock and the curve (`curve.jsonl`).
        fingerprint: hash of everything that decides the result; a checkpoint of another one is refused.
        on_log: called every `log_every` steps with the mean loss, the rate and the speed.

    Raises:
        LockHeldError: another process trains in `folder`.
        CheckpointError: `folder` holds checkpoints of another training.
        Stopped: SIGTERM or Ctrl-C; saved, the same call goes on.
        DivergedError: the loss became NaN or infinite.
    """
    with files.folder_lock(folder, title), runtime.stop_signal() as stop:
        accelerator = runtime.accelerator(settings)
        parameters = optim.trainable(module)
        optimizer = optim.build(parameters, settings.optimizer)
        average = optim.WeightAverage(parameters, settings.optimizer.ema_decay)
        checkpoints = folder / "checkpoints"
        start = 0
        if found := checkpoint.newest(checkpoints, fingerprint):
            checkpoint.restore_weights(parameters, found.weights)
            checkpoint.restore_optimizer(optimizer, parameters, found.optimizer)
            average.tensors.update({k: v.to(parameters[k].device) for k, v in found.averages.items()})
            start = found.step
            log.info("%s: going on from step %d of %d", title, start, settings.steps)
        model, prepared = accelerator.prepare(module, optimizer)
        source = batches(start)

        def save(step: int) -> None:
            state = checkpoint.optimizer_tensors(optimizer, parameters)
            weights: dict[str, torch.Tensor] = {k: p.detach() for k, p in parameters.items()}
            found = checkpoint.Checkpoint(step, fingerprint, weights, state, average.tensors)
            checkpoint.save(checkpoints, found)

        losses: list[float] = []
        saved, last = start, time.monotonic()
        with meter(title, settings.steps) as progress:
            progress.skip(start)
            for step in range(start, settings.steps):
                optim.set_rate(optimizer, optim.rate_share(settings.optimizer, step, settings.steps))
                total = 0.0
                for part in range(settings.accumulation):
                    draw = runtime.generator(settings.seed, step * settings.accumulation + part)
                    with accelerator.accumulate(model), accelerator.autocast():
                        loss = model(next(source), draw)
                        value = loss.item()
                        if not math.isfinite(value):
                            raise DivergedError(
                                f"{title}: the loss is {value} at step {step}. Lower the learning rate; "
                                f"the last good state is step {saved}."
                            )
                        accelerator.backward(loss)
                        total += value / settings.accumulation
                        if accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(parameters.values(), settings.optimizer.clip_norm)
                        prepared.step()
                        prepared.zero_grad()
                if settings.optimizer.ema_decay:
                    average.update(step + 1)
                losses.append(total)
                done = step + 1
                progress.advance(note=f"loss {sum(losses) / len(losses):.4f}")
                if done % settings.log_every == 0:
                    now = time.monotonic()
                    rate = len(losses) * settings.batch_size / (now - last)
                    mean = sum(losses) / len(losses)
                    on_log(
                        done,
                        {"loss": mean, "learning_rate": optimizer.param_groups[0]["lr"], "samples_per_second": rate},
                    )
                    losses, last = [], now
                if done % settings.checkpoint_every == 0 or done == settings.steps or stop:
                    save(done)
                    saved = done
                if stop and done < settings.steps:
                    raise runtime.Stopped(
                        f"{title}: stopped and saved at step {done} of {settings.steps}; run it again to go on."
                    )
        if settings.optimizer.ema_decay:
            average.copy_to_weights()
