"""Op contracts: schemas, fakes, torch.compile, modules, levels."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import sparse_weight

import sparse_backend as sb
from sparse_backend.kernels import cpu, registry


def test_opcheck():
    weight = sparse_weight(21, 77, 0.5)
    packed = sb.pack(weight)
    mask, values = packed.tensors["mask"], packed.tensors["values"]
    machine = packed.lower().tensors["packed"]
    ops = cpu.ops()
    x, bias = torch.randn(3, 5, 77).bfloat16(), torch.randn(21)
    torch.library.opcheck(ops.bitmask_linear.default, (x, machine, bias, 21))
    torch.library.opcheck(
        ops.bitmask_linear.default, (x[0, :, 1:].contiguous().float()[:0].new_ones(0, 77), machine, None, 21)
    )
    for lower in (ops.bitmask_lower.default, ops.sell_lower.default, ops.lanes_lower.default):
        torch.library.opcheck(lower, (mask, values, None, 77, 12, 0, 0))
        torch.library.opcheck(lower, (mask, values.to(torch.int8), torch.ones(21, 1), 77, 8, 0, 16))
    torch.library.opcheck(
        ops.sell_linear.default, (x, sb.pack(weight, format="sell").lower().tensors["packed"], bias, 21)
    )
    block = sb.pack(weight, format="block").lower().tensors["packed"]
    torch.library.opcheck(ops.lanes_linear.default, (x, block, bias, 21))
    torch.library.opcheck(ops.bf16x12_encode.default, (weight,))
    torch.library.opcheck(ops.bf16x12_decode.default, tuple(sb.pack(weight, format="bf16x12").tensors.values()))
    torch.library.opcheck(ops.bitmask_unpack.default, (mask, values, 77))
    torch.library.opcheck(ops.bitmask_pack.default, (weight,))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    layer = sb.SparseLinear(sb.pack(sparse_weight(32, 64, 0.5)).lower(), torch.randn(32).bfloat16())

    def forward(x):
        return torch.nn.functional.silu(layer(x * 2)) + 1

    compiled = torch.compile(forward, fullgraph=True, dynamic=dynamic)
    for tokens in (1, 4, 9):
        x = torch.randn(tokens, 64).bfloat16()
        assert torch.allclose(compiled(x), forward(x), rtol=2e-2, atol=2e-2)
    machine = layer.machine_weight()
    function = torch.compile(lambda x: sb.linear(x, machine), fullgraph=True)
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(function(x), sb.linear(x, machine))


def test_sparse_linear_replaces_linear(tmp_path):
    dense = torch.nn.Linear(96, 40).bfloat16()
    with torch.no_grad():
        dense.weight.copy_(sparse_weight(40, 96, 0.7))
    layer = sb.SparseLinear.from_linear(dense)
    assert layer.format in ("bitmask", "sell")
    x = torch.randn(5, 96).bfloat16()
    assert torch.allclose(layer(x), dense(x), rtol=2e-2, atol=2e-2)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other = sb.SparseLinear.from_linear(dense)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(x), layer(x))
    with pytest.raises(sb.OptionError, match="keeps this weight dense"):
        sb.SparseLinear.from_linear(torch.nn.Linear(64, 64))
    assert sb.SparseLinear.from_linear(torch.nn.Linear(64, 64).bfloat16()).format == "bf16x12"
    forced = sb.SparseLinear.from_linear(torch.nn.Linear(64, 64).bfloat16(), format="bitmask")
    assert forced.format == "bitmask"
    # What the plan takes is what is packed, its kind of values included.
    for values, format in (("int4", "int4"), ("int8", "int8"), ("bf16x12", "bf16x12")):
        assert sb.SparseLinear.from_linear(torch.nn.Linear(64, 64).bfloat16(), values=values).format == format


def test_the_table_matches_what_the_library_exports():
    for kernel in registry.rows("cpu"):
        schema = getattr(cpu.ops(), kernel.op).default._schema
        names = [a.name for a in schema.arguments]
        assert names[0] == "x"
        required = [a.name for a in schema.arguments if a.default_value is None and a.name != "absmax"]
        assert required[-2:] == ["bias", "out_features"]
        example = sb.pack(sparse_weight(4, 8, 0.5), format=kernel.format).lower()
        assert required[1:-2] == list(example.tensors)
        row, reason = registry.select(kernel.format, kernel.device, kernel.values[0])
        assert row is kernel
        assert kernel.op in reason


def test_choosing_what_is_not_there_is_an_error():
    with pytest.raises(sb.OptionError, match="bitmask on cpu"):
        registry.select("bitmask", "xpu", torch.bfloat16)
    with pytest.raises(sb.IsaError, match="no level 'neon'"):
        registry.select("bitmask", "cpu", torch.bfloat16, isa="neon")
    with pytest.raises(sb.IsaError, match="no level"):
        sb.pack(sparse_weight(4, 8, 0.5)).lower(isa="sse9")


def run_with_isa(level: str) -> subprocess.CompletedProcess:
    code = "from sparse_backend.kernels import cpu; print(cpu.active_isa())"
    env = {**os.environ, "SPARSE_BACKEND_ISA": level}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_isa_variable_forces_a_lower_level():
    for level in cpu.available_levels():
        assert run_with_isa(level).stdout.strip() == level


def test_isa_variable_beyond_the_machine_is_an_error():
    missing = [level for level in cpu.ISA_LEVELS if level not in cpu.available_levels()]
    for level in [*missing, "sse2"]:
        result = run_with_isa(level)
        assert result.returncode != 0
        assert f"SPARSE_BACKEND_ISA={level}" in result.stderr
        assert "allowed here: scalar" in result.stderr


def test_features_agree_with_the_operating_system():
    flags = next(li for li in Path("/proc/cpuinfo").read_text().splitlines() if li.startswith("flags")).split()
    found = cpu.features()
    assert found["avx2"] == all(f in flags for f in ("avx2", "fma", "f16c", "popcnt"))
    assert found["avx512_bf16"] == ("avx512_bf16" in flags and found["avx512"])
    assert found["avx512"] == all(f in flags for f in ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vbmi2"))
    assert found["amx_bf16"] == ("amx_bf16" in flags)
    assert found["amx_int8"] == ("amx_int8" in flags)
    tiles = all(found[f] for f in ("avx512_bf16", "amx_bf16", "amx_int8"))
    assert ("amx" in cpu.available_levels()) == tiles
    assert found["avx512_vnni"] == ("avx512_vnni" in flags and found["avx512"])


def test_no_second_openmp_runtime_is_loaded():
    cpu.library()
    path = cpu.library()._name
    needed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "libgomp" not in needed.replace(str(torch.__path__[0]), "")
    assert isinstance(cpu.library(), ctypes.CDLL)


def test_import_is_quick_and_brings_no_engine():
    code = (
        "import sys, sparse_backend; "
        "bad = [m for m in ('torch', 'vllm', 'sglang', 'transformers') if m in sys.modules]; "
        "assert not bad, bad; sparse_backend.pack; "
        "bad = [m for m in ('vllm', 'sglang', 'transformers') if m in sys.modules]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
