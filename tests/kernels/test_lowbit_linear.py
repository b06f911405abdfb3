"""Ternary and int8 layers against references in float64, at every level the machine has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_backend as sb
from sparse_backend.formats import naive_linear
from sparse_backend.kernels import cpu

# One rounding to the output dtype.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2e-6}
# Of the sum of magnitudes: 22 bits of an activation kept, 14 for int8 layers.
KEPT = {"ternary": 1e-6, "int8": 7e-5}
DTYPES = list(TOLERANCE)


def weight_of(n, k, group=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (n, k), generator=g).bfloat16()
    if not group:
        return codes * (torch.rand(n, 1, generator=g) + 0.5).bfloat16()
    factors = (torch.rand(n, -(-k // group), generator=g) + 0.5).bfloat16()
    return codes * factors.repeat_interleave(group, dim=1)[:, :k]


def quantised(x):
    """Activations as int8 per token, and what one step is: transformers' activation_quant in float32."""
    scale = 127 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x.float() * scale).round().clamp(-128, 127), scale


def check(x, packed, bias=None):
    y = sb.linear(x, packed, bias)
    if packed.attributes.get("activations") == "int8":
        codes, scale = quantised(x)
        x = codes.double() / scale.double()
        kept = 1e-6
    else:
        kept = KEPT[packed.format]
    weight = packed.unpack().double() if packed.format == "ternary" else _exact_int8(packed)
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    scale = x.double().abs().amax(-1, keepdim=True) * weight.abs().sum(1)
    allowed = TOLERANCE[y.dtype] * (expected.abs() + (0 if bias is None else bias.double().abs())) + kept * scale
    error = (y.double() - expected).abs()
    allowed = allowed + 1e-35  # below the normal range of float32 there are fewer bits
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.2f} times the tolerance"
    return y


def _exact_int8(packed):
    return packed.tensors["weight"].double() * packed.tensors["scales"].double()


def levels(x, packed, bias=None):
    """The result at every level, which must be the same to the bit."""
    results = []
    for level in cpu.available_levels():
        with cpu.forced_isa(level):
            results.append(check(x, packed, bias))
    assert all(torch.equal(r, results[0]) for r in results[1:])
    return results[0]


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 700),
    tokens=st.integers(1, 12),
    kind=st.sampled_from([(2, "int8"), (2, "keep"), (1.6, "int8"), (1.6, "keep"), None]),
    group=st.sampled_from([0, 0, 32, 128]),
    x_dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(n, k, tokens, kind, group, x_dtype, bias, seed):
    if kind is None:
        packed = sb.pack(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), "int8")
    else:
        packed = sb.pack(weight_of(n, k, group, seed), "ternary", bits=kind[0], activations=kind[1])
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).to(x_dtype)
    levels(x, packed, torch.randn(n).to(x_dtype) if bias else None)


def test_integers_are_exact():
    """One activation scale, one weight scale of 1: float32 results are the integers themselves."""
    codes = torch.randint(-1, 2, (50, 3000)).float()
    codes[0, 0] = 1
    x = torch.randint(-127, 128, (9, 3000)).float()
    x[:, 0] = 127
    for bits in (2, 1.6):
        packed = sb.pack(codes, "ternary", bits=bits, activations="int8")
        assert torch.equal(levels(x, packed), x @ codes.T)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 16, 33, 96, 97, 200])
@pytest.mark.parametrize("kind", [(2, "int8", 0), (1.6, "int8", 64), (2, "keep", 0), (2, "int8", 64)])
def test_a_row_does_not_depend_on_its_batch_nor_on_threads(isa, tokens, kind):
    bits, activations, group = kind
    packed = sb.pack(weight_of(61, 1100, group), "ternary", bits=bits, activations=activations)
    x = torch.randn(tokens, 1100).bfloat16()
    together = check(x, packed)
    assert torch.equal(together, torch.cat([sb.linear(row[None], packed) for row in x]))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(sb.linear(x, packed), together)
    finally:
        torch.set_num_threads(before)


def test_bitnets_linear_is_transformers(isa):
    """BitLinear and AutoBitLinear themselves, in float32."""
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights

    codes = torch.randint(-1, 2, (96, 320))
    x = torch.randn(5, 320)
    auto = AutoBitLinear(320, 96, bias=False, dtype=torch.float32)
    auto.weight.data, auto.weight_scale.data = codes.float(), torch.tensor([0.37])
    packed = sb.pack(codes * torch.tensor(0.37), "ternary", activations="int8")
    with torch._dynamo.config.patch(disable=True):
        assert torch.allclose(sb.linear(x, packed), auto(x), rtol=1e-4, atol=1e-4)
    bit = BitLinear(320, 96, bias=False, dtype=torch.float32)
    bit.weight.data, bit.weight_scale.data = pack_weights(codes.clone()), torch.tensor([1 / 0.37])
    with torch._dynamo.config.patch(disable=True):
        assert torch.allclose(sb.linear(x, packed), bit(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", ["int8", "keep"])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-10, 1e-5, 1.0, 1e10, 1e30])
def test_huge_and_tiny_activations(isa, activations, magnitude):
    packed = sb.pack(weight_of(20, 200), "ternary", activations=activations)
    x = (torch.randn(3, 200) * magnitude).to(torch.float32)
    y = check(x, packed)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("format", ["ternary", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_that_are_no_numbers_propagate(isa, format, bad, dtype):
    packed = sb.pack(weight_of(20, 200), format)
    x = torch.randn(9, 200).to(dtype)
    x[4, 100] = bad
    y = sb.linear(x, packed)
    assert torch.isnan(y[4]).all()
    assert torch.isfinite(y[torch.arange(9) != 4]).all()


def test_zero_activations_and_zero_scales(isa):
    weight = weight_of(20, 200)
    weight[7] = 0
    packed = sb.pack(weight, "ternary", activations="int8")
    assert torch.equal(sb.linear(torch.zeros(3, 200), packed), torch.zeros(3, 20))
    assert (sb.linear(torch.randn(3, 200), packed)[:, 7] == 0).all()


def test_strides_dimensions_and_empty_batches(isa):
    packed = sb.pack(weight_of(19, 45), "ternary")
    base = torch.randn(7, 5, 90).bfloat16()
    for x in (base[..., ::2], base[..., :45].transpose(0, 1), base[0, 0, 45:], base[..., 1:46], base[:, 0, 3:48]):
        check(x, packed)
    for shape in ((0, 45), (3, 0, 45)):
        assert sb.linear(torch.empty(shape), packed).shape == (*shape[:-1], 19)


def test_the_longest_rows(isa):
    packed = sb.pack(weight_of(6, 65536), "ternary", activations="int8")
    for tokens in (1, 20):
        check(torch.ones(tokens, 65536).bfloat16(), packed)
        check(-torch.ones(tokens, 65536).bfloat16(), packed)


def test_a_given_absmax_makes_parts_of_a_token_round_alike(isa):
    """What tensor parallelism does: two halves of K, one scale."""
    codes = torch.randint(-1, 2, (32, 256)).float()
    x = torch.randn(5, 256)
    whole = sb.linear(x, sb.pack(codes, "ternary", activations="int8"))
    absmax = x.abs().amax(-1)
    parts = []
    for half in (slice(0, 128), slice(128, 256)):
        machine = sb.pack(codes[:, half].contiguous(), "ternary", activations="int8").lower()
        tensors = machine.tensors.values()
        parts.append(cpu.ops().lowbit_linear(x[:, half].contiguous(), *tensors, None, 32, absmax))
    # Each part is rounded to float32 once: 16 at most cancel here.
    assert torch.allclose(parts[0] + parts[1], whole, rtol=1e-6, atol=1e-5)


def test_keep_loses_no_more_than_float32_sums_with_an_outlier_in_the_token():
    """22 bits below each token's largest activation: bf16 output rounds a thousand times more away."""
    weight = weight_of(64, 4096)
    packed = sb.pack(weight, "ternary")
    x = torch.randn(8, 4096).bfloat16().float()
    for outlier, times in ((5.0, 1), (300.0, 10)):
        x[:, 5] = outlier
        expected = naive_linear(x, packed)
        ours = (sb.linear(x, packed).double() - expected).norm()
        torchs = ((x @ weight.float().T).double() - expected).norm()
        rounded = (expected.bfloat16().double() - expected).norm()
        assert ours <= times * torchs
        assert ours <= 1e-3 * rounded


def test_wrong_arguments_are_named():
    packed = sb.pack(weight_of(8, 64), "ternary")
    buffer, scales = packed.lower().tensors.values()
    op = cpu.ops().lowbit_linear
    x = torch.ones(2, 64)
    for arguments, message in (
        ((torch.ones(2, 63), buffer, scales, None, 8), "in_features = 64"),
        ((x, buffer, scales, None, 9), "8 output features, not 9"),
        ((x, buffer, scales, torch.ones(9), 8), r"bias must have shape \[8\]"),
        ((x, buffer, torch.ones(2, 8), None, 8), r"scales must be contiguous, \[1\] or \[1, 8\]"),
        ((x, buffer, scales, None, 8, torch.ones(3)), "one value per token"),
        ((x, buffer[:-1], scales, None, 8), "packed weight"),
        ((x, buffer[64:], scales, None, 8), "packed weight"),
        ((x, torch.zeros_like(buffer), scales, None, 8), "packed weight"),
        ((x.int(), buffer, scales, None, 8), "bfloat16, float16 or float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_ops_pass_opcheck():
    packed = sb.pack(weight_of(21, 75), "ternary", bits=1.6)
    codes = torch.randint(-1, 2, (21, 75), dtype=torch.int8)
    ops = torch.ops.sparse_backend
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.ternary_encode.default, (codes, 5), test_utils=tests)
    torch.library.opcheck(ops.ternary_decode.default, (packed.tensors["codes"], 5, 75), test_utils=tests)
    for per_byte, group, limbs in ((4, 0, 1), (5, 0, 3), (5, 64, 1), (4, 32, 1), (1, 0, 2)):
        torch.library.opcheck(ops.lowbit_lower.default, (codes, per_byte, group, limbs), test_utils=tests)
    arguments = (torch.randn(3, 75), *packed.lower().tensors.values(), None, 21)
    torch.library.opcheck(ops.lowbit_linear.default, arguments)
    compiled = torch.compile(lambda x: ops.lowbit_linear(x, *arguments[1:]), fullgraph=True)
    assert torch.equal(compiled(arguments[0]), ops.lowbit_linear(*arguments))
