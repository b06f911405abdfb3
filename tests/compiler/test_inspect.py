"""What `inspect` tells of a checkpoint."""

from __future__ import annotations

import pytest
import torch
from conftest import sparse_weight
from small_models import CONFIG, TERNARY, cli, plain_model, save_model

from sparse_backend import Options
from sparse_backend.compiler import checkpoint, inspection
from sparse_backend.compiler.compile import compile_checkpoint
from sparse_backend.compiler.source import Source


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


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
