"""What is compared: mechanisms and controls, what serves each, and one row's measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import choice, registry
from ..base import KernelizedLinear, MaskedSoftmax, Mechanism
from ..call import AttentionCall
from ..errors import InvalidInputError, UnsupportedCallError
from ..testing.budgets import Budgets, Verdict
from .measure import Trial, decoy, isolated, peak_bytes
from .metrics import (
    MeanOfValues,
    approximation,
    by_head,
    checked_rows,
    finite_or_none,
    percentile,
    relative_l2,
    row_errors,
)
from .setting import Setting
from .store import new_row

# Implementations that compile at their first call, beside those that say so (`compiles = True`).
_COMPILED = ("native", "triton", "flex")
# Dense pairs that a density may count; more are sampled by rows.
_ALIKE = 16  # runs beside one that is judged by few rows
_MOST_PAIRS = 2**31


@dataclass
class Entry:
    """One row in the making.

    Attributes:
        impl: the implementation asked for.
        control: shown beside the others for comparison.
        row: the record; its status is None until it is known.
        taken: the name of the implementation that `impl` came to, forward and with gradients.
    """

    mechanism: Mechanism
    impl: str = "auto"
    control: bool = False
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether nothing has failed so far."""
        return self.row["status"] is None

    def close(self, status: str, reason: str = "") -> None:
        """Set the status; a row that is not ok shows no speed."""
        self.row["status"], self.row["reason"] = status, reason
        if status != "ok":
            for name in ("time", "speedup", "peak_bytes", "select_s", "compile_s", "backward"):
                self.row[name] = None


def blank_row(mechanism: Mechanism, control: bool, **given: Any) -> dict[str, Any]:
    """A row of this mechanism whose status is not known yet."""
    notes = []
    if mechanism.nature == "different_function" and not isinstance(mechanism, MeanOfValues):
        notes.append("another function: pretrained softmax weights need training for it")
    if mechanism.looks_ahead:
        notes.append("looks ahead: fit for prefill only")
    return new_row(
        mechanism=repr(mechanism),
        nature=mechanism.nature,
        looks_ahead=bool(mechanism.looks_ahead),
        control=control,
        notes=notes,
        **given,
    )


def admit(entry: Entry, call: AttentionCall) -> None:
    """Close the rows of calls that cannot be served."""
    failures: list[str] = []
    with isolated(failures):
        try:
            refusals = list(entry.mechanism.refusals(call))
            if refusals:
                raise UnsupportedCallError("; ".join(refusals), refusals)
            taken = choice.choose(entry.mechanism, call, entry.impl)
        except UnsupportedCallError as error:
            entry.close("unsupported", "; ".join(error.reasons))
        except InvalidInputError as error:  # it has no implementation of this name
            entry.close("unsupported", str(error))
        else:
            entry.row["impl"] = taken.name
    if failures:
        entry.close("failed", failures[0])


def admit_backward(entry: Entry, call: AttentionCall) -> bool:
    """Whether gradients can be had; if not, the row says why."""
    call = call.replace(needs_grad=True)
    failures: list[str] = []
    record: dict[str, Any] = dict.fromkeys(
        ("impl", "arithmetic", "time", "speedup", "baseline_s", "peak_bytes")
    )
    entry.row["backward"] = {"status": None, "reason": ""} | record
    with isolated(failures):
        try:
            refusals = list(entry.mechanism.refusals(call))
            if refusals:
                raise UnsupportedCallError("; ".join(refusals), refusals)
            taken = choice.choose(entry.mechanism, call, entry.impl)
            entry.row["backward"]["impl"] = taken.name
            return True
        except UnsupportedCallError as error:
            entry.row["backward"] |= {"status": "unsupported", "reason": "; ".join(error.reasons)}
    if failures:
        entry.row["backward"] |= {"status": "failed", "reason": failures[0]}
    return False


def judge(
    entry: Entry,
    setting: Setting,
    trial: Trial,
    backward: Trial | None,
    baselines: tuple[float | None, float | None],
    runs: int,
) -> None:
    """Fill in a row from its timed runs: errors first, speed only if the arithmetic holds.

    Args:
        backward: the runs with gradients, or None where there were none.
        baselines: full's median in the same rounds, forward and with gradients.
    """
    failures: list[str] = []
    with isolated(failures):
        _judge(entry, setting, trial, backward, baselines, runs)
    if failures:
        entry.close("failed", failures[0])


