"""Which weights pruning takes: against naive loops, and sparsities that make layers err alike."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_backend import CheckpointError, OptionError, Options, WeightError
from sparse_backend.compiler import checkpoint, convert, prune
from sparse_backend.compiler.compile import compile_checkpoint
from sparse_backend.compiler.pruning.allocation import equal_error
from sparse_backend.compiler.pruning.pruner import Pruner

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 7), (17, 33), (40, 50), (33, 64)]


def random(n, k, dtype=torch.float32, ties=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    return (weight.mul(2).round() if ties else weight).to(dtype)


def naive_mask(scores, sparsity, pattern):
    """What to prune, in loops."""
    n, k = len(scores), len(scores[0])
    mask = torch.zeros(n, k, dtype=torch.bool)
    kind, _, m = pattern.partition(":")
    if pattern == "unstructured":
        for r in range(n):
            for c in sorted(range(k), key=lambda c: (scores[r][c], c))[: round(sparsity * k)]:
                mask[r, c] = True
    elif kind == "block":
        side = int(m.split("x")[0])
        blocks = []
        for top in range(0, n, side):
            for left in range(0, k, side):
                cells = [(r, c) for r in range(top, min(n, top + side)) for c in range(left, min(k, left + side))]
                blocks.append((math.fsum(scores[r][c] for r, c in cells) / len(cells), len(blocks), cells))
        blocks.sort(key=lambda b: b[:2])
        sizes = [sum(len(cells) for _, _, cells in blocks[:count]) for count in range(len(blocks) + 1)]
        count = min(range(len(sizes)), key=lambda i: (abs(sizes[i] - sparsity * n * k), i))
        for _, _, cells in blocks[:count]:
            for cell in cells:
                mask[cell] = True
    else:
        for r in range(n):
            for start in range(0, k, int(m)):
                group = range(start, min(k, start + int(m)))
                keep = math.ceil(int(kind) * len(group) / int(m))
                for c in sorted(group, key=lambda c: (scores[r][c], c))[: len(group) - keep]:
                    mask[r, c] = True
    return mask


PATTERNS = [("unstructured", 0.3), ("unstructured", 0.9), ("2:4", 0.5), ("4:8", 0.5), ("8:16", 0.5),
            ("block:16x16", 0.5), ("block:32x32", 0.3)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_magnitude_and_wanda_are_their_naive_selves(pattern, sparsity, dtype, monkeypatch):
    for ties in (False, True):
        for n, k in SHAPES:
            weight = random(n, k, dtype, ties)
            norms = torch.rand(k) + 0.1
            mask = naive_mask(weight.abs().float().tolist(), sparsity, pattern)
            scores = (weight.abs().float() * norms).tolist()
            for chunk in (1, 1 << 24):  # rows at a time or all at once: the same
                monkeypatch.setattr(prune, "_CHUNK", chunk)
                pruned = prune.magnitude(weight, sparsity, pattern)
                assert pruned.dtype == dtype
                assert torch.equal(pruned, weight.masked_fill(mask, 0))
                by_wanda = weight.masked_fill(naive_mask(scores, sparsity, pattern), 0)
                assert torch.equal(prune.wanda(weight, norms, sparsity, pattern), by_wanda)


def test_counts_are_exact():
    weight = random(64, 96) + 3  # no zeros
    zeros = {p: prune.magnitude(weight, s, p) == 0 for p, s in [*PATTERNS, ("block:16x16", 0.25)]}
    assert (zeros["unstructured"].sum(1) == round(0.9 * 96)).all()
    for n, m in ((2, 4), (4, 8), (8, 16)):
        assert (zeros[f"{n}:{m}"].view(64, -1, m).sum(2) == m - n).all()
    blocks = zeros["block:16x16"].view(4, 16, 6, 16).sum((1, 3))
    assert sorted(set(blocks.flatten().tolist())) == [0, 256]
    assert (blocks == 256).sum() == 6
    short = prune.magnitude(random(5, 11) + 3, 0, "2:4") == 0
    assert (short[:, 8:].sum(1) == 1).all(), "of 3 columns, ceil(2 * 3 / 4) = 2 stay"
    assert (prune.magnitude(random(5, 9) + 3, 0, "2:4")[:, 8] != 0).all(), "of 1 column, 1 stays"


def test_views_and_empty_weights():
    wide = random(20, 64, torch.bfloat16)
    for pattern, sparsity in PATTERNS:
        view = wide.t()
        assert torch.equal(prune.magnitude(view, sparsity, pattern), prune.magnitude(view.clone(), sparsity, pattern))
        for shape in ((0, 8), (8, 0)):
            assert prune.magnitude(torch.empty(shape), sparsity, pattern).shape == shape
    assert torch.equal(prune.magnitude(wide, 0.0), wide)
    assert torch.equal(prune.magnitude(wide, 0.0, "block:16x16"), wide)
    long = random(2, (1 << 16) + 3, torch.bfloat16)  # columns do not fit beside two bytes
    assert torch.equal(prune.magnitude(long, 0.5), prune.magnitude(long.float(), 0.5).bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:16x16"])
def test_nan_and_inf_are_refused(pattern, bad):
    weight = random(20, 40, torch.bfloat16)
    weight[7, 9] = bad
    with pytest.raises(WeightError, match="NaN or infinite"):
        prune.magnitude(weight, 0.5, pattern)
    if pattern != "2:4":
        with pytest.raises(WeightError, match="NaN or infinite"):
            prune.error_curve(weight, None, pattern)
    norms = torch.ones(40)
    norms[3] = bad
    with pytest.raises(WeightError, match="overflows on this text"):
        prune.wanda(random(20, 40), norms, 0.5, pattern)
    with pytest.raises(WeightError, match="40 input features, its calibration 39"):
        prune.wanda(random(20, 40), norms[1:], 0.5, pattern)


@pytest.mark.parametrize("pattern", ["unstructured", "block:16x16"])
def test_the_error_curve_is_what_pruning_loses(pattern):
    weight, norms = random(48, 80), torch.rand(80)
    curve = prune.error_curve(weight, norms, pattern)
    energy = (weight * norms).double().square()
    for step in (0, 1, len(curve.error) // 2, len(curve.error) - 2):
        pruned = prune.wanda(weight, norms, float(curve.sparsity[step]), pattern)
        assert float((pruned == 0).float().mean()) == pytest.approx(curve.sparsity[step], abs=1e-6)
        assert float(energy[pruned == 0].sum() / energy.sum()) == pytest.approx(curve.error[step], rel=1e-5)
    nothing = prune.error_curve(torch.zeros(4, 8), None, pattern)
    assert not nothing.error.any()
    assert nothing.sparsity[-1] == 1


def save_model(folder, weights, config=None):
    folder.mkdir()
    save_file({f"{name}.weight": weight for name, weight in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"architectures": ["Test"]}))
    return folder


@pytest.fixture
def uneven(tmp_path):
    """Four projections: one bears pruning well (few weights matter), one badly (all alike), one is half zeros."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(64, 400, generator=generator)
    half = torch.randn(96, 200, generator=generator)
    half[:, ::2] = 0
    weights = {
        "layers.0.heavy_proj": normal**3,
        "layers.0.flat_proj": normal.sign() * (1 + 0.01 * normal),
        "layers.1.normal_proj": torch.randn(160, 300, generator=generator),
        "layers.1.half_proj": half,
    }
    return save_model(tmp_path / "uneven", {name: w.bfloat16() for name, w in weights.items()})


