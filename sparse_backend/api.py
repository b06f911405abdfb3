"""The Python API: pack a weight, multiply by it, or swap a torch Linear for a sparse one."""

from __future__ import annotations

import torch

from .compiler import plan
from .errors import OptionError, WeightError
from .formats import get_format
from .kernels import registry
from .options import Options
from .packed import MachineWeight, PackedWeight

VALUE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "bf16x12": torch.bfloat16}


def pack(
    weight: torch.Tensor,
    format: str = "bitmask",
    values: str | None = None,
    bits: float | None = None,
    group_size: int | None = None,
    activations: str | None = None,
) -> PackedWeight:
    """Pack a dense weight.

    `bitmask` and `sell` are lossless unless `values` says int8 or int4. `ternary` is lossless for
    weights that are ternary times a scale (per weight, row, or group of columns) and rounds any
    other by the absmean rule; `int8` rounds.

    Args:
        weight: [N, K], bfloat16, float16 or float32, any strides; one on a GPU is copied, as packing runs on the CPU.
        format: name of the format.
        values: of bitmask and sell: `bf16` or `fp16`, to which other weights are rounded; `bf16x12`, bf16
            in 12 bits; `int8` or `int4`, under a scale per row or group. None keeps the weight's own dtype;
            float32 weights need it said.
        bits: of ternary codes, 2 or 1.6.
        group_size: columns per scale where `ternary` or `values` round; None for one scale (int4: 128).
        activations: of ternary and integer weights: `keep` or `int8` (per token, as BitNet models are trained).

    Returns:
        The canonical form, on the CPU; `linear` and `lower` bring it to a GPU, and make the machine form there.

    Raises:
        OptionError: unknown format or values.
        WeightError: NaN or Inf in the weight, or a dtype or shape the format cannot hold.
    """
    options = Options(format=format, values=values, bits=bits, group_size=group_size, activations=activations)
    if weight.dim() != 2:
        raise WeightError(f"a weight has two dimensions [N, K], got shape {tuple(weight.shape)}")
    weight = convert_values(weight, values)
    form = get_format(format)
    if weight.dtype == torch.float32 and torch.float32 not in form.dtypes:
        raise WeightError("a float32 weight would be rounded: say values='bf16' or values='fp16'")
    weight = weight.detach().cpu()
    if format == "ternary":  # int8 rounds as it packs
        weight = form.round(weight, options)
    return form.pack(weight, options)


def convert_values(weight: torch.Tensor, values: str | None) -> torch.Tensor:
    """The weight in the dtype called `values`; WeightError if a magnitude overflows there.

    None, int8 and int4 leave it: what rounds to integers does so as it packs, from bf16 or fp16.
    """
    if values in ("int8", "int4"):
        return weight.to(torch.bfloat16) if weight.dtype == torch.float32 else weight
    if values is None:
        return weight
    converted = weight.to(VALUE_DTYPES[values])
    if torch.isinf(converted).any() and not torch.isinf(weight).any():
        raise WeightError(f"values {values} cannot hold this weight: some magnitudes overflow to Inf")
    return converted


def linear(x: torch.Tensor, weight: PackedWeight | MachineWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias, accumulated in float32.

    Args:
        x: [..., K], bfloat16, float16 or float32, any strides.
        weight: packed [N, K]; a canonical form is lowered on first use and cached.
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype. On CPUs a row's result does not depend on the batch it is in, but for bf16 values and
        activations in format `sell` on AMX, which has two kernels (up to 24 tokens, and more); on GPUs it depends on
        the kernel that serves so many tokens.
    """
    device = str(x.device) if x.is_cuda else "cpu"
    machine = weight.lower(device) if isinstance(weight, PackedWeight) else weight
    return registry.kernel(machine.format, machine.device).run(x, machine, bias)


class SparseLinear(torch.nn.Module):
    """Drop-in for `torch.nn.Linear` at inference: the weight lives in machine form only.

    Attributes:
        in_features, out_features: K and N.
        format: name of the format the weight is stored in.
        kernel_device: torch device type whose kernels run it.
    """

    def __init__(self, weight: MachineWeight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.format = weight.format
        self.kernel_device = weight.device
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._names = tuple(weight.tensors)
        self.bias: torch.Tensor | None
        for name, tensor in weight.tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_linear(cls, module: torch.nn.Linear, format: str = "auto", values: str | None = None) -> SparseLinear:
        """Convert a Linear. `auto` takes what the plan predicts fastest here, lossless unless `values` rounds.

        Raises:
            OptionError: `auto`, and it is predicted to stay fastest as it is.
            WeightError: as `pack`.
        """
        weight = module.weight.detach()
        if format == "auto":
            options = Options(values=values)
            packed, reason = plan.pack(convert_values(weight, values), options)
            if packed is None:
                raise OptionError(f"format auto keeps this weight dense ({reason}); name a format to force it")
        else:
            packed = pack(weight, format, None if values == format or format == "int8" else values)
        return cls(packed.lower(str(weight.device)), module.bias)

    def machine_weight(self) -> MachineWeight:
        """The machine form this layer runs on."""
        tensors = {name: getattr(self, name) for name in self._names}
        shape = (self.out_features, self.in_features)
        return MachineWeight(self.format, shape, self.dtype, tensors, self.kernel_device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        tensors = [getattr(self, name) for name in self._names]
        return registry.kernel(self.format, self.kernel_device).call(x, tensors, self.bias, self.out_features)

    def extra_repr(self) -> str:  # noqa: D102
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"