def _judge(
    entry: Entry,
    setting: Setting,
    trial: Trial,
    backward: Trial | None,
    baselines: tuple[float | None, float | None],
    runs: int,
) -> None:
    mechanism, row = entry.mechanism, entry.row
    q, k, v = setting.inputs
    # Once, from the whole inputs as given: the rows that are checked take their part of it.
    call = mechanism.with_selection(q, k, setting.call)
    part = setting.part_of(call)
    with_gradients = backward is not None and backward.grads is not None
    seeds = None
    if with_gradients:
        assert setting.grad is not None
        seeds = (setting.part(setting.grad), None)
        part = part.replace(needs_grad=True)
    budgets = Budgets(mechanism, setting.part(q), k, v, part, seeds)
    part = part.replace(needs_grad=False)
    _approximation(entry, setting, call, part, budgets.ref.out)
    if not bool(torch.isfinite(budgets.ref.out).all()):
        return entry.close("failed", "its definition in float64 is not finite on this input")
    if trial.failure is not None or trial.out is None:
        return entry.close("failed", trial.failure or "no run of it could be checked")
    verdict = budgets.out(trial.out)
    row["arithmetic"] = _record(verdict)
    if not verdict.holds:
        return entry.close("failed", _over(f"{row['impl']}: arithmetic error", verdict))
    spot = _spot(mechanism, setting, trial)
    if spot is not None and not spot.holds:
        return entry.close("failed", _over("arithmetic error on other inputs", spot))
    if backward is not None:
        reason = _gradients(row, backward, budgets, with_gradients)
        if reason:
            return entry.close("failed", reason)
    _speed(entry, setting, trial, baselines[0], runs)
    if backward is not None:
        _backward_speed(entry, setting, backward, baselines[1])
    entry.close("ok")
    return None


def _record(verdict: Verdict) -> dict[str, float | None]:
    return {"error": finite_or_none(verdict.error), "budget": finite_or_none(verdict.budget)}


def _over(what: str, verdict: Verdict) -> str:
    return (
        f"{what} {verdict.error:.3g} is over its budget {verdict.budget:.3g}: what a timed run "
        "gave is not the mechanism's own definition"
    )


def _approximation(
    entry: Entry, setting: Setting, call: AttentionCall, part: AttentionCall, out: Tensor
) -> None:
    """Everything about the definition: error, retained mass, oracle, density, metrics."""
    mechanism, row, exact = entry.mechanism, entry.row, setting.exact
    row["error"] = approximation(out, exact.out, setting.mean_error)
    row["heads"] = by_head(out, exact.out, setting.heads)
    against = row["error"]["vs_mean_of_values"]
    if against is not None and against > 1 and not isinstance(mechanism, MeanOfValues):
        row["notes"].append("worse than the mean of the values")
    row["density"] = finite_or_none(_density(entry, setting, call))
    row["metrics"] = _metrics(row, out, exact.out, part)
    if setting.needle_rows is not None:
        row["metrics"]["needle_found"] = _needle_found(setting, out, exact.out)
    masked = type(mechanism).mask is not Mechanism.mask
    if mechanism.nature not in ("exact", "masked_softmax") or not masked:
        return
    sparse = mechanism.nature == "masked_softmax"
    inside = exact.inside(mechanism, part, out, oracle=sparse)
    if not inside.consistent:
        raise UnsupportedCallError(
            "its definition and its mask disagree: O - O' = (1 - m)(mean outside - mean inside) "
            f"is off by {inside.residual:.3g}, where float64 leaves {inside.tolerance:.3g}"
        )
    row["retained_mass"] = {
        "p5": finite_or_none(percentile(inside.mass, 5)),
        "p50": finite_or_none(percentile(inside.mass, 50)),
    }
    if inside.oracle is not None:
        row["oracle_rel_l2"] = finite_or_none(relative_l2(inside.oracle, exact.out))


def _density(entry: Entry, setting: Setting, call: AttentionCall) -> float:
    mechanism = entry.mechanism
    if type(mechanism).mask is Mechanism.mask and type(mechanism).density is Mechanism.density:
        return 1.0 if isinstance(mechanism, (KernelizedLinear, MeanOfValues)) else _dense(call)
    counted = isinstance(mechanism, MaskedSoftmax) and not mechanism.is_dynamic
    if counted or call.batch * call.q_heads * call.n * call.m <= _MOST_PAIRS:
        return mechanism.density(call)
    rows = checked_rows(call.n, setting.seed, limit=0, count=512)
    entry.row["notes"].append("density of 512 rows")
    return mechanism.density(call.take_rows(rows))  # type: ignore[arg-type]


def _dense(call: AttentionCall) -> float:
    """All pairs that the call allows, if it allows any."""
    return 1.0 if call.n and call.m else 0.0


def _metrics(
    row: dict[str, Any], out: Tensor, ref: Tensor, call: AttentionCall
) -> dict[str, float | None]:
    """The metrics that plugins registered; one that fails is null and leaves a note."""
    found: dict[str, float | None] = {}
    functions: Mapping[str, Callable[..., Any]] = registry.metrics()
    for name, function in functions.items():
        failures: list[str] = []
        found[name] = None
        with isolated(failures):
            found[name] = finite_or_none(float(function(out.clone(), ref.clone(), call)))
        if failures:
            row["notes"].append(f"metric {name}: {failures[0]}")
    return found


