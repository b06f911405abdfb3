"""`compile` as a whole: recipes, dry runs, verification, the model card, what its report says."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from conftest import PYTHON_LM, sparse_weight
from safetensors.torch import load_file, save_file
from small_models import CONFIG, SHARD, TERNARY, cli, compiled, plain_model, save_model

from sparse_backend import CheckpointError, OptionError, Options, WeightError
from sparse_backend.compiler import checkpoint, recipe
from sparse_backend.compiler.compile import compile_checkpoint, plan_checkpoint
from sparse_backend.compiler.source import Source, why_unknown
from sparse_backend.compiler.verify import verify_checkpoint


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


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


def test_the_stream_opens_shards_anew_and_reads_everything(model, monkeypatch):
    monkeypatch.setattr("sparse_backend.compiler.source.MAPPED_BYTES", 1)
    source = Source(checkpoint.read(model))
    streamed = dict(source.weights())
    tensors = {**load_file(model / "model-1.safetensors"), **load_file(model / "model-2.safetensors")}
    assert streamed.keys() == tensors.keys()
    assert all(torch.equal(streamed[n], t) for n, t in tensors.items())
    assert source.done_bytes == sum(t.nbytes for t in tensors.values())


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
