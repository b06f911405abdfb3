"""Choosing formats, and the profile they are chosen by."""

from __future__ import annotations

import json
import math
import types

import pytest
import torch
from conftest import ROOT, blocks_of_zeros, sparse_weight
from safetensors.torch import save_file
from typer.testing import CliRunner

import sparse_backend as sb
from sparse_backend.cli import app
from sparse_backend.compiler import calibrate, cost, gpu_cost, plan, planning, prune
from sparse_backend.compiler.cost import KernelCost, Profile
from sparse_backend.compiler.gpu_cost import GpuProfile
from sparse_backend.formats import get_format
from sparse_backend.kernels import registry

BATCHES = (1, 8, 64)
NOTHING, ONCE, HIDDEN = (0.0,) * 3, (1.0,) * 3, (100.0,) * 3


def kernel_of(stored: tuple[float, ...], exponent=HIDDEN, scale=ONCE) -> KernelCost:
    """Costs so many seconds per stored value, for 1, 8 and 64 tokens."""
    return KernelCost((0.0, 1.0), (NOTHING, stored), exponent, (scale, scale))


def machine(**stored: float) -> Profile:
    """Memory of 10 GB/s; kernels named `format__values` cost so many seconds per stored value and token."""
    kernels = {"dense/bf16": KernelCost((1.0,), ((2e-10, 16e-10, 64e-10),), HIDDEN, (ONCE,))}
    for name, seconds in stored.items():
        per_batch = tuple(seconds * b for b in BATCHES)
        kernels[name.replace("__", "/")] = kernel_of(per_batch)
    return Profile("a machine", "none", 2, 1e10, 0.0, BATCHES, kernels)


def test_seconds_are_those_of_memory_and_compute_and_how_they_hide_each_other():
    profile = machine(bitmask__bf16=1e-12)
    shape = (1000, 1000)
    bytes_read = 1e6 / 8 + 2 * 5e5
    assert profile.seconds("bitmask", "bf16", shape, 0.5, 1) == pytest.approx(bytes_read / 1e10)
    assert profile.seconds("bitmask", "bf16", shape, 0.5, 64) == pytest.approx(bytes_read / 1e10)
    slow = machine(bitmask__bf16=1e-9)
    assert slow.seconds("bitmask", "bf16", shape, 0.5, 4) == pytest.approx(4 * 5e5 * 1e-9)  # between 1 and 8
    assert slow.seconds("bitmask", "bf16", shape, 0.5, 128) == pytest.approx(128 * 5e5 * 1e-9)  # beyond 64
    kernel = kernel_of((1e-9,) * 3, (2.0, 1.0, 1.0), (1.5, 1.0, 1.0))
    both = Profile("m", "none", 1, 1e10, 1e-5, BATCHES, {"dense/bf16": kernel, "bitmask/bf16": kernel})
    expected = 1e-5 + 1.5 * math.hypot(5e5 * 1e-9, bytes_read / 1e10)
    assert both.seconds("bitmask", "bf16", shape, 0.5, 1) == pytest.approx(expected)
    assert both.seconds("sell", "bf16", shape, 0.5, 1) is None


def test_between_and_beyond_the_densities_measured():
    points = ((1.0, 8.0), (2.0, 4.0), (6.0, 3.0))
    kernel = KernelCost((0.2, 0.4, 0.8), points, HIDDEN, points)
    for density, expected in ((0.2, (1, 8)), (0.3, (1.5, 6)), (0.4, (2, 4)), (0.6, (4, 3.5))):
        assert kernel.per_position(density) == pytest.approx(expected)
        assert kernel.scale_at(density) == pytest.approx(expected)
    for density, seconds, scale in ((1.0, (8, 2.5), (6, 3)), (0.1, (0.5, 10), (1, 8)), (0.0, (0, 12), (1, 8))):
        assert kernel.per_position(density) == pytest.approx(seconds)
        assert kernel.scale_at(density) == scale