def _needle_found(setting: Setting, out: Tensor, ref: Tensor) -> float | None:
    """The share of the queries after the needle with a row error below one half: theirs is mostly
    the output of exact attention."""
    index = torch.arange(setting.call.n) if setting.rows is None else setting.rows.cpu()
    assert setting.needle_rows is not None
    late = (index >= setting.needle_rows).to(out.device)
    errors, _ = row_errors(out[:, :, late], ref[:, :, late])
    return float((errors < 0.5).mean()) if errors.size else None


def _spot(mechanism: Mechanism, setting: Setting, trial: Trial) -> Verdict | None:
    """The verdict on a few rows of a run on other inputs."""
    if trial.spot is None:
        return None

    def budgets(number: int) -> Budgets:
        q, k, v = decoy(setting.inputs, number)
        call = mechanism.with_selection(q, k, setting.call).take_rows(setting.spot_rows)
        return Budgets(mechanism, q[:, :, setting.spot_rows], k, v, call)

    verdict = budgets(trial.spot_number).out(trial.spot)
    if verdict.holds:
        return verdict
    # On so few rows the naive computation may come out well by luck: runs on inputs alike tell what
    # it usually misses by. A replayed output is wrong by far more.
    alike = [budgets(trial.spot_number + step) for step in range(1, 1 + _ALIKE)]
    usual = max(one.out(one.ref.out).budget for one in alike)
    return verdict._replace(budget=max(verdict.budget, usual))


def _gradients(
    row: dict[str, Any], trial: Trial, budgets: Budgets, with_gradients: bool
) -> str | None:
    """Judge dq, dk and dv; returns why the row fails, or None."""
    record = row["backward"]
    if trial.failure is not None or not with_gradients:
        return f"backward: {trial.failure or 'no run of it could be checked'}"
    assert trial.grads is not None
    verdicts = dict(zip(("dq", "dk", "dv"), budgets.grads(trial.grads), strict=True))
    record["arithmetic"] = {name: _record(verdict) for name, verdict in verdicts.items()}
    for name, verdict in verdicts.items():
        if not verdict.holds:
            return _over(f"{record['impl']}: arithmetic error of {name}", verdict)
    if trial.out is not None and not budgets.out(trial.out).holds:
        return _over("arithmetic error with gradients", budgets.out(trial.out))
    return None


def _speed(entry: Entry, setting: Setting, trial: Trial, baseline: float | None, runs: int) -> None:
    mechanism, row = entry.mechanism, entry.row
    row["time"] = trial.summary()
    assert row["time"] is not None
    median = row["time"]["median_s"]
    row["baseline_s"] = baseline
    row["speedup"] = None if baseline is None or median <= 0 else baseline / median
    row["peak_bytes"] = _peak(entry, setting, gradients=False)
    if isinstance(mechanism, MaskedSoftmax) and mechanism.is_dynamic:
        row["select_s"] = _selection_time(mechanism, setting, runs)
    named = [i for i in choice.candidates(mechanism) if i.name == row["impl"]]
    compiles = row["impl"] in _COMPILED or any(getattr(i, "compiles", False) for i in named)
    if compiles and trial.first_s is not None:
        row["compile_s"] = max(0.0, trial.first_s - median)


def _backward_speed(entry: Entry, setting: Setting, trial: Trial, baseline: float | None) -> None:
    record = entry.row["backward"]
    record["time"] = trial.summary()
    assert record["time"] is not None
    median = record["time"]["median_s"]
    record["baseline_s"] = baseline
    record["speedup"] = None if baseline is None or median <= 0 else baseline / median
    record["peak_bytes"] = _peak(entry, setting, gradients=True)
    record["status"] = "ok"


def _selection_time(mechanism: MaskedSoftmax, setting: Setting, runs: int) -> float:
    """Median time of the choice alone; it is part of `time`."""
    seconds = []
    for number in range(max(1, min(runs, 5))):
        q, k, _ = decoy(setting.inputs, number)
        start = time.perf_counter()
        mechanism.with_selection(q, k, setting.call)
        if q.device.type == "cuda":
            torch.cuda.synchronize(q.device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _peak(entry: Entry, setting: Setting, gradients: bool) -> int | None:
    """Extra memory of one call; with gradients, of forward and backward."""
    run = setting.run(entry.mechanism, entry.impl)
    given = tuple(x.clone().requires_grad_(gradients) for x in decoy(setting.inputs, 1))

    def once() -> Any:
        with torch.set_grad_enabled(gradients):
            out = run(*given)  # type: ignore[arg-type]
            if not gradients:
                return out
            return out, torch.autograd.grad(out, given, setting.grad, allow_unused=True)

    return peak_bytes(once, setting.inputs[0].device)
