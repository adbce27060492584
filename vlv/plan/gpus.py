"""Public facts about GPUs: memory and peak rates, each with its source.

Rates are dense (a data sheet that counts 2:4 sparsity says twice as much) and for matrix products that accumulate
in float32, as training does.
"""

from dataclasses import dataclass

from vlv.config import Precision


class UnknownGpuError(ValueError):
    """A GPU that is not in the table, or that lacks the asked precision."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory: GiB.
        bf16, tf32, fp32: peak TFLOP/s; None where the hardware has no such unit. fp32 is the ordinary cores' rate.
        source: the document that the numbers are from.
    """

    name: str
    memory: float
    bf16: float | None
    tf32: float | None
    fp32: float
    source: str

    def has(self, precision: Precision, *, tf32: bool = False) -> bool:
        """Whether it has a unit for this precision."""
        return self._rate(precision, tf32) is not None

    def _rate(self, precision: Precision, tf32: bool) -> float | None:
        return self.bf16 if precision == "bf16" else self.tf32 if tf32 else self.fp32

    def peak(self, precision: Precision, *, tf32: bool = False) -> float:
        """Peak rate in FLOP/s at a training precision; `tf32`: float32 products run on the tensor cores.

        Raises:
            UnknownGpuError: this GPU has no such unit.
        """
        rate = self._rate(precision, tf32)
        if rate is None:
            what = "bf16" if precision == "bf16" else "tf32"
            raise UnknownGpuError(f"{self.name} has no {what} unit. Set the stages' precision to fp32, without --tf32.")
        return rate * 1e12


_ADA = "NVIDIA, Ada GPU architecture whitepaper V2"
_AMPERE = "NVIDIA, A100 data sheet"
_HOPPER = "NVIDIA, H100 data sheet (halved where it counts sparsity)"

GPUS = [
    # 1,457 TFLOPS of the data sheet are FP8 with sparsity: dense bf16 is a quarter of it, tf32 an eighth.
    Gpu("RTX 6000 Ada", 48, 364.2, 182.1, 91.1, "NVIDIA, RTX 6000 Ada Generation data sheet"),
    Gpu("L40S", 48, 362.05, 183.0, 91.6, "NVIDIA, L40S data sheet"),
    Gpu("RTX 4090", 24, 165.2, 82.6, 82.6, _ADA),
    Gpu("A100 40GB", 40, 312.0, 156.0, 19.5, _AMPERE),
    Gpu("A100 80GB", 80, 312.0, 156.0, 19.5, _AMPERE),
    Gpu("H100 SXM", 80, 989.4, 494.7, 66.9, _HOPPER),
    Gpu("H100 PCIe", 80, 756.5, 378.0, 51.0, _HOPPER),
    Gpu("V100 32GB", 32, None, None, 15.7, "NVIDIA, V100 data sheet (its 125 tensor TFLOPS are fp16)"),
]


def find(name: str) -> Gpu:
    """The GPU of this name; case, spaces and dashes do not matter.

    Raises:
        UnknownGpuError: not in the table.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    for gpu in GPUS:
        if plain(gpu.name) == plain(name):
            return gpu
    raise UnknownGpuError(f"There is no GPU {name!r} in the table; there are: {', '.join(g.name for g in GPUS)}")