def zero_blocks(weight):
    """How many weights are in blocks of zeros."""
    return sum(b.numel() for rows in weight.split(16) for b in rows.split(16, 1) if not b.any())


@pytest.mark.parametrize("pattern", ["unstructured", "block:16x16"])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_allocation_meets_its_target_and_makes_errors_equal(uneven, pattern, target):
    options = Options(sparsity=target, allocation="error", pattern=pattern)
    pruner = Pruner(checkpoint.read(uneven), options)
    pruner.prepare()
    weights = {name.removesuffix(".weight"): w for name, w in load_file(uneven / "model.safetensors").items()}
    pruned = {name: pruner.prune(name, weight, options) for name, weight in weights.items()}
    dropped = sum(zero_blocks(p) if pattern != "unstructured" else int((p == 0).sum()) for p in pruned.values())
    total = sum(w.numel() for w in weights.values())
    error = {n: float((w - pruned[n]).double().square().sum() / w.double().square().sum()) for n, w in weights.items()}
    if pattern == "unstructured":
        assert dropped / total == pytest.approx(target, abs=0.005)
        assert max(error.values()) - min(error.values()) < 0.01
    else:  # a block is 1% of a weight: as near as whole blocks come
        assert dropped / total == pytest.approx(target, abs=0.02)
    assert pruner.sparsity("layers.0.heavy_proj") > pruner.sparsity("layers.0.flat_proj")
    assert f"{target:.1%} of their weights" in pruner.notes[0]


