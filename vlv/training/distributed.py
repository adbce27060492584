"""One training in several processes: rank and world size, devices, sharded tensors, collectives, signals.

A single process trains alone. Several processes are started by `vlv.training.launch` or by `accelerate launch`, and
find each other through the environment variables that the launcher sets. Rank and world size are read from these
variables, so they are known before torch's process group exists.
"""

import datetime
import logging
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, set_seed
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from vlv import rng
from vlv.config import ConfigError, Training

log = logging.getLogger(__name__)


class MissingProcessError(RuntimeError):
    """Some of the processes that should train together did not connect."""


def rank() -> int:
    """Number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process has rank 0. It alone writes checkpoints, the curve and the tracking records."""
    return rank() == 0


def join(minutes: float = 30.0) -> torch.device:
    """Wait for the other processes and return the device of this one. Later calls only return the device.

    Raises:
        MissingProcessError: not all processes connected within `minutes`.
        ConfigError: there are more processes on this machine than GPUs.
    """
    here, cpu = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), _is_set("ACCELERATE_USE_CPU")
    if not cpu and here > 1 and here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} processes were started, but this machine has {torch.cuda.device_count()} GPUs. Set num_processes "
            f"in the accelerate file to the number of GPUs, or use_cpu: true."
        )
    timeout = datetime.timedelta(minutes=minutes)
    try:
        state = PartialState(cpu=cpu, **({"timeout": timeout} if world_size() > 1 else {}))
    except torch.distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise MissingProcessError(
            f"Process {rank()} of {world_size()} waited {minutes:g} minutes at {where} for the others: "
            f"{str(error).splitlines()[0]} Start all of them with the same address and port."
        ) from error
    device: torch.device = state.device
    return device


def accelerator(settings: Training) -> Accelerator:
    """The Accelerator, with sharded parameters if the launcher asks for them.

    accelerate keeps the first precision that a process asks for and refuses another one, so it is never told the
    precision: the loop's own autocast applies it. Trainable parameters are stored, averaged over the processes and
    updated in float32.

    Raises:
        ConfigError: the launcher asks for FSDP 1 or for DeepSpeed.
    """
    join()
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError("The accelerate file asks for DeepSpeed, which is not supported; set distributed_type: FSDP")
    # Without a dtype for parameters, FSDP leaves the casts to autocast, as with one process.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=policy) if _is_set("ACCELERATE_USE_FSDP") else None
    made = Accelerator(
        mixed_precision="no",
        fsdp_plugin=plugin,
        # The frozen parts' buffers never change. Gradients that live in the buckets save one copy of them.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if plugin is not None:
        if plugin.fsdp_version != 2:
            raise ConfigError("The accelerate file asks for FSDP 1; set fsdp_version: 2")
        # accelerate shards on GPUs only, and keeps the plugin of the first training in this process.
        made.state.distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = plugin
    set_seed(settings.seed)
    return made


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def micro_batch_size(settings: Training, samples: int) -> int:
    """How many of the `samples` of a step this process takes in one micro-batch.

    Raises:
        ConfigError: the samples cannot be divided evenly.
    """
    parts = world_size() * settings.accumulation
    if samples % parts:
        raise ConfigError(
            f"{samples} samples of a step cannot be divided evenly among {world_size()} processes with accumulation "
            f"{settings.accumulation}. Change the number of processes (the accelerate file) or accumulation, so that "
            f"their product divides it. The batch stays what the configuration says."
        )
    return samples // parts


def generator(seed: int, step: int, device: torch.device | str = "cpu", stream: int = 0) -> torch.Generator:
    """An RNG that depends on (seed, step, stream) alone: a resumed training gets the same random numbers."""
    return torch.Generator(device=device).manual_seed(_mix(seed, step, stream))


def part_generator(settings: Training, step: int, micro_batch: int) -> rng.PartGenerator:
    """The RNG for this process's part of a step. The batch is divided by micro-batch first, then by process."""
    part = micro_batch * world_size() + rank()
    return rng.PartGenerator(_mix(settings.seed, step, 0), part, settings.accumulation * world_size())


def _mix(seed: int, step: int, stream: int) -> int:
    return ((seed * 1_000_003 + step) * 4_096 + stream) & 0x7FFF_FFFF_FFFF_FFFF


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGUSR1 and SIGINT in a list instead of ending the process. A second SIGINT raises as usual.

    SIGINT stays ignored where it is ignored already (a worker whose parent answers to the terminal). SIGUSR1 is for
    launchers that give their workers too little time after a SIGTERM (configs/cluster/slurm.sh).
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


def all_reduce(values: Sequence[float], device: torch.device) -> list[float]:
    """The sums of `values` over all processes, in double precision. Every process gets the same sums."""
    if world_size() == 1:
        return list(values)
    together = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(together)
    return [float(value) for value in together.tolist()]


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; all processes must call it. Other tensors are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a sharded tensor, in the same memory. Other tensors are returned as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A full tensor on the device of `like`, sharded as `like` is.

    Every process has the full tensor already, so nothing is sent.
    """
    placed = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return placed
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def gather_to_main(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Full tensors on the CPU of the main process; the other processes get none.

    Tensors are gathered one at a time, so that the full tensors never fill a GPU.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = all_gather(tensor.detach())
        if is_main():
            gathered[name] = full.to("cpu").contiguous()
    return gathered


def unshard(module: nn.Module) -> None:
    """Replace the sharded trainable parameters by full ones, on the CPU of the main process.

    Afterwards the module can be saved, but no longer run: this is for the end of a training.
    """
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            if not parameter.requires_grad or not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:  # tied parameters stay tied
                full = all_gather(parameter.detach())
                made[id(parameter)] = nn.Parameter(full.to("cpu")) if is_main() else parameter
            setattr(owner, leaf, made[id(parameter)])
