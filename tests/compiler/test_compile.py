"""`compile` as a whole: recipes, dry runs, interruptions, verification, the model card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import PYTHON_LM, ROOT, sparse_weight
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sparse_backend import CheckpointError, OptionError, Options, WeightError
from sparse_backend.cli import app
from sparse_backend.compiler import calibrate, checkpoint, inspection, recipe, writer
from sparse_backend.compiler.compile import compile_checkpoint, plan_checkpoint
from sparse_backend.compiler.cost import Profile
from sparse_backend.compiler.source import Source, why_unknown
from sparse_backend.compiler.verify import verify_checkpoint

TERNARY = ROOT / "models" / "python-lm-ternary"
SHARD = 3000
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def save_model(folder, layers=4, config=CONFIG):
    """Two source shards; each layer gives an output shard of its own."""
    folder.mkdir(parents=True)
    tensors = {"model.embed_tokens.weight": sparse_weight(50, 32, 0.0), "model.norm.weight": torch.ones(32).bfloat16()}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.self_attn.q_proj.weight"] = sparse_weight(32, 32, 0.5, seed=i)
        tensors[f"{prefix}.self_attn.q_proj.bias"] = torch.ones(32).bfloat16()
        tensors[f"{prefix}.mlp.down_proj.weight"] = sparse_weight(32, 64, 0.8, seed=10 + i)
        tensors[f"{prefix}.mlp.up_proj.weight"] = sparse_weight(64, 32, 0.0, seed=20 + i)
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[:5], names[5:]), 1):
        save_file({n: tensors[n] for n in part}, folder / f"model-{i}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, f"model-{i}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


def fingerprint(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def compiled(source, out, options=Options(), **kwargs):  # noqa: B008 - frozen
    """Compile, and take the result away again: its fingerprint and report."""
    report = compile_checkpoint(source, out, options, max_shard_bytes=SHARD, **kwargs)
    result = fingerprint(out)
    shutil.rmtree(out)
    return result, report


def interrupt(source, out, options=Options(), after=8):  # noqa: B008
    """A run that ends after so many tensors as Ctrl-C ends it."""

    def progress(done, total, what):
        nonlocal after
        after -= 1
        if after < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_checkpoint(source, out, options, progress, max_shard_bytes=SHARD)
    assert not out.exists()


# One process that forks: each child is killed before its n-th rename or wait for the disk.
KILLER = """
import os, signal, sys
from pathlib import Path
import torch
from sparse_backend import Options
from sparse_backend.compiler import compile, writer
source, out, shard, point, step = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
torch.set_num_threads(1)

