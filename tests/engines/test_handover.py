"""Compiled weights on their way into an engine's layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import sparse_backend as sb
from sparse_backend.compiler import plan
from sparse_backend.compiler.gpu_cost import GpuProfile
from sparse_backend.engines import handover
from sparse_backend.errors import CheckpointError
from sparse_backend.options import Options


def tensor_of(name, n=32, k=64, format="bitmask", **options):
    torch.manual_seed(n)
    weight = torch.randn(n, k).bfloat16()
    weight[torch.rand(n, k) < 0.5] = 0
    packed = sb.pack(weight, format, **options)
    return handover.PackedTensor(name, packed, packed.unpack)


def resident(path):
    """Bytes of a file that are mapped and in memory."""
    kilobytes = 0
    mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if " kB" not in line and ":" in line and "-" in line.split()[0]:
            mine = line.endswith(str(path))
        elif mine and line.startswith("Rss:"):
            kilobytes += int(line.split()[1])
    return kilobytes * 1024


def test_memory_of_a_file_is_given_back_and_of_nothing_else(tmp_path):
    packed = tensor_of("q", 2048, 1024).packed
    path = tmp_path / "model.safetensors"
    save_file(dict(packed.tensors), path)
    with safe_open(path, "pt") as shard:
        mapped = dataclasses.replace(packed, tensors={name: shard.get_tensor(name) for name in packed.tensors})
        expected = packed.unpack()
        tensors = [handover.PackedTensor("q", p, p.unpack) for p in (mapped, packed)]
        assert torch.equal(mapped.unpack(), expected)
        assert resident(path) > 0.9 * packed.nbytes
        handover.release(tensors)
        assert resident(path) < 0.1 * packed.nbytes
        for tensor in tensors:
            assert torch.equal(tensor.dense(), expected)


PARTS = [("q", 32), ("k", 16)]


def test_a_packed_tensor_becomes_dense_when_it_is_looked_at():
    tensor = tensor_of("q")
    dense = tensor.packed.unpack()
    assert tensor.shape == dense.shape
    assert tensor.dtype == torch.bfloat16
    assert tensor.numel() == dense.numel()
    assert "bitmask" in repr(tensor)
    for result, expected in (
        (tensor.narrow(0, 4, 8), dense[4:8 + 4]), (tensor.t(), dense.t()), (tensor.float(), dense.float()),
        (torch.cat([tensor, dense]), torch.cat([dense, dense])), (tensor[3], dense[3]), (tensor + 1, dense + 1),
    ):  # fmt: skip
        assert type(result) is torch.Tensor
        assert torch.equal(result, expected)
    assert torch.equal(torch.empty(32, 64, dtype=torch.bfloat16).copy_(tensor), dense)


def test_a_damaged_weight_says_so_when_it_is_looked_at():
    def unpack():
        raise CheckpointError("model.safetensors: module q is damaged")

    broken = handover.PackedTensor("q", tensor_of("q").packed, unpack)
    with pytest.raises(CheckpointError, match="damaged"):
        broken.sum()


def test_parts_are_joined_in_the_layers_order_whatever_order_they_came_in():
    q, k = tensor_of("q"), tensor_of("k", 16)
    joined = handover.join([k, q], PARTS, 64, torch.bfloat16, Options(format="bitmask"))
    assert joined is not None
    assert torch.equal(joined.unpack(), torch.cat([q.dense(), k.dense()]))


def test_what_is_not_whole_or_not_alike_is_left_to_dense_weights():
    q, k = tensor_of("q"), tensor_of("k", 16)
    options = Options(format="bitmask")

    def joined(tensors, parts=PARTS, columns=64, dtype=torch.bfloat16, options=options):
        return handover.join(tensors, parts, columns, dtype, options)

    assert joined([q, k]) is not None
    assert joined([q]) is None  # k came dense
    assert joined([q, k, k]) is None
    assert joined([q, k], [("q", 32), ("v", 16)]) is None
    assert joined([q, k], []) is None  # an engine that merges other parts than it names
    assert joined([q, k], [("q", 16), ("k", 8)]) is None  # tensor parallelism
    assert joined([q, k], columns=32) is None
    assert joined([q, k], dtype=torch.float16) is None
    assert joined([q, k], options=Options(format="sell")) is None
    assert joined([q, tensor_of("k", 16, format="sell")]) is None


def test_what_has_no_kernel_where_the_layer_is_becomes_dense(monkeypatch):
    card, options = torch.device("cuda"), Options(batch=1)
    monkeypatch.setattr(plan, "gpu_profile", lambda device: GpuProfile("a card", 4.9e12, 3.3e13, 5e14))
    dense = [tensor_of("q", format="bf16x12"), tensor_of("k", 16, format="bf16x12")]
    assert handover.join(dense, PARTS, 64, torch.bfloat16, options) is not None
    assert handover.join(dense, PARTS, 64, torch.bfloat16, options, device=card) is None
    joined = handover.join([tensor_of("q"), tensor_of("k", 16)], PARTS, 64, torch.bfloat16, options, device=card)
    assert joined is not None
    assert joined.format in ("bitmask", "sell")


def test_activations_asked_for_at_load_are_obeyed():
    torch.manual_seed(0)
    weight = torch.randint(-1, 2, (32, 64)).bfloat16()
    packed = sb.pack(weight, "ternary")
    tensor = handover.PackedTensor("q", packed, packed.unpack)
    kept = handover.join([tensor], PARTS[:1], 64, torch.bfloat16, Options())
    int8 = handover.join([tensor], PARTS[:1], 64, torch.bfloat16, Options(activations="int8"))
    assert kept is not None
    assert int8 is not None
    assert (kept.attributes["activations"], int8.attributes["activations"]) == ("keep", "int8")
    # Scales finer than the engine's dtype stay what they are.
    exact = sb.pack(weight.float() * 0.3, "ternary")
    tensor = handover.PackedTensor("q", exact, exact.unpack)
    joined = handover.join([tensor], PARTS[:1], 64, torch.bfloat16, Options())
    assert joined is not None
    assert joined.dtype == torch.float32


def test_the_plan_of_this_machine_decides_between_formats_of_one_form():
    torch.manual_seed(1)
    weight = torch.randn(1024, 1024).bfloat16()
    weight[torch.rand(1024, 1024) < 0.95] = 0
    packed = sb.pack(weight, "bitmask")
    tensor = handover.PackedTensor("q", packed, packed.unpack)
    joined = handover.join([tensor], [("q", 1024)], 1024, torch.bfloat16, Options())
    assert joined is not None
    assert joined.format == "sell"
    assert torch.equal(joined.unpack(), weight)


def test_scratch_memory_is_given_out_again_and_grows():
    scratch = handover.Scratch()
    parts = [tensor_of("q"), tensor_of("k", 16)]
    for _ in range(3):
        first = scratch.empty((3, 5), torch.bfloat16)
        second = scratch.empty((7,), torch.float32)
        first.fill_(1)
        second.fill_(2)
        assert first.eq(1).all()
        assert first.shape == (3, 5)
        joined = handover.join(parts, PARTS, 64, torch.bfloat16, Options(format="bitmask"), scratch.empty)
        assert joined is not None
        assert torch.equal(joined.unpack(), torch.cat([p.dense() for p in parts]))
        assert scratch.empty((0, 4), torch.int8).shape == (0, 4)
        where = first.data_ptr()
        scratch.reset()
    assert scratch.empty((3, 5), torch.bfloat16).data_ptr() == where
