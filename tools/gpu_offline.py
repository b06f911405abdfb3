"""Compile the GPU kernels where there is no GPU, and hold the machine code to what is promised of it.

    python tools/gpu_offline.py                   every kernel, configuration and target
    python tools/gpu_offline.py --quick           the few that `make test` looks at
    python tools/gpu_offline.py --settings FILE   as tuned for a card, by benchmarks/gpu.py --tune

NVIDIA code is checked: no register spills, weights read 16 bytes at a time, no barrier in the loop of a
GEMV, and instructions of the loop per weight under the kernel's BUDGET. AMD code is only compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="gpu_offline_"))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_backend.kernels.triton import (
    block,
    block_kernels,
    common,
    nm,
    nm_kernels,
    sell,
    sell_kernels,
    ternary,
    ternary_kernels,
    tuning,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NVIDIA = (80, 90, 100)
TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in NVIDIA} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
DIVISIBLE = (  # as of the layers of language models
    "k", "n", "x_stride", "supers", "scale_stride", "lines", "columns", "stride",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel in one configuration.

    Attributes:
        name: for the table.
        kernel: the jit function.
        types: of arguments, as Triton writes them.
        constants: values of the other arguments.
        num_warps: of one program.
        per_thread: stored weights, or of nm's dot positions, that a thread handles in one iteration of the loop;
            0: no loop.
        budget: instructions of the loop for each of them; 0: none is set.
        barriers: whether the loop may hold any.
        wide: whether weights have to be read 16 bytes at a time.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    per_thread: float = 0
    budget: float = 0
    barriers: bool = True
    wide: bool = True


@dataclasses.dataclass(frozen=True)
class Loop:
    instructions: int
    barriers: int


@dataclasses.dataclass(frozen=True)
class Code:
    """What the machine code of a kernel says.

    Attributes:
        registers: per thread.
        spills: instructions that move registers to and from local memory.
        wide_loads: 16-byte loads of global memory.
        loops: those that read global memory, the longest first.
    """

    registers: int
    spills: int
    wide_loads: int
    loops: list[Loop]


BITS = {"bf16": 16, "fp16": 16, "int8": 8, "int4": 4}
# Pointers to values, as Triton writes them; sell and block hold int4 in words, nm in bytes beside its positions.
POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "int8": "*i8", "int4": "*i32"}


_file: Path | None = None  # of settings tuned for a card


def launches_of(family: str) -> tuning.Launches:
    return tuning.defaults(family) if _file is None else tuning.load(_file)[family]


def nm_case(kept: int, kind: str, form: str, batch: int, masked: bool) -> Case:
    setting, bits = launches_of("nm")[form, batch], BITS[kind]
    slots = nm.slots_of(kept, bits)
    groups, chunks = nm.geometry(kept, slots)
    gemv = form == "gemv"
    wide = kept != 6 or bits == 16
    side = setting.groups if gemv else nm.dot_groups(groups)
    unroll = nm.gemv_unroll(chunks, setting, bits == 4) if gemv else 1
    constants = {
        "KEPT": kept, "SUPER": groups, "CHUNKS": chunks, "SLOTS": slots, "ROWS": common.TILE_ROWS, "GROUPS": side,
        "UNROLL": unroll, "MASK_K": masked, "SCALED": {8: 1, 4: 128}.get(bits, 0), "JOINED": bits == 4,
    }  # fmt: skip
    x = "*fp16" if kind == "fp16" else "*bf16"
    types = {"values": "*i8" if bits < 16 else POINTERS[kind], "words": "*i32", "scales": "*fp32"}
    types |= dict.fromkeys(("n", "k", "supers", "scale_stride"), "i32")
    name = f"nm {kept}:16 {kind} {form}{batch or ''}{' odd K' if masked else ''}"
    if form == "decompress":
        return Case(name, nm_kernels.decompress, {"dense": x, **types}, constants, setting.num_warps, wide=wide)
    types |= {"x": x, "out": "*fp32", "m": "i32", "x_stride": "i32", "splits": "i32"}
    constants |= {"bias": None, "BATCH": batch} | ({"ALIGNED": not masked} if gemv else {"SAME": True})
    rows = side * common.TILE_ROWS / (32 * setting.num_warps)
    per_thread = rows * (unroll * chunks * slots if gemv else groups * nm.GROUP)
    budget = 0 if masked else nm.BUDGET[form, batch, bits]
    kernel = nm_kernels.gemv if gemv else nm_kernels.dot
    return Case(name, kernel, types, constants, setting.num_warps, per_thread, budget, not gemv, wide)


def nm_cases(quick: bool) -> Iterator[Case]:
    if quick:
        for kind in ("bf16", "int8", "int4"):
            yield from (nm_case(8, kind, *form, False) for form in (("gemv", 1), ("dot", 16)))
        return
    for kept, kind in ((8, "bf16"), (8, "fp16"), (8, "int8"), (8, "int4"), (6, "bf16"), (6, "int8"), (6, "int4"),
                       (4, "bf16"), (4, "int8"), (4, "int4")):  # fmt: skip
        for form, batch in launches_of("nm"):
            for masked in (False, True) if batch in (1, 2, 16) else (False,):
                yield nm_case(kept, kind, form, batch, masked)


def sell_cases(quick: bool) -> Iterator[Case]:
    kinds = (("bf16", 0), ("fp16", 0), ("int8", 1), ("int8", 128), ("int4", 1), ("int4", 128))
    for kind, scaled in kinds[:1] if quick else kinds:
        bits = BITS[kind]
        slots = 8 if bits == 16 else 16
        constants = {"SLOTS": slots, "ROWS": common.TILE_ROWS, "SCALED": scaled}
        x = "fp16" if kind == "fp16" else "bf16"
        weights = {
            "values": POINTERS[kind], "positions": "*u8", "starts": "*i32", "offsets": "*i32", "rows": "*i32",
            "scales": "*fp32",
        }  # fmt: skip
        integers = dict.fromkeys(("m", "n", "x_stride", "parts", "lines"), "i32")
        for (form, batch), setting in launches_of("sell").items():
            if quick and (form, batch) != ("gemv", 1):
                continue
            name = f"sell {kind}{f' groups of {scaled}' if scaled > 1 else ''} {form}{batch or ''}"
            if form == "decompress":
                dense = {"dense": f"*{x}", **weights, "k": "i32", "parts": "i32", "lines": "i32"}
                yield Case(name, sell_kernels.decompress, dense, constants, setting.num_warps)
                continue
            stored = common.TILE_ROWS / (32 * setting.num_warps) * setting.unroll * slots
            fixed = {**constants, "BATCH": batch, "UNROLL": setting.unroll, "bias": None}
            types = {"x": f"*{x}", **weights, "out": "*fp32", **integers}
            kernel = sell_kernels.gemv if form == "gemv" else sell_kernels.batched
            budget = sell.BUDGET[form, batch, bits] + (sell.SCALES_OF_GROUPS[form] if scaled > 1 else 0)
            yield Case(name, kernel, types, fixed, setting.num_warps, stored, budget, form != "gemv", form == "gemv")


def ternary_cases(quick: bool) -> Iterator[Case]:
    rows = common.TILE_ROWS
    integers = dict.fromkeys(("rows", "n", "columns", "chunks", "scale_stride", "splits"), "i32")
    types = {"sums": "*i32", "words": "*i32", "scales": "*fp32", "out": "*fp32", **integers}
    for (form, batch), setting in launches_of("ternary").items():
        if form == "decompress":
            decompression = setting
            continue
        for size in (0,) if quick else (0, 128, 32):
            if (quick and batch not in (1, 16)) or batch > ternary.most_rows(size):
                continue
            gemv = form == "gemv"
            groups = setting.groups if gemv else ternary.dot_groups(setting, size)
            unit = min(size, ternary.CHUNK) or ternary.CHUNK
            constants = {"BATCH": batch, "ROWS": rows, "GROUPS": groups, "UNIT": unit, "SCALED": size}
            constants |= {"UNROLL": setting.unroll, "PTX": True} if gemv else {}
            per_thread = groups * setting.unroll * ternary.CHUNK * rows / (32 * setting.num_warps)
            budget = ternary.BUDGET.get((form, batch, size > 0), 0)
            name = f"ternary {form}{batch}{f' groups of {size}' if size else ''}"
            kernel = ternary_kernels.gemv if gemv else ternary_kernels.dot
            # A tile of one chunk a row has 8 bytes for each of 128 threads.
            wide = gemv or groups > 1
            yield Case(
                name, kernel, {"x": "*i32" if gemv else "*i8", **types}, constants, setting.num_warps, per_thread,
                budget, not gemv, wide,
            )  # fmt: skip
    if not quick:
        weights = {"words": "*i32", "scales": "*fp32", "n": "i32", "k": "i32", "chunks": "i32", "scale_stride": "i32"}
        for kind in ("bf16", "i8"):
            fixed = {"ROWS": rows, "GROUPS": decompression.groups, "SCALED": 0, "CODES": kind == "i8"}
            types = {"dense": f"*{kind}", **weights}
            yield Case(f"ternary decompress {kind}", ternary_kernels.decompress, types, fixed, decompression.num_warps)
        tokens = {"x": "*bf16", "codes": "*i8", "sums": "*i32", "steps": "*fp32"}
        types = {**tokens, "k": "i32", "columns": "i32", "x_stride": "i32"}
        parts = {"partial": "*fp32", "steps": "*fp32", "scales": "*fp32", "bias": "*bf16", "y": "*bf16"}
        last = {**parts, **dict.fromkeys(("rows", "n", "stride", "splits"), "i32")}
        for limbs in (1, 3):
            fixed = {"LIMBS": limbs, "UNIT": 64, "BLOCK": 8192}
            own = {**fixed, "absmax": None}
            yield Case(f"ternary quantise{limbs}", ternary_kernels.quantise, types, own, 8, wide=False)
            name, given = f"ternary quantise{limbs} by a given absmax", {**types, "absmax": "*fp32"}
            yield Case(name, ternary_kernels.quantise, given, fixed, 8, wide=False)
            fixed = {"LIMBS": limbs, "SCALED": False, "BLOCK": 256}
            yield Case(f"ternary finish{limbs}", ternary_kernels.finish, last, fixed, 4, wide=False)


def block_cases(quick: bool) -> Iterator[Case]:
    kinds = (("bf16", 0), ("int8", 1), ("int8", 128), ("int4", 1), ("int4", 128))
    for kind, scaled in kinds[:1] if quick else kinds:
        weights = {"values": POINTERS[kind], "columns": "*i32", "offsets": "*i32", "scales": "*fp32"}
        integers = dict.fromkeys(("m", "n", "k", "x_stride", "scale_stride"), "i32")
        for (form, batch), setting in launches_of("block").items():
            if quick and (form, batch) not in (("gemv", 1), ("dot", 16)):
                continue
            step = 1 if form == "dot" and scaled > 1 else setting.groups
            constants = {"STEP": step, "SCALED": scaled}
            name = f"block {kind}{f' groups of {scaled}' if scaled > 1 else ''} {form}{batch or ''}"
            wide = kind != "int4" and step > 1  # one block has 4 bytes for each thread
            if form == "decompress":
                types = {"dense": "*bf16", **weights, "n": "i32", "k": "i32", "scale_stride": "i32"}
                constants["STEP"] = block.decompress_step(setting, kind == "int4")
                yield Case(name, block_kernels.decompress, types, constants, setting.num_warps, wide=wide)
                continue
            constants |= {"BATCH": batch, "MASK_K": False, "bias": None}
            types = {"x": "*bf16", **weights, "out": "*fp32", **integers}
            per_thread = step * setting.unroll * 256 / (32 * setting.num_warps)
            if form == "gemv":
                constants |= {"SLOTS": 16 if kind == "int8" else 8, "UNROLL": setting.unroll}
                budget = block.BUDGET[form, batch] + (block.SCALES_OF_GROUPS if scaled > 1 else 0)
                yield Case(
                    name, block_kernels.gemv, types, constants, setting.num_warps, per_thread, budget, False, wide
                )
            else:
                constants["SAME"] = True
                yield Case(name, block_kernels.dot, types, constants, setting.num_warps, per_thread, wide=wide)


def cases(quick: bool) -> list[Case]:
    found = [*nm_cases(quick), *sell_cases(quick), *ternary_cases(quick), *block_cases(quick)]
    if not quick:
        types = {"partial": "*fp32", "bias": "*bf16", "y": "*bf16", "m": "i32", "n": "i32", "splits": "i32"}
        found.append(Case("finish", common._finish, types, {"BLOCK": common.FINISH_BLOCK}, 4, wide=False))
    return found


def cases_with(file: Path | None, quick: bool) -> list[Case]:
    """The cases under the settings of a file, or the defaults."""
    global _file
    _file = file
    return cases(quick)


def compiled(case: Case, target: GPUTarget) -> Any:
    names = case.kernel.arg_names
    unknown = [name for name in names if name not in case.types and name not in case.constants]
    assert not unknown, f"{case.name}: {unknown}"
    aligned = [i for i, name in enumerate(names) if case.types.get(name, "").startswith("*") or name in DIVISIBLE]
    signature = {name: case.types.get(name, "constexpr") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if names[i] in case.types}
    constants = case.constants | ({"PTX": False} if "PTX" in names and target.backend == "hip" else {})
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def disassembled(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    loops = []
    for i, line in enumerate(code):
        jump = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], i) < i:
            body = code[labels[jump[1]] : i + 1]
            if any("LDG" in each for each in body):
                loops.append(Loop(len(body), sum(" BAR." in f" {each}" for each in body)))
    registers = re.search(r"REG:(\d+)", usage)
    return Code(
        int(registers[1]) if registers else 0,
        sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in code),
        sum(bool(re.search(r"\bLDG\S*\.128", line)) for line in code),
        sorted(loops, key=lambda loop: -loop.instructions),
    )


def problems(case: Case, code: Code) -> list[str]:
    found = []
    if code.spills:
        found.append(f"{code.spills} spills")
    if case.wide and not code.wide_loads:
        found.append("no 16-byte loads")
    if case.budget and not code.loops:
        found.append("no loop found")
    for loop in code.loops:
        if loop.barriers and not case.barriers:
            found.append(f"{loop.barriers} barriers in the loop")
        if case.budget and loop.instructions > case.budget * case.per_thread:
            found.append(f"over {case.budget} instructions")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--settings", type=Path, nargs="+", default=[], metavar="FILE", help="tuned for a card")
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}; instructions of the main loop per stored weight (nm dot: per position)")
    print(f"{'kernel':34} {'target':7} {'instr.':>7} {'budget':>7} {'regs':>5} {'16-byte':>8} {'barriers':>9}  verdict")
    start, failures, count = time.monotonic(), 0, 0
    files = [None, *([] if arguments.quick else sorted(tuning.SHIPPED.glob("*.json"))), *arguments.settings]
    for case in (case for file in files for case in cases_with(file, arguments.quick)):
        if arguments.only not in case.name:
            continue
        # Quick: the loop of every GEMV on every architecture, the rest on Hopper.
        targets = arguments.target if not (arguments.quick and case.barriers) else ["sm_90"]
        for name in targets:
            if arguments.quick and name == "gfx942":
                continue
            try:
                result = compiled(case, TARGETS[name])
            except Exception as error:
                failures += 1
                print(f"{case.name:34} {name:7} does not compile: {str(error).splitlines()[-1][:200]}")
                continue
            count += 1
            if name.startswith("gfx"):
                print(f"{case.name:34} {name:7} {'':>39}  compiled, not run")
                continue
            code = disassembled(result.asm["cubin"])
            wrong = problems(case, code)
            failures += bool(wrong)
            main_loop = code.loops[0] if code.loops else None
            per = f"{main_loop.instructions / case.per_thread:.1f}" if main_loop and case.per_thread else ""
            budget = f"{case.budget:.1f}" if case.budget else ""
            barriers = main_loop.barriers if main_loop else ""
            print(
                f"{case.name:34} {name:7} {per:>7} {budget:>7} {code.registers:5} {code.wide_loads:8} {barriers:>9}  "
                + (", ".join(wrong) or "ok"),
                flush=True,
            )
    print(f"{count} compiled, {failures} failed, {time.monotonic() - start:.0f} s")
    return 1 if failures or not count else 0


if __name__ == "__main__":
    sys.exit(main())
