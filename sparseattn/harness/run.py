"""The comparison: every mechanism on every input, error and arithmetic and time, row by row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .. import choice, registry
from ..base import Mechanism
from ..errors import InvalidInputError, SparseAttnError, UnknownMechanismError
from . import manifest as conditions
from .entry import Entry, admit, admit_backward, blank_row, judge
from .growth import growth
from .inputs import Sample, Source, head_names, source
from .measure import Contender, Inputs, Race, Trial, isolated, say
from .metrics import Full, MeanOfValues, mark_pareto
from .setting import Setting
from .store import SCHEMA, Journal, plain, row_key

Progress = Callable[[int, int, str], None]

DEFAULT_SPECS = (
    "full",
    "windowed(window=256)",
    "windowed(window=252, sinks=4)",
    "dilated",
    "chunked",
    "longformer",
    "strided",
    "bigbird",
    "topk_blocks",
    "vertical_slash",
    "oracle_topk",
    "linear",
    "performer",
    "taylor",
    "retention",
)
BENCH_SPECS = ("full", "windowed(window=256)", "bigbird", "topk_blocks", "linear")
BENCH_LENGTHS = (512, 1024, 2048, 4096)
DTYPES = ("float64", "float32", "bfloat16", "float16")
CONTROLS = ("full", "oracle_topk")


def compare(
    specs: Sequence[str | Mechanism] | None = None,
    inputs: Sequence[str | os.PathLike[str]] = ("recorded",),
    lengths: Sequence[int] | None = None,
    causal: bool = True,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    seeds: Sequence[int] = (0,),
    impl: str = "auto",
    backward: bool = False,
    runs: int = 5,
    progress: Progress | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure mechanisms on inputs: approximation error, arithmetic error, time and memory.

    The controls `full` and `mean_of_values` are measured beside whatever is asked for. A mechanism
    that raises, runs out of memory or is refused loses its own row only.

    Args:
        specs: names, specs or instances; a selection of the built-in mechanisms by default.
        inputs: names (see `harness.inputs`) or safetensors files.
        lengths: queries and keys; by default what each input has.
        dtype, device: of q, k and v.
        seeds: of the generated inputs and of the sampled rows. An input that no seed changes is
            measured once, with the first.
        impl: the implementation, as in `sparseattn.attention`; a mechanism without it is
            `unsupported`.
        backward: also time forward plus backward, and check dq, dk and dv.
        runs: timed runs of each mechanism, interleaved.
        progress: called as `progress(rows done, rows in all, what is going on)`.
        journal: where rows are kept as they finish, one synced JSON line each.
        resume: go on from the journal, if it is there.
        command: for the manifest; by default the command line of this process.

    Returns:
        `{"manifest": ..., "rows": [...]}` of plain JSON values without NaN.

    Raises:
        InvalidInputError, UnknownMechanismError, UnknownOptionError: before any work is done.
    """
    dtype, device = checked_dtype(dtype), torch.device(device)
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise InvalidInputError(f"runs must be an int of at least 1, got {runs!r:.80}")
    sources = [source(name) for name in inputs]
    settings = list(_settings(sources, lengths, seeds))
    wanted = mechanisms(registered(DEFAULT_SPECS) if specs is None else specs)
    check_impl(impl, wanted)
    entries = _with_controls(wanted, impl)
    facts = _manifest(
        entries, sources, settings, causal, dtype, device, seeds, impl, backward, runs, command
    )
    book = None if journal is None else Journal(journal, facts, resume)
    done = {} if book is None else {row_key(row): row for row in book.rows}
    comparison = _Comparison(causal, dtype, device, backward, runs)
    total = len(settings) * len(entries)
    tell = _Teller(progress, total)
    try:
        rows = []
        for origin, length, seed in settings:
            finished = comparison.measure(origin, length, seed, entries, done, book, tell)
            rows += finished
        mark_pareto(rows)
    finally:
        if book is not None:
            book.close()
    return plain({"manifest": facts, "rows": rows})


