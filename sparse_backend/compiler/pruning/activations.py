"""Wanda's calibration pass: the norm of every linear layer's input features, layer by layer.

As in the paper (Sun et al., 2023, section 3), blocks are pruned one after another: what reaches a block comes from
blocks that are pruned already. The whole model is held in memory in its own dtype; one block at a time is computed
in float32, which CPUs without bf16 instructions do ten times faster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, OptionError
from .text import TRANSFORMERS

Prune = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
Progress = Callable[[float, str], None]


@dataclasses.dataclass(frozen=True)
class Norms:
    """What a calibration pass found.

    Attributes:
        of: per HF module, float32 [K]: the L2 norm of each input feature over all tokens that came. Modules that
            the text never reached are absent.
        dense_because: why all of them were measured on the dense model; None if blocks were pruned in sequence.
    """

    of: dict[str, torch.Tensor]
    dense_because: str | None = None


def load_model(folder: Path, config: Mapping[str, Any]) -> torch.nn.Module:
    """The model of a checkpoint, in its dtype, on the CPU.

    Raises:
        OptionError: transformers is missing or does not know the architecture.
        CheckpointError: transformers cannot load it.
    """
    try:
        import transformers
    except ImportError:
        raise OptionError(TRANSFORMERS) from None
    name = next(iter(config.get("architectures") or []), None)
    architecture = getattr(transformers, name, None) if isinstance(name, str) else None
    if architecture is None or not hasattr(architecture, "from_pretrained"):
        raise OptionError(
            f"{folder}: transformers {transformers.__version__} knows no architecture {name!r}, and calibrating "
            "means running the model; use method magnitude, which needs only the weights"
        )
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # ours says what is going on
    try:
        model, loading = architecture.from_pretrained(str(folder), dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder}: transformers cannot load this model: {first}") from None
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: lacks {missing[0]} (and {len(missing) - 1} more), so {name} cannot be run to calibrate; "
            "use method magnitude"
        )
    if model.config.is_encoder_decoder:
        raise OptionError(
            f"{folder}: calibrating runs the model on text alone, which an encoder-decoder like {name} cannot; use "
            "method magnitude"
        )
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _run(model: torch.nn.Module, ids: torch.Tensor) -> None:
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    config.use_cache = False  # a cache would carry state from one run to the next
    model(input_ids=ids[None])


class _Collector:
    """Sums of squares of the inputs of linear layers, while it is on."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    @contextmanager
    def on(self, modules: Mapping[str, torch.nn.Linear]) -> Iterator[None]:
        hooks = [module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def add(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            total = x.float().square().sum(0, dtype=torch.float64)
            self.sums[name] = self.sums[name] + total if name in self.sums else total

        return add

    def norms(self, names: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {name: self.sums[name].sqrt().float() for name in names if name in self.sums}


def _linears(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.nn.Linear]:
    dot = f"{prefix}." if prefix else ""
    return {
        f"{dot}{name}" if name else prefix: child
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.Linear)
    }


def input_norms(model: torch.nn.Module, sequences: torch.Tensor, prune: Prune | None, progress: Progress) -> Norms:
    """Norms block by block, each pruned before the next is measured; leaves the model as it was.

    Args:
        model: of transformers.
        sequences: token ids, int64 [count, length].
        prune: (HF module, float32 weight, norms) -> weight, called for every linear layer of a block that tokens
            reach; None measures the dense model.
        progress: called as (share done, what).

    Returns:
        Norms for every linear layer that is in a block; if this model is no plain chain of blocks, those of the
        dense model, for every linear layer, and why.
    """
    with torch.inference_mode():
        try:
            chain = _Chain(model, sequences)
        except _NotAChain as error:
            return Norms(_dense_norms(model, sequences, progress), str(error))
        norms: dict[str, torch.Tensor] = {}
        for i, (name, block) in enumerate(chain.blocks.items()):
            progress(i / len(chain.blocks), f"calibrating {name}")
            linears = _linears(block, name)
            collector = _Collector()
            with _in_float32(block):
                with collector.on(linears):
                    outputs = [chain.forward(i, s) for s in range(len(sequences))]
                found = collector.norms(linears)
                norms.update(found)
                if prune is not None and i + 1 < len(chain.blocks):
                    del outputs
                    for module, norm in found.items():
                        linears[module].weight.data = prune(module, linears[module].weight.data, norm)
                    outputs = [chain.forward(i, s) for s in range(len(sequences))]  # what the next block gets
            chain.hidden = outputs
        progress(1.0, "calibrated")
        return Norms(norms)


def _dense_norms(model: torch.nn.Module, sequences: torch.Tensor, progress: Progress) -> dict[str, torch.Tensor]:
    collector, linears = _Collector(), _linears(model)
    with collector.on(linears):
        for i, ids in enumerate(sequences):
            progress(i / len(sequences), "calibrating")
            _run(model, ids)
    return collector.norms(linears)


@contextmanager
def _in_float32(block: torch.nn.Module) -> Iterator[None]:
    """A block with all its weights in float32; its own are put back at the end."""
    own = [(tensor, tensor.data) for tensor in (*block.parameters(), *block.buffers())]
    for tensor, data in own:
        tensor.data = data.float() if data.is_floating_point() else data
    try:
        yield
    finally:
        for tensor, data in own:
            tensor.data = data


class _NotAChain(Exception):
    """The model's blocks do not feed one another with nothing in between."""


class _Chain:
    """The blocks of a model, run one by one.

    What a block gets beside its hidden states (masks, rotary embeddings) is recorded in one run of the model. It
    must be the same for two different texts, and every block's output must be the next one's input, bit for bit;
    otherwise running block by block would compute something else than the model.
    """

    def __init__(self, model: torch.nn.Module, sequences: torch.Tensor) -> None:
        self.blocks = _blocks(model)
        first, last = self._record(model, sequences[0]), self._record(model, sequences[-1])
        for name, mine, other in zip(self.blocks, first, last, strict=True):
            if not _same((mine.args, mine.kwargs), (other.args, other.kwargs)):
                raise _NotAChain(f"{name} gets more from the text than hidden states")
        for name, block, after in zip(self.blocks, first, first[1:], strict=False):
            if not torch.equal(block.output, after.hidden):
                raise _NotAChain(f"the output of {name} is not the input of the next block")
        self.calls = [dataclasses.replace(c, args=_float32(c.args), kwargs=_float32(c.kwargs)) for c in first]
        self.hidden = [self._record(model, ids, stop=True)[0].hidden.float() for ids in sequences]

    def _record(self, model: torch.nn.Module, ids: torch.Tensor, stop: bool = False) -> list[_Call]:
        calls: list[_Call] = []

        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, torch.Tensor):
                raise _NotAChain("its blocks are not called with hidden states")
            kwargs = {key: value for key, value in kwargs.items() if args or key != "hidden_states"}
            calls.append(_Call(hidden.clone(), args[1:], kwargs, by_name=not args))
            if stop:
                raise _Stop

        def after(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls[-1].output = _hidden(output).clone()

        hooks = [b.register_forward_pre_hook(before, with_kwargs=True) for b in self.blocks.values()]
        hooks += [b.register_forward_hook(after) for b in self.blocks.values()]
        try:
            _run(model, ids)
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if not stop and len(calls) != len(self.blocks):
            raise _NotAChain(f"{len(self.blocks)} blocks were called {len(calls)} times")
        return calls

    def forward(self, block: int, sequence: int) -> torch.Tensor:
        """One block's output for one sequence's hidden states."""
        call, hidden = self.calls[block], self.hidden[sequence]
        module = list(self.blocks.values())[block]
        if call.by_name:
            return _hidden(module(hidden_states=hidden, **call.kwargs))
        return _hidden(module(hidden, *call.args, **call.kwargs))


@dataclasses.dataclass
class _Call:
    """How a block was called, beside its hidden states, and with which."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool
    output: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))


class _Stop(Exception):
    """Ends a run of the model when its first block has been called."""


def _hidden(output: Any) -> torch.Tensor:
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, torch.Tensor):
        raise _NotAChain("its blocks do not return hidden states")
    return first


def _blocks(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The longest list of modules that hold linear layers, of what reads text."""
    best: dict[str, torch.nn.Module] = {}
    decoder = getattr(model, "get_decoder", lambda: model)()  # not a vision tower's, which may be longer
    inside = {id(module) for module in (decoder or model).modules()}
    for name, module in model.named_modules():
        if (
            id(module) in inside
            and isinstance(module, torch.nn.ModuleList)
            and len(module) > len(best)
            and all(map(_linears, module))
        ):
            best = {f"{name}.{i}": child for i, child in enumerate(module)}
    if not best:
        raise _NotAChain("it has no list of blocks")
    return best


def _float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)([_float32(v) for v in value])
    if isinstance(value, Mapping):
        return {k: _float32(v) for k, v in value.items()}
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    plain = (bool, int, float, str, torch.dtype)
    return type(a) is type(b) and (not isinstance(a, plain) or a == b)
