"""Hugging Face's bitnet packing to ours and back, and what either refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import sparse_backend as sb
from sparse_backend import Options
from sparse_backend.compiler import bitnet
from sparse_backend.compiler.compile import compile_checkpoint
from sparse_backend.errors import CheckpointError, OptionError, WeightError

sys.path.insert(0, str(Path(__file__).parents[1] / "engines"))
import bitnet_models

TERNARY = ROOT / "models" / "python-lm-ternary"
LAYER = "model.layers.2.mlp.up_proj"


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def quantization_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_the_packing_is_transformers():
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    codes = torch.randint(-1, 2, (24, 10), dtype=torch.int8)
    packed = bitnet.pack_codes("m", codes)
    assert torch.equal(packed, pack_weights(codes.clone()))
    assert torch.equal(bitnet.unpack_codes("m", packed), codes)
    with torch._dynamo.config.patch(disable=True):
        assert torch.equal(unpack_weights(packed, torch.int8), codes)
    with pytest.raises(WeightError, match="multiples of 4"):
        bitnet.pack_codes("m", codes[:6])


@pytest.mark.parametrize("bits", [None, 1.6])
@pytest.mark.parametrize("form", ["autobitlinear", "bitlinear"])
def test_there_and_back_is_the_same_checkpoint(tmp_path, form, bits):
    source = bitnet_models.save(tmp_path, form)
    compile_checkpoint(source, tmp_path / "ours", Options(bits=bits))
    compile_checkpoint(tmp_path / "ours", tmp_path / "theirs", Options(), layout="bitnet")
    assert quantization_of(tmp_path / "ours")["activations"] == "int8"
    assert quantization_of(tmp_path / "theirs")["linear_class"] == form
    before, after = tensors_of(source), tensors_of(tmp_path / "theirs")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_exact_scales_survive_where_bf16_would_round_them(tmp_path):
    source = bitnet_models.save(tmp_path, "bitlinear")
    compile_checkpoint(source, tmp_path / "ours", Options())
    scale = tensors_of(tmp_path / "ours")[f"{LAYER}.ternary.scales"]
    assert scale.dtype == torch.float32
    assert float(scale) == pytest.approx(1 / float(tensors_of(source)[f"{LAYER}.weight_scale"]), rel=1e-7)


def test_masters_are_rounded_and_counted_as_the_checkpoints_own(tmp_path):
    source = bitnet_models.save(tmp_path, "online")
    report = compile_checkpoint(source, tmp_path / "ours", Options())
    assert report.packed_count == 42
    assert not report.changed
    codes = sb.pack(bitnet.absmean(tensors_of(source)[f"{LAYER}.weight"]), "ternary").tensors["codes"]
    assert torch.equal(tensors_of(tmp_path / "ours")[f"{LAYER}.ternary.codes"], codes)


def test_forcing_a_dense_model_counts_what_it_rounds(tmp_path):
    report = compile_checkpoint(ROOT / "models" / "python-lm", tmp_path / "out", Options(format="ternary"))
    assert report.changed == {"rounded": 42}


def test_biases_are_scaled_as_transformers_scales_them(tmp_path):
    source = bitnet_models.save(tmp_path, "autobitlinear with biases")
    compile_checkpoint(source, tmp_path / "ours", Options())
    name = "model.layers.0.self_attn.q_proj"
    before = tensors_of(source)
    expected = before[f"{name}.bias"].float() * before[f"{name}.weight_scale"].float()
    assert torch.equal(tensors_of(tmp_path / "ours")[f"{name}.bias"], expected.bfloat16())
    compile_checkpoint(source, tmp_path / "theirs", Options(), layout="bitnet")
    assert quantization_of(tmp_path / "theirs")["linear_class"] == "bitlinear"  # adds its bias afterwards


def test_modules_to_not_convert_match_as_in_transformers():
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj", "model.layers.1.self_attn.o_proj"]
    for pattern in ("lm_head", "up_proj", "model.layers.1", r"model\.layers\.\d+\.mlp", "layers.1", "proj"):
        config = {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": [pattern]}}
        source = bitnet.BitNet.of(config, [])
        for name in names:
            assert source._skipped(name) != should_convert_module(name, [pattern]), (pattern, name)


@pytest.mark.parametrize(
    ("options", "source", "error", "message"),
    [
        (Options(format="ternary", group_size=64, activations="int8"), "python-lm", WeightError, "with one scale"),
        (Options(format="bitmask", activations="int8"), "python-lm", WeightError, "is bitmask"),
        (Options(format="ternary"), "python-lm", OptionError, "means int8 activations"),
        (Options(lm_head="int8"), "python-lm-ternary", OptionError, "'lm_head' cannot be stored"),
        (Options(bits=1.6), "python-lm-ternary", OptionError, "'bits' cannot be stored"),
    ],
)
def test_what_the_layout_cannot_say_is_refused(tmp_path, options, source, error, message):
    with pytest.raises(error, match=message):
        compile_checkpoint(ROOT / "models" / source, tmp_path / "out", options, layout="bitnet")
    assert not list(tmp_path.iterdir())


def damaged(folder, change):
    bitnet_models.rewrite(folder, change)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != f"{LAYER}.weight_scale"}, "has no .*up_proj.weight_scale"),
        (lambda t: {n: v for n, v in t.items() if n != f"{LAYER}.weight"}, "has only its weight_scale"),
        (lambda t: {**t, f"{LAYER}.weight": t[f"{LAYER}.weight"] | 0b1100}, "hold a two-bit code 3"),
        (lambda t: {**t, f"{LAYER}.weight_scale": torch.tensor([float("nan")])}, "one positive number"),
        (lambda t: {**t, f"{LAYER}.weight_scale": torch.ones(2)}, "one positive number"),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path, change, message):
    source = damaged(tmp_path / "source", change)
    with pytest.raises(CheckpointError, match=message):
        compile_checkpoint(source, tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


def test_norms_of_layers_are_refused_with_what_to_do(tmp_path):
    source = bitnet_models.save(tmp_path, "autobitlinear with norms")
    with pytest.raises(CheckpointError, match="serve it as it is"):
        compile_checkpoint(source, tmp_path / "out", Options())


def test_codes_that_do_not_exist_in_a_compiled_checkpoint_are_named(tmp_path):
    for bits, byte, message in ((2, 0xFF, "3 in two bits"), (1.6, 250, "243 to 255")):
        folder = tmp_path / str(bits)
        compile_checkpoint(TERNARY, folder, Options(bits=bits))
        path = folder / "model.safetensors"
        tensors = load_file(path)
        name = f"{LAYER}.ternary.codes"
        tensors[name][1, 1] = byte
        # A checksum that fits: codes are looked at even where nothing was damaged on the way.
        from safetensors import safe_open

        from sparse_backend.compiler import checkpoint, inspection

        with safe_open(path, framework="pt") as shard:
            metadata = json.loads(shard.metadata()["sparse_backend"])
        metadata["modules"][LAYER]["crc32"]["codes"] = checkpoint.checksum(tensors[name])
        info = checkpoint.read(folder)
        metadata["crc32"] = checkpoint.header_checksum(info.tensors, metadata["modules"])
        save_file(tensors, path, metadata={"format": "pt", "sparse_backend": json.dumps(metadata)})
        with pytest.raises(CheckpointError, match=f"{LAYER} is damaged.*{message}"):
            inspection.inspect(folder, verify=True)
