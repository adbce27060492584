"""Where models are used. Trainings ask accelerate instead, which gives each process a device of its own."""

import torch


def for_inference() -> torch.device:
    """The accelerator (a GPU; CUDA_VISIBLE_DEVICES says which), else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