@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize(("format", "values"), cost.KERNELS)
def test_sizes_are_those_of_the_formats(format, values, density):
    n, k = 256, 1024
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(values, torch.bfloat16)
    if format == "dense":
        assert cost.stored_bytes(format, values, (n, k), 1.0) == n * k * dtype.itemsize
        return
    weight = (blocks_of_zeros if format == "block" else sparse_weight)(n, k, 1 - density).to(dtype)
    if format == "ternary":
        bits, _, activations = values.partition(" ")
        packed = sb.pack(weight.sign(), format="ternary", bits=float(bits), activations=activations or None)
    else:
        packed = sb.pack(weight, format=format, values=None if format == values else values)
    stored = torch.count_nonzero(weight).item() / (n * k)
    assert cost.stored_bytes(format, values, (n, k), stored) == pytest.approx(packed.nbytes, rel=0.07)
    machine_form = cost.machine_bytes(format, values, (n, k), stored * n * k)
    assert machine_form == pytest.approx(packed.lower().nbytes, rel=0.12)


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_what_a_block_candidate_takes_is_what_packing_gives(values, group_size):
    weight = blocks_of_zeros(64, 256, 0.5)
    options = sb.Options(format="block", values=values, group_size=group_size)
    (found,) = get_format("block").candidates(weight, int(torch.count_nonzero(weight)), options)
    assert found.nbytes == found.pack().nbytes


def test_the_fastest_is_taken_and_the_smaller_of_equals():
    weight = sparse_weight(64, 512, 0.6)
    assert plan.choose(weight, sb.Options(), machine(bitmask__bf16=1e-11, sell__bf16=2e-9)).format == "bitmask"
    assert plan.choose(weight, sb.Options(), machine(bitmask__bf16=2e-9, sell__bf16=1e-11)).format == "sell"
    # 30 ps a weight is less than the 150 ps that 12 bits take from memory; the others are slower than dense.
    dense = torch.randn(64, 512).bfloat16()
    assert plan.choose(dense, sb.Options(), machine(bf16x12__bf16x12=3e-11, bitmask__bf16=1e-12)).format == "bf16x12"
    assert plan.choose(dense, sb.Options(), machine(bf16x12__bf16x12=3e-10)).format == "dense"


def test_the_batch_decides():
    profile = machine(bitmask__bf16=4e-11, sell__bf16=1e-11)
    slow_sell = Profile(**{**vars(profile), "kernels": {
        **profile.kernels, "sell/bf16": kernel_of((1e-11, 9e-9, 9e-8))}})  # fmt: skip
    weight = sparse_weight(64, 512, 0.9)
    assert plan.choose(weight, sb.Options(batch=1), slow_sell).format != "dense"
    assert plan.choose(weight, sb.Options(batch=8), slow_sell).format == "bitmask"


def test_a_format_far_slower_than_dense_in_prefill_is_not_taken():
    # A tenth of dense at batch 1, five times dense at 64.
    kernel = kernel_of((2e-11, 1e-9, 320e-10))
    dense = KernelCost((1.0,), ((2e-10, 16e-10, 64e-10),), HIDDEN, (ONCE,))
    kernels = {"dense/bf16": dense, "bf16x12/bf16x12": kernel}
    profile = Profile("m", "none", 1, 1e10, 0.0, BATCHES, kernels)
    weight = torch.randn(64, 512).bfloat16()
    decision = plan.choose(weight, sb.Options(), profile)
    assert decision.format == "dense"
    assert "prompts" in decision.reason
    faster = Profile("m", "none", 1, 1e10, 0.0, BATCHES, {
        **kernels, "bf16x12/bf16x12": kernel_of((2e-11, 1e-9, 160e-10))})  # fmt: skip
    assert plan.choose(weight, sb.Options(), faster).format == "bf16x12"


def test_rounded_values_are_only_taken_when_asked_for():
    weight = sparse_weight(64, 512, 0.1)
    everything = plan.predictions(weight, 29491, sb.Options(), Profile.load(ROOT / "tests" / "profile.json"))
    assert {p.values for p in everything} <= {"", "bf16", "bf16x12"}
    rounded = plan.choose(weight, sb.Options(values="int4"))
    assert rounded.format in ("int4", "bitmask")
    assert rounded.chosen.values == "int4"
    assert plan.choose(weight, sb.Options(values="int8")).chosen.values == "int8"


def test_a_format_without_such_groups_is_no_candidate():
    weight = sparse_weight(64, 512, 0.5)
    for group_size, formats in ((64, {"bitmask", "int4"}), (32, {"int4"}), (128, {"bitmask", "sell", "int4"})):
        decision = plan.choose(weight, sb.Options(values="int4", group_size=group_size))
        assert {p.format for p in decision.predictions} == {"dense", *formats}
        assert decision.pack().attributes["group_size"] == group_size