def test_allocation_by_rules_gives_each_sparsity_its_own_budget(uneven):
    rules = ({"match": "layers.1.*", "sparsity": 0.8}, {"match": "*.flat_proj", "allocation": "uniform"})
    pruner = Pruner(checkpoint.read(uneven), Options(sparsity=0.4, allocation="error", rules=rules))
    pruner.prepare()
    assert pruner.sparsity("layers.0.flat_proj") == 0.4
    assert pruner.sparsity("layers.0.heavy_proj") == pytest.approx(0.4, abs=1e-6), "alone with its budget"
    share = {name: pruner.sparsity(f"layers.1.{name}") for name in ("normal_proj", "half_proj")}
    assert (share["normal_proj"] * 48000 + share["half_proj"] * 19200) / 67200 == pytest.approx(0.8, abs=1e-6)
    assert share["half_proj"] > share["normal_proj"]
    assert pruner.sparsity("layers.9.none_proj") == 0.0


def test_where_zeros_are_more_than_the_target_nothing_else_goes():
    weight = random(8, 64)
    weight[:, :48] = 0
    curves = {name: prune.error_curve(weight, None, "unstructured") for name in "ab"}
    shares = equal_error(curves, {"a": 512, "b": 512}, 0.5)
    assert shares == pytest.approx({"a": 0.5, "b": 0.5})
    assert all(torch.equal(prune.magnitude(weight, s), weight) for s in shares.values())


def test_compile_by_pattern(uneven, tmp_path):
    for pattern, rules in (("2:4", ()), ("block:16x16", ({"match": "*.half_proj", "pattern": "8:16"},))):
        options = Options(sparsity=None if pattern == "2:4" else 0.5, pattern=pattern, rules=rules)
        out = tmp_path / pattern.replace(":", "-")
        report = compile_checkpoint(uneven, out, options, verify=True)
        assert report.changed["pruned"] == 4
        info = checkpoint.read(out)
        assert info.config["quantization_config"]["pattern"] == pattern
        weights = dict(checkpoint.expand(load_file(out / "model.safetensors").items(), info.modules))
        for name, before in load_file(uneven / "model.safetensors").items():
            own = "8:16" if rules and "half" in name else pattern
            assert torch.equal(weights[name], prune.magnitude(before, 0.5, own)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(method="wanda", sparsity=0.5), "pass --calibration FILE"),
        (Options(method="sparsegpt", pattern="2:4"), "pass --calibration FILE"),
        (Options(method="wanda"), "'method' = 'wanda', but there is nothing to prune; pass --sparsity"),
        (Options(allocation="error"), "'allocation' = 'error', but there is nothing to prune"),
        (Options(sparsity=0.5, rules=({"match": "*x", "method": "wanda"},)), "there is nothing to prune"),
        (Options(sparsity=0.5, rules=({"match": "*.half_proj", "method": "wanda"},)), "pass --calibration FILE"),
    ],
)
def test_what_pruning_lacks_is_said_before_anything_is_written(uneven, tmp_path, options, message):
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        compile_checkpoint(uneven, tmp_path / "out", options)
    assert [p.name for p in tmp_path.iterdir()] == ["uneven"]


