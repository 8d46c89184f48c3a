"""`compare` and `bench`: what each mechanism costs in accuracy, and gains in time and memory."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import InvalidInputError
from . import output, results
from .output import JsonPath

Specs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SPEC]...", help="Names or specs; a selection without one."),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME|FILE",
        help="recorded (the default), gaussian, clustered, needle, sink_heavy, or a safetensors "
        "file with q, k and v as [B, H, N, D]. May repeat.",
    ),
]
Lengths = Annotated[
    list[int] | None,
    typer.Option("--length", min=1, metavar="N", help="Queries and keys. May repeat."),
]
Seeds = Annotated[
    list[int] | None, typer.Option("--seed", metavar="N", help="Of the inputs. May repeat.")
]
Causal = Annotated[bool, typer.Option("--causal/--no-causal")]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="float64, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, or cuda.")]
Impl = Annotated[
    str, typer.Option(metavar="NAME", help="The implementation; auto is what attention() takes.")
]
Backward = Annotated[
    bool, typer.Option("--backward", help="Time forward and backward, and check gradients.")
]
Runs = Annotated[
    int, typer.Option(min=1, metavar="N", help="Timed runs of each mechanism, interleaved.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the journal PATH.part of --json PATH.")
]


def check_dtype(dtype: str) -> None:
    if dtype not in ("float64", "float32", "bfloat16", "float16"):
        raise InvalidInputError(
            f"--dtype got {dtype!r:.80}; expected float64, float32, bfloat16 or float16"
        )


def check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InvalidInputError(f"--device got {device!r:.80}; expected cpu or cuda") from None
    if kind not in ("cpu", "cuda"):
        raise InvalidInputError(f"--device got {device!r:.80}; expected cpu or cuda")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (torch.device(device).index or 0) >= count:
            raise InvalidInputError(
                f"--device got {device!r:.80}, but torch finds {count} GPUs; see "
                "`sparseattn doctor`"
            )


def _measure(
    which: str, specs: list[str] | None, json: str | None, resume: bool, **given: Any
) -> Any:
    """What the harness's `compare` or `bench` makes of it, journalled beside PATH."""
    journal = output.journal_of(json, resume, given.get("inputs", ()))
    check_dtype(given["dtype"])
    check_device(given["device"])
    from ..harness import run

    with output.own_stdout(), output.Progress() as progress:
        measure = run.bench if which == "bench" else run.compare
        result = measure(specs or None, journal=journal, resume=resume, progress=progress, **given)
    output.write_json(json, result)
    if journal is not None:
        journal.unlink(missing_ok=True)
    return result


def compare(
    specs: Specs = None,
    inputs: Inputs = None,
    lengths: Lengths = None,
    seeds: Seeds = None,
    causal: Causal = True,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    impl: Impl = "auto",
    backward: Backward = False,
    runs: Runs = 7,
    json: JsonPath = None,
    resume: Resume = False,
) -> None:
    """Error against exact attention, time and memory of each mechanism, on real q, k and v.

    Exits with 1 if a row failed.
    """
    result = _measure(
        "compare",
        specs,
        json,
        resume,
        inputs=inputs or ["recorded"],
        lengths=lengths or None,
        seeds=seeds or [0],
        causal=causal,
        dtype=dtype,
        device=device,
        impl=impl,
        backward=backward,
        runs=runs,
    )
    if json != output.STDOUT:
        results.print_comparison(result["rows"])
    if any(row["status"] == "failed" for row in result["rows"]):
        raise typer.Exit(1)


def bench(
    specs: Specs = None,
    lengths: Lengths = None,
    causal: Causal = True,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    impl: Impl = "auto",
    backward: Backward = False,
    runs: Runs = 5,
    json: JsonPath = None,
    resume: Resume = False,
) -> None:
    """How time and memory grow with length, on generated inputs, forward or with the backward pass.

    A time is shown only where the arithmetic check of the same run passed. Exits with 1 if a row
    failed.
    """
    result = _measure(
        "bench",
        specs,
        json,
        resume,
        lengths=lengths or None,
        causal=causal,
        dtype=dtype,
        device=device,
        impl=impl,
        backward=backward,
        runs=runs,
    )
    if json != output.STDOUT:
        results.print_growth(result["rows"])
    if any(row["status"] == "failed" for row in result["rows"]):
        raise typer.Exit(1)
