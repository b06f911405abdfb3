"""The AVX-512 kernels on machines that lack them: logic under emulation, and the assembly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

CSRC = ROOT / "sparse_backend" / "csrc"
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"]


def compile_file(source, output, *flags):
    command = ["g++", "-std=c++17", "-w", *flags, f"-I{CSRC}", "-c", str(source), "-o", str(output)]
    subprocess.run(command, check=True)
    return output


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """What the library is linked from: of the wheel's own build where that is, brought up to date."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    build = next((ROOT / "build").glob("py3-none-*/CMakeCache.txt"), tmp_path_factory.mktemp("build") / "none").parent
    if not (build / "CMakeCache.txt").exists():
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DPython3_EXECUTABLE={sys.executable}",
        ]
        subprocess.run(configure, check=True, env={**os.environ, "PATH": path})
    subprocess.run(
        ["cmake", "--build", str(build), "--target", "kernels"], check=True, env={**os.environ, "PATH": path}
    )
    folder = build / "CMakeFiles" / "kernels.dir" / "sparse_backend" / "csrc"
    names = {str(file.relative_to(folder)).removesuffix(".cpp.o"): file for file in folder.rglob("*.o")}
    found = {name: file for name, file in names.items() if (CSRC / f"{name}.cpp").exists()}  # not what was left behind
    sources = {str(file.relative_to(CSRC).with_suffix("")) for file in CSRC.glob("*/*.cpp")}
    assert sources <= set(found)
    return found


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
        "sell/amx": ["-O1", *emulate],
        "sell/avx2": ["-O0", *AVX2],
        "lowbit/avx512_vnni": ["-O1", *emulate],
        "lowbit/amx": ["-O1", *emulate],
        "lowbit/avx_vnni": ["-O1", *vnni],
        "lowbit/avx2": ["-O1", *AVX2],
    }
    baseline = [f"{family}/{file}" for family in ("bitmask", "lanes", "sell", "lowbit") for file in BASELINE]
    baseline += ["unstructured/buffer", "unstructured/pack", "unstructured/strips"]
    flags |= {name: ["-O2", "-DSPARSE_BACKEND_POISON"] for name in (*baseline, "cpu_features")}
    flags["bitmask/pack"].append(emulate[0])  # orders weights with the emulated kernels
    jobs = [(CSRC / f"{name}.cpp", tmp_path / f"{name.replace('/', '_')}.o", *extra) for name, extra in flags.items()]
    for name in ("unstructured_test", "lowbit_test"):
        jobs.append((ROOT / "tests" / "csrc" / f"{name}.cpp", tmp_path / f"{name}.o", "-O2", emulate[0]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_file(*job), jobs))
    binary = tmp_path / "kernels_test"
    subprocess.run(["g++", *map(str, objects), "-o", str(binary), "-pthread"], check=True)
    result = subprocess.run([str(binary)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert result.stdout.strip() == "0 failures"


def disassemble(path):
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.parametrize("name", ["avx512", "avx512_bf16", "amx"])
def test_every_expand_has_its_destination_zeroed_right_before(objects, name):
    lines = disassemble(objects[f"bitmask/{name}"])
    expands = [i for i, line in enumerate(lines) if "vpexpand" in line]
    assert len(expands) > 20
    for i in expands:
        register = re.search(r"vpexpand[bw] %zmm\d+,%zmm(\d+)\{%k[1-7]\}\{z\}", lines[i])
        assert register, lines[i]  # register form: the memory form is microcoded on some chips
        zero = f"%zmm{register[1]},%zmm{register[1]},%zmm{register[1]}"
        assert "vpxor" in lines[i - 1]
        assert zero in lines[i - 1].replace(" ", "")


BASELINE = ["pack", "linear", "scalar"]


LEVELS = ("avx2", "avx512", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx")


def test_files_for_every_machine_use_no_avx(objects):
    names = [name for name in objects if not name.endswith(LEVELS)]
    assert set(names) >= {f"{family}/{file}" for family in ("bitmask", "lanes", "sell", "lowbit") for file in BASELINE}
    for name in names:
        found = [line for line in disassemble(objects[name]) if re.search(r"%[yz]mm|\tv[a-z]", line)]
        assert not found, (name, found[:3])


def test_files_for_one_level_export_nothing_but_their_kernels(objects):
    """An inline function compiled for AVX-512 must never be merged with another file's copy."""
    names = [name for name in objects if name.endswith(LEVELS)]
    assert len(names) >= 19
    for name in names:
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", "-g", str(objects[name])], capture_output=True, text=True, check=True
        )
        exported = [line.split(maxsplit=2)[2] for line in symbols.stdout.splitlines()]
        assert exported
        assert all("_kernels(" in n for n in exported), (name, exported)
