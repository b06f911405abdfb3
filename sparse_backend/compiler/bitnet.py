"""BitNet checkpoints in Hugging Face layout, read and written.

Three kinds exist (transformers, `integrations/bitnet.py`; weights by Ma et al., 2024):

- packed (`quantization_mode: offline`): `weight` [N / 4, K] uint8 holds row i * N / 4 + r in
  bits 2 i of row r, and `weight_scale` [1] stands beside it. For `autobitlinear` the weight is
  code * weight_scale, for `bitlinear` code / weight_scale.
- `quantization_mode: online`: master weights, made ternary by the absmean rule as they are used.
- a model of type `bitnet` without quantization_config: transformers runs it dense; under this
  plugin's flag its weights are masters, too.

All become plain dense tensors here, ternary times a scale: from there on they are what any
ternary checkpoint is. Activations are int8 per token in all of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ..errors import CheckpointError, WeightError
from ..formats.ternary import Ternary, absmean
from ..options import Options

METHOD = "bitnet"
LINEAR_CLASSES = ("autobitlinear", "bitlinear")


@dataclasses.dataclass
class BitNet:
    """How one checkpoint stores its ternary layers, and what expand() found beside weights.

    Attributes:
        linear_class: `autobitlinear` or `bitlinear`.
        online: weights are masters.
        plain: there is no quantization_config: weights that are ternary already stay what they are.
        rms_norm_eps: layers normalise their input first (`use_rms_norm`); None if not.
        skip: modules that are no BitNet layers, as transformers matches them.
        names: all tensors of the checkpoint.
        scales: exact scale of modules whose dense dtype rounds it.
        norms: weights [K] of the layers' own norms, by module.
    """

    linear_class: str
    online: bool
    plain: bool
    rms_norm_eps: float | None
    skip: tuple[str, ...]
    names: frozenset[str]
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    norms: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Iterable[str]) -> BitNet | None:
        """What a checkpoint's config.json and tensor names say; None if it is no BitNet checkpoint.

        Raises:
            CheckpointError: a linear class or mode that transformers does not know either.
        """
        quantization = config.get("quantization_config")
        plain = quantization is None
        if plain:
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
        skip = tuple(quantization.get("modules_to_not_convert") or ())
        online = mode == "online" and linear_class == "autobitlinear"
        return cls(linear_class, online, plain, eps, skip, frozenset(tensors))

    @property
    def kind(self) -> str:
        """In words, for the log."""
        return "master weights made ternary by the absmean rule" if self.online else "ternary weights"

    def expand(
        self, weights: Iterable[tuple[str, torch.Tensor]], is_projection: Callable[[str], bool], dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors with every BitNet layer's weight dense and ternary.

        A layer's tensors come out together, when the last of them has come in.

        Args:
            weights: (name, tensor) in any order.
            is_projection: tells for an HF module name whether its 2-D weight is a linear layer.
            dtype: of dense weights made from packed ones.

        Raises:
            CheckpointError: a packed weight holds a code that does not exist, or lost its scale.
            WeightError: a master weight holds NaN or Inf.
        """
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in weights:
            module, leaf = self._owner(name)
            parts = self._parts(module)
            if len(parts) < 2 or leaf not in parts:
                if leaf == "weight_scale":
                    raise CheckpointError(f"{module}: the checkpoint has only its weight_scale")
                if leaf == "weight" and tensor.dtype == torch.uint8:
                    raise CheckpointError(f"{name}: packed, but the checkpoint has no {module}.weight_scale")
                yield name, self._master(module, tensor, is_projection) if leaf == "weight" else tensor
                continue
            waiting.setdefault(module, {})[leaf] = tensor
            if len(waiting[module]) == len(parts):
                yield from self._layer(module, waiting.pop(module), is_projection, dtype)
        if waiting:
            module = next(iter(waiting))
            raise CheckpointError(f"{module}: the checkpoint has only its {' and '.join(waiting[module])}")

    def last_result(self, name: str) -> str:
        """The last of the tensors expand() makes from the one called `name`, and from those it waits for."""
        module, leaf = self._owner(name)
        return f"{module}.weight" if leaf in self._parts(module) else name

    def _owner(self, name: str) -> tuple[str, str]:
        """The layer a tensor belongs to, and its name there."""
        module, _, leaf = name.rpartition(".")
        if self.rms_norm_eps is not None and module.endswith(".rms_norm"):
            return module.removesuffix(".rms_norm"), f"rms_norm.{leaf}"
        return module, leaf

    def _parts(self, module: str) -> list[str]:
        """The tensors a layer's weight has to wait for; just itself for most."""
        wanted = ["weight", "weight_scale"]
        if self.rms_norm_eps is not None:
            wanted.append("rms_norm.weight")
        if self.linear_class == "autobitlinear" and f"{module}.weight_scale" in self.names:
            wanted.append("bias")  # transformers scales it with the product
        return [leaf for leaf in wanted if f"{module}.{leaf}" in self.names]

    def _layer(
        self, module: str, parts: dict[str, torch.Tensor], is_projection: Callable[[str], bool], dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor]]:
        if "rms_norm.weight" in parts:
            self.norms[module] = parts["rms_norm.weight"]
        if "weight_scale" not in parts:
            yield f"{module}.weight", self._master(module, parts["weight"], is_projection)
            return
        scale = parts["weight_scale"]
        if "bias" in parts:
            yield f"{module}.bias", (parts["bias"].float() * scale.float()).to(parts["bias"].dtype)
        yield f"{module}.weight", self._dense(module, parts["weight"], scale, dtype)

    def _master(self, module: str, weight: torch.Tensor, is_projection: Callable[[str], bool]) -> torch.Tensor:
        if not self.online or weight.dim() != 2 or not is_projection(module) or self._skipped(module):
            return weight
        try:
            return Ternary().round(weight, Options(format="ternary")) if self.plain else absmean(weight)
        except WeightError as error:
            raise WeightError(f"{module}: {error}") from None

    def _skipped(self, module: str) -> bool:
        """The tests of transformers' should_convert_module: a pattern from the start, or the end."""
        return any(re.match(pattern, module) or module.endswith(pattern) for pattern in self.skip)

    def _dense(self, module: str, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if scale.numel() != 1 or not torch.isfinite(scale).all() or float(scale) <= 0:
            raise CheckpointError(f"{module}.weight_scale: must be one positive number, got {scale.tolist()}")
        codes = weight if weight.dtype != torch.uint8 else unpack_codes(module, weight)
        exact = float(scale) if self.linear_class == "autobitlinear" else 1.0 / float(scale)
        rounded = torch.tensor(exact, dtype=torch.float64).to(dtype)
        # A weight stored unpacked may hold anything: its scale is exact only beside codes.
        if float(rounded) != exact and float(codes.abs().max()) == 1:
            self.scales[module] = exact
        return codes.to(dtype) * rounded


def unpack_codes(module: str, packed: torch.Tensor) -> torch.Tensor:
    """Codes -1, 0, 1 as int8 [N, K] of a packed weight [N / 4, K] uint8.

    Raises:
        CheckpointError: naming the module, for the code 3, which does not exist.
    """
    bad = int((packed & (packed >> 1) & 0x55).count_nonzero())
    if bad:
        raise CheckpointError(f"{module}.weight: {bad} byte(s) hold a two-bit code 3, which is no ternary code")
    return torch.cat([(packed >> (2 * i)) & 3 for i in range(4)]).view(torch.int8).sub_(1)


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
