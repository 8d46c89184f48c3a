"""The rows of one cell: all mechanisms on one input of one length, dtype and device.

First every contender runs, interleaved (`measure.Race`); then each is judged, and its row handed
out: the error of its definition, and the arithmetic of the outputs that its timed runs gave. A
mechanism that fails at any point loses its own row only.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import functional, registry
from ..base import MaskedSoftmax, Mechanism
from ..call import AttentionCall
from ..errors import UnsupportedCallError
from ..testing.budgets import Budgets, Verdict
from . import metrics
from .inputs import Sample, Source
from .measure import Contender, Inputs, Race, Trial, decoy, isolated, peak_bytes
from .store import Row, blank_row

_SPOT_ROWS = 16
# Nothing is compiled when these first run.
_NEVER_COMPILED = ("reference", "torch")


@dataclass(frozen=True)
class Settings:
    """What all cells of a run share.

    Attributes:
        impl: the implementation asked for, or "auto".
        approximation: whether definitions are compared with exact attention.
        row_limit: above so many queries, 128 are checked.
    """

    causal: bool
    dtype: torch.dtype
    device: torch.device
    impl: str = "auto"
    backward: bool = False
    runs: int = 7
    warmup: int = 2
    max_seconds: float = 10.0
    approximation: bool = True
    row_limit: int = 4096


@dataclass
class Entry:
    """A line of the table: a mechanism by its spec, or why there is none."""

    label: str
    mechanism: Mechanism | None
    control: bool = False
    failure: str | None = None


@dataclass
class _Runner:
    """An entry on its way through one cell."""

    entry: Entry
    row: Row
    call: AttentionCall | None = None
    impl: str | None = None
    trial: Trial | None = None
    backward: Trial | None = None

    @property
    def mechanism(self) -> Mechanism:
        assert self.entry.mechanism is not None
        return self.entry.mechanism

    def fail(self, reason: str, status: str = "failed") -> None:
        self.row["status"], self.row["reason"] = status, reason
        # No speed without an arithmetic check that passed.
        for name in ("time", "speedup", "select_s", "compile_s", "peak_bytes", "backward"):
            self.row[name] = None


@dataclass
class Cell:
    """One input, length and seed; `run` measures its rows."""

    source: Source
    length: int
    seed: int
    settings: Settings
    entries: Sequence[Entry]
    provenance: dict[str, Any] = field(default_factory=dict)

    def key(self, entry: Entry) -> tuple[Any, ...]:
        """As `store.key` of the entry's row."""
        return entry.label, self.source.name, self.length, self.seed

    def run(
        self,
        emit: Callable[[Row], None],
        tick: Callable[[str], None],
        done: Collection[tuple[Any, ...]] = (),
    ) -> None:
        """Measure the rows that are not `done`, and `emit` each when it is complete."""
        pending = [e for e in self.entries if self.key(e) not in done]
        if not pending:
            return
        place = f"{self.source.name}, {self.length}"
        failures: list[str] = []
        sample = None
        with isolated(failures):
            sample = self.source.make(self.length, self.seed, self.settings.causal)
        if sample is None:
            for entry in pending:
                row = self._row(entry)
                row["status"], row["reason"] = "failed", f"the input failed: {failures[0]}"
                emit(row)
            return
        self.provenance.update(sample.provenance)
        bench = _Bench(sample, self.settings, self.seed, self.length)
        # `full` runs again beside rows that are missing: a speed-up is a ratio of neighbours.
        runners = [
            bench.prepare(entry, self._row(entry))
            for entry in self.entries
            if entry in pending or (entry.control and entry.label == self.entries[0].label)
        ]
        bench.race(runners, lambda text: tick(f"{place}: {text}"))
        for runner in runners:
            if runner.entry in pending:
                tick(f"{place}: judging {runner.entry.label}")
                bench.judge(runner)
                emit(runner.row)

    def _row(self, entry: Entry) -> Row:
        mechanism = entry.mechanism
        row = blank_row(
            mechanism=entry.label,
            input=self.source.name,
            length=self.length,
            seed=self.seed,
            causal=self.settings.causal,
            dtype=str(self.settings.dtype).removeprefix("torch."),
            control=entry.control,
        )
        if mechanism is not None:
            row["nature"] = str(mechanism.nature)
            row["looks_ahead"] = bool(mechanism.looks_ahead)
        return row


class _Bench:
    """One sample, and what is measured on it."""

    def __init__(self, sample: Sample, settings: Settings, seed: int, length: int) -> None:
        self.settings, self.sample = settings, sample
        place = {"device": settings.device, "dtype": settings.dtype}
        q, k, v = (x.to(**place).contiguous() for x in (sample.q, sample.k, sample.v))
        self.inputs: Inputs = (q, k, v)
        self.options: dict[str, Any] = {"causal": settings.causal}
        if sample.scale is not None:
            self.options["scale"] = sample.scale
        self.plain = AttentionCall.make(q, k, v, **self.options)
        n = self.plain.n
        self.rows = metrics.checked_rows(n, seed, settings.row_limit)
        if self.rows is not None:
            self.rows = self.rows.to(settings.device)
        generator = torch.Generator().manual_seed(seed % 2**63)
        self.spot_rows = torch.randperm(n, generator=generator)[:_SPOT_ROWS].sort()[0]
        self.spot_rows = self.spot_rows.to(settings.device)
        grad = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(**place)
        if self.rows is not None:
            # Only the checked rows send a gradient back, so that they alone define dk and dv.
            kept = torch.zeros(n, 1, **place)
            kept[self.rows] = 1
            grad = grad * kept
        self.grad = grad
        self.baseline: _Runner | None = None
        self._exact: metrics.Exact | None = None
        self._mean_error: float | None = None

    # --- running ---------------------------------------------------------------------------------

    def prepare(self, entry: Entry, row: Row) -> _Runner:
        """Find the implementation that will run; a refusal ends the row here."""
        runner = _Runner(entry, row)
        if entry.mechanism is None:
            runner.fail(entry.failure or "it could not be made")
            return runner
        failures: list[str] = []
        with isolated(failures):
            reasons = list(entry.mechanism.refusals(self.plain))
            if reasons:
                runner.fail("; ".join(map(str, reasons)), "unsupported")
            else:
                try:
                    runner.impl = self._choose(runner, self.plain)
                    runner.call = self.plain
                except UnsupportedCallError as error:
                    runner.fail("; ".join(error.reasons), "unsupported")
        if failures:
            runner.fail(failures[0])
        row["impl"] = runner.impl
        if entry.control and entry.label == "full":
            self.baseline = runner
        return runner

    def _choose(self, runner: _Runner, call: AttentionCall) -> str:
        mechanism, impl = runner.mechanism, self.settings.impl
        if runner.entry.control and impl not in (
            one.name for one in functional.candidates(mechanism)
        ):
            impl = "auto"
        return functional.choose(mechanism, call, impl).name

    def _contender(self, runner: _Runner) -> Contender:
        mechanism, impl = runner.mechanism, runner.impl
        assert impl is not None

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # The public call: what it costs is what a user pays.
            return functional.attention(q, k, v, mechanism, impl=impl, **self.options)

        return Contender(runner.entry.label, run)

    def race(self, runners: Sequence[_Runner], tick: Callable[[str], None]) -> None:
        """Time all, interleaved; then forward plus backward, if asked."""
        able = [r for r in runners if r.call is not None]
        for runner, trial in zip(able, self._race(able, None, tick), strict=True):
            runner.trial = trial
        if not self.settings.backward:
            return
        able = [r for r in able if r.trial is not None and r.trial.failure is None]
        able = [r for r in able if self._differentiable(r)]
        trials = self._race(able, self.grad, lambda text: tick(f"backward, {text}"))
        for runner, trial in zip(able, trials, strict=True):
            runner.backward = trial

    def _race(
        self, runners: Sequence[_Runner], grad: Tensor | None, tick: Callable[[str], None]
    ) -> list[Trial]:
        race = Race(
            self.inputs,
            rows=self.rows,
            grad=grad,
            spot_rows=self.spot_rows if grad is None else None,
            runs=self.settings.runs,
            warmup=self.settings.warmup,
            max_seconds=self.settings.max_seconds,
        )
        return race([self._contender(r) for r in runners], tick)

    def _differentiable(self, runner: _Runner) -> bool:
        """Whether the mechanism takes inputs that require gradients; if not, the row says why."""
        failures: list[str] = []
        with isolated(failures):
            call = self.plain.replace(needs_grad=True)
            failures.extend(map(str, runner.mechanism.refusals(call)))
            if not failures:
                self._choose(runner, call)
        if failures:
            runner.row["notes"].append(f"no gradients: {'; '.join(failures)}")
        return not failures

    # --- judging ---------------------------------------------------------------------------------

    @property
    def exact(self) -> metrics.Exact:
        if self._exact is None:
            q, k, v = self.inputs
            self._exact = metrics.Exact(self._cut(q), k, v, self._rows_of(self.plain))
            mean = metrics.MeanOfValues()
            out = Budgets(mean, self._cut(q), k, v, self._rows_of(self.plain)).ref.out
            self._mean_error = metrics.relative_l2(out, self._exact.out)
        return self._exact

    def _cut(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[:, :, self.rows]

    def _rows_of(self, call: AttentionCall) -> AttentionCall:
        return call if self.rows is None else call.take_rows(self.rows)

    def judge(self, runner: _Runner) -> None:
        """Fill in the row."""
        trial, row = runner.trial, runner.row
        if runner.call is None or trial is None:
            return
        row["rows_checked"] = self.plain.n if self.rows is None else len(self.rows)
        failures: list[str] = []
        with isolated(failures):
            q, k, v = self.inputs
            call = self._rows_of(runner.mechanism.with_selection(q, k, self.plain))
            budgets = Budgets(runner.mechanism, self._cut(q), k, v, call)
            if self.settings.approximation:
                self._approximation(runner, call, budgets.ref.out)
            if trial.failure is None:
                self._arithmetic(runner, trial, budgets)
        reason = trial.failure or next(iter(failures), None)
        if reason is not None:
            runner.fail(reason)
        if row["status"] != "ok":
            return
        with isolated(failures):
            self._gradients(runner)
        if failures:
            runner.fail(failures[0])
        if row["status"] == "ok":
            self._speed(runner, trial)
        against = (row["error"] or {}).get("vs_mean_of_values")
        if row["status"] == "ok" and against is not None and against > 1 and not row["control"]:
            row["reason"] = "worse than the mean of the values"

    def _arithmetic(self, runner: _Runner, trial: Trial, budgets: Budgets) -> None:
        assert trial.out is not None
        verdict = budgets.out(trial.out)
        runner.row["arithmetic"] = _record(verdict)
        if not verdict.holds:
            runner.fail(f"arithmetic {verdict} against its own definition")
            return
        if trial.spot is None:
            return
        q, k, v = decoy(self.inputs, trial.spot_number)
        call = runner.mechanism.with_selection(q, k, self.plain).take_rows(self.spot_rows)
        verdict = Budgets(runner.mechanism, q[:, :, self.spot_rows], k, v, call).out(trial.spot)
        if not verdict.holds:
            runner.fail(f"another timed run, on other inputs, is wrong: arithmetic {verdict}")

    def _approximation(self, runner: _Runner, call: AttentionCall, out: Tensor) -> None:
        row, ref = runner.row, self.exact.out
        row["error"] = metrics.approximation(out, ref, self._mean_error)
        row["rows_left_out"] = metrics.row_errors(out, ref)[1]
        if not bool(torch.isfinite(out).all()):
            runner.fail("its definition is not finite")
            return
        self._plugin_metrics(row, out, ref, call)
        if self.sample.needle_rows is not None:
            row["metrics"]["needle_found"] = self._needle_found(out, ref)
        mechanism = runner.mechanism
        if mechanism.nature not in ("exact", "masked_softmax"):
            row["density"] = self._density(mechanism, call, None)
            return
        if mechanism.nature != "exact" and type(mechanism).mask is Mechanism.mask:
            row["notes"].append("it names no mask, so that its retained mass is not known")
            return
        inside = self.exact.inside(mechanism, call, out)
        row["density"] = self._density(mechanism, call, inside)
        row["retained_mass"] = {
            "p5": metrics.finite_or_none(metrics.percentile(inside.mass, 5)),
            "p50": metrics.finite_or_none(metrics.percentile(inside.mass, 50)),
        }
        row["identity"] = {"residual": inside.residual, "tolerance": inside.tolerance}
        if mechanism.nature != "exact":
            oracle = metrics.relative_l2(inside.oracle, ref)
            row["oracle_rel_l2"] = metrics.finite_or_none(oracle)
        if not inside.residual <= inside.tolerance:
            runner.fail(
                "its definition and its mask contradict each other: O - O' differs from (1 - m) "
                f"(mean outside - mean inside) by {inside.residual:.3g}, and float64 explains "
                f"{inside.tolerance:.3g}"
            )

    def _density(
        self, mechanism: Mechanism, call: AttentionCall, inside: metrics.Inside | None
    ) -> float | None:
        """Pairs used over pairs allowed: of all rows where that is cheap, else of those checked."""
        if inside is None:
            return mechanism.density(call)
        static = isinstance(mechanism, MaskedSoftmax) and not mechanism.is_dynamic
        drawn = static and type(mechanism).layout is not MaskedSoftmax.layout
        if self.rows is not None and drawn:
            return mechanism.density(self.plain)
        return inside.used / inside.allowed if inside.allowed else 0.0

    def _plugin_metrics(self, row: Row, out: Tensor, ref: Tensor, call: AttentionCall) -> None:
        for name, function in registry.metrics().items():
            failures: list[str] = []
            value = None
            with isolated(failures):
                value = metrics.finite_or_none(float(function(out.clone(), ref.clone(), call)))
            row["metrics"][name] = value
            if failures:
                row["notes"].append(f"metric {name}: {failures[0]}")

    def _needle_found(self, out: Tensor, ref: Tensor) -> float | None:
        """The share of the queries after the needle whose output is mostly that of exact attention:
        a row error below one half."""
        index = torch.arange(self.plain.n) if self.rows is None else self.rows.cpu()
        assert self.sample.needle_rows is not None
        late = (index >= self.sample.needle_rows).to(out.device)
        errors, _ = metrics.row_errors(out[:, :, late], ref[:, :, late])
        return float((errors < 0.5).mean()) if errors.size else None

    def _gradients(self, runner: _Runner) -> None:
        trial, row = runner.backward, runner.row
        if trial is None:
            return
        if trial.failure is not None:
            runner.fail(f"backward: {trial.failure}")
            return
        assert trial.grads is not None
        q, k, v = self.inputs
        call = self._rows_of(runner.mechanism.with_selection(q, k, self.plain))
        call = call.replace(needs_grad=True)
        seeds = (self._cut(self.grad), None)
        found = Budgets(runner.mechanism, self._cut(q), k, v, call, seeds).grads(trial.grads)
        row["gradients"] = {x: _record(one) for x, one in zip("qkv", found, strict=True)}
        for name, verdict in zip("qkv", found, strict=True):
            if not verdict.holds:
                runner.fail(f"gradient of {name}: {verdict}")
                return

    # --- speed -----------------------------------------------------------------------------------

    def _speed(self, runner: _Runner, trial: Trial) -> None:
        row = runner.row
        row["time"] = trial.summary()
        row["speedup"] = self._speedup(trial, "trial")
        run = self._contender(runner).run
        q, k, v = self.inputs
        failures: list[str] = []
        with isolated(failures), torch.no_grad():
            row["select_s"] = self._select_s(runner.mechanism)
            if runner.impl not in _NEVER_COMPILED and trial.first_s is not None:
                row["compile_s"] = max(0.0, trial.first_s - statistics.median(trial.seconds))
            row["peak_bytes"] = peak_bytes(lambda: run(q, k, v), q.device)
        backward = runner.backward
        if backward is not None:
            row["backward"] = {
                "time": backward.summary(),
                "speedup": self._speedup(backward, "backward"),
                "peak_bytes": None,
            }
            leaves = [x.detach().clone().requires_grad_() for x in self.inputs]

            def both() -> Any:
                out = run(*leaves)
                return torch.autograd.grad(out, leaves, self.grad, allow_unused=True)

            with isolated(failures), torch.enable_grad():
                row["backward"]["peak_bytes"] = peak_bytes(both, q.device)
        if failures:
            # The run that is measured for memory is a run like any other.
            runner.fail(failures[0])

    def _speedup(self, trial: Trial, which: str) -> float | None:
        """Full's median over this one's, of the same race."""
        full = None if self.baseline is None else getattr(self.baseline, which)
        theirs, mine = None if full is None else full.summary(), trial.summary()
        if theirs is None or mine is None or not mine["median_s"] > 0:
            return None
        return float(theirs["median_s"] / mine["median_s"])

    def _select_s(self, mechanism: Mechanism) -> float | None:
        """How much of a call's time goes into the selection, for a dynamic mechanism."""
        if not getattr(mechanism, "is_dynamic", False):
            return None
        times = []
        for number in range(min(3, self.settings.runs)):
            q, k, _ = decoy(self.inputs, number)
            _synchronize(q.device)
            start = time.perf_counter()
            mechanism.with_selection(q, k, self.plain)
            _synchronize(q.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _record(verdict: Verdict) -> Mapping[str, float | None]:
    return {
        name: value if math.isfinite(value) else None
        for name, value in (("error", verdict.error), ("budget", verdict.budget))
    }
