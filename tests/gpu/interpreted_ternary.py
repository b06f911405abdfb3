"""Ternary weights on the GPU path; test_interpreted.py runs this file under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from gpu_tools import check, run

import sparse_backend as sb
from sparse_backend.formats import get_format
from sparse_backend.kernels.triton import common, ternary

SHAPES = [(1, 1, 0), (64, 512, 0), (70, 300, 0), (33, 700, 32), (20, 600, 64), (5, 700, 128), (3, 600, 256)]


def weight_of(n, k, group=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(-1, 2, (n, k), generator=generator).to(dtype)
    factors = (torch.rand(n, -(-k // group) if group else 1, generator=generator) + 0.5).to(dtype)
    return codes * factors.repeat_interleave(group or k, dim=1)[:, :k]


def packed(n, k, group=0, bits=2, activations="int8", dtype=torch.bfloat16):
    return sb.pack(weight_of(n, k, group, dtype), "ternary", bits=bits, activations=activations)


def check_int8(p, x, bias=None):
    """The product against float64 of activations rounded as transformers' activation_quant: sums are exact."""
    got = run(p.lower("cuda"), x, bias)
    assert got.dtype == x.dtype
    scale = 127 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    rounded = (x.float() * scale).round().clamp(-128, 127).double() / scale.double()
    expected = rounded @ p.unpack().double().T
    size = rounded.abs() @ p.unpack().double().abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    # One group after the other is added in float32; one rounding to x's dtype, cut off by the interpreter.
    unit = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[x.dtype]
    error = (got.double() - expected).abs()
    assert (error <= unit * expected.abs() + 1e-6 * size + 1e-30).all(), (error / size.clamp_min(1e-30)).max()


def test_the_interpreter_runs():
    assert common.interpreted()


@pytest.mark.parametrize("bits", [2, 1.6])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_the_machine_form_holds_the_weight(n, k, group, bits):
    p = packed(n, k, group, bits)
    assert p.attributes["group_size"] == group
    words, scales, limbs = p.lower("cuda").tensors.values()
    dense = ternary.naive_unpack(words, scales, k)
    assert torch.equal(dense[:n], p.unpack().float())
    assert not dense[n:].any()
    assert limbs.shape == (1, 0)


def test_bytes_of_the_machine_form():
    assert packed(256, 2048).lower("cuda").nbytes == 256 * (2048 // 4 + 4)
    assert packed(256, 2048, 128).lower("cuda").nbytes == 256 * (2048 // 4 + 4 * 16)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_every_kernel_on_every_shape(n, k, group):
    p = packed(n, k, group)
    check_int8(p, torch.randn(1, k).bfloat16(), torch.randn(n).bfloat16())
    check_int8(p, torch.randn(5, k))
    p = packed(n, k, group, activations="keep")
    check(p, torch.randn(1, k))
    check(p, torch.randn(2, k).half(), torch.randn(n).half())


@pytest.mark.parametrize("group", [0, 64])
def test_every_number_of_tokens_that_a_kernel_is_compiled_for(group):
    p = packed(20, 200, group)
    for tokens in (2, 3, 4, 17) if group else (3, 17):
        check_int8(p, torch.randn(tokens, 200))
    check(packed(20, 200, group, activations="keep"), torch.randn(2, 3, 200).bfloat16())


@pytest.mark.parametrize("group", [0, 64])
def test_many_tokens(group):
    bias = torch.randn(70)
    check_int8(packed(70, 200, group), torch.randn(65, 200), bias)
    keep = packed(70, 200, group, activations="keep")
    check(keep, torch.randn(65, 200).bfloat16())
    if not group:
        check(keep, torch.randn(22, 200), bias)  # 66 rows of limbs


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_of_other_dtypes(dtype):
    for activations, proof in (("int8", check_int8), ("keep", check)):
        p = packed(20, 100, 0, 2, activations, dtype)
        proof(p, torch.randn(1, 100))
        proof(p, torch.randn(6, 100).to(torch.bfloat16))


def test_one_scale_for_the_weight():
    p = sb.pack(torch.randint(-1, 2, (20, 100)).bfloat16() * 0.37, "ternary", activations="int8")
    assert p.tensors["scales"].shape == (1, 1)
    check_int8(p, torch.randn(1, 100))
    check_int8(p, torch.randn(6, 100))


def test_integers_are_exact_and_equal_the_cpus():
    codes = torch.randint(-1, 2, (50, 1000)).float()
    codes[0, 0] = 1
    x = torch.randint(-127, 128, (6, 1000)).float()
    x[:, 0] = 127
    p = sb.pack(codes, "ternary", activations="int8")
    for tokens in (1, 6):
        assert torch.equal(run(p.lower("cuda"), x[:tokens]), x[:tokens] @ codes.T)
    y = torch.randn(6, 1000).bfloat16().float()  # some of these lie halfway between two integers
    assert torch.allclose(run(p.lower("cuda"), y), sb.linear(y, p), rtol=1e-6, atol=0)


def test_long_rows():
    check(packed(6, 20000, activations="keep"), -torch.ones(6, 20000))


@pytest.mark.parametrize("activations", ["int8", "keep"])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-6, 1e30])
def test_huge_and_tiny_activations(activations, magnitude):
    p = packed(20, 200, activations=activations)
    x = torch.randn(2, 200) * magnitude
    (check_int8 if activations == "int8" else check)(p, x)
    assert torch.equal(run(p.lower("cuda"), 0 * x), torch.zeros(2, 20))


