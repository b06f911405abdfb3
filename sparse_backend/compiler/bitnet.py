"""BitNet checkpoints in Hugging Face layout, read and written.

Three kinds exist (transformers, `integrations/bitnet.py`; weights by Ma et al., 2024):

- packed (`quantization_mode: offline`): `weight` [N / 4, K] uint8 holds row i * N / 4 + r in
  bits 2 i of row r, and `weight_scale` [1] stands beside it. For `autobitlinear` the weight is
  code * weight_scale, for `bitlinear` code / weight_scale.
- `quantization_mode: online`: master weights, made ternary by the absmean rule as they are used.
- master weights of a model of type `bitnet` without any quantization_config.

All become plain dense tensors here, ternary times a scale: from there on they are what any
ternary checkpoint is. Activations are int8 per token in all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..errors import CheckpointError, WeightError
from ..formats.ternary import absmean
from ..options import matches

METHOD = "bitnet"
LINEAR_CLASSES = ("autobitlinear", "bitlinear")


@dataclasses.dataclass
class BitNet:
    """How one checkpoint stores its ternary layers, and what expand() found beside weights.

    Attributes:
        linear_class: `autobitlinear` or `bitlinear`.
        online: weights are masters.
        rms_norm_eps: layers normalise their input first (`use_rms_norm`); None if not.
        skip: modules that are no BitNet layers, as transformers matches them.
        scaled: modules with a `weight_scale` in the checkpoint.
        scales: exact scale of modules whose dense dtype rounds it.
        norms: weights [K] of the layers' own norms, by module.
    """

    linear_class: str
    online: bool
    rms_norm_eps: float | None
    skip: tuple[str, ...]
    scaled: frozenset[str]
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    norms: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Iterable[str]) -> BitNet | None:
        """What a checkpoint's config.json and tensor names say; None if it is no BitNet checkpoint.

        Raises:
            CheckpointError: a linear class or mode that transformers does not know either.
        """
        quantization = config.get("quantization_config")
        if quantization is None:
            if config.get("model_type") != METHOD:
                return None
            quantization = {"linear_class": "autobitlinear", "quantization_mode": "online"}
        elif not isinstance(quantization, Mapping) or quantization.get("quant_method") != METHOD:
            return None
        linear_class = quantization.get("linear_class", "bitlinear")
        mode = quantization.get("quantization_mode", "offline")
        if linear_class not in LINEAR_CLASSES or mode not in ("online", "offline"):
            raise CheckpointError(
                f"quantization_config: bitnet linear_class {linear_class!r}, quantization_mode {mode!r}; known are "
                f"{', '.join(LINEAR_CLASSES)} and online, offline"
            )
        eps = float(quantization.get("rms_norm_eps", 1e-6)) if quantization.get("use_rms_norm") else None
        scaled = frozenset(n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale"))
        skip = tuple(quantization.get("modules_to_not_convert") or ())
        return cls(linear_class, mode == "online" and linear_class == "autobitlinear", eps, skip, scaled)

    def expand(
        self, weights: Iterable[tuple[str, torch.Tensor]], is_projection: Any, dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors with every BitNet layer's weight dense and ternary.

        Args:
            weights: (name, tensor) in any order.
            is_projection: tells for an HF module name whether its 2-D weight is a linear layer.
            dtype: of dense weights made from packed ones.

        Raises:
            CheckpointError: a packed weight holds a code that does not exist, or lost its scale.
        """
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in weights:
            module, _, leaf = name.rpartition(".")
            if self.rms_norm_eps is not None and module.endswith(".rms_norm"):
                self.norms[module.removesuffix(".rms_norm")] = tensor
            elif module in self.scaled and leaf in ("weight", "weight_scale"):
                parts = waiting.setdefault(module, {})
                parts[leaf] = tensor
                if len(parts) == 2:
                    del waiting[module]
                    yield f"{module}.weight", self._dense(module, parts["weight"], parts["weight_scale"], dtype)
            elif leaf == "weight" and tensor.dtype == torch.uint8:
                raise CheckpointError(f"{name}: packed, but the checkpoint has no {module}.weight_scale")
            elif self.online and leaf == "weight" and tensor.dim() == 2 and self._converts(module, is_projection):
                try:
                    yield name, absmean(tensor)
                except WeightError as error:
                    raise WeightError(f"{module}: {error}") from None
            else:
                yield name, tensor
        if waiting:
            module = next(iter(waiting))
            raise CheckpointError(f"{module}: the checkpoint has only its {' and '.join(waiting[module])}")

    def _converts(self, module: str, is_projection: Any) -> bool:
        skipped = any(
            module == s or module.startswith(f"{s}.") or module.endswith(f".{s}") or matches(s, module)
            for s in self.skip
        )
        return bool(is_projection(module)) and not skipped

    def _dense(self, module: str, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if scale.numel() != 1 or not torch.isfinite(scale).all() or float(scale) <= 0:
            raise CheckpointError(f"{module}.weight_scale: must be one positive number, got {scale.tolist()}")
        codes = weight if weight.dtype != torch.uint8 else unpack_codes(module, weight)
        exact = float(scale) if self.linear_class == "autobitlinear" else 1.0 / float(scale)
        rounded = torch.tensor(exact, dtype=torch.float64).to(dtype)
        if float(rounded) != exact:
            self.scales[module] = exact
        return codes.to(dtype) * rounded


def unpack_codes(module: str, packed: torch.Tensor) -> torch.Tensor:
    """Codes -1, 0, 1 as int8 [N, K] of a packed weight [N / 4, K] uint8.

    Raises:
        CheckpointError: naming the module, for the code 3, which does not exist.
    """
    codes = torch.cat([(packed >> (2 * i)) & 3 for i in range(4)]).to(torch.int8)
    bad = int((codes == 3).sum())
    if bad:
        raise CheckpointError(f"{module}.weight: {bad} two-bit code(s) are 3, which is no ternary code")
    return codes - 1


def pack_codes(module: str, codes: torch.Tensor) -> torch.Tensor:
    """The packed weight [N / 4, K] uint8 of codes -1, 0, 1 [N, K].

    Raises:
        WeightError: N does not divide by 4, which the layout cannot say.
    """
    n = codes.shape[0]
    if n % 4:
        raise WeightError(f"{module}: the bitnet layout holds multiples of 4 output features, this has {n}")
    unsigned = (codes + 1).to(torch.uint8).view(4, n // 4, -1)
    return unsigned[0] | unsigned[1] << 2 | unsigned[2] << 4 | unsigned[3] << 6
