"""The AVX-512 kernels on machines that lack them: logic under emulation, and the assembly."""

from __future__ import annotations

import re
import subprocess

import pytest
from conftest import ROOT

CSRC = ROOT / "sparse_backend" / "csrc"
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi2", "-mavx512vbmi", "-mavx512vnni"]


def compile_file(source, output, *flags):
    command = ["g++", "-std=c++17", "-w", *flags, f"-I{CSRC}", "-c", str(source), "-o", str(output)]
    subprocess.run(command, check=True)
    return output


def test_logic_under_emulation(tmp_path):
    emulate = ["-DSPARSE_BACKEND_EMULATE_AVX512", f"-I{ROOT / 'tests' / 'csrc' / 'emulation'}"]
    vnni = ["-include", str(ROOT / "tests" / "csrc" / "emulation" / "avx_vnni.h"), *AVX2]
    flags = {
        "bitmask/avx512": ["-O1", "-mf16c", "-mfma", *emulate],
        "bitmask/avx512_bf16": ["-O1", "-mf16c", "-mfma", *emulate],
        "bitmask/amx": ["-O1", *emulate],
        "bitmask/order_avx512": ["-O1", *emulate],
        "bitmask/avx2": ["-O0", *AVX2],
        "lanes/avx512": ["-O1", "-mf16c", "-mfma", *emulate],
        "lanes/avx512_bf16": ["-O1", "-mf16c", "-mfma", *emulate],
        "lanes/amx": ["-O1", *emulate],
        "lanes/avx2": ["-O0", *AVX2],
        "sell/avx512": ["-O1", "-mf16c", "-mfma", *emulate],
        "sell/avx512_bf16": ["-O1", "-mf16c", "-mfma", *emulate],
        "sell/avx2": ["-O0", *AVX2],
        "lowbit/avx512_vnni": ["-O1", *emulate],
        "lowbit/amx": ["-O1", *emulate],
        "lowbit/avx_vnni": ["-O1", *vnni],
        "lowbit/avx2": ["-O1", *AVX2],
    }
    baseline = [f"{family}/{file}" for family in ("bitmask", "lanes", "sell", "lowbit") for file in BASELINE]
    baseline += ["unstructured/buffer", "unstructured/pack", "unstructured/strips"]
    flags |= {name: ["-O2"] for name in (*baseline, "cpu_features")}
    flags["bitmask/pack"] = ["-O2", emulate[0]]  # orders weights with the emulated kernels
    objects = [
        compile_file(CSRC / f"{name}.cpp", tmp_path / f"{name.replace('/', '_')}.o", *extra)
        for name, extra in flags.items()
    ]
    for name in ("unstructured_test", "lowbit_test"):
        source = ROOT / "tests" / "csrc" / f"{name}.cpp"
        objects.append(compile_file(source, tmp_path / f"{name}.o", "-O2", emulate[0]))
    binary = tmp_path / "kernels_test"
    subprocess.run(["g++", *map(str, objects), "-o", str(binary), "-pthread"], check=True)
    result = subprocess.run([str(binary)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert result.stdout.strip() == "0 failures"


def disassemble(path):
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.parametrize(
    ("name", "flags"), [("avx512", AVX512), ("avx512_bf16", [*AVX512, "-mavx512bf16"]), ("amx", AVX512)]
)
def test_every_expand_has_its_destination_zeroed_right_before(tmp_path, name, flags):
    lines = disassemble(compile_file(CSRC / "bitmask" / f"{name}.cpp", tmp_path / "k.o", "-O3", *flags))
    expands = [i for i, line in enumerate(lines) if "vpexpand" in line]
    assert len(expands) > 20
    for i in expands:
        register = re.search(r"vpexpand[bw] %zmm\d+,%zmm(\d+)\{%k[1-7]\}\{z\}", lines[i])
        assert register, lines[i]  # register form: the memory form is microcoded on some chips
        zero = f"%zmm{register[1]},%zmm{register[1]},%zmm{register[1]}"
        assert "vpxor" in lines[i - 1]
        assert zero in lines[i - 1].replace(" ", "")


BASELINE = ["pack", "linear", "scalar"]


@pytest.mark.parametrize(
    "name",
    [
        *(f"{family}/{file}" for family in ("bitmask", "lanes", "sell", "lowbit") for file in BASELINE),
        *("unstructured/buffer", "unstructured/pack", "unstructured/strips", "cpu_features", "huge_pages"),
    ],
)
def test_files_for_every_machine_use_no_avx(tmp_path, name):
    lines = disassemble(compile_file(CSRC / f"{name}.cpp", tmp_path / "k.o", "-O3"))
    assert not [line for line in lines if re.search(r"%[yz]mm|\tv[a-z]", line)]


def test_files_for_one_level_export_nothing_but_their_kernels(tmp_path):
    """An inline function compiled for AVX-512 must never be merged with another file's copy."""
    for name, flags in (
        ("bitmask/avx2", AVX2),
        ("bitmask/avx512", AVX512),
        ("bitmask/avx512_bf16", [*AVX512, "-mavx512bf16"]),
        ("bitmask/amx", AVX512),
        ("bitmask/order_avx512", AVX512),
        ("lanes/avx2", AVX2),
        ("lanes/avx512", AVX512),
        ("lanes/avx512_bf16", [*AVX512, "-mavx512bf16"]),
        ("lanes/amx", AVX512),
        ("sell/avx2", AVX2),
        ("sell/avx512", AVX512),
        ("sell/avx512_bf16", [*AVX512, "-mavx512bf16"]),
        ("lowbit/avx2", AVX2),
        ("lowbit/avx_vnni", [*AVX2, "-mavxvnni"]),
        ("lowbit/avx512_vnni", AVX512),
        ("lowbit/amx", AVX512),
    ):
        path = compile_file(CSRC / f"{name}.cpp", tmp_path / "k.o", "-O3", *flags)
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", "-g", str(path)], capture_output=True, text=True, check=True
        )
        names = [line.split(maxsplit=2)[2] for line in symbols.stdout.splitlines()]
        assert all("_kernels(" in n for n in names), names
