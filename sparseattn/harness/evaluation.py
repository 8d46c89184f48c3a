"""What a mechanism does to a real model: its perplexity on a text, and how far its words move.

Each mechanism is swapped into the model and reads the same windows of a text as the original, turn
by turn. The tokens at some positions of each window are scored: perplexity, and the divergence of
the next token's distribution from the original's.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base import Mechanism
from ..errors import InvalidInputError, SwapError, UnsupportedCallError
from ..integrations.swapping import Swap, check_on_unsupported, swap
from . import manifest as conditions
from .measure import isolated, peak_bytes
from .metrics import MeanOfValues, finite_or_none
from .models import LoadedModel, load, read_text, tokenize, tokens_sha256
from .reading import Reading, Totals
from .run import CONTROLS, check_impl, checked_dtype, exact_control, mechanisms, registered
from .store import SCHEMA, Journal, plain

ROW_FIELDS = (
    "mechanism",
    "nature",
    "impl",
    "status",
    "reason",
    "perplexity",
    "nll",
    "tokens",
    "kl",
    "top1_agreement",
    "s_per_token",
    "time",
    "speedup",
    "baseline_s",
    "peak_bytes",
    "modules",
    "fallbacks",
    "notes",
    "looks_ahead",
    "control",
)
DEFAULT_SPECS = (
    "windowed(window=256)",
    "windowed(window=252, sinks=4)",
    "bigbird",
    "topk_blocks",
    "oracle_topk",
    "linear",
)
ORIGINAL = "original"

Progress = Callable[[int, int, str], None]


def evaluate(
    model: str | os.PathLike[str],
    specs: Sequence[str | Mechanism] | None = None,
    *,
    text: str | os.PathLike[str],
    context: int = 1024,
    score: tuple[int, int] | None = None,
    windows: int = 1,
    layers: Mapping[str, str] | None = None,
    impl: str = "auto",
    on_unsupported: str = "raise",
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    runs: int = 3,
    progress: Progress | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Perplexity, divergence, time and memory of a model with each mechanism swapped in.

    The controls are measured beside whatever is asked for: `original`, the model as it came;
    `full`, exact attention swapped in; and `mean_of_values`, attention that knows nothing. Oracle
    top-k is a control where it is asked for, with its own budget. A mechanism that is refused or
    fails loses its own row only.

    Args:
        model: as in `models.load`; it must be a causal language model.
        specs: names, specs or instances; a selection by default.
        text: a text file, read from its start.
        context: tokens that the model reads at once.
        score: the positions `start <= t < end` of each window whose tokens are scored, each from
            all before it; by default its second half.
        windows: how many stretches of `context` tokens, one after the other.
        layers: other mechanisms for some modules, in every row, as in `sparseattn.swap`.
        impl, on_unsupported: as in `sparseattn.swap`.
        dtype, device: of the model.
        runs: how often each window is read and timed; scored the first time.
        progress, journal, resume, command: as in `harness.run.compare`.

    Returns:
        `{"manifest": ..., "rows": [...]}` of plain JSON values without NaN. A row has ROW_FIELDS:
        `perplexity` and `nll`, its logarithm, in nats a token; `kl`, the mean of
        `KL(original || this)` over the scored positions, in nats; `top1_agreement`, the share
        where both have the same most likely token; `time` of one forward of `context` tokens, and
        `s_per_token`, its median over `context`; `speedup`, the original's median in the same
        rounds over this one's; `peak_bytes`, extra memory of one forward; `modules` that a
        mechanism served, and `fallbacks`, calls that the original attention served instead.

    Raises:
        InvalidInputError, UnknownMechanismError, UnknownOptionError: before any work is done.
        SwapError: no swap can reach this model's attention.
    """
    dtype, device = checked_dtype(dtype), torch.device(device)
    start, end = score = _score(context, score)
    for name, value in (("windows", windows), ("runs", runs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInputError(f"{name} must be an int of at least 1, got {value!r:.80}")
    check_on_unsupported(on_unsupported)
    layers = dict(layers or {})
    entries = _entries(specs, layers)
    others = mechanisms(list(layers.values()))
    check_impl(impl, [*(e.mechanism for e in entries if e.mechanism is not None), *others])
    words = read_text(text)
    loaded = load(model, dtype, device)
    _check_model(loaded, context)
    # It would refuse each row for what is wrong with all: a glob, or a model out of reach.
    swap(loaded.model, exact_control(), layers=layers, on_unsupported=on_unsupported).restore()
    tokens = tokenize(loaded, words)
    last = tokens.window(windows - 1, context)  # first: it says how much text is missing
    ids = torch.tensor(
        [*(tokens.window(at, context) for at in range(windows - 1)), last], device=device
    )
    facts = plain(
        {
            "schema": SCHEMA,
            "kind": "evaluation",
            **conditions.conditions(device, command),
            **loaded.facts,
            "text": {
                "file": Path(text).name,
                "sha256": conditions.sha256(Path(text)),
                "tokens_sha256": tokens_sha256(ids.flatten().tolist()),
            },
            "mechanisms": [entry.name for entry in entries],
            "context": context,
            "score": score,
            "windows": windows,
            "layers": layers,
            "impl": impl,
            "on_unsupported": on_unsupported,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "runs": runs,
        }
    )
    reading = Reading(loaded.model, ids, start, end, runs)
    put = _Put(loaded.model, layers, impl, on_unsupported)
    with contextlib.ExitStack() as stack:
        book = None
        if journal is not None:
            book = stack.enter_context(
                contextlib.closing(Journal(journal, facts, resume, ROW_FIELDS))
            )
        rows = {} if book is None else {row["mechanism"]: row for row in book.rows}
        for entry in entries:
            if entry.name in rows:
                continue
            if progress is not None:
                progress(len(rows), len(entries), entry.name)
            row = _row(entry, reading, put)
            if book is not None:
                book.add(row)
            rows[entry.name] = row
    return plain({"manifest": facts, "rows": [rows[entry.name] for entry in entries]})


@dataclass(frozen=True)
class _Entry:
    """One row to be: its mechanism, or None for the model as it came.

    Attributes:
        asked: whether someone asked for it; else it is what it is in every layer, by whatever
            serves it.
    """

    mechanism: Mechanism | None
    control: bool = True
    asked: bool = False

    @property
    def name(self) -> str:
        return ORIGINAL if self.mechanism is None else repr(self.mechanism)


def _entries(specs: Sequence[str | Mechanism] | None, layers: Mapping[str, str]) -> list[_Entry]:
    wanted = mechanisms(registered(DEFAULT_SPECS) if specs is None else specs)
    # A mixture of mechanisms is no control.
    asked = [_Entry(mech, mech.name in CONTROLS and not layers, asked=True) for mech in wanted]
    exact = [entry for entry in asked if entry.mechanism == exact_control()]
    others = [entry for entry in asked if entry not in exact]
    return [_Entry(None), *(exact or [_Entry(exact_control())]), *others, _Entry(MeanOfValues())]


def _score(context: int, score: tuple[int, int] | None) -> tuple[int, int]:
    if isinstance(context, bool) or not isinstance(context, int) or context < 2:
        raise InvalidInputError(f"context must be an int of at least 2, got {context!r:.80}")
    if score is not None and len(score) != 2:
        raise InvalidInputError(f"score got {score!r:.80}; expected two positions, START and END")
    start, end = (context // 2, context) if score is None else score
    if not 1 <= start < end <= context:
        raise InvalidInputError(
            f"score got {start}:{end}; expected START:END with 1 <= START < END <= {context}, the "
            "context: a token is scored from those before it"
        )
    return start, end


def _check_model(loaded: LoadedModel, context: int) -> None:
    if not loaded.predicts or loaded.model.config.is_encoder_decoder:
        raise InvalidInputError(
            f"{loaded.name} is no causal language model (it is {loaded.facts['architecture']}): it "
            "predicts no next token, so it has no perplexity. `sparseattn record` and "
            "`sparseattn compare --input` measure its attention"
        )
    loaded.check_length("context", context)


@dataclass(frozen=True)
class _Put:
    """How a mechanism is put into the model."""

    model: Any
    layers: dict[str, str]
    impl: str
    on_unsupported: str

    def __call__(self, entry: _Entry) -> contextlib.AbstractContextManager[Swap | None]:
        if entry.mechanism is None:
            return contextlib.nullcontext()
        return swap(
            self.model,
            entry.mechanism,
            layers=self.layers if entry.asked else None,
            impl=self.impl if entry.asked else "auto",
            on_unsupported=self.on_unsupported,
        )


def _row(entry: _Entry, reading: Reading, put: _Put) -> dict[str, Any]:
    mechanism = entry.mechanism
    row: dict[str, Any] = dict.fromkeys(ROW_FIELDS) | {
        "mechanism": entry.name,
        "nature": "exact" if mechanism is None else mechanism.nature,
        "looks_ahead": mechanism is not None and bool(mechanism.looks_ahead),
        "control": entry.control,
        "notes": _notes(mechanism),
        "reason": "",
    }
    failures: list[str] = []
    with isolated(failures), warnings.catch_warnings():
        # A swap warns of another function; the row's notes say so.
        warnings.filterwarnings("ignore", message=".*different_function.*")
        try:
            _measure(row, entry, reading, put)
            row["status"] = "ok"
        # InvalidInputError: it has no implementation of this name.
        except (UnsupportedCallError, SwapError, InvalidInputError) as error:
            row |= {"status": "unsupported", "reason": str(error)}
    if failures:
        row |= {"status": "failed", "reason": failures[0]}
    return row


def _notes(mechanism: Mechanism | None) -> list[str]:
    notes: list[str] = []
    if mechanism is None or isinstance(mechanism, MeanOfValues):
        return notes
    if mechanism.nature == "different_function":
        notes.append("another function: pretrained softmax weights need training for it")
    if mechanism.looks_ahead:
        notes.append("looks ahead: perplexity is not to be trusted, fit for prefill only")
    return notes


def _measure(row: dict[str, Any], entry: _Entry, reading: Reading, put: _Put) -> None:
    """Fill in a row: warm up, read each window beside the original, then take the memory."""
    windows, context = reading.ids.shape
    with put(entry) as held:
        logits = reading.forward(0)
        _describe(row, held)
        if not bool(torch.isfinite(logits).all()):
            raise ArithmeticError("its logits are not finite")
        del logits
    totals = Totals()
    mine: list[float] = []
    theirs: list[float] = []
    for number in range(reading.runs):
        for window in range(windows):
            original, seconds = reading.timed(window)
            theirs.append(seconds)
            with put(entry):
                logits, seconds = reading.timed(window)
            mine.append(seconds)
            if number == 0:
                targets = reading.ids[window, reading.start : reading.end]
                totals.add(logits, original, targets)
            del logits, original
    if not math.isfinite(totals.nll):
        raise ArithmeticError("its logits are not finite")
    with put(entry):
        row["peak_bytes"] = peak_bytes(lambda: reading.forward(0), reading.ids.device)
    low, median, high = np.percentile(mine, [25, 50, 75])
    baseline = float(np.median(theirs))
    nll = totals.nll / totals.tokens
    row |= {
        "perplexity": finite_or_none(math.exp(nll) if nll < 700 else math.inf),
        "nll": nll,
        "tokens": totals.tokens,
        "kl": finite_or_none(totals.kl / totals.tokens),
        "top1_agreement": totals.same / totals.tokens,
        "s_per_token": float(median) / context,
        "time": {
            "median_s": float(median),
            "iqr_s": float(high - low),
            "runs": len(mine),
        },
        "speedup": baseline / float(median),
        "baseline_s": baseline,
    }


def _describe(row: dict[str, Any], held: Swap | None) -> None:
    """What served, from the swap's report."""
    if held is None:
        return
    records = [record for record in held.report if record.calls]
    row["impl"] = ", ".join(sorted({record.impl for record in records if record.impl}))
    row["modules"] = sum(record.calls > record.fallback for record in records)
    row["fallbacks"] = sum(record.fallback for record in records)
    reasons = {record.reason for record in records if record.fallback}
    row["notes"] += [f"fell back to the original: {reason}" for reason in sorted(reasons)]
