"""Numbers of `analyze` against the plainest torch, planted structure, and every kind of checkpoint."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, sparse_weight
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from test_cli import cli

from sparse_backend import CheckpointError, OptionError
from sparse_backend.commands import base
from sparse_backend.commands.base import print_table
from sparse_backend.compiler import analysis_json, analysis_page, analysis_text, calibrate, weight_stats
from sparse_backend.compiler.analyze import analyze, kind_of
from sparse_backend.compiler.cost import KERNELS, KernelCost, Profile
from sparse_backend.compiler.prediction import predict
from sparse_backend.compiler.weight_stats import measure

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def save(folder, tensors, config=LLAMA):
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Invented figures: 1 GB/s for whatever is dense, an eighth of a nanosecond for each value that is stored.
PROFILE = Profile(
    machine="a test's machine", fingerprint="", threads=1, bandwidth=1e9, overhead=1e-6, batches=(1, 8),
    kernels={
        f"{format}/{values}": KernelCost((1.0,), ((1.25e-10, 1e-9),), (10.0, 10.0), ((1.0, 1.0),))
        for format, values in KERNELS
        if format not in ("block", "int4")
    },
)  # fmt: skip


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.json"
    calibrate.save(PROFILE, path)
    return path


def naive_tiles(weight, rows, columns):
    n, k = weight.shape[0] // rows, weight.shape[1] // columns
    return weight[: n * rows, : k * columns].reshape(n, rows, k, columns).transpose(1, 2).reshape(n * k, rows * columns)


def check_against_naive(weight):
    before = weight.clone()
    stats = measure(weight)
    assert torch.equal(weight, before)
    w = weight.double()
    magnitudes = w.abs().flatten().sort().values
    assert stats.parameters == w.numel()
    assert stats.zeros == int((w == 0).sum())
    thresholds = torch.tensor(weight_stats.THRESHOLDS, dtype=torch.float32 if weight.dtype == torch.float32 else None)
    assert stats.below == tuple(int((w.abs() < t).sum()) for t in thresholds.double())
    assert stats.distinct == len(set(w.flatten().tolist()))
    narrow = 1e-12 if weight.dtype != torch.float32 else 4e-3
    for share, kept in zip(weight_stats.PRUNED_SHARES, stats.kept, strict=True):
        left = magnitudes[round(share * w.numel()) :]
        assert kept[0] == pytest.approx(float(left.sum() / magnitudes.sum()), rel=narrow)
        assert kept[1] == pytest.approx(float((left**2).sum() / (magnitudes**2).sum()), rel=narrow)
    for size, found in zip(weight_stats.BLOCKS, stats.zero_blocks, strict=True):
        tiles = naive_tiles(w, size, size)
        assert found == (int((tiles == 0).all(1).sum()) if len(tiles) else 0, len(tiles))
    for (n, m), found in zip(weight_stats.NM_PATTERNS, stats.nm, strict=True):
        groups = naive_tiles(w, 1, m)
        assert found == (int(((groups != 0).sum(1) <= n).sum()) if len(groups) else 0, len(groups))
    squares = torch.linalg.svdvals(w) ** 2
    for rank, energy in zip(weight_stats.RANKS, stats.energy, strict=True):
        assert energy == pytest.approx(float(squares[:rank].sum() / squares.sum()), abs=1e-5)
    assert stats.energy_exact
    bits = weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16).int()
    field = bits >> {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[weight.dtype]
    p = field.bitwise_and(0x1F if weight.dtype == torch.float16 else 0xFF).flatten().bincount().double() / w.numel()
    assert stats.exponent_entropy == pytest.approx(float(torch.special.entr(p).sum() / math.log(2)))
    present = w[w != 0].abs()
    assert int(stats.octaves.sum()) == present.numel()
    for octave in range(-10, 3):
        bins = stats.octaves[4 * (octave - weight_stats.FIRST_OCTAVE) :][:4]
        for quarter, count in enumerate(bins.tolist()):
            low, high = 2**octave * (1 + quarter / 4), 2**octave * (1 + (quarter + 1) / 4)
            assert count == int(((present >= low) & (present < high)).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 101), (64, 32), (1, 21), (130, 33), (16, 16)])
@pytest.mark.parametrize("zeros", [0.0, 0.7])
def test_numbers_against_naive(shape, zeros, dtype):
    check_against_naive(sparse_weight(*shape, zeros, dtype) * 0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_a_weight_of_several_chunks(dtype):
    weight = sparse_weight(5251, 101, 0.6, torch.float16).to(dtype)
    weight[800:864, 64:100] = 0
    weight[7, 3] = -0.0
    assert len(list(weight_stats._chunks(weight))) > 1
    check_against_naive(weight)


def test_octave_bins_are_what_they_say():
    centers, widths = weight_stats.octave_bins()
    assert float(widths.sum()) == pytest.approx(weight_stats.OCTAVES)
    for center in centers[::7].tolist():
        stats = measure(torch.tensor([[center]], dtype=torch.float32), rank=False)
        assert int(stats.octaves.argmax()) == int((centers == center).nonzero())


def test_float32_that_was_bfloat16_counts_as_such():
    weight = sparse_weight(40, 30, 0.2)
    wide, narrow = measure(weight.float()), measure(weight)
    assert wide.dtype == "bfloat16"
    assert (wide.kept, wide.below, wide.distinct) == (narrow.kept, narrow.below, narrow.distinct)
    assert measure(torch.rand(400, 300), rank=False).distinct is None  # more than is counted


def test_planted_patterns_are_found():
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(64, 128, generator=generator).bfloat16() + 0.1
    order = torch.rand(64, 32, 4, generator=generator).argsort(-1)
    fitting = weight.masked_fill((order < 2).view(64, 128), 0)
    stats = measure(fitting)
    assert stats.nm[0] == (64 * 32, 64 * 32)
    assert stats.density == 0.5
    blocks = weight.clone()
    blocks[32:, 64:96] = 0
    assert measure(blocks).zero_blocks == ((64, 512), (4, 32), (1, 8))
    assert measure(weight).nm == ((0, 64 * 32), (0, 64 * 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["tensor", "row", "group of 64", None])
def test_ternary_is_found_with_its_granularity(granularity, dtype):
    n, k = 2800, 200  # two chunks
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-1, 2, (n, k), generator=generator).float()
    scales = torch.randint(1, 100, (n, -(-k // 64)), generator=generator).float() / 64
    if granularity == "row":
        scales[:, 1:] = scales[:, :1]
    elif granularity == "tensor":
        scales[:] = 0.25
    else:
        scales[:2700, 1:] = scales[:2700, :1]  # rows up there, groups only in the second chunk
    weight = (codes * scales.repeat_interleave(64, 1)[:, :k]).to(dtype)
    if granularity is None:
        weight[-1, :4] = torch.tensor([0.5, 0.25, 1.0, 2.0], dtype=dtype)
    assert measure(weight, rank=False).ternary == granularity
    if granularity == "tensor":
        assert measure(weight, rank=False).distinct == 3


def test_energy_of_large_weights_is_a_close_lower_bound(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    flat = torch.randn(600, 700, generator=generator)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    decaying = (u * s * 0.98 ** torch.arange(600)) @ v
    exact = [measure(w.bfloat16()).energy for w in (flat, decaying)]
    monkeypatch.setattr(weight_stats, "_EXACT_RANK", 500)
    for weight, true, slack in ((flat, exact[0], 0.15), (decaying, exact[1], 0.002)):
        found = measure(weight.bfloat16())
        assert not found.energy_exact
        for low, high in zip(found.energy, true, strict=True):
            assert (1 - slack) * high <= low <= high + 1e-4


def test_nan_and_infinity_are_counted_and_left_out():
    weight = sparse_weight(50, 40, 0.3)
    clean = measure(weight)
    weight[3, 7], weight[4, 4], weight[5, 5] = float("nan"), float("inf"), -float("inf")
    stats = measure(weight)
    assert stats.nonfinite == 3
    assert stats.kept[1] == pytest.approx(clean.kept[1], rel=0.01)
    assert stats.energy == pytest.approx(clean.energy, rel=0.01)
    assert weight_stats.sketch(weight).isfinite().all()
    for dtype in DTYPES:
        only = measure(torch.full((4, 4), float("nan"), dtype=dtype))
        assert (only.nonfinite, only.kept, only.ternary) == (16, (None,) * 4, None)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_empty_and_extreme_weights(shape):
    for dtype in DTYPES:
        stats = measure(torch.zeros(shape, dtype=dtype))
        assert (stats.parameters, stats.ternary, stats.kept[0], stats.energy) == (0, None, None, (None,) * 3)
        largest = measure(torch.full((3, 40), torch.finfo(dtype).max, dtype=dtype))
        assert largest.energy == pytest.approx((1.0, 1.0, 1.0))
        least = measure(torch.full((3, 40), torch.finfo(dtype).smallest_normal / 16, dtype=dtype))
        assert least.energy == pytest.approx((1.0, 1.0, 1.0))
        assert measure(torch.zeros(5, 7, dtype=dtype)).zeros == 35


def test_sketches_estimate_cosines():
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 300, 400, generator=generator)
    weights = [a, -a, 0.6 * a + 0.8 * b, b, torch.zeros_like(a)]
    found = weight_stats.cosines([weight_stats.sketch(w.bfloat16()) for w in weights])
    flat = torch.stack([w.flatten() for w in weights])
    true = torch.nn.functional.cosine_similarity(flat.unsqueeze(0), flat.unsqueeze(1), dim=-1)
    assert torch.allclose(found, true, atol=0.02)
    assert float(found[0, 1]) == pytest.approx(-1)
    small = [w[:20, :20].contiguous() for w in weights[:3]]
    exact = torch.nn.functional.cosine_similarity(small[0].flatten(), small[2].flatten(), dim=0)
    assert float(weight_stats.cosines([weight_stats.sketch(w) for w in small])[0, 2]) == pytest.approx(float(exact))


def test_kinds_come_from_the_last_part():
    kinds = {
        "model.layers.0.mlp.gate_proj": "gate", "a.down_proj": "down", "w3": "up", "x.attention.self.query": "q",
        "x.k": "k", "x.v_proj": "v", "x.o_proj": "o", "x.qkv_proj": "other", "x.gate_up_proj": "other",
        "h.0.attn.c_attn": "other", "x.dense": "other",
    }  # fmt: skip
    assert {name: kind_of(name) for name in kinds} == kinds


@pytest.fixture
def model(tmp_path):
    tensors = {"model.embed_tokens.weight": sparse_weight(60, 48, 0.0), "model.norm.weight": torch.ones(48)}
    for layer in range(11):
        for i, (name, shape) in enumerate({"q_proj": (48, 48), "up_proj": (70, 48), "qkv": (144, 48)}.items()):
            tensors[f"model.layers.{layer}.{name}.weight"] = sparse_weight(*shape, 0.25, seed=10 * layer + i)
    tensors["model.layers.7.up_proj.weight"] = -tensors["model.layers.2.up_proj.weight"]
    tensors["model.layers.3.codes.weight"] = torch.zeros(8, 8, dtype=torch.int8)
    return save(tmp_path / "model", tensors)


def test_a_checkpoint_layer_by_layer(model):
    seen = []
    analysis = analyze(model, lambda *a: seen.append(a))
    assert seen[-1][0] <= seen[-1][1]
    assert len(analysis.projections) == 33
    assert [p.layer for p in analysis.projections if p.kind == "q"] == list(range(11))
    assert analysis.left_out == {"embedding, head or router": 1, "int8 weights": 1}
    assert [(k.kind, k.matrices) for k in analysis.kinds()] == [("up", 11), ("q", 11), ("other", 11)]
    tensors = load_file(model / "model.safetensors")
    ups = torch.stack([tensors[f"model.layers.{i}.up_proj.weight"] for i in range(11)]).double()
    up = analysis.kinds()[0]
    assert up.parameters == ups.numel()
    assert up.zeros == int((ups == 0).sum())
    assert up.below == tuple(int((ups.abs() < t).sum()) for t in weight_stats.THRESHOLDS)
    squares = torch.linalg.svdvals(ups) ** 2
    shares = (squares.cumsum(1)[:, 31] / squares.sum(1)).mean()
    assert up.energy[0] == pytest.approx(float(shares), abs=1e-5)
    assert [(round(c, 3), *names) for c, *names in analysis.similar()] == [
        (-1.0, "model.layers.7.up_proj", "model.layers.2.up_proj")
    ]
    similarity = next(s for s in analysis.similarities if s.name == "up_proj")
    flat = torch.nn.functional.normalize(ups.flatten(1), dim=1)
    assert torch.allclose(similarity.cosine, (flat @ flat.T).float(), atol=1e-5)
    assert not analysis.warnings
    assert analyze(model, rank=False).total().energy is None


def test_predictions_add_up_and_say_what_is_lossy():
    half, ternary = sparse_weight(64, 96, 0.5), sparse_weight(32, 32, 0.3).sign()
    stats = [measure(w, rank=False) for w in (half, ternary, torch.zeros(0, 8).bfloat16())]
    found = {p.label: p for p in predict(stats, PROFILE, batch=1)}
    shapes = [(64, 96), (32, 32)]
    dense = found["dense, as it is"]
    assert dense.nbytes == sum(2 * n * k for n, k in shapes)
    assert dense.seconds == pytest.approx(sum(PROFILE.seconds("dense", "bf16", s, 1.0, 1) for s in shapes))
    exact = found["fastest without loss, per projection"]
    sell = PROFILE.seconds("sell", "bf16x12", shapes[0], stats[0].density, 1)
    bits = PROFILE.seconds("bitmask", "bf16x12", shapes[0], stats[0].density, 1)
    assert exact.seconds == pytest.approx(min(sell, bits) + PROFILE.seconds("ternary", "1.6", shapes[1], 1.0, 1))
    assert not exact.lossy
    lossy = {label for label, p in found.items() if p.lossy}
    assert lossy == {
        "int8", "ternary, 2 bits", "ternary, 1.6 bits", "bitmask, int8", "bitmask, int4", "sell, int8", "sell, int4",
        *(f"pruned to {z}% zeros, fastest sparse" for z in (50, 70, 90)),
    }  # fmt: skip
    assert not any(label.startswith(("block", "int4")) for label in found)  # the profile has none
    assert not any("fp16" in label for label in found)
    times = [found[f"pruned to {z}% zeros, fastest sparse"].seconds for z in (50, 70, 90)]
    assert times == sorted(times, reverse=True)
    assert predict(stats, PROFILE, batch=64)[0].seconds > dense.seconds
    alone = {p.label: p.lossy for p in predict(stats[1:2], PROFILE, batch=1)}
    assert not alone["ternary, 2 bits"]
    full = [measure(sparse_weight(40, 40, 0.0, torch.float16), rank=False)]
    assert "bitmask, fp16" not in {p.label for p in predict(full, PROFILE, 1)}
    pruned = {p.label for p in predict([measure(sparse_weight(40, 40, 0.8), rank=False)], PROFILE, 1)}
    assert "pruned to 90% zeros, fastest sparse" in pruned
    assert "pruned to 70% zeros, fastest sparse" not in pruned
    assert predict([], PROFILE, 1) == []


def test_every_kind_of_checkpoint(python_lm, python_lm_50, pruned_50):
    plain, compiled = analyze(pruned_50), analyze(python_lm_50)
    assert analysis_json.to_json(plain)["kinds"] == analysis_json.to_json(compiled)["kinds"]
    assert compiled.total().zeros == compiled.total().parameters // 2
    assert analyze(python_lm, rank=False).total().kept[1][0] < 1
    ternary = analyze(ROOT / "models" / "python-lm-ternary", rank=False).total()
    assert ternary.ternary == {"tensor": 42}
    assert ternary.distinct == 3


def test_command_prints_and_writes(model, profile, tmp_path):
    report = tmp_path / "report.json"
    result = cli("analyze", model, "--json", report, COLUMNS="100", SPARSE_BACKEND_PROFILE=str(profile))
    assert result.returncode == 0, result.stderr
    data = json.loads(report.read_text())
    up = data["kinds"][0]
    row = ["up_proj", "11", f"{up['parameters']:,}", *(f"{v:.1%}" for v in up["below"].values()), f"{up['zeros']:.1%}"]
    assert row in [line.split() for line in result.stdout.splitlines()]
    tables = result.stdout[: result.stdout.index("ternary: ")]
    assert max(map(len, tables.splitlines())) <= 100
    for text in ("2:4 fits", "ternary: no matrix", "sharing depth: 1 pair", "left out: 1 x embedding"):
        assert text in result.stdout
    assert len(data["projections"]) == 33
    assert data["similar"][0]["modules"] == ["model.layers.7.up_proj", "model.layers.2.up_proj"]
    assert data["machine"] == PROFILE.machine
    assert data["predictions"][0]["format"] == "dense, as it is"
    assert "Predicted: every projection once, on a test's machine" in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "profile.json", "report.json"]
    assert "sparse-backend analyze ./llama --html report.html" in cli("analyze", "--help").stdout


@pytest.mark.parametrize(("width", "terminal"), [(30, False), (30, True), (70, True), (80, True), (200, True)])
def test_no_digit_of_a_table_is_cut_off(width, terminal):
    header = ("projection", "matrices", "exponent bits", "kept, 50%", "<0.01")
    row = ("linear_attn.in_proj_qkvz", "64", "2.61 of 8", "25,600,000,000", "63.4%")
    table = Table(*header, box=box.SIMPLE_HEAD, show_edge=False)
    table.add_row(*row)
    file = io.StringIO()
    print_table(table, Console(file=file, width=width, force_terminal=terminal, color_system=None))
    text = re.sub(r"\x1b\[\d*m", "", file.getvalue())
    for cell in row[1:]:
        assert cell in text
    assert (" ".join(row) in " ".join(text.split())) == (not terminal or width >= 80)
    assert "…" not in text
    if width >= 70:
        assert max(map(len, text.splitlines())) <= width


def test_damaged_weights_and_unknown_architectures_are_warned_of(tmp_path):
    weight = sparse_weight(32, 32, 0.1)
    weight[1, 1] = float("nan")
    folder = save(tmp_path / "m", {"body.1.strange.weight": weight}, {"model_type": "no-such-model"})
    unknown, damaged = analyze(folder).warnings
    assert "no-such-model" in unknown
    assert "found by tensor names and shapes" in unknown
    assert "1 weight(s) are NaN or infinite, in 1 module(s), the first body.1.strange" in damaged
    known = save(tmp_path / "n", {"body.1.strange.weight": sparse_weight(4, 4, 0.1)})
    assert "all projections are of kind 'other'" in analyze(known).warnings[0]
    empty = save(tmp_path / "e", {"a.up_proj.weight": torch.zeros(0, 4), "a.q_proj.weight": torch.zeros(4, 4)})
    text = analysis_text.tables(analyze(empty))
    assert text[0].rows[0] == ("up_proj", "1", "0", "-", "-", "-", "-", "-")


def test_what_is_wrong_with_the_input_is_said(model, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        analyze(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        analyze(tmp_path)
    codes = save(tmp_path / "codes", {"a.q_proj.weight": torch.zeros(4, 4, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"no linear projection to analyse \(1 x int8 weights\)"):
        analyze(codes)
    index = {"weight_map": {"a.weight": "model.safetensors", "b.weight": "model-2.safetensors"}}
    (codes / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-2.safetensors.*a shard is missing"):
        analyze(codes)
    cut = shutil.copytree(model, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or not safetensors"):
        analyze(cut)


def test_reports_are_whole_or_not_there(model, tmp_path, monkeypatch):
    result = cli("analyze", model, "--html", tmp_path / "none" / "report")
    assert result.returncode == 2
    assert "--html " in result.stderr
    assert "create it first" in result.stderr
    with pytest.raises(OptionError, match=r"--json .*is a folder"):
        base.check_writable("--json", tmp_path)
    target = tmp_path / "report"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        base.write_whole("--json", target, "\udc80")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match=r"pip install 'sparse_backend\[report\]'"):
        analysis_page.to_html(analyze(model, rank=False))