def test_blocks_and_ternary_weights_are_found():
    assert plan.choose(blocks_of_zeros(256, 1024, 0.7), sb.Options()).format == "block"
    ternary = torch.randint(-1, 2, (256, 1024)).bfloat16() * 0.02
    assert plan.choose(ternary, sb.Options()).format == "ternary"
    assert plan.choose(ternary, sb.Options(activations="int8")).format == "ternary"


def test_a_profile_comes_back_as_it_was_saved(tmp_path):
    profile = Profile.load(ROOT / "tests" / "profile.json")
    calibrate.save(profile, tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == profile
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize("change", [
    lambda d: d.update(version=99), lambda d: d.pop("kernels"), lambda d: d.update(bandwidth=0),
    lambda d: d["kernels"].pop("dense/bf16"), lambda d: d.update(batches=[1]), lambda d: d.update(more=1),
    lambda d: d["kernels"]["bitmask/bf16"]["densities"].reverse(),
    lambda d: d["kernels"]["bitmask/bf16"]["compute"].pop(),
])  # fmt: skip
def test_a_file_that_is_no_profile_is_named(tmp_path, change):
    data = json.loads((ROOT / "tests" / "profile.json").read_text())
    change(data)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data))
    with pytest.raises(sb.OptionError, match=r"p\.json: is no machine profile .*sparse-backend calibrate"):
        Profile.load(path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(sb.OptionError, match="is no machine profile"):
        Profile.load(path)


def test_a_weight_whose_rows_differ_goes_to_the_next_format():
    weight = torch.randn(1024, 512)
    weight *= torch.where(torch.arange(1024) % 16 == 0, 1.0, 2.0 ** torch.linspace(-60, 60, 1024))[:, None]
    weight = weight.bfloat16()  # every 16th row, which are those that are looked at, has few exponents
    assert plan.choose(weight, sb.Options()).format == "bf16x12"
    packed, _ = plan.pack(weight, sb.Options())
    assert packed is None or torch.equal(packed.unpack(), weight)
    assert packed is None or packed.format != "bf16x12"
    with pytest.raises(sb.WeightError, match="rare exponents"):
        plan.pack(weight, sb.Options(format="bf16x12"))


def test_a_plan_for_a_named_format_says_what_it_would_do():
    weight = sparse_weight(64, 512, 0.5)
    for name in ("block", "int4", "int8", "bf16x12", "bitmask", "sell", "dense"):
        decision = plan.choose(weight, sb.Options(format=name), Profile.load(ROOT / "tests" / "profile.json"), True)
        assert decision.format == name
        assert name in {p.format for p in decision.predictions}
    with pytest.raises(sb.WeightError, match="format nm cannot hold"):
        plan.choose(weight, sb.Options(format="nm"), Profile.load(ROOT / "tests" / "profile.json"), True)


def test_the_command_shows_choice_prediction_and_runner_up(python_lm, python_lm_50, tmp_path):
    out = tmp_path / "plan.json"
    result = CliRunner().invoke(app, ["plan", str(python_lm_50), "--batch", "8", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "42 projections, 8 token(s) a step" in result.output
    assert "a made-up machine" in result.output
    data = json.loads(out.read_text())
    assert data["batch"] == 8
    for p in data["projections"]:
        seconds = [q["seconds"] for q in p["predictions"]]
        assert seconds == sorted(seconds)
        assert {"dense", "bitmask"} <= {q["format"] for q in p["predictions"]}
    result = CliRunner().invoke(app, ["plan", str(python_lm), "--format", "int4"])
    assert result.exit_code == 0, result.output
    assert result.output.count("int4") >= 42
    for arguments, message in (
        (["plan", str(python_lm), "--format", "nm"], "cannot hold this weight"),
        (["plan", str(tmp_path / "none")], "no such folder"),
        (["plan", str(python_lm), "--profile", str(out)], "is no machine profile"),
        (["plan", str(python_lm), "--json", str(tmp_path)], "is a folder"),
        (["calibrate", "--out", str(tmp_path)], "is a folder"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, message in result.output) == (2, True), result.output


def test_a_float32_checkpoint_is_planned_dense(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: sparse_weight(64, 128, 0.5, torch.float32)}, tmp_path / "model.safetensors")
    (planned,) = planning.plan_weights(tmp_path, sb.Options(), machine(bitmask__bf16=1e-12))
    assert planned.chosen.format == "dense"
    assert "float32" in planned.reason


def test_bits_of_a_flag_name_the_kernels(tmp_path):
    weight = torch.randint(-1, 2, (64, 128)).bfloat16()
    profile = machine(ternary__2=1e-15)
    assert plan.choose(weight, sb.Options(bits=2.0), profile).format == "ternary"


def test_planning_holds_no_weights(python_lm):
    planned = planning.plan_weights(python_lm, sb.Options(), Profile.load(ROOT / "tests" / "profile.json"))
    assert len(planned) == 42
    assert all(q.pack is None for p in planned for q in p.predictions)
    assert all(p.chosen.format == "bf16x12" and p.runner_up is not None for p in planned)


def a_gpu() -> GpuProfile:
    """An H200, as torch describes it."""
    return GpuProfile.of(types.SimpleNamespace(
        name="NVIDIA H200", multi_processor_count=132, clock_rate=1980000, memory_clock_rate=3201000,
        memory_bus_width=6144, major=9))  # fmt: skip


def test_a_gpu_is_planned_for_by_what_its_kernels_read_and_issue():
    card, shape = a_gpu(), (17408, 5120)
    assert card.bandwidth == pytest.approx(4.9e12, rel=0.01)
    assert card.rate / card.bandwidth == pytest.approx(6.8, rel=0.05)  # lane instructions per byte
    dense = card.seconds("dense", "bf16", shape, 1.0, 1)
    assert dense == pytest.approx(2 * 17408 * 5120 / card.bandwidth + card.overhead)
    assert card.seconds("dense", "bf16", shape, 1.0, 4096) > 10 * dense
    assert card.seconds("bf16x12", "bf16x12", shape, 1.0, 1) is None
    for batch in (1, 2, 3, 16, 17, 64, 200):  # a larger batch never takes less time than a smaller one
        times = [card.seconds("sell", "bf16", shape, 0.1, b) for b in (batch, batch + 1)]
        assert times == sorted(times)
    # Longer prompts are decompressed: never faster than dense, and next to as fast when they are long.
    for name in gpu_cost.KERNELS:
        over = [card.seconds(*name.split("/"), shape, 0.3, b) / card.seconds("dense", "bf16", shape, 1, b)
                for b in (65, 4096)]  # fmt: skip
        assert over[0] >= over[1] >= 1
        assert over[1] < 1.2
    formats = {name.partition("/")[0] for name in gpu_cost.KERNELS}
    assert formats == {row.format for row in registry.rows("cuda")}


def test_a_gpu_gets_formats_that_have_kernels_there():
    dense = torch.randn(64, 512).bfloat16()
    assert plan.choose(dense, sb.Options(), a_gpu()).format == "dense"
    large = sparse_weight(1024, 4096, 0.9)
    assert plan.choose(large, sb.Options(), a_gpu()).format in ("sell", "bitmask")
    pattern = prune.magnitude(torch.randn(1024, 4096).bfloat16(), 0.5, "8:16")
    assert plan.choose(pattern, sb.Options(), a_gpu()).format == "nm"
    assert plan.choose(pattern, sb.Options(batch=256), a_gpu()).format == "dense"  # where it would be decompressed
    ternary = torch.randint(-1, 2, (256, 1024)).bfloat16() * 0.02
    assert plan.choose(ternary, sb.Options(), a_gpu()).format == "ternary"


def test_this_machine_is_measured_once_and_the_file_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("SPARSE_BACKEND_PROFILE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "_profiles", {})
    state = torch.random.get_rng_state()
    result = CliRunner().invoke(app, ["calibrate", "--out", str(tmp_path / "shipped.json")])
    assert result.exit_code == 0, result.output
    assert torch.equal(torch.random.get_rng_state(), state)  # an engine samples the same whether it measured or not
    first = Profile.load(tmp_path / "shipped.json")
    assert set(first.kernels) == {f"{f}/{v}" for f, v in cost.KERNELS}
    for name, kernel in first.kernels.items():
        assert all(p > 0 for points in (*kernel.compute, kernel.exponent, *kernel.scale) for p in points), name
    if first.threads == torch.get_num_threads():  # not so on a machine too busy to measure
        for _ in range(2):  # from this process's memory, then from the file
            assert calibrate.current_profile(lambda *a: pytest.fail("measured twice")) == first
            calibrate._profiles.clear()
        assert Profile.load(calibrate.cache_file()) == first
    monkeypatch.setenv("SPARSE_BACKEND_PROFILE", str(ROOT / "tests" / "profile.json"))
    assert calibrate.current_profile().fingerprint == "tests"