def test_nan_names_the_module(uneven, tmp_path):
    weights = load_file(uneven / "model.safetensors")
    weights["layers.0.flat_proj.weight"][3, 3] = float("nan")
    save_file(weights, uneven / "model.safetensors")
    with pytest.raises(WeightError, match=r"layers\.0\.flat_proj: weight has NaN"):
        compile_checkpoint(uneven, tmp_path / "out", Options(sparsity=0.5, allocation="error"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(sparsity=0.5, method="wanda"), "a.b_proj: option 'method' = 'wanda' needs the whole model"),
        (Options(sparsity=0.5, allocation="error"), "option 'allocation' = 'error' needs the whole model"),
        (Options(pattern="2:4", method="sparsegpt"), "compile it first: sparse-backend compile MODEL OUT"),
    ],
)
def test_while_an_engine_loads_only_magnitude_prunes(options, message):
    with pytest.raises(OptionError, match=message):
        convert.change_weight("a.b_proj", random(8, 8), options)
    weight, what = convert.change_weight("a.b_proj", random(8, 8), Options(pattern="2:4"))
    assert what == "pruned"
    assert ((weight == 0).view(8, 2, 4).sum(2) == 2).all()


# As llm-compressor 0.3 to 0.6 wrote it for a model pruned to 2:4 and saved with save_compressed=False.
PRUNED_BY_LLM_COMPRESSOR = {
    "config_groups": {},
    "format": "dense",
    "global_compression_ratio": None,
    "ignore": [],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "frozen",
    "sparsity_config": {
        "format": "dense", "global_sparsity": 0.42, "ignore": ["lm_head"], "registry_requires_subclass": False,
        "sparsity_structure": "2:4", "targets": ["Linear"],
    },
}  # fmt: skip


def foreign(folder, quantization, extra=None):
    weight = prune.magnitude(random(32, 64, torch.bfloat16), 0, "2:4")
    config = {"architectures": ["Test"], "quantization_config": quantization}
    save_model(folder, {"layers.0.up_proj": weight}, config)
    if extra:
        save_file({**load_file(folder / "model.safetensors"), **extra}, folder / "model.safetensors")
    return folder, weight


def test_a_checkpoint_pruned_by_llm_compressor_is_taken_as_it_is(tmp_path):
    model, weight = foreign(tmp_path / "model", PRUNED_BY_LLM_COMPRESSOR)
    report = compile_checkpoint(model, tmp_path / "out", Options(), verify=True)
    assert report.packed_count == 1
    info = checkpoint.read(tmp_path / "out")
    assert info.config["quantization_config"] == {"quant_method": "sparse-compiled"}
    found = dict(checkpoint.expand(load_file(tmp_path / "out" / "model.safetensors").items(), info.modules))
    assert torch.equal(found["layers.0.up_proj.weight"], weight)


@pytest.mark.parametrize(
    ("change", "extra", "message"),
    [
        ({"format": "pack-quantized"}, None, "already quantised"),
        (
            {"config_groups": {"group_0": {"weights": {"num_bits": 4}, "targets": ["Linear"]}}},
            None,
            "already quantised",
        ),
        ({"kv_cache_scheme": {"num_bits": 8}}, None, "already quantised"),
        ({"quant_method": "gptq"}, None, r"already quantised \(gptq\)"),
        (
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            {"layers.0.down_proj.bitmask": torch.zeros(4, 4, dtype=torch.uint8)},
            "stored compressed .compressed-tensors, sparse-24-bitmask.; save the model again with",
        ),
    ],
)
def test_quantised_or_compressed_checkpoints_of_others_are_refused(tmp_path, change, extra, message):
    model, _ = foreign(tmp_path / "model", {**PRUNED_BY_LLM_COMPRESSOR, **change}, extra)
    with pytest.raises(CheckpointError, match=message):
        compile_checkpoint(model, tmp_path / "out", Options())
