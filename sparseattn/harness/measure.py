"""Times and peak memory of calls, and outputs of timed runs to check them by.

The times of all contenders are taken in one process, after warm-up, round by round in shuffled
order, so that drift of the machine meets all alike. Every run has inputs of its own, and one run of
each contender, at a place nobody can foresee, has the inputs that its arithmetic is checked on:
what is checked is what was timed.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

_clock = time.perf_counter  # bound now: no plugin can stop it later
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass
class Contender:
    """Something to time: `run(q, k, v) -> out [B, Hq, N, Dv]`, without a warm cache of results."""

    label: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Trial:
    """What the runs of one contender gave.

    Attributes:
        seconds: one number a timed run.
        first_s: the first warm-up call.
        out: the output of the checked run (its checked rows), as it was when the clock stopped.
        grads: dq (its checked rows), dk, dv of the checked run, where gradients were wanted.
        spot: output rows of a run on other inputs, and `spot_number`, which.
        failure: why there are no times, or None.
    """

    seconds: list[float] = field(default_factory=list)
    first_s: float | None = None
    out: Tensor | None = None
    grads: Inputs | None = None
    spot: Tensor | None = None
    spot_number: int = 0
    failure: str | None = None
    held: list[tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=list)

    def summary(self) -> dict[str, Any] | None:
        """Median, interquartile range and number of runs; None for a failed trial."""
        if self.failure is not None or not self.seconds:
            return None
        low, median, high = np.percentile(self.seconds, [25, 50, 75])
        return {
            "median_s": float(median),
            "iqr_s": float(high - low),
            "runs": len(self.seconds),
        }


def say(error: BaseException) -> str:
    """One line about an exception, of bounded length."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its message cannot be shown)"
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


