"""The kernels against the naive reference, at every level the machine has."""

from __future__ import annotations

import pytest
import torch
from conftest import sparse_weight
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_backend as sb
from sparse_backend.formats import naive_linear
from sparse_backend.kernels import cpu, registry

# Relative error of one rounding to the output dtype, plus fp32 accumulation over K.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-5}
DTYPES = list(TOLERANCE)


# Up to so many tokens `sell` does not use AMX, which adds floats in another order (csrc/sell/linear.cpp).
SELL_WITHOUT_TILES = 24

FORMATS = ["bitmask", "sell", "block", "bf16x12", "int4"]
VALUES = [None, "bf16", "bf16x12", "int8", "int4"]


def pack(weight, form, values=None, activations=None):
    if weight.dtype == torch.float16 and values in ("bf16", "bf16x12"):
        values = None
    if form in ("bf16x12", "int4"):  # dense: one kind of values
        values = None
    if form == "bf16x12":
        weight, activations = weight.bfloat16(), None
    return sb.pack(weight, format=form, values=values, activations=activations)


def check(x, packed, bias=None):
    y = sb.linear(x, packed, bias)
    expected = naive_linear(x, packed, bias)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], packed.shape[0])
    # Errors scale with the sum of magnitudes, not with a result that cancels to nothing.
    weights = packed.unpack().double().abs()
    scale = x.double().abs() @ weights.T + (0 if bias is None else bias.double().abs())
    error = (y.double() - expected).abs()
    allowed = TOLERANCE[x.dtype] * (expected.abs() + 1e-30) + 1e-6 * scale
    if packed.attributes.get("group_size") is not None:
        # unpack() rounds code times scale to the weight's dtype; activations are rounded to integers.
        limit = 127 if packed.attributes["activations"] == "int8" else 32767
        largest = x.double().abs().amax(-1, keepdim=True)
        allowed = allowed + 2**-8 * scale + 0.51 / limit * largest * weights.sum(1)
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.2f} times the tolerance"
    return y


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 140),
    k=st.integers(1, 700),
    tokens=st.integers(1, 12) | st.integers(25, 36),
    zeros=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES[:2]),
    form=st.sampled_from(FORMATS),
    values=st.sampled_from(VALUES),
    activations=st.sampled_from([None, "int8"]),
    x_dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_any_pattern(n, k, tokens, zeros, dtype, form, values, activations, x_dtype, bias, seed):
    packed = pack(sparse_weight(n, k, zeros, dtype, seed), form, values, activations)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).to(x_dtype)
    b = torch.randn(n).to(x_dtype) if bias else None
    results = {}
    for level in cpu.available_levels():
        with cpu.forced_isa(level):
            results[level] = check(x, packed, b)
    if form == "sell":  # sums in the same order everywhere, but for floats in tiles
        if tokens > SELL_WITHOUT_TILES and packed.attributes.get("group_size") is None and x_dtype == torch.bfloat16:
            results.pop("amx", None)
        assert all(torch.equal(r, results["scalar"]) for r in results.values())


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 16, 33, 64, 65, 97, 200])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "values"),
    [("bitmask", None), ("bitmask", "int4"), ("sell", None), ("sell", "int8"), ("block", None), ("block", "int8"),
     ("int4", None)],
)  # fmt: skip
def test_a_row_does_not_depend_on_its_batch(isa, tokens, dtype, form, values):
    packed = pack(sparse_weight(61, 1100, 0.6), form, values)
    x = torch.randn(tokens, 1100).to(dtype)
    together = check(x, packed)
    tiles = isa == "amx" and (form, values, dtype) == ("sell", None, torch.bfloat16) and tokens > SELL_WITHOUT_TILES
    fewest = 1 + SELL_WITHOUT_TILES if tiles else 1
    alone = torch.cat([sb.linear(row.expand(fewest, -1), packed)[-1:] for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("values", ["bf16x12", "int8"])
def test_the_same_on_any_number_of_threads_and_every_time(isa, tokens, form, values):
    packed = pack(sparse_weight(333, 2000, 0.5), form, values)
    x = torch.randn(tokens, 2000).bfloat16()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            results.append(sb.linear(x, packed))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_values_with_rare_exponents(isa):
    weight = sparse_weight(70, 2000, 0.5)
    weight[3, 17], weight[69, 1999], weight[0, 0] = 1e30, -1e-30, 2.0**-126
    for form in FORMATS[:-1]:
        packed = pack(weight, form, "bf16x12")
        for x in (torch.randn(3, 2000), torch.randn(28, 2000).bfloat16()):
            check(x, packed)
        only = torch.zeros(1, 2000)
        only[0, 17] = 1.0
        assert sb.linear(only, packed)[0, 3] == weight[3, 17].float()


def test_integer_sums_do_not_overflow(isa):
    # The largest codes times the largest activations, over more columns than 32 bits could sum.
    weight = torch.ones(3, 65536 + 300).bfloat16()
    for form in ("bitmask", "sell", "block", "int4"):
        packed = pack(weight, form, "int8")
        for tokens in (2, 28):
            y = sb.linear(torch.ones(tokens, weight.shape[1]), packed)
            assert torch.allclose(y, torch.full_like(y, weight.shape[1]), rtol=1e-4)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("k", [192, 2112, 3000])
def test_nothing_is_left_of_an_earlier_product(isa, form, values, k):
    before = sb.pack(sparse_weight(8, 4096, 0.5), format="bitmask", values="int8", activations="int8")
    packed = pack(sparse_weight(70, k, 0.5), form, values)
    for tokens in (1, 28):
        # Their codes are the bytes of NaNs: padding that is not cleared would be seen.
        sb.linear(torch.full((tokens, 4096), -1.0).bfloat16(), before)
        check(torch.randn(tokens, k).bfloat16(), packed)


@pytest.mark.parametrize("form", FORMATS)
def test_strides_dimensions_and_empty_batches(isa, form):
    packed = sb.pack(sparse_weight(19, 45, 0.5), format=form)
    base = torch.randn(7, 5, 90).bfloat16()
    for x in (base[..., ::2], base[..., :45].transpose(0, 1), base[0, 0, 45:], base[..., 1:46], base[:, 0, 3:48]):
        check(x, packed)
    for shape in ((0, 45), (3, 0, 45)):
        assert sb.linear(torch.empty(shape), packed).shape == (*shape[:-1], 19)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("values", VALUES)
def test_empty_weights(isa, shape, form, values):
    packed = pack(torch.zeros(shape, dtype=torch.bfloat16), form, values)
    for tokens in (3, 28):
        y = sb.linear(torch.ones(tokens, shape[1]).bfloat16(), packed, torch.ones(shape[0]))
        assert torch.equal(y, torch.ones(tokens, shape[0]).bfloat16())


def test_bias_of_another_dtype_and_stride(isa):
    packed = sb.pack(sparse_weight(20, 64, 0.5))
    check(torch.randn(3, 64).bfloat16(), packed, torch.randn(40)[::2])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("tokens", [3, 28])
def test_nan_activations_pass_through_like_dense(isa, form, values, tokens):
    weight = sparse_weight(8, 64, 0.2)
    packed = pack(weight, form, values)
    x = torch.ones(tokens, 64).bfloat16()
    x[1, 5] = float("nan")
    y = sb.linear(x, packed)
    assert torch.isnan(y[1][weight[:, 5] != 0]).all()  # sell does not touch what is zero, but in tiles
    assert torch.isfinite(y[torch.arange(tokens) != 1]).all()


def test_extreme_magnitudes_accumulate_in_float32(isa):
    # 4096 x 2^-9: each addend is lost next to 1.0 in bf16, none in fp32.
    weight = torch.full((4, 4096), 2.0**-9).bfloat16()
    y = sb.linear(torch.ones(1, 4096).bfloat16(), sb.pack(weight))
    assert torch.equal(y, torch.full((1, 4), 8.0).bfloat16())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("values", VALUES)
def test_long_rows(isa, form, values):
    packed = pack(sparse_weight(6, 70000, 0.7), form, values)
    for tokens in (1, 28):
        check(torch.randn(tokens, 70000).bfloat16(), packed)


@pytest.mark.parametrize("form", FORMATS)
def test_wrong_arguments_are_named(form):
    packed = sb.pack(sparse_weight(8, 64, 0.5), format=form)
    machine = packed.lower().tensors["packed"]
    op = registry.kernel(form).function()
    with pytest.raises(RuntimeError, match="in_features = 64"):
        sb.linear(torch.ones(2, 63), packed)
    with pytest.raises(RuntimeError, match=r"bias must have shape \[8\]"):
        sb.linear(torch.ones(2, 64), packed, torch.ones(9))
    with pytest.raises(RuntimeError, match="bfloat16, float16 or float32"):
        sb.linear(torch.ones(2, 64, dtype=torch.int32), packed)
    wild = machine.clone()
    wild[136:144] = 0x7F
    for broken in (wild, machine[:20], machine[:-1], torch.zeros_like(machine), machine[128:]):
        with pytest.raises(RuntimeError, match="packed weight"):
            op(torch.ones(2, 64), broken.contiguous(), None, 8)
