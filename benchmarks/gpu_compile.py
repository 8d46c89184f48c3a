"""What the kernels compile to, on a machine without a GPU: registers, spills, memory, tensor cores.

    python benchmarks/gpu_compile.py [--representative] [--only WORD] [--processes 2] [--json PATH]

The launchers themselves run, on CPU tensors in a `triton_launch.recording`, so that each kernel is
compiled with the signature, constants and options of a real launch. A stand-in driver says which
GPU is there. One process meets one version of Triton; the JSON file holds the rows of several.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gpu_calls
import torch
from gpu_calls import Call

from sparseattn.engines import triton_launch
from sparseattn.engines.triton_launch import Launch, Target
from sparseattn.harness import manifest, store

TARGETS = (Target("cuda", 80), Target("cuda", 90), Target("hip", "gfx942"))
_KIB = 1024
# Of a program, from each vendor's documents: compute capability 8.0, 9.0, and CDNA 3.
SHARED_LIMIT = {"sm_80": 163 * _KIB, "sm_90": 227 * _KIB, "gfx942": 64 * _KIB}
_TENSOR_CORES = {"cuda": ("HGMMA", "HMMA", "DMMA"), "hip": ("v_mfma",)}
JSON = Path(__file__).parent / "results" / "gpu_compile.json"


def name_of(target: Target) -> str:
    """sm_80, sm_90, gfx942."""
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


class _StandIn:
    """The driver of a GPU that is not there: enough of it to compile."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        width = 64 if target.backend == "hip" else 32
        self._target = GPUTarget(target.backend, target.arch, width)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # what Triton keeps compiled kernels by

    def get_current_stream(self, device: str) -> int:
        return 0


class Found(NamedTuple):
    """A kernel to compile: a launch, the key that Triton keeps it by, and the calls it is of."""

    target: Target
    launch: Launch
    key: str
    calls: list[str]


def key_of(target: Target, launch: Launch) -> str:
    """What decides whether Triton compiles a launch anew: types, constants and options."""
    import triton

    keys: list[str] = []

    def heard(**given: Any) -> bool:
        keys.append(given["compile"]["key"])
        return True  # it need not be compiled

    triton.runtime.driver.set_active(_StandIn(target))
    before, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, heard
    try:
        launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.options)
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    if not keys:
        raise RuntimeError(f"{launch.kernel.__name__} was compiled before its key was asked for")
    return f"{launch.kernel.__module__}.{launch.kernel.__name__}: {keys[0]}"


class Listing(NamedTuple):
    """The kernels of some calls, each once, and why Triton serves none of the other calls."""

    found: list[Found]
    refused: dict[str, str]


def launches_of(target: Target, run: Callable[[], Any]) -> list[Launch]:
    """What a call would launch on a target."""
    heard: list[Launch] = []
    with triton_launch.recording(target, heard.append):
        run()
    return heard


def listing(calls: Iterable[Call], targets: Iterable[Target] = TARGETS) -> Listing:
    """Every kernel that calls launch on targets."""
    found: dict[tuple[Target, str], Found] = {}
    refused: dict[str, str] = {}
    for call in calls:
        for target in targets:
            try:
                heard = launches_of(target, call.run)
            except gpu_calls.REFUSALS as error:
                refused[call.name] = str(error).splitlines()[0]
                continue
            for launch in heard:
                key = key_of(target, launch)
                one = found.setdefault((target, key), Found(target, launch, key, []))
                if call.name not in one.calls:
                    one.calls.append(call.name)
    return Listing(list(found.values()), refused)


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _cuda_facts(kernel: Any) -> tuple[int, int, str]:
    """Registers, bytes of stack (spills are there), and the machine code, of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [_tool("cuobjdump"), how, file.name], capture_output=True, text=True, check=True
            ).stdout
            for how in ("--dump-resource-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return int(registers), int(stack), code


def _hip_facts(kernel: Any) -> tuple[int, int, str]:
    """As `_cuda_facts`: vector registers; and the scratch memory, or spilled registers' bytes."""
    code = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"^\s*\.{name}:\s*(\d+)", code, re.MULTILINE)[1])  # type: ignore[index]

    spilled = max(field("private_segment_fixed_size"), 4 * field("vgpr_spill_count"))
    return field("vgpr_count"), spilled, code


def _dots(ttgir: str) -> tuple[int, int]:
    """The matrix products of a kernel, and how many of them no tensor core computes."""
    made = re.findall(r"= (?:tt\.dot|ttng\.warp_group_dot) .*", ttgir)
    return len(made), sum("#ttg.dot_op<{opIdx = 0, parent = #blocked" in one for one in made)


def _shown(value: Any) -> Any:
    return value if isinstance(value, (bool, int, str)) else str(value)