@contextlib.contextmanager
def isolated(failures: list[str]) -> Iterator[None]:
    """Whatever the body raises, `SystemExit` included but not `KeyboardInterrupt`, becomes a reason
    in `failures`; global state of torch that it changed is put back."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    grad = torch.is_grad_enabled()
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        failures.append(say(error))
        # The traceback holds the tensors of the frames that failed.
        error.__traceback__ = None
        del error
        gc.collect()
        if torch.cuda.is_available():
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


def decoy(inputs: Inputs, number: int) -> Inputs:
    """Other inputs of the same kind: rolled along the sequence, the values signed and scaled.

    Outputs differ from those on `inputs` and between numbers, so that a replay shows.
    """
    sign = -1.0 if number % 2 else 1.0
    factor = sign * (1.0 + (number % 7 + 1) / 8)
    n, m = inputs[0].shape[2], inputs[1].shape[2]
    shift = 1 + number * 37
    q = inputs[0].roll(shift % max(n, 1), dims=2)
    k = inputs[1].roll(shift % max(m, 1), dims=2)
    return q, k, inputs[2].roll(shift % max(m, 1), dims=2) * factor


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """The checked rows of `[B, H, N, D]`, never sharing memory with x."""
    return x.detach().clone() if rows is None else x.detach()[:, :, rows.to(x.device)]


def misshapen(out: object, inputs: Inputs) -> str | None:
    """Why `out` has not the form of an output of a call on `inputs`; None if it has."""
    q, _, v = inputs
    shape = (*q.shape[:3], v.shape[3])
    if type(out) is not Tensor:
        return f"it returned {type(out).__name__}; expected a plain torch.Tensor"
    if tuple(out.shape) != shape or out.dtype != q.dtype or out.device != q.device:
        return (
            f"it returned {out.dtype} {list(out.shape)} on {out.device}; expected {q.dtype} "
            f"{list(shape)} on {q.device}"
        )
    return None


class Race:
    """Interleaved timed runs of some contenders on one call.

    Args:
        inputs: q, k, v as given: the inputs of the checked run.
        rows: int64 index of the queries to keep of checked outputs, or None for all.
        grad: gradient of the output for the checked run; with it a run is forward plus backward.
        spot_rows: rows to keep of a run on other inputs, or None for no such check.
        max_seconds: a contender that has run this long, three times at least, runs no more, except
            to be checked.
    """

    def __init__(
        self,
        inputs: Inputs,
        *,
        rows: Tensor | None = None,
        grad: Tensor | None = None,
        spot_rows: Tensor | None = None,
        runs: int = 7,
        warmup: int = 2,
        max_seconds: float = 4.0,
        random_state: random.Random | None = None,
    ) -> None:
        self.inputs, self.rows, self.grad, self.spot_rows = inputs, rows, grad, spot_rows
        self.runs, self.warmup, self.max_seconds = max(runs, 1), max(warmup, 1), max_seconds
        # Not seeded by default: a contender must not know which of its runs is checked.
        self.random = random.SystemRandom() if random_state is None else random_state
        self.number = 0

    def __call__(
        self, contenders: Sequence[Contender], tick: Callable[[str], None] | None = None
    ) -> list[Trial]:
        """Run them all; one trial each, in the same order."""
        trials = [Trial() for _ in contenders]
        for contender, trial in zip(contenders, trials, strict=True):
            if tick is not None:
                tick(f"warming up {contender.label}")
            for _ in range(self.warmup):
                if trial.first_s is None or trial.first_s < self.max_seconds / 4:
                    self._run(contender, trial, "warmup")
        plans = [self._plan() for _ in contenders]
        for number in range(self.runs):
            if tick is not None:
                tick(f"timing, round {number + 1} of {self.runs}")
            for at in self.random.sample(range(len(contenders)), len(contenders)):
                trial, plan = trials[at], plans[at]
                kind = plan.pop(number, "timed")
                slow = len(trial.seconds) >= 3 and sum(trial.seconds) > self.max_seconds
                if slow and kind == "timed":
                    continue
                self._run(contenders[at], trial, kind)
        for trial in trials:
            trial.held.clear()
        return trials

    def _plan(self) -> dict[int, str]:
        """Which round has the checked run, and which the run on other inputs that is checked."""
        checked = self.random.randrange(self.runs)
        plan = {checked: "checked"}
        if self.spot_rows is not None and self.runs > 1:
            plan[self.random.choice([r for r in range(self.runs) if r != checked])] = "spot"
        return plan

    def _run(self, contender: Contender, trial: Trial, kind: str) -> None:
        if trial.failure is not None:
            return
        self.number += 1
        given = self.inputs if kind == "checked" else decoy(self.inputs, self.number)
        # Own storage: the inputs of this run are nobody else's.
        given = tuple(x.detach().clone() for x in given)  # type: ignore[assignment]
        if self.grad is not None:
            given = tuple(x.requires_grad_() for x in given)  # type: ignore[assignment]
        before = [(x.detach().clone(), x._version) for x in given]
        failures: list[str] = []
        with isolated(failures):
            seconds, out, grads = self._timed(contender, given, kind)
            problem = misshapen(out, given)
            kept = None
            rows = self.rows if kind == "checked" else self.spot_rows
            if problem is None and kind in ("checked", "spot"):
                kept = take(out, rows)  # at once: what comes later is not what was timed
            problem = problem or self._faults(trial, given, before, out)
            if problem is not None:
                failures.append(problem)
            elif kind != "warmup":
                trial.seconds.append(seconds)
            elif trial.first_s is None:
                trial.first_s = seconds
            if problem is None and kept is not None:
                self._keep(trial, kind, out, kept, grads)
        if failures:
            trial.failure = failures[0]
            trial.held.clear()

    def _timed(
        self, contender: Contender, given: Inputs, kind: str
    ) -> tuple[float, Tensor, tuple[Tensor | None, ...] | None]:
        device = given[0].device
        grad = self.grad
        if grad is not None and kind != "checked":
            grad = grad.roll(self.number, dims=2)
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.set_grad_enabled(grad is not None):
                wait(device)
                start = _clock()
                out = contender.run(*given)
                grads = None
                if grad is not None:
                    grads = torch.autograd.grad(out, given, grad, allow_unused=True)
                wait(device)
                return _clock() - start, out, grads
        finally:
            if collecting:
                gc.enable()

    def _keep(
        self,
        trial: Trial,
        kind: str,
        out: Tensor,
        kept: Tensor,
        grads: tuple[Tensor | None, ...] | None,
    ) -> None:
        rows = self.rows if kind == "checked" else self.spot_rows
        trial.held.append((out.detach(), rows, kept))
        if kind == "spot":
            trial.spot, trial.spot_number = kept, self.number
            return
        trial.out = kept
        if grads is not None:
            full = [
                torch.zeros_like(x) if g is None else g.detach().clone()
                for g, x in zip(grads, self.inputs, strict=True)
            ]
            trial.grads = take(full[0], self.rows), full[1], full[2]

    @staticmethod
    def _faults(
        trial: Trial, given: Inputs, before: list[tuple[Tensor, int]], out: Tensor
    ) -> str | None:
        """What a run did wrong, apart from its numbers."""
        if not bool(torch.isfinite(out).all()):
            return "its output is not finite"
        for name, x, (old, version) in zip("qkv", given, before, strict=True):
            if x._version != version or not torch.equal(x.detach(), old):
                return f"it modified its input {name}"
        # An output that was returned before this run must not have been written into by it.
        changed = any(not torch.equal(take(whole, rows), kept) for whole, rows, kept in trial.held)
        trial.held.clear()
        return "a later call changed an output that it had returned" if changed else None


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Extra memory that one call holds at its peak, beyond what was there before, its result
    included; call it after a warm-up.

    On CUDA: the allocator's high-water mark. On Linux with glibc: the growth of the resident set
    (`VmHWM`), after free memory was given back to the system; it counts whatever touched memory,
    scratch of C++ kernels too, in pages, and lags by up to a few hundred KiB. Elsewhere: what
    torch's CPU allocator gave out, from the profiler's events, which does not see memory of other
    origin. Memory that an implementation keeps from call to call counts in none of them.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    return _resident_peak(run) if _can_reset_peak() else _allocator_peak(run)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _trim_and_reset() -> None:
    import ctypes

    # Free pages that the heap kept would be used again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _can_reset_peak() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        _trim_and_reset()
        # Some kernels accept the write and do nothing.
        return _status("VmHWM") <= _status("VmRSS") + 2**22
    except (OSError, AttributeError, ValueError):
        return False


def _resident_peak(run: Callable[[], Any]) -> int:
    _trim_and_reset()
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _allocator_peak(run: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    del result
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak
