"""What tests of the GPU kernels share."""

from __future__ import annotations

import torch

import sparse_backend as sb
from sparse_backend.formats import naive_linear
from sparse_backend.kernels import registry

HALVES = (torch.bfloat16, torch.float16)


def run(machine: sb.MachineWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return registry.kernel(machine.format, "cuda").run(x, machine, bias)


def check(packed: sb.PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """The product against float64: within float32's sums, or one unit of what halves are rounded to.

    The interpreter cuts float32 off to bfloat16, where GPUs round: one unit instead of half of one.
    """
    got = run(packed.lower("cuda"), x, bias)
    assert got.dtype == x.dtype
    assert got.shape == (*x.shape[:-1], packed.shape[0])
    integer = packed.attributes.get("values") in ("int8", "int4")
    if integer:  # unpack rounds code times scale to the weight's dtype, kernels do not
        packed = exact(packed)
    expected = naive_linear(x, packed, bias)
    size = naive_linear(x.abs(), absolute(packed), None if bias is None else bias.abs())
    unit = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[x.dtype]
    error = (got.double() - expected).abs()
    assert (error <= unit * expected.abs() + 4e-6 * size + 1e-30).all(), (error / size.clamp_min(1e-30)).max()


class Dense:
    """A float64 weight in the shape `naive_linear` takes."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def unpack(self) -> torch.Tensor:
        return self.weight


def exact(packed: sb.PackedWeight) -> Dense:
    """Codes times scales in float64."""
    from sparse_backend.formats import get_format

    size = packed.attributes["group_size"] or max(1, packed.shape[1])
    form = get_format(packed.format)
    codes = form._dense(packed, form._codes(packed)) if packed.format == "block" else form._dense_codes(packed)
    scales = packed.tensors["scales"].double().repeat_interleave(size, dim=1)
    return Dense(codes.double() * scales[:, : packed.shape[1]])


def absolute(packed: sb.PackedWeight | Dense) -> Dense:
    return Dense(packed.unpack().double().abs())