def row_of(one: Found) -> dict[str, Any]:
    """Compile a kernel and read what came of it."""
    import triton

    target, launch = one.target, one.launch
    triton.runtime.driver.set_active(_StandIn(target))
    options = dict(launch.options)
    warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 0)
    row: dict[str, Any] = {
        "triton": triton.__version__,
        "target": name_of(target),
        "kernel": launch.kernel.__name__,
        "dtype": str(launch.args[0].dtype).removeprefix("torch."),
        "constants": {name: _shown(value) for name, value in options.items()},
        "warps": warps,
        "stages": stages,
        "call": one.calls[0],
        "calls": len(one.calls),
        "failed": "",
    }
    start = time.perf_counter()
    try:
        kernel = launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.options)
    except Exception as raised:  # what a compiler raises is of any kind; it is told by `problems`
        error: BaseException = raised
        while error.__cause__ is not None:  # the outer ones only say where the cause came up
            error = error.__cause__
        return row | {"failed": f"{type(error).__name__}: {str(error)[-400:].strip()}"}
    seconds = time.perf_counter() - start
    registers, spilled, code = (_cuda_facts if target.backend == "cuda" else _hip_facts)(kernel)
    dots, slow = _dots(kernel.asm["ttgir"])
    return row | {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": kernel.metadata.shared,
        "tensor_cores": {
            word: count
            for word in _TENSOR_CORES[target.backend]
            if (count := len(re.findall(rf"\b{word}", code)))
        },
        "products": dots,
        "products_without": slow,
        "seconds": round(seconds, 2),
    }


def problems(row: dict[str, Any]) -> list[str]:
    """What no kernel may have; empty where all is well. Spilled registers cost time alone: they are
    listed, and the tests hold them to what is stored."""
    if row["failed"]:
        return [row["failed"]]
    found = []
    limit = SHARED_LIMIT[row["target"]]
    if row["shared_bytes"] > limit:
        found.append(f"{row['shared_bytes']} bytes of shared memory, and there are {limit}")
    if row["products_without"]:
        missing, count = row["products_without"], row["products"]
        found.append(f"{missing} of {count} matrix products are not on tensor cores")
    if row["products"] and not row["tensor_cores"]:
        found.append("no tensor-core instruction")
    return found


_WORK: list[Found] = []  # a forked process has what its parent listed


def _nth(at: int) -> dict[str, Any]:
    return row_of(_WORK[at])


def rows_of(found: list[Found], processes: int = 2) -> Iterator[dict[str, Any]]:
    """Compile kernels in some processes at once; rows come as they are ready, in order."""
    global _WORK
    _WORK = found
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=fork) as pool:
        yield from pool.map(_nth, range(len(found)))


def label(row: dict[str, Any]) -> str:
    """A kernel's row in a few words."""
    constants = row["constants"]
    words = [f"{word}={value}" for word, value in constants.items() if not isinstance(value, bool)]
    words += [word for word, value in constants.items() if value is True]
    return f"{row['triton']} {row['target']} {row['kernel']} {row['dtype']} {' '.join(words)}"


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["triton"], row["target"], row["kernel"], row["call"])


def merged(
    before: dict[str, Any], rows: list[dict[str, Any]], refused: dict[str, str]
) -> dict[str, Any]:
    """A document with rows in it, in the place of those of the same kernel, call and version."""
    version = rows[0]["triton"]
    new = {_identity(row) for row in rows}
    kept = [row for row in before["rows"] if _identity(row) not in new]
    facts = {"commit": manifest.commit(), "versions": manifest.versions() | {"triton": version}}
    return {
        "manifest": before["manifest"] | {version: facts},
        "refused": refused,
        "rows": sorted([*kept, *rows], key=_identity),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--representative", action="store_true", help="each entry of the tables")
    parser.add_argument("--brief", action="store_true", help="what the tests compile")
    parser.add_argument("--only", default="", metavar="WORD", help="calls whose name has it")
    parser.add_argument("--target", default="", help="sm_80, sm_90 or gfx942 alone")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    calls = gpu_calls.representative() if given.representative else gpu_calls.every()
    calls = gpu_calls.brief() if given.brief else calls
    targets = [one for one in TARGETS if given.target in name_of(one)]
    start = time.perf_counter()
    found, refused = listing([one for one in calls if given.only in one.name], targets)
    print(f"{len(found)} kernels, listed in {time.perf_counter() - start:.0f} s", flush=True)
    before: dict[str, Any] = {"manifest": {}, "rows": []}
    if given.json is not None and given.json.exists():
        before = json.loads(given.json.read_text())
    rows, bad = [], 0
    for row in rows_of(found, given.processes):
        rows.append(row)
        wrong = problems(row)
        bad += bool(wrong)
        if wrong:
            print(f"{label(row)}\n    {row['call']}: {'; '.join(wrong)}", flush=True)
        if given.json is not None:  # as it goes: it may be stopped
            store.write(given.json, merged(before, rows, refused))
    for name, why in refused.items():
        print(f"not served: {name}: {why:.120}")
    print(f"{len(rows)} compiled, {bad} with problems, {time.perf_counter() - start:.0f} s")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    main()
