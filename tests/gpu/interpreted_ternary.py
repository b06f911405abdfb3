"""Ternary weights on the GPU path; test_interpreted.py runs this file under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from gpu_tools import check, run

import sparse_backend as sb
from sparse_backend.formats import get_format
from sparse_backend.kernels import cpu
from sparse_backend.kernels.triton import common, ternary

SHAPES = [(1, 1, 0), (64, 512, 0), (70, 300, 0), (33, 700, 32), (20, 600, 64), (5, 700, 128), (3, 600, 256)]


def weight_of(n, k, group=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(-1, 2, (n, k), generator=generator).to(dtype)
    factors = (torch.rand(n, -(-k // group) if group else 1, generator=generator) + 0.5).to(dtype)
    return codes * factors.repeat_interleave(group or k, dim=1)[:, :k]


def packed(n, k, group=0, bits=2, activations="int8", dtype=torch.bfloat16):
    return sb.pack(weight_of(n, k, group, dtype), "ternary", bits=bits, activations=activations)


def check_int8(p, x, bias=None, roundings=1):
    """The product against float64 of activations rounded as transformers' activation_quant: sums are exact.

    `roundings` to x's dtype are allowed.
    """
    got = run(p.lower("cuda"), x, bias)
    assert got.dtype == x.dtype
    scale = 127 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    rounded = (x.float() * scale).round().clamp(-128, 127).double() / scale.double()
    expected = rounded @ p.unpack().double().T
    size = rounded.abs() @ p.unpack().double().abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    # One group after the other is added in float32; roundings to x's dtype are cut off by the interpreter.
    unit = roundings * {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[x.dtype]
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompts_under_scales_of_groups_are_torchs_product_with_rounded_activations(dtype, monkeypatch):
    weight = weight_of(70, 1000, 64, dtype)
    weight[0] = 1.5
    p = sb.pack(weight, "ternary", activations="int8")
    x = 100 * torch.randn(65, 1000).to(dtype)
    x[3], x[4, 7] = 0, float("nan")
    monkeypatch.setattr(ternary.ternary_kernels, "dot", None)
    y = run(p.lower("cuda"), x)
    assert torch.isnan(y[4]).all()
    x[4] = 0.5  # codes of 127: the sum of row 0 is beyond float16
    check_int8(p, x, roundings=2)


@pytest.mark.parametrize(("tokens", "group"), [(1, 0), (5, 0), (65, 0), (3, 64), (65, 64)])
def test_a_given_absmax_makes_parts_of_a_token_round_alike(tokens, group):
    """What tensor parallelism does: two halves of K, one scale, which is the CPU's sum."""
    weight = weight_of(32, 256, group, torch.float32)
    x = torch.randn(tokens, 256)
    x[0, 200] = 9.0  # the first half never sees it
    absmax = x.abs().amax(-1)
    ours, cpus = [], []
    for half in (slice(0, 128), slice(128, 256)):
        p, part = sb.pack(weight[:, half].contiguous(), "ternary", activations="int8"), x[:, half]
        assert p.attributes["group_size"] == group
        op = torch.ops.sparse_backend.ternary_triton_linear.default
        ours.append(op(part, *p.lower("cuda").tensors.values(), None, 32, absmax))
        cpus.append(cpu.ops().lowbit_linear(part.contiguous(), *p.lower().tensors.values(), None, 32, absmax))
    for a, b in zip(ours, cpus, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-5)
    whole = sb.pack(weight, "ternary", activations="int8")
    assert torch.allclose(sum(ours), sb.linear(x, whole), rtol=1e-6, atol=2e-5)
    first = sb.pack(weight[:, :128].contiguous(), "ternary", activations="int8")
    assert not torch.allclose(run(first.lower("cuda"), x[:, :128])[0], ours[0][0], rtol=1e-6, atol=1e-5)


def test_an_absmax_that_is_none_is_refused_and_nan_propagates():
    tensors = packed(20, 64).lower("cuda").tensors.values()
    op, x = torch.ops.sparse_backend.ternary_triton_linear.default, torch.randn(2, 64)
    for wrong in (torch.ones(3), torch.ones(2).double(), torch.ones(4)[::2]):
        with pytest.raises(RuntimeError, match="absmax must be"):
            op(x, *tensors, None, 20, wrong)
    y = op(x, *tensors, None, 20, torch.tensor([1.0, float("nan")]))
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(y[1]).all()


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
    for absmax in ((), (torch.ones(1),)):
        torch.library.opcheck(op, (torch.randn(1, 64), *tensors, torch.randn(8), 8, *absmax), test_utils=checks)
