"""Compiling checkpoints: exact, atomic, and clear about everything that is wrong."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PYTHON_LM, ROOT, sparse_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_backend import CheckpointError, OptionError, Options, WeightError
from sparse_backend.compiler import checkpoint, prune
from sparse_backend.compiler.compile import compile_checkpoint
from sparse_backend.compiler.convert import why_not_projection


def make_model(folder, tensors, config=None):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"architectures": ["Test"]}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def model(tmp_path):
    tensors = {
        "model.embed_tokens.weight": sparse_weight(50, 32, 0.0),
        "model.layers.0.self_attn.q_proj.weight": sparse_weight(32, 32, 0.5, seed=1),
        "model.layers.0.self_attn.q_proj.bias": torch.ones(32).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": sparse_weight(64, 32, 0.0, seed=2),
        "model.layers.0.mlp.down_proj.weight": sparse_weight(32, 64, 0.8, torch.float16, seed=3),
        "model.norm.weight": torch.ones(32).bfloat16(),
    }
    return make_model(tmp_path / "model", tensors)


def fingerprint(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def expanded(folder):
    info = checkpoint.read(folder)
    tensors = {}
    for path in info.files:
        tensors.update(load_file(path))
    return dict(checkpoint.expand(tensors.items(), info.modules))


def test_lossless_by_default(model, tmp_path):
    before = fingerprint(model)
    out = tmp_path / "out"
    report = compile_checkpoint(model, out, Options())
    original, compiled = load_file(model / "model.safetensors"), expanded(out)
    assert original.keys() == compiled.keys()
    for name, tensor in original.items():
        assert torch.equal(compiled[name], tensor), name
    layer = "model.layers.0"
    modules = {name: entry.format for name, entry in checkpoint.read(out).modules.items()}
    assert modules == {
        f"{layer}.mlp.down_proj": "sell", f"{layer}.self_attn.q_proj": "bitmask", f"{layer}.mlp.up_proj": "bf16x12"
    }  # fmt: skip
    assert {name: row[0] for name, row in report.by_format().items()} == {
        "dense": 1, "sell": 1, "bitmask": 1, "bf16x12": 1
    }  # fmt: skip
    assert set(report.dense_reasons()) == {"embedding, head or router"}
    assert fingerprint(model) == before
    assert (out / "tokenizer.json").read_text() == "{}"
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "sparse-compiled"}
    with safe_open(out / "model.safetensors", "pt") as f:
        data = json.loads(f.metadata()["sparse_backend"])
        names = list(f.keys())
    assert data["version"] == 1
    entry = data["modules"]["model.layers.0.mlp.down_proj"]
    assert (entry["format"], entry["shape"], entry["dtype"]) == ("sell", [32, 64], "float16")
    assert "model.layers.0.mlp.down_proj.sell.values" in names


def test_pruning_per_row_rules_and_ignore(model, tmp_path):
    options = Options(sparsity=0.5, ignore=("*.q_proj",), rules=({"match": "*.up_proj", "sparsity": 0.75},))
    compile_checkpoint(model, tmp_path / "out", options)
    tensors = expanded(tmp_path / "out")
    zeros = {n: (t == 0).float().mean(1) for n, t in tensors.items() if t.dim() == 2}
    assert (zeros["model.layers.0.mlp.up_proj.weight"] == 0.75).all()
    assert (zeros["model.layers.0.mlp.down_proj.weight"] >= 0.5).all()
    original = load_file(model / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        assert torch.equal(tensors[name], original[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_magnitude_keeps_the_largest_of_every_row(dtype):
    weight = torch.randn(37, 101).to(dtype)
    weight[3] = 1.0  # ties
    for sparsity in (0.0, 0.3, 0.5, 0.99):
        pruned = prune.magnitude(weight, sparsity)
        drop = round(sparsity * 101)
        assert ((pruned == 0).sum(1) == drop).all()
        kept = pruned != 0
        assert torch.equal(pruned[kept], weight[kept])
        for row in range(37):
            if drop:
                assert weight[row][kept[row]].abs().min() >= weight[row][~kept[row]].abs().max()
        assert torch.equal(prune.magnitude(pruned, sparsity), pruned)


def test_shards_in_and_out(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:3], names[3:]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, model / file)
        weight_map.update(dict.fromkeys(part, file))
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    out = tmp_path / "out"
    seen = []
    compile_checkpoint(model, out, Options(sparsity=0.5), lambda *a: seen.append(a), max_shard_bytes=1500)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].endswith(f"-of-{len(files):05d}.safetensors")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == set(files)
    assert expanded(out).keys() == tensors.keys()
    assert seen[-1][0] <= seen[-1][1]
    (out / files[0]).unlink()
    with pytest.raises(CheckpointError, match="a shard is missing"):
        checkpoint.read(out)


def test_what_is_wrong_with_the_input_is_said(model, tmp_path):
    out = tmp_path / "out"
    cases = []
    cases.append((tmp_path / "nowhere", CheckpointError, "no such folder"))
    empty = tmp_path / "empty"
    empty.mkdir()
    cases.append((empty, CheckpointError, "no config.json"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text("{")
    cases.append((tmp_path / "text", CheckpointError, "cannot be read as JSON"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text("{}")
    cases.append((tmp_path / "bin", CheckpointError, "safe_serialization"))
    gptq = make_model(
        tmp_path / "gptq", {"a.weight": torch.ones(4, 4)}, {"quantization_config": {"quant_method": "gptq"}}
    )
    cases.append((gptq, CheckpointError, r"already quantised \(gptq\)"))
    nothing = make_model(tmp_path / "nothing", {"norm.weight": torch.ones(4), "lm_head.weight": torch.ones(4, 4)})
    cases.append((nothing, CheckpointError, "no linear projection to convert"))
    nan = sparse_weight(64, 64, 0.5)
    nan[3, 4] = float("nan")
    cases.append((make_model(tmp_path / "nan", {"a.up_proj.weight": nan}), WeightError, "a.up_proj: weight has 1 NaN"))
    for folder, error, message in cases:
        with pytest.raises(error, match=message):
            compile_checkpoint(folder, out, Options())
        assert not out.exists()
    with pytest.raises(WeightError, match=r"a.up_proj: .*NaN"):
        compile_checkpoint(tmp_path / "nan", out, Options(sparsity=0.5))
    with pytest.raises(OptionError, match=r"nothing to pack .*leave no projection"):
        compile_checkpoint(model, out, Options(ignore=("*",)))
    out.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        compile_checkpoint(model, out, Options(sparsity=0.5))
    assert not list(tmp_path.glob(".out.incomplete*"))


def test_shards_that_the_others_count_must_be_there(model, tmp_path):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: is not there; a shard is missing"):
        compile_checkpoint(model, tmp_path / "out", Options(sparsity=0.5))
    assert not (tmp_path / "out").exists()
    save_file({"other": torch.ones(1)}, model / "model-00002-of-00002.safetensors")
    assert "other" in checkpoint.read(model).tensors


def test_only_the_files_of_the_index_count(model, tmp_path):
    save_file(load_file(model / "model.safetensors"), model / "consolidated.safetensors")
    save_file({"x.lora_A.weight": torch.ones(2, 2)}, model / "adapter_model.safetensors")
    assert [p.name for p in checkpoint.read(model).files] == ["model.safetensors"]
    save_file({"model.norm.weight": torch.ones(32)}, model / "stale.safetensors")
    with pytest.raises(CheckpointError, match="another shard holds too"):
        checkpoint.read(model)
    (model / "stale.safetensors").unlink()
    for text in ("{", '{"weight_map": null}', "5", '{"weight_map": {"a": 3}}'):
        (model / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="cannot be read as an index"):
            checkpoint.read(model)


def test_weights_of_other_dtypes_are_left_as_they_are(tmp_path):
    tensors = {
        "a.up_proj.weight": sparse_weight(64, 64, 0.5),
        "a.q_proj.weight": torch.randint(-8, 8, (64, 64), dtype=torch.int8),
        "a.k_proj.weight": torch.randn(64, 64).to(torch.float8_e4m3fn),
        "a.v_proj.weight": torch.ones(64, 8, dtype=torch.uint32),
    }
    folder = make_model(tmp_path / "mixed", tensors)
    report = compile_checkpoint(folder, tmp_path / "out", Options(sparsity=0.5))
    assert report.packed_count == 1
    assert "int8 weights are left as they are" in report.dense_reasons()
    compiled = expanded(tmp_path / "out")
    for name in ("a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight"):
        assert torch.equal(compiled[name].view(torch.uint8), tensors[name].view(torch.uint8))


def damage(folder, change):
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    data = bytearray(path.read_bytes())
    changed = change(data)
    path.write_bytes(data if changed is None else changed)
    return path


def read_whole(folder):
    expanded(folder)


def test_truncated_files_are_refused(model, tmp_path):
    out = tmp_path / "out"
    compile_checkpoint(model, out, Options(sparsity=0.5))
    whole = (out / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (out / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model.safetensors: truncated"):
            read_whole(out)


def test_every_flipped_header_byte_is_noticed(model, tmp_path):
    out = tmp_path / "out"
    compile_checkpoint(model, out, Options(sparsity=0.5))
    path = out / "model.safetensors"
    whole = path.read_bytes()
    original = expanded(out)
    header = int.from_bytes(whole[:8], "little") + 8
    unnoticed, unnamed = [], 0
    for at in range(0, header, 7):
        data = bytearray(whole)
        data[at] ^= 1 << (at % 7)
        path.write_bytes(data)
        try:
            result = expanded(out)
        except CheckpointError as refusal:
            unnamed += "model.safetensors" not in str(refusal)
            continue
        # Harmless only where nothing changed: padding, or a key nobody reads.
        same = result.keys() == original.keys() and all(torch.equal(result[n], original[n]) for n in original)
        if not same:
            unnoticed.append((at, whole[max(0, at - 20) : at + 20]))
    assert not unnoticed
    assert not unnamed


def test_a_flipped_byte_in_packed_data_is_noticed(model, tmp_path):
    out = tmp_path / "out"
    compile_checkpoint(model, out, Options(sparsity=0.5))
    with safe_open(out / "model.safetensors", "pt") as f:
        values = f.get_tensor("model.layers.0.mlp.up_proj.bitmask.values")
    raw = values.view(torch.uint8).numpy().tobytes()

    def flip(data):
        data[data.find(raw) + 5] ^= 0x10

    damage(out, flip)
    with pytest.raises(CheckpointError, match=r"module model.layers.0.mlp.up_proj is damaged"):
        read_whole(out)


def test_another_format_version_is_refused(model, tmp_path):
    out = tmp_path / "out"
    compile_checkpoint(model, out, Options(sparsity=0.5))
    tensors = load_file(out / "model.safetensors")
    with safe_open(out / "model.safetensors", "pt") as f:
        metadata = f.metadata()
    data = json.loads(metadata["sparse_backend"])
    save_file(tensors, out / "model.safetensors", {**metadata, "sparse_backend": json.dumps({**data, "version": 2})})
    with pytest.raises(CheckpointError, match="format version 2, this sparse_backend reads 1"):
        checkpoint.read(out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="no sparse_backend metadata"):
        checkpoint.read(out)


COMPILE = (
    "import sys; from sparse_backend.cli import main; sys.argv = ['sparse-backend', 'compile', *sys.argv[1:]]; main()"
)


def test_a_full_disk_leaves_nothing(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # writes past 1 MiB fail
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(PYTHON_LM), str(tmp_path / "out"), "--sparsity", "0.5"],
        capture_output=True, text=True, preexec_fn=limit, check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_killed_half_way_leaves_no_half_checkpoint(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILE, str(PYTHON_LM), str(tmp_path / "out"), "--sparsity", "0.5"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while process.poll() is None and not (tmp_path / ".out.incomplete").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists() or checkpoint.read(tmp_path / "out")


def test_what_counts_as_a_projection():
    for name in (
        "model.layers.3.self_attn.q_proj",
        "encoder.layer.0.attention.self.query",
        "h.1.mlp.gate_proj",
        "encoder.layer.0.output.dense",
    ):
        assert why_not_projection(name) is None, name
    for name in ("model.embed_tokens", "lm_head", "transformer.wte", "embeddings.word_embeddings", "layers.0.mlp.gate",
                 "embeddings.position_embeddings", "model.layers.1.mlp.experts.3.up_proj", "pooler.dense",
                 "output", "transformer.output_layer", "model.visual.pos_embed"):  # fmt: skip
        assert why_not_projection(name) is not None, name


def test_the_repository_is_light():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    sizes = {n: (ROOT / n).stat().st_size for n in tracked.decode().split("\0") if n and (ROOT / n).exists()}
    assert max(sizes.values()) < 12e6
