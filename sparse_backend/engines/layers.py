"""What runs in place of a layer's dense product: the op, and the parameters it reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels import registry
from ..packed import MachineWeight


class LayerKernel:
    """The op of one engine layer and the names of the parameters it reads.

    Attributes:
        int8_activations: the layer makes its input int8 by each token's largest magnitude: where
            tensor parallelism cuts the input, the ranks have to agree on that.
    """

    def __init__(self, layer: torch.nn.Module, machine: MachineWeight, int8_activations: bool = False) -> None:
        """Replace the layer's dense weight by the machine form's tensors."""
        del layer.weight
        for name, tensor in machine.tensors.items():
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self.names = tuple(machine.tensors)
        self.op = registry.kernel(machine.format, machine.device).function()
        self.out_features = machine.shape[0]
        self.int8_activations = int8_activations

    def __call__(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        absmax: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y [..., N] = x [..., K] W^T + bias; `absmax` [tokens] float32 as the op takes it."""
        tensors = [getattr(layer, name) for name in self.names]
        extra = () if absmax is None else (absmax,)
        y: torch.Tensor = self.op(x, *tensors, bias, self.out_features, *extra)
        return y


class NormedKernel(LayerKernel):
    """Parts of one layer, each behind an RMSNorm of its own (BitNet's `use_rms_norm`)."""

    def __init__(
        self, layer: torch.nn.Module, machines: Sequence[MachineWeight], norms: Sequence[torch.Tensor], eps: float
    ) -> None:
        del layer.weight
        self.parts: list[tuple[list[str], int]] = []
        for i, (machine, norm) in enumerate(zip(machines, norms, strict=True)):
            tensors = {"norm": norm, **machine.tensors}
            names = [f"part{i}_{name}" for name in tensors]
            for name, tensor in zip(names, tensors.values(), strict=True):
                layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
            self.parts.append((names, machine.shape[0]))
        self.op = registry.kernel(machines[0].format, machines[0].device).function()
        self.eps = eps
        self.int8_activations = False

    def __call__(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        absmax: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As transformers' LlamaRMSNorm before each BitLinear: normalised in float32, rounded, scaled."""
        full = x.float()
        normed = (full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        outputs = []
        for (norm, *names), out_features in self.parts:
            tensors = [getattr(layer, name) for name in names]
            outputs.append(self.op(getattr(layer, norm) * normed, *tensors, None, out_features))
        y = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        return y if bias is None else y + bias
