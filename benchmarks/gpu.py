"""`make gpu`: on a GPU, are the kernels right, and how fast; without one, do they compile.

    python benchmarks/gpu.py [--minutes 8] [--triton FOLDER] [--json PATH] [--commit NAME]

Every row goes to a journal beside the JSON file as it finishes: a run that is stopped, or that has
no time left, is gone on with by the next: it then ends with status 3. Without a GPU it says so, and
ends well after compiling.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gpu_bench
import gpu_calls
import gpu_goals
import gpu_page
import torch
from gpu_bench import Roof

import sparseattn as sa
from sparseattn.harness import manifest, store
from sparseattn.testing import Budgets

JSON = Path(__file__).parent / "results" / "gpu.json"
_REFUSED = ("UnsupportedCallError", "InvalidInputError", "NotImplementedError")
UNFINISHED = 3  # the exit status of a run that had no time left


def checked(call: gpu_calls.Call, device: str, impl: str = "triton") -> dict[str, Any]:
    """Run a call and judge its output and gradients against the definition in float64."""
    row: dict[str, Any] = {"call": call.name, "problem": "", "worst": None}
    try:
        out, *grads = call.run(device, impl)
    except Exception as error:  # a kernel that cannot run is a problem of its own row
        return row | {"problem": f"{type(error).__name__}: {error}"[:300]}
    made, grad = call.make(device)
    mech = sa.mechanism(call.mech) if isinstance(call.mech, str) else call.mech
    q, k, v = (made.pop(word) for word in "qkv")
    if call.steps:
        made.pop("key_mask", None)  # a cache is filled without holes
        before = sa.attention(q, k, v, mech, impl="torch", **made)[:, :, : -call.steps]
        out = torch.cat([before, out], dim=2)  # the steps are its last rows
    seeds = (grad.to(device), None) if call.backward else None
    budgets = Budgets(mech, q, k, v, sa.AttentionCall.make(q, k, v, **made), seeds)
    verdicts = {"out": budgets.out(out)}
    if call.backward:
        verdicts |= dict(zip(("dq", "dk", "dv"), budgets.grads(grads), strict=True))
    wrong = [f"{word}: {verdict}" for word, verdict in verdicts.items() if not verdict.holds]
    worst = max(one.error / one.budget if one.budget else 0.0 for one in verdicts.values())
    return row | {"problem": "; ".join(wrong), "worst": worst}


def check_all(
    calls: list[gpu_calls.Call], device: str, done: set[str], late: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """A row of each call that is not done and that Triton serves, until it is late.

    Most of the time is compiling, which processes beside each other share.
    """
    left = [call for call in calls if call.name not in done]
    workers = min(14, max(1, (os.cpu_count() or 2) - 1), max(1, len(left)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_alone) as pool:
        waiting = [pool.submit(checked, call, device) for call in left]
        for future in as_completed(waiting):
            row = future.result()
            # What it refuses beforehand is no configuration of a kernel.
            if not row["problem"].startswith(_REFUSED):
                yield row
            if late():
                pool.shutdown(cancel_futures=True)
                return


def _alone() -> None:
    torch.set_num_threads(1)


def timer() -> gpu_bench.Timer:
    """Milliseconds of a run on the GPU: the median, the second cache emptied before each."""
    from triton.testing import do_bench

    return lambda run: float(do_bench(run, warmup=5, rep=25, return_mode="median"))


def session(
    path: Path,
    device: str,
    roof: Callable[[], Roof],
    clock: gpu_bench.Timer,
    late: Callable[[], bool],
    calls: list[gpu_calls.Call],
    shapes: list[gpu_bench.Shape],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Check, then measure; rows go to the journal `PATH.part`, and all to the document at the end.

    Both are gone on with where the journal is of the same commit and device.
    """
    part = Path(f"{path}.part")
    try:
        journal = store.Journal(part, facts, resume=True, fields=("kind", "call"))
    except sa.InvalidInputError as error:
        print(f"{error}: it is begun anew")
        journal = store.Journal(part, facts, fields=("kind", "call"))
    kept = [*journal.rows]

    def of(kind: str) -> list[dict[str, Any]]:
        return [row for row in kept if row["kind"] == kind]

    def take(kind: str, row: dict[str, Any]) -> None:
        kept.append({"kind": kind, **row})
        journal.add(kept[-1])

    def names(kind: str) -> set[str]:
        return {row["call"] for row in of(kind)}

    try:
        if not of("roof"):
            take("roof", {"call": "roof", **roof()._asdict()})
        top = Roof(*(of("roof")[0][word] for word in Roof._fields))
        for row in check_all(calls, device, names("check"), late):
            take("check", row)
            if row["problem"]:
                print(f"WRONG {row['call']}: {row['problem']}", flush=True)
        whole = not late()
        for name, find in gpu_goals.facts(device).items():
            if name not in names("fact") and not late():
                take("fact", {"call": name, "value": gpu_goals.found(find)})
                print(f"{name}: {of('fact')[-1]['value']}", flush=True)
        for row in gpu_bench.measure_all(shapes, top, clock, device, names("time"), late):
            take("time", row)
            said = row["reason"] or f"{row['ms']:.3f} ms, {row['share']:.0%} of the roof"
            print(f"{row['call']}: {said}", flush=True)
    finally:
        journal.close()
    whole = whole and len(names("time")) == len(shapes)
    document = {
        "manifest": facts,
        "complete": bool(whole),
        "roof": top._asdict(),
        "checks": of("check"),
        "facts": {row["call"]: row["value"] for row in of("fact")},
        "rows": [row for row in of("time") if row["ms"] is not None],
        "not_timed": {row["call"]: row["reason"] for row in of("time") if row["ms"] is None},
    }
    store.write(path, document)
    if whole:
        part.unlink()
    return document


def compiled() -> int:
    """The compile-only part, in a process of its own; its exit status."""
    script = Path(__file__).with_name("gpu_compile.py")
    workers = str(min(8, os.cpu_count() or 1))
    words = [sys.executable, str(script), "--representative", "--processes", workers]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(x for x in sys.path if x)}
    return subprocess.run(words, env=env).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--triton", type=Path, help="a folder, for an environment without triton")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument(
        "--commit", default=manifest.commit(), help="of a checkout that came without its history"
    )
    given = parser.parse_args()
    start = time.monotonic()
    if importlib.util.find_spec("triton") is None and given.triton is not None:
        sys.path.append(str(given.triton))
    if not torch.cuda.is_available():
        status = compiled()
        print("no GPU is here: nothing was run or measured beyond compiling")
        return status
    budget = 60 * given.minutes
    clock = timer()
    facts = {
        "device": torch.cuda.get_device_name(),
        "commit": given.commit,
        "versions": manifest.versions(),
    }

    def late() -> bool:
        return time.monotonic() - start > 0.93 * budget  # a row takes seconds

    document = session(
        given.json,
        "cuda",
        lambda: gpu_bench.roof(clock, "cuda"),
        clock,
        late,
        gpu_calls.every(),
        gpu_bench.shapes(),
        facts,
    )
    for goal in gpu_goals.goals(document):
        print(f"{'met' if goal.met else 'short'}: {goal.goal}: {goal.asked}, {goal.found}")
    gpu_page.main()
    wrong = [row for row in document["checks"] if row["problem"]]
    print(f"{len(document['checks'])} checked, {len(wrong)} wrong; {len(document['rows'])} timed")
    if wrong:
        return 1
    if not document["complete"]:
        print("time is up: run it again to go on")
        return UNFINISHED
    return 0


if __name__ == "__main__":
    sys.exit(main())