def child(point):
    rename, fsync, left = os.rename, os.fsync, [point]
    def step(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    os.rename, os.fsync = step(rename), step(fsync)
    options = Options(sparsity=0.5)
    compile.compile_checkpoint(source, out, options, max_shard_bytes=shard, verify=True, say=print, command="c")

for _ in range(200):
    print("killed at", point, flush=True)
    pid = os.fork()
    if pid == 0:
        child(point)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if out.exists():
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    point += step
else:
    sys.exit("never finished")
"""


# With step 0 every run gets a little further than the one before it; else each takes up what the last one left.
@pytest.mark.parametrize(("first", "step"), [(0, 1), (24, 0)])
def test_killed_anywhere_a_rerun_gives_the_same_bytes(model, tmp_path, first, step):
    out = tmp_path / "out"
    expected, _ = compiled(model, out, Options(sparsity=0.5), command="c")
    command = [sys.executable, "-c", KILLER, *map(str, (model, out, SHARD, first, step))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("killed at") > 1
    assert "taking up an interrupted run" in result.stdout
    assert fingerprint(out) == expected
    assert checkpoint.read(out).modules
    # What was killed between the last rename and the tidying up is tidied by whoever comes next.
    with pytest.raises(CheckpointError, match="exists already"):
        compile_checkpoint(model, out, Options(sparsity=0.5))


def test_an_interrupted_run_is_taken_up_not_done_again(model, tmp_path):
    out, said, seen = tmp_path / "out", [], []
    expected, whole = compiled(model, out)
    interrupt(model, out, after=10)
    kept = sorted(p.name for p in (tmp_path / ".out.incomplete").glob("shard-*"))
    assert kept
    result, report = compiled(model, out, progress=lambda *a: seen.append(a), say=said.append)
    assert result == expected
    assert report == whole
    assert len(seen) < 18
    assert [s for s in said if "taking up an interrupted run" in s] == said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("layout", ["sparse-compiled", "bitnet"])
def test_bitnet_and_compiled_sources_are_taken_up(tmp_path, layout):
    out, options = tmp_path / "out", Options()
    source = TERNARY
    if layout == "bitnet":
        source = tmp_path / "compiled"
        compile_checkpoint(TERNARY, source, options)
    size = 300_000
    runs = {"layout": layout, "max_shard_bytes": size}
    compile_checkpoint(source, out, options, verify=True, **runs)
    expected = fingerprint(out)
    shutil.rmtree(out)
    calls = 0

    def progress(done, total, what):
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_checkpoint(source, out, options, progress, **runs)
    said = []
    compile_checkpoint(source, out, options, say=said.append, **runs)
    assert "taking up" in said[0]
    assert fingerprint(out) == expected


def test_other_options_or_another_source_start_over(model, tmp_path):
    out = tmp_path / "out"
    for change, word in (
        (lambda: Options(sparsity=0.75), "options differ"),
        (lambda: (model / "config.json").write_text(json.dumps({**CONFIG, "x": 1})) and Options(), "source differ"),
    ):
        interrupt(model, out)
        said, options = [], change()
        result, _ = compiled(model, out, options, say=said.append)
        assert len(said) == 1
        assert word in said[0]
        assert "starting over" in said[0]
        assert result == compiled(model, out, options)[0]


def test_damaged_work_is_not_used(model, tmp_path):
    out, work = tmp_path / "out", tmp_path / ".out.incomplete"
    expected, _ = compiled(model, out)

    def flip(path):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    for damage, message in (
        (lambda: (work / "manifest.json").write_text('{"key": 1'), "manifest of an interrupted run is damaged"),
        (lambda: (work / "manifest.json").write_text('{"key": 1, "shards": [{}]}'), "manifest .* is damaged"),
        (lambda: flip(work / "shard-1.safetensors"), "shard 1 of an interrupted run is damaged"),
        (lambda: flip(work / "shard-2.safetensors"), "shard 2 of an interrupted run is damaged"),
        (lambda: (work / "shard-2.safetensors").unlink(), "shard 2 of an interrupted run is damaged"),
    ):
        interrupt(model, out, after=16)
        damage()
        said = []
        assert compiled(model, out, say=said.append)[0] == expected
        assert any(re.search(message, text) for text in said), said


def test_two_runs_do_not_mix(model, tmp_path):
    out, refused = tmp_path / "out", []

    def progress(done, total, what):
        if not refused:
            with pytest.raises(CheckpointError, match="another run is writing it now") as error:
                compile_checkpoint(model, out, Options(), max_shard_bytes=SHARD)
            refused.append(error)

    compile_checkpoint(model, out, Options(), progress, max_shard_bytes=SHARD)
    assert refused
    assert verify_checkpoint(model, out) == 18


def test_a_full_disk_keeps_whole_shards_and_says_how_much_is_missing(model, tmp_path):
    out = tmp_path / "out"
    expected, _ = compiled(model, out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def progress(done, total, what):
        if (tmp_path / ".out.incomplete" / "shard-2.safetensors").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # Python ignores the signal: writes fail

    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: .* more are needed, .* are free") as error:
            compile_checkpoint(model, out, Options(), progress, max_shard_bytes=SHARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the same command goes on from them" in str(error.value)
    assert not out.exists()
    assert not (tmp_path / ".out.incomplete" / "shard.new").exists()
    said = []
    assert compiled(model, out, say=said.append)[0] == expected
    assert "taking up" in said[0]


def test_what_is_wrong_with_the_input_leaves_nothing(model, tmp_path):
    tensors = load_file(model / "model-2.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, model / "model-2.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"layers.3.mlp.up_proj"):
        compile_checkpoint(model, tmp_path / "out", Options(format="bitmask"), max_shard_bytes=SHARD)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    (model / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a shard is missing"):
        compile_checkpoint(model, tmp_path / "out", Options())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(sparsity=0.5, ignore=("*.q_proj",)),
        Options(sparsity=0.3, rules=({"match": "*.up_proj", "format": "dense"},)),
        Options(values="int8", format="bitmask"),
        Options(values="int4", sparsity=0.5),
        Options(values="fp16"),
        Options(values="bf16x12"),
        Options(format="ternary", group_size=32),
        Options(format="int8"),
    ],
    ids=lambda o: json.dumps(o.to_dict()),
)
def test_verify_accepts_what_compile_makes(model, tmp_path, options):
    compile_checkpoint(model, tmp_path / "out", options, verify=True, max_shard_bytes=SHARD)
    assert verify_checkpoint(model, tmp_path / "out") == 18


def rewrite(folder, change):
    """Other tensors, under a header and checksums that fit them."""
    path = folder / "model.safetensors"
    info = checkpoint.read(folder)
    tensors = change(load_file(path))
    entries = {name: entry.to_json() for name, entry in info.modules.items()}
    for name, entry in entries.items():
        keys = entry["crc32"]
        entry["crc32"] = {k: checkpoint.checksum(tensors[f"{name}.{entry['format']}.{k}"]) for k in keys}
    header = {n: info.tensors.get(n, ("F32", [1])) for n in tensors}
    data = {"version": 1, "modules": entries, "crc32": checkpoint.header_checksum(header, entries)}
    save_file(tensors, path, metadata={"format": "pt", "sparse_backend": json.dumps(data)})


def test_verify_names_what_differs(model, tmp_path):
    out, module = tmp_path / "out", "model.layers.1.mlp.down_proj"

    def value(tensors):
        name = next(n for n in tensors if n.startswith(module) and n.endswith("values"))
        tensors[name][7] += 1
        return tensors

    def mask(tensors):
        name = next(n for n in tensors if n.startswith(module) and n.endswith("mask"))
        tensors[name][[0, 1]] = tensors[name][[1, 0]]
        return tensors

    def norm(tensors):
        tensors["model.norm.weight"][0] = 2
        return tensors

    cases = [
        (value, f"module {module} is not what its source becomes"),
        (mask, f"module {module} is"),
        (norm, "module model.norm is not what its source becomes"),
        (lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"}, "lacks model.norm.weight"),
        (lambda t: {**t, "model.other": torch.ones(1)}, "holds model.other, which"),
    ]
    compile_checkpoint(model, tmp_path / "good", Options(sparsity=0.5))
    for change, message in cases:
        shutil.copytree(tmp_path / "good", out)
        rewrite(out, change)
        with pytest.raises(CheckpointError, match=message):
            verify_checkpoint(model, out)
        shutil.rmtree(out)
    # Compiled with other options than its config.json says.
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    config["quantization_config"]["sparsity"] = 0.6
    (tmp_path / "good" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.\w+_proj is not what its source becomes"):
        verify_checkpoint(model, tmp_path / "good")


def test_what_fails_verification_never_appears(model, tmp_path):
    flipped = []

    def progress(done, total, what):
        if what.startswith("verifying") and not flipped:  # the disk loses a bit of what was written
            flipped.append(what)
            path = sorted((tmp_path / ".out.incomplete" / "model").glob("*.safetensors"))[-1]
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    with pytest.raises(CheckpointError, match=r"module model\.\S+ is (not what|damaged)"):
        compile_checkpoint(model, tmp_path / "out", Options(), progress, max_shard_bytes=SHARD, verify=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_dry_run_plans_the_same_and_writes_nothing(model, tmp_path):
    planned = plan_checkpoint(model, Options(sparsity=0.5))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    _, report = compiled(model, tmp_path / "out", Options(sparsity=0.5))
    assert planned == report
    assert planned.total_bytes > planned.packed_bytes > 0
    with pytest.raises(OptionError, match="nothing to pack"):
        plan_checkpoint(model, Options(ignore=("*",)))


def cli(*args):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def test_flags_win_over_the_recipe(model, tmp_path):
    (tmp_path / "r.yaml").write_text("# half\nsparsity: 0.5\nrules:\n  - {match: '*.up_proj', sparsity: 0.25}\n")
    (tmp_path / "r.json").write_text('{"sparsity": 0.5, "ignore": ["*.q_proj"], "quant_method": "sparse-compiled"}')
    dry = cli("compile", model, tmp_path / "o", "--recipe", tmp_path / "r.yaml", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "(not written)" in dry.output.replace("\n", "")
    assert not (tmp_path / "o").exists()
    for name, flags, expected in (
        ("yaml", (), {"sparsity": 0.5, "rules": [{"match": "*.up_proj", "sparsity": 0.25}]}),
        ("yaml", ("--sparsity", 0.75, "--format", "bitmask"), {
            "sparsity": 0.75, "format": "bitmask", "rules": [{"match": "*.up_proj", "sparsity": 0.25}]
        }),
        ("json", ("--ignore", "*.up_proj", "--verify"), {"sparsity": 0.5, "ignore": ["*.up_proj"]}),
    ):  # fmt: skip
        result = cli("compile", model, tmp_path / "o", "--recipe", tmp_path / f"r.{name}", *flags)
        assert result.exit_code == 0, result.output
        assert ("verified" in result.output) == ("--verify" in flags)
        config = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
        assert config == {"quant_method": "sparse-compiled", **expected}
        shutil.rmtree(tmp_path / "o")
    assert "Flags given here win" in " ".join(cli("compile", "--help").output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsty: 0.5", r"r.yaml: unknown option 'sparsty'; did you mean 'sparsity'\?"),
        ('{"formt": "auto"}', r"r.yaml: unknown option 'formt'; did you mean 'format'\?"),
        ("sparsity: 1.5", "r.yaml: option 'sparsity' = 1.5 is out of range"),
        ("rules: [{match: a, formt: dense}]", "r.yaml: unknown option 'rules: formt'"),
        ("[1, 2]", "r.yaml: must be one mapping"),
        ("sparsity: [", "r.yaml: is neither JSON nor YAML"),
        ('{"sparsity": 0.5', "r.yaml: is neither JSON nor YAML"),
        (None, "r.yaml: cannot be read"),
    ],
)
def test_bad_recipes_are_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(OptionError, match=message):
        recipe.read(tmp_path / "r.yaml")


def front_matter(folder):
    _, matter, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter), body


def test_the_model_card(model, tmp_path):
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\ntags: [x]\n---\n# Mother\n")
    out = tmp_path / "half a llama"
    options = Options(sparsity=0.5, format="bitmask")
    compile_checkpoint(model, out, options, command="sparse-backend compile m 'half a llama'")
    matter, body = front_matter(out)
    assert set(matter.pop("tags")) == {"sparse-compiled", "bitmask", "pruned"}
    assert matter == {"license": "apache-2.0", "language": ["en"], "library_name": "sparse_backend"}
    assert (out / "README.source.md").read_text().endswith("# Mother\n")
    for text in (
        "# half a llama", "(README.source.md)", "Made from `model`", "12 projections were pruned",
        "method magnitude, pattern unstructured, sparsity 0.5", "| bitmask | 12 |", "| dense | 1 |",
        "sparse-backend compile m 'half a llama'", '"sparsity": 0.5', "vllm serve", "sglang.launch_server",
        "import sparse_backend.engines.transformers", "by sparse_backend 0.",
    ):  # fmt: skip
        assert text in body, text
    config = {**CONFIG, "_name_or_path": "meta-llama/Llama-3.2-1B"}
    compile_checkpoint(save_model(tmp_path / "m2", config=config), tmp_path / "plain", Options())
    matter, body = front_matter(tmp_path / "plain")
    assert matter["base_model"] == "meta-llama/Llama-3.2-1B"
    assert "license" not in matter
    assert "No weight was changed" in body
    assert not (tmp_path / "plain" / "README.source.md").exists()
    cached = tmp_path / "models--org--na-me" / "snapshots" / "1"
    compile_checkpoint(save_model(cached), tmp_path / "third", Options())
    assert front_matter(tmp_path / "third")[0]["base_model"] == "org/na-me"


def test_unknown_architectures_are_converted_with_a_warning(tmp_path):
    for number, config in enumerate(({}, {"model_type": "florble"}, {"architectures": ["X"], "model_type": "florble"})):
        said, source = [], save_model(tmp_path / f"m{number}", config=config)
        report = compile_checkpoint(source, tmp_path / f"o{number}", Options(format="bitmask"), say=said.append)
        assert len(said) == 1
        assert "unknown architecture" in said[0]
        assert report.packed_count == 12
    for config in (CONFIG, {"model_type": "qwen3_5_text"}, {"architectures": ["X"]},
                   {"model_type": "florble", "auto_map": {"AutoConfig": "x.Y"}}):  # fmt: skip
        assert why_unknown(config) is None
    assert why_unknown(json.loads((PYTHON_LM / "config.json").read_text())) is None


def test_inspect_tells_density_and_kinds(model, tmp_path):
    options = Options(format="bitmask", ignore=("*.up_proj",), rules=({"match": "*.down_proj", "format": "sell"},))
    compile_checkpoint(model, tmp_path / "out", options)
    info = inspection.inspect(tmp_path / "out", verify=True).to_json()
    density = [row["density"] for row in info["modules"] if "down_proj" in row["name"]]
    assert density == pytest.approx([0.2] * 4, abs=0.05)
    assert [(row["name"], row["format"], row["bits_per_weight"]) for row in info["dense"]] == [
        (f"model.layers.{i}.mlp.up_proj (dense)", "dense", 16.0) for i in range(4)
    ]
    kinds = {row["name"]: row["count"] for row in info["kinds"]}
    assert kinds == {"q_proj (bitmask)": 4, "down_proj (sell)": 4, "up_proj (dense)": 4}
    assert "down_proj (sell)" in cli("inspect", tmp_path / "out", "--kinds").output
    assert "up_proj" in cli("inspect", model, "--modules").output


def test_the_stream_opens_shards_anew_and_reads_everything(model, monkeypatch):
    monkeypatch.setattr("sparse_backend.compiler.source.MAPPED_BYTES", 1)
    source = Source(checkpoint.read(model))
    streamed = dict(source.weights())
    tensors = {**load_file(model / "model-1.safetensors"), **load_file(model / "model-2.safetensors")}
    assert streamed.keys() == tensors.keys()
    assert all(torch.equal(streamed[n], t) for n, t in tensors.items())
    assert source.done_bytes == sum(t.nbytes for t in tensors.values())


def plain_model(folder, weight, config=CONFIG):
    """One source shard, its one projection `weight`."""
    folder.mkdir(parents=True)
    save_file({"model.layers.0.mlp.down_proj.weight": weight}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


ALL_FP16 = Options(format="bitmask", rules=({"match": "*", "values": "fp16"},))


@pytest.mark.parametrize(
    ("dtype", "options", "what"),
    [
        (torch.bfloat16, Options(values="fp16", format="bitmask"), "rounded to fp16"),
        (torch.bfloat16, ALL_FP16, "rounded to fp16"),
        (torch.float32, Options(values="bf16", format="bitmask"), "rounded to bf16"),
        (torch.float32, Options(values="bf16x12", format="bitmask", sparsity=0.5), "pruned and rounded to bf16"),
        (torch.bfloat16, Options(values="bf16", format="bitmask"), None),
        (torch.bfloat16, Options(sparsity=0.5, format="int8"), "pruned and rounded"),
        (torch.bfloat16, Options(sparsity=0.5, format="int4"), "pruned and rounded"),
        (torch.bfloat16, Options(sparsity=0.5, format="ternary"), "pruned and rounded"),
        (torch.bfloat16, Options(sparsity=0.01, values="int8"), "pruned and rounded"),
    ],
)  # fmt: skip
def test_the_card_and_the_report_say_everything_that_was_rounded(tmp_path, dtype, options, what):
    source = plain_model(tmp_path / "m", sparse_weight(64, 256, 0.0, dtype) * 1e-3)
    report = compile_checkpoint(source, tmp_path / "out", options, verify=True)
    assert report.changed == ({what: 1} if what else {})
    matter, body = front_matter(tmp_path / "out")
    assert ("No weight was changed" in body) == (what is None)
    if what:
        assert f"1 projections were {what}." in body
        assert [tag for tag in matter["tags"] if tag in ("pruned", "rounded")] == [w for w in what.split() if "ed" in w]
        assert ("method magnitude, pattern unstructured" in body) == ("pruned" in what)


def test_values_that_lose_nothing_are_no_rounding(tmp_path):
    weight = sparse_weight(64, 256, 0.5).float()  # bfloat16's numbers
    source = plain_model(tmp_path / "m", weight)
    assert not compile_checkpoint(source, tmp_path / "out", Options(values="bf16", format="bitmask")).changed


def test_the_command_says_what_values_round(tmp_path):
    source = plain_model(tmp_path / "m", sparse_weight(64, 256, 0.0) * 1e-3)
    text = cli("compile", source, tmp_path / "out", "--values", "fp16", "--format", "bitmask").output
    assert "1 projections rounded to fp16: this model differs from the original" in text


def test_activations_that_the_source_did_not_round_are_a_difference(tmp_path):
    ternary = (torch.randint(-1, 2, (64, 256)) * 0.5).bfloat16()
    source, options = plain_model(tmp_path / "m", ternary), Options(activations="int8", format="ternary")
    assert compile_checkpoint(source, tmp_path / "out", options).changed == {"given int8 activations": 1}
    assert "1 projections were given int8 activations." in front_matter(tmp_path / "out")[1]
    assert "No weight was changed" not in front_matter(tmp_path / "out")[1]
    # As trained, and kept, are no difference.
    assert not compile_checkpoint(TERNARY, tmp_path / "bitnet", Options()).changed
    assert not compile_checkpoint(source, tmp_path / "keep", Options(format="ternary")).changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(sparsity=0.5, ignore=("*",)), "'ignore' and 'rules' leave no projection"),
        (Options(sparsity=0.5, rules=({"match": "*", "format": "dense"},)), "'ignore' and 'rules' leave no projection"),
        (Options(format="dense"), "format dense packs nothing"),
        (Options(sparsity=0.001), "pass a higher --sparsity"),
        (Options(), "pass --sparsity to prune"),
    ],
)
def test_advice_where_nothing_is_packed_is_not_what_was_done(tmp_path, options, message):
    source = plain_model(tmp_path / "m", sparse_weight(16, 16, 0.0, torch.float32))
    with pytest.raises(OptionError, match=f"nothing to pack .*{message}"):
        plan_checkpoint(source, options)


def test_patterns_that_fit_no_module_are_said_once(model, tmp_path):
    said = []
    rules = ({"match": "model.layers.0.mlp.up_prj", "sparsity": 0.5}, {"match": "xyz", "sparsity": 0.5})
    fitting = ("*.q_proj", "lm_head", "model.norm", "re:.*embed.*")
    options = Options(ignore=("*.down_prj", *fitting), rules=rules, format="bitmask")
    compile_checkpoint(model, tmp_path / "out", options, say=said.append)
    assert said == [
        "option 'ignore': no module fits '*.down_prj'; the nearest is model.layers.0.mlp.down_proj",
        "option 'rules': no module fits 'model.layers.0.mlp.up_prj'; the nearest is model.layers.0.mlp.up_proj",
        "option 'rules': no module fits 'xyz'",
    ]


def test_a_run_goes_on_by_the_profile_it_began_with(model, tmp_path, monkeypatch):
    """A machine too busy for its profile to be kept: every process measures another one."""
    recorded = Profile.load(ROOT / "tests" / "profile.json")
    measured = []

    def measure(progress=None):
        # Dense products get faster and faster: what was packed in the first run would stay dense in the next.
        measured.append(1)
        dense = recorded.kernels["dense/bf16"]
        faster = tuple(tuple(t / 1000 ** (len(measured) - 1) for t in row) for row in dense.compute)
        kernels = {**recorded.kernels, "dense/bf16": dataclasses.replace(dense, compute=faster)}
        return dataclasses.replace(recorded, kernels=kernels, threads=torch.get_num_threads() + 1)

    monkeypatch.delenv("SPARSE_BACKEND_PROFILE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "calibrate", measure)
    monkeypatch.setattr(calibrate, "_profiles", {})
    expected, _ = compiled(model, tmp_path / "out")
    calibrate._profiles.clear()
    measured.clear()
    interrupt(model, tmp_path / "out", after=10)
    calibrate._profiles.clear()  # another process
    said = []
    assert compiled(model, tmp_path / "out", say=said.append)[0] == expected
    assert [s for s in said if "taking up an interrupted run" in s] == said
    assert len(measured) == 1
    assert not calibrate._profiles
    # Other options are another run: it plans by what it measures.
    interrupt(model, tmp_path / "out", after=10)
    calibrate._profiles.clear()
    said.clear()
    compile_checkpoint(model, tmp_path / "out", Options(batch=2, sparsity=0.9), say=said.append, max_shard_bytes=SHARD)
    assert "options, machine differ" in said[0]
    assert len(measured) == 3


@pytest.mark.parametrize(
    ("flags", "after", "message"),
    [
        (("--dry-run",), 3, "a dry run writes nothing"),
        ((), 0, "before the first shard was whole; nothing is kept"),
        ((), 12, "shards that are whole are kept"),
    ],
)
def test_interrupting_says_what_is_kept(model, tmp_path, monkeypatch, flags, after, message):
    done = writer.Writer.done
    left = [after]

    def interrupted(self, result):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        self.max_shard_bytes = SHARD
        done(self, result)

    monkeypatch.setattr(writer.Writer, "done", interrupted)
    result = cli("compile", model, tmp_path / "out", *flags)
    assert result.exit_code == 130
    assert message in result.output
    assert (tmp_path / ".out.incomplete").exists() == (after == 12)


def test_inspect_tells_what_is_stored_of_integers_and_odd_shapes(model, tmp_path):
    for values in ("int8", "int4"):
        options = Options(values=values, format="bitmask")
        compile_checkpoint(model, tmp_path / values, options)
        rows = inspection.inspect(tmp_path / values).rows
        weights = [checkpoint_weight(model, row.name.partition(" ")[0]) for row in rows]
        for row, weight in zip(rows, weights, strict=True):
            assert 0 <= row.nnz - int(torch.count_nonzero(weight)) <= (values == "int4")
    for number, zero_blocks in enumerate((0, 1)):
        weight = torch.ones(20, 20).bfloat16()
        weight[:16, :16] *= 1 - zero_blocks
        for values in (None, "int8", "int4"):
            out = tmp_path / f"{number}{values}"
            source = plain_model(tmp_path / f"m{number}{values}", weight)
            compile_checkpoint(source, out, Options(format="block", values=values))
            assert inspection.inspect(out).rows[0].density == 1 - zero_blocks / 4


def test_inspect_takes_float32_sources_as_such(tmp_path):
    for number, (config, options) in enumerate((
        ({}, Options(format="int8")),
        ({"dtype": "float32"}, Options(format="bitmask", values="bf16")),
        ({"torch_dtype": "float32"}, Options(format="ternary")),
    )):  # fmt: skip
        source = plain_model(tmp_path / f"m{number}", sparse_weight(32, 64, 0.5, torch.float32), {**CONFIG, **config})
        report = compile_checkpoint(source, tmp_path / f"o{number}", options)
        assert inspection.inspect(tmp_path / f"o{number}").rows[0].dense_bytes == report.dense_bytes == 4 * 32 * 64
    compile_checkpoint(TERNARY, tmp_path / "ternary", Options())
    assert {row.dense_bytes for row in inspection.inspect(tmp_path / "ternary").rows} <= {
        2 * row.weights for row in inspection.inspect(tmp_path / "ternary").rows
    }


def checkpoint_weight(folder, module):
    return next(t for n, t in Source(checkpoint.read(folder)).weights() if n == f"{module}.weight")


def test_verifying_a_plain_checkpoint_says_that_it_has_no_checksums(model):
    text = cli("inspect", model, "--verify").output
    assert "no checksums to check" in text
    assert "all checksums match" not in text