@pytest.mark.parametrize("activations", ["int8", "keep"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_activations_that_are_no_numbers_propagate(activations, bad):
    p = packed(20, 200, activations=activations)
    x = torch.randn(3, 200)
    x[1, 100] = bad
    y = run(p.lower("cuda"), x)
    assert torch.isnan(y[1]).all()
    assert torch.isfinite(y[::2]).all()


@pytest.mark.parametrize(("group", "activations", "proof"), [(0, "int8", check_int8), (128, "keep", check)])
def test_splits_of_k_add_up_and_no_memory_is_read_before_it_is_written(group, activations, proof, monkeypatch):
    """Partial sums start as NaN here; padding rows of int8 activations hold anything."""
    empty = torch.Tensor.new_empty

    def poisoned(tensor, *args, **kwargs):
        made = empty(tensor, *args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    p = packed(10, 1000, group, activations=activations)
    for tokens in (1, 6):
        proof(p, torch.randn(tokens, 1000))
    first, second = (run(p.lower("cuda"), torch.ones(1, 1000)) for _ in range(2))
    assert torch.equal(first, second)


def test_views_and_no_tokens():
    p = packed(19, 45)
    base = torch.randn(7, 90).bfloat16()
    for x in (base[:, ::2], base[:, 1:46], base[:2, 45:], base[:5, :45].T.contiguous().T, base[0, :45]):
        check_int8(p, x)
    assert run(p.lower("cuda"), torch.randn(2, 0, 45)).shape == (2, 0, 19)


def test_codes_that_are_none_are_refused():
    for bits, byte in ((2, 0b11), (1.6, 250)):
        p = packed(8, 64, bits=bits)
        p.tensors["codes"][0, 0] = byte
        with pytest.raises(sb.WeightError, match="ternary: a"):
            p.lower("cuda")
    codes = torch.zeros(2, 65537, dtype=torch.int8)
    long = get_format("ternary").from_codes(codes, torch.ones(1, 1), 0, sb.Options(format="ternary"))
    with pytest.raises(sb.WeightError, match="up to 65536 columns"):
        long.lower("cuda")


def test_the_op_as_torch_compile_sees_it():
    tensors = packed(8, 64).lower("cuda").tensors.values()
    op = torch.ops.sparse_backend.ternary_triton_linear.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (torch.randn(1, 64), *tensors, torch.randn(8), 8), test_utils=checks)