def bench(
    specs: Sequence[str | Mechanism] | None = None,
    lengths: Sequence[int] | None = None,
    inputs: Sequence[str | os.PathLike[str]] = ("gaussian",),
    **options: Any,
) -> dict[str, Any]:
    """How time and memory grow with length; arguments as in `compare`.

    Returns:
        What `compare` does, and `growth`: for each mechanism and input the exponents p of the
        least-squares lines `time ~ length ** p` and `peak memory ~ length ** p`, forward and with
        gradients; null below two lengths.
    """
    result = compare(
        registered(BENCH_SPECS) if specs is None else specs,
        inputs=inputs,
        lengths=BENCH_LENGTHS if lengths is None else lengths,
        **options,
    )
    result["growth"] = growth(result["rows"])
    return result


class _Teller:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, text: str, finished: int = 0) -> None:
        self.done += finished
        if self.progress is not None:
            self.progress(self.done, self.total, text)


class _Comparison:
    """What all rows of one comparison share."""

    def __init__(
        self, causal: bool, dtype: torch.dtype, device: torch.device, backward: bool, runs: int
    ) -> None:
        self.causal, self.dtype, self.device = causal, dtype, device
        self.backward, self.runs = backward, runs

    def measure(
        self,
        origin: Source,
        length: int,
        seed: int,
        templates: Sequence[Entry],
        done: dict[tuple[Any, ...], dict[str, Any]],
        book: Journal | None,
        tell: _Teller,
    ) -> list[dict[str, Any]]:
        """The rows of one input, length and seed, in the order of the entries."""
        common = {
            "input": origin.name,
            "length": length,
            "seed": seed if origin.seeded else None,
            "causal": self.causal,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        where = f"{origin.name}, length {length}"
        entries = [
            Entry(t.mechanism, t.impl, t.control, blank_row(t.mechanism, t.control, **common))
            for t in templates
        ]
        rows = {row_key(e.row): done.get(row_key(e.row)) for e in entries}
        missing = [e for e in entries if rows[row_key(e.row)] is None]
        tell(where, finished=len(entries) - len(missing))
        if missing:
            # Full runs again beside what is missing: a speed is a ratio of the same rounds.
            baseline = next(e for e in entries if e.mechanism.nature == "exact" and e.control)
            racing = missing if baseline in missing else [baseline, *missing]
            for entry in self._rows(origin, length, seed, racing, missing, baseline, where, tell):
                rows[row_key(entry.row)] = entry.row
                if book is not None:
                    book.add(entry.row)
                tell(f"{where}: {entry.row['mechanism']}", finished=1)
        return [row for row in rows.values() if row is not None]

    def _rows(
        self,
        origin: Source,
        length: int,
        seed: int,
        racing: list[Entry],
        missing: list[Entry],
        baseline: Entry,
        where: str,
        tell: _Teller,
    ) -> Iterator[Entry]:
        tell(f"{where}: making the input")
        failures: list[str] = []
        with isolated(failures):
            setting = self._setting(origin, length, seed)
        if failures:
            for entry in missing:
                entry.close("failed", f"input {origin.name}: {failures[0]}")
                yield entry
            return
        for entry in racing:
            admit(entry, setting.call)
        trials = self._race(setting, [e for e in racing if e.open], where, tell, gradients=False)
        behind: dict[int, Trial] = {}
        if self.backward:
            able = [
                e
                for e in racing
                if e.open and trials[id(e)].failure is None and admit_backward(e, setting.call)
            ]
            behind = self._race(setting, able, f"{where}, backward", tell, gradients=True)
        baselines = _median(trials.get(id(baseline))), _median(behind.get(id(baseline)))
        for entry in missing:
            if entry.open:
                tell(f"{where}: checking {entry.row['mechanism']}")
                back = behind.get(id(entry))
                judge(entry, setting, trials[id(entry)], back, baselines, self.runs)
            yield entry

    def _setting(self, origin: Source, length: int, seed: int) -> Setting:
        sample: Sample = origin.make(length, seed, self.causal)
        given: Inputs = tuple(  # type: ignore[assignment]
            x.to(self.device, self.dtype) for x in (sample.q, sample.k, sample.v)
        )
        for name, x in zip("qkv", given, strict=True):
            if not bool(torch.isfinite(x).all()):
                raise InvalidInputError(f"{name} has numbers that {self.dtype} does not hold")
        heads = head_names(sample.provenance, given[0].shape[1])
        return Setting(
            given, self.causal, sample.scale, seed, self.backward, heads, sample.needle_rows
        )

    def _race(
        self, setting: Setting, entries: list[Entry], where: str, tell: _Teller, gradients: bool
    ) -> dict[int, Trial]:
        race = Race(
            setting.inputs,
            rows=setting.rows,
            grad=setting.grad if gradients else None,
            spot_rows=None if gradients else setting.spot_rows,
            runs=self.runs,
        )
        trials = race(
            [Contender(e.row["mechanism"], setting.run(e.mechanism, e.impl)) for e in entries],
            lambda text: tell(f"{where}: {text}"),
        )
        return {id(e): trial for e, trial in zip(entries, trials, strict=True)}


def _median(trial: Trial | None) -> float | None:
    summary = None if trial is None else trial.summary()
    return None if summary is None else summary["median_s"]


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidInputError(f"dtype got {name!r:.80}; expected one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def registered(specs: Sequence[str]) -> list[str]:
    """Those whose mechanism this process has: SPARSEATTN_PLUGINS may leave some out."""
    names = {record.name for record in registry.list_mechanisms()}
    return [spec for spec in specs if spec.partition("(")[0] in names]


def mechanisms(specs: Sequence[str | Mechanism]) -> list[Mechanism]:
    """The mechanisms in the order given, each once."""
    found: dict[str, Mechanism] = {}
    for spec in specs:
        try:
            made = registry.mechanism(spec)
        except SparseAttnError:
            raise
        except Exception as error:
            raise InvalidInputError(
                f"the mechanism {spec!r:.80} cannot be made: {say(error)}"
            ) from (error)
        found.setdefault(repr(made), made)
    return list(found.values())


def check_impl(impl: str, mechanisms: Sequence[Mechanism]) -> None:
    """Refuse a name that no mechanism has an implementation for: that is a slip of the pen."""
    if impl == "auto":
        return
    known = {one.name for mech in mechanisms for one in choice.candidates(mech)}
    if impl not in known:
        raise InvalidInputError(
            f"impl={impl!r:.80} is no implementation of these mechanisms; expected auto, "
            f"{', '.join(sorted(known))}"
        )


def _with_controls(mechanisms: Sequence[Mechanism], impl: str) -> list[Entry]:
    """The mechanisms, with `full` before them where it is not asked for, and the mean after."""
    entries = [Entry(mech, impl, mech.name in CONTROLS) for mech in mechanisms]
    if not any(mech.name == "full" for mech in mechanisms):
        entries.insert(0, Entry(exact_control(), control=True))
    return [*entries, Entry(MeanOfValues(), control=True)]


def exact_control() -> Mechanism:
    try:
        return registry.mechanism("full")
    except UnknownMechanismError:  # SPARSEATTN_PLUGINS leaves it out
        return Full()


def _settings(
    sources: Sequence[Source], lengths: Sequence[int] | None, seeds: Sequence[int]
) -> Iterator[tuple[Source, int, int]]:
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise InvalidInputError(f"seed must be an int from 0 to 2**63 - 1, got {seed!r:.80}")
    for name, given in (("inputs", sources), ("seeds", seeds)):
        if not given:
            raise InvalidInputError(f"{name} got none; expected at least one")
    for origin in {one.name: one for one in sources}.values():
        for length in dict.fromkeys(lengths or (origin.default_length,)):
            origin.check_length(length)
            for seed in dict.fromkeys(seeds if origin.seeded else seeds[:1]):
                yield origin, length, seed


def _manifest(
    entries: Sequence[Entry],
    sources: Sequence[Source],
    settings: Sequence[tuple[Source, int, int]],
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
    seeds: Sequence[int],
    impl: str,
    backward: bool,
    runs: int,
    command: str | None,
) -> dict[str, Any]:
    origins = {origin.name: _origin(origin) for origin in sources}
    return plain(
        {
            "schema": SCHEMA,
            **conditions.conditions(device, command),
            "seed": list(seeds),
            "mechanisms": [repr(entry.mechanism) for entry in entries],
            "inputs": origins,
            "settings": [[o.name, n, s if o.seeded else None] for o, n, s in settings],
            "causal": causal,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "impl": impl,
            "backward": backward,
            "runs": runs,
        }
    )


def _origin(origin: Source) -> dict[str, Any]:
    """Where an input's numbers come from, without drawing any."""
    if origin.sha256 is None:
        return {"made": origin.name, "sha256": None}
    facts = origin.make(origin.default_length, 0, True).provenance
    return dict(facts)


__all__ = ["BENCH_LENGTHS", "DEFAULT_SPECS", "bench", "compare"]
