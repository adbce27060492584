"""Processes, devices, precision and signals around the training loop.

One process trains alone; several (started by `vlv.training.workers` or by `accelerate launch`) find each other
by the launcher's environment. Rank and world size are read from it, so that they are known before torch's
process group is up.
"""

import datetime
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, set_seed
from torch.distributed.fsdp import MixedPrecisionPolicy

from vlv import rng as draws
from vlv.config import ConfigError, Training

log = logging.getLogger(__name__)


class MissingProcessError(RuntimeError):
    """Some of the processes that should train together never came."""


def rank() -> int:
    """Number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes: checkpoints, curve, tracking."""
    return rank() == 0


def join(minutes: float = 30.0) -> torch.device:
    """Meet the other processes; returns this one's device. Called again it only returns the device.

    Raises:
        MissingProcessError: not all came within `minutes`.
        ConfigError: more processes here than GPUs.
    """
    here, cpu = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), _asked("ACCELERATE_USE_CPU")
    if not cpu and here > 1 and here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} processes were started, but this machine has {torch.cuda.device_count()} GPUs. Set num_processes "
            f"in the accelerate file to the number of GPUs, or use_cpu: true."
        )
    patience = datetime.timedelta(minutes=minutes)
    try:
        state = PartialState(cpu=cpu, **({"timeout": patience} if world() > 1 else {}))
    except torch.distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise MissingProcessError(
            f"Process {rank()} of {world()} waited {minutes:g} minutes at {where} for the others: "
            f"{str(error).splitlines()[0]} Start all of them with the same address and port."
        ) from error
    device: torch.device = state.device
    return device


def accelerator(settings: Training) -> Accelerator:
    """Accelerate with the configured precision and, where the launcher asks for it, sharded parameters.

    bf16 is arithmetic only (autocast): what learns is stored, averaged over processes and stepped in float32.
    """
    join()
    deepspeed, sharded = _asked("ACCELERATE_USE_DEEPSPEED"), _asked("ACCELERATE_USE_FSDP")
    # Without a dtype for parameters FSDP leaves the casts to autocast, as with one process.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    plan = FullyShardedDataParallelPlugin(mixed_precision_policy=policy) if sharded else None
    runtime = Accelerator(
        # DeepSpeed's own bf16 would store what learns in bf16 as well; the loop's autocast does without it.
        mixed_precision="bf16" if settings.precision == "bf16" and not deepspeed else "no",
        fsdp_plugin=plan,
        # The frozen parts' buffers never change; gradients in the buckets themselves save one copy of them.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if plan is not None:
        if plan.fsdp_version != 2:
            raise ConfigError("The accelerate file asks for FSDP 1; set fsdp_version: 2")
        # accelerate shards on GPUs only, and keeps the first training's plan for the next one in this process.
        runtime.state.distributed_type = DistributedType.FSDP
        runtime.state.fsdp_plugin = plan
    if deepspeed:
        plugin = runtime.state.deepspeed_plugin.deepspeed_config
        plugin["train_micro_batch_size_per_gpu"] = share(settings, settings.batch_size)
        plugin["gradient_accumulation_steps"] = 1  # the loop weighs micro-batches itself and says which is the last
        plugin["gradient_clipping"] = settings.optimizer.clip_norm
    set_seed(settings.seed)
    return runtime


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def share(settings: Training, samples: int) -> int:
    """How many of a step's `samples` a process takes in one micro-batch.

    Raises:
        ConfigError: they cannot be shared evenly.
    """
    parts = world() * settings.accumulation
    if samples % parts:
        raise ConfigError(
            f"{samples} samples of a step cannot be shared evenly by {world()} processes with accumulation "
            f"{settings.accumulation}. Change the number of processes (the accelerate file) or accumulation, so that "
            f"their product divides it; the batch stays what the configuration says."
        )
    return samples // parts


def generator(seed: int, step: int, device: torch.device | str = "cpu", stream: int = 0) -> torch.Generator:
    """Randomness as a function of (seed, step, stream): a resumed run draws the same numbers."""
    return torch.Generator(device=device).manual_seed(_mix(seed, step, stream))


def part_generator(settings: Training, step: int, micro_batch: int) -> draws.PartGenerator:
    """Randomness of this process's part of a step: the batch is divided by micro-batch, then by process."""
    part = micro_batch * world() + rank()
    return draws.PartGenerator(_mix(settings.seed, step, 0), part, settings.accumulation * world())


def _mix(seed: int, step: int, stream: int) -> int:
    return ((seed * 1_000_003 + step) * 4_096 + stream) & 0x7FFF_FFFF_FFFF_FFFF


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGUSR1 and SIGINT in a list instead of dying at once; a second SIGINT raises as usual.

    Where SIGINT is ignored (a worker whose parent answers to the terminal) it stays so. SIGUSR1 is for launchers
    that would give their workers too little time after a SIGTERM of their own (configs/cluster/slurm.sh).
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        log.warning("%s received: saving, then leaving", signal.Signals(number).name)

    numbers = [signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        numbers.append(signal.SIGINT)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
