"""`list` and `show`: which mechanisms there are, and what one of them is and does."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInputError
from ..harness import store
from . import output
from .output import JsonPath, say, table

if TYPE_CHECKING:
    from ..base import Mechanism
    from ..call import AttentionCall
    from ..registry import MechanismRecord
    from .attention_map import AttentionMaps
    from .picture import Picture

_HEADS, _KV_HEADS, _WIDTH, _LENGTH = 4, 2, 16, 12  # of the calls that `show` asks about


def _options(record: MechanismRecord) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "type": option.type,
            "default": store.plain(option.default),
            "required": option.required,
        }
        for name, option in record.options.items()
    }


def _record(record: MechanismRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "status": "ok",
        "reason": "",
        "nature": record.nature,
        "provider": record.provider,
        "options": _options(record),
        "looks_ahead": record.looks_ahead,
        "summary": record.summary,
        "source": record.source,
    }


def _shown(record: MechanismRecord) -> str:
    from ..base import format_option

    return ", ".join(
        name if option.required else f"{name}={format_option(option.default)}"
        for name, option in record.options.items()
    )


def list_mechanisms(json: JsonPath = None) -> None:
    """Mechanisms, their natures, providers and options."""
    output.check_json(json)
    from .. import registry

    records = registry.list_mechanisms()
    output.write_json(json, [_record(record) for record in records])
    if json != output.STDOUT:
        table(
            ["name", "nature", "provider", "options", "summary"],
            [
                [
                    r.name,
                    r.nature + (" (looks ahead)" if r.looks_ahead else ""),
                    r.provider,
                    _shown(r),
                    r.summary,
                ]
                for r in records
            ],
        )
    absent = [r.name for r in registry.diagnose() if r.status == "broken"]
    if absent:
        say(f"broken plugins: {', '.join(absent)}; see `sparseattn doctor`", err=True)


def show(
    spec: Annotated[str, typer.Argument(metavar="NAME", help="A name, or a spec with options.")],
    length: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draw the pattern for this many queries and keys."),
    ] = None,
    as_map: Annotated[
        bool,
        typer.Option(
            "--map",
            help="Draw the attention map on a recorded head instead, beside the exact one; of 256 "
            "positions without --length.",
        ),
    ] = False,
    layer: Annotated[
        int | None, typer.Option(metavar="N", help="With --map: a head of this layer.")
    ] = None,
    head: Annotated[
        int | None, typer.Option(metavar="N", help="With --map: the head of this number there.")
    ] = None,
    causal: Annotated[bool, typer.Option("--causal/--no-causal")] = True,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the drawing as an image (x.png).")
    ] = None,
    json: JsonPath = None,
) -> None:
    """What a mechanism is: its maths, options, supported calls, implementations and pattern."""
    output.check_json(json)
    for word, given_head in (("layer", layer), ("head", head)):
        if given_head is not None and not as_map:
            raise InvalidInputError(
                f"--{word} {given_head} chooses a head of --map; give --map too"
            )
    from .. import registry, specs

    name, given = specs.parse(spec)
    cls = registry.lookup(name)
    record = next(r for r in registry.list_mechanisms() if r.name == name)
    needed = [n for n, option in record.options.items() if option.required and n not in given]
    wants_picture = as_map or length is not None or save is not None
    picture: Picture | AttentionMaps | None = None
    with output.own_stdout(), output.Progress() as progress:
        # A name alone shows a mechanism whose options have no defaults, too.
        mech = None if needed and not given and not wants_picture else registry.mechanism(spec)
        found = _record(record) | {
            "spec": name if mech is None else repr(mech),
            "doc": inspect.cleandoc(cls.__doc__ or "") if record.summary else "",
            "dynamic": bool(getattr(mech, "is_dynamic", False)),
            "honours": sorted(cls.honours),
            "calls": [] if mech is None else _calls(mech),
            "implementations": [] if mech is None else _implementations(mech),
        }
        if mech is not None and as_map:
            from . import attention_map as maps

            picture = maps.draw(
                mech, maps.DEFAULT_LENGTH if length is None else length, causal, layer, head
            )
            found["map"] = picture.record()
        elif mech is not None and wants_picture:
            from . import picture as pictures

            picture = pictures.draw(mech, 1024 if length is None else length, causal, progress)
            found["pattern"] = picture.record()
        if picture is not None and save is not None:
            picture.save(save)
    output.write_json(json, found)
    if json == output.STDOUT:
        return
    _print(found, needed)
    if picture is not None:
        say()
        for line in picture.lines(getattr(sys.stdout, "encoding", None)):
            say(line)


def _print(found: dict[str, Any], needed: list[str]) -> None:
    nature = found["nature"] + (", looks ahead" if found["looks_ahead"] else "")
    say(f"{output.printable(found['spec'])}: {nature}, from {output.printable(found['provider'])}")
    if found["doc"]:
        say()
        for line in found["doc"].splitlines():
            say(output.printable(line))
    if found["source"]:
        say()
        say(f"Source: {output.printable(found['source'])}")
    if found["options"]:
        say()
        table(
            ["option", "type", "default"],
            [
                [name, o["type"], "(must be given)" if o["required"] else repr(o["default"])]
                for name, o in found["options"].items()
            ],
        )
    say()
    if needed:
        say(f"Give {', '.join(needed)} to see calls and implementations: {found['name']}(...)")
        return
    table(
        ["call", "status", "implementation", "reason"],
        [[c["name"], c["status"], c["impl"], c["reason"]] for c in found["calls"]],
    )
    say()
    table(
        ["implementation", "status", "reason"],
        [[i["name"], i["status"], i["reason"]] for i in found["implementations"]],
    )


def _tensors(q_heads: int = _KV_HEADS, m: int = _LENGTH, dtype: Any = None) -> tuple[Any, Any]:
    import torch

    dtype = dtype or torch.float32
    return (
        torch.zeros(1, q_heads, _LENGTH, _WIDTH, dtype=dtype),
        torch.zeros(1, _KV_HEADS, m, _WIDTH, dtype=dtype),
    )


def _questions() -> dict[str, AttentionCall]:
    """One call for each thing that a mechanism may or may not serve."""
    import torch

    from ..call import AttentionCall

    q, k = _tensors()
    more_q, _ = _tensors(_HEADS)
    _, more_k = _tensors(m=2 * _LENGTH)
    mask = torch.ones(1, _LENGTH, dtype=torch.bool)
    mask[:, -2:] = False
    segments = (torch.arange(_LENGTH) // 5)[None]

    def make(q: Any = q, k: Any = k, **given: Any) -> AttentionCall:
        return AttentionCall.make(q, k, k, **given)

    calls = {
        "causal": make(causal=True),
        "not causal": make(),
        "grouped heads": make(more_q, causal=True),
        "more keys than queries": make(k=more_k, causal=True),
        "key_mask": make(causal=True, key_mask=mask),
        "segments": make(causal=True, q_segments=segments),
        "q_offset": make(causal=True, q_offset=3),
        "scale": make(causal=True, scale=0.5),
        "softcap": make(causal=True, softcap=30.0),
        "sink_logits": make(causal=True, sink_logits=torch.zeros(_KV_HEADS)),
        "bias": make(causal=True, bias=torch.zeros(1, 1, 1, _LENGTH)),
        "return_lse": make(causal=True, needs_lse=True),
        "gradients": make(causal=True).replace(needs_grad=True),
    }
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        calls[str(dtype).removeprefix("torch.")] = make(*_tensors(dtype=dtype), causal=True)
    return calls


def _calls(mech: Mechanism) -> list[dict[str, str]]:
    from ..choice import choose
    from ..errors import SparseAttnError

    answers = []
    for name, call in _questions().items():
        impl, reasons, status = "", [], "refused"
        try:
            reasons = list(mech.refusals(call))
            impl = "" if reasons else choose(mech, call).name
        except SparseAttnError as error:
            reasons = error.reasons
        except Exception as error:  # a plugin's own supports() may raise anything
            reasons, status = [f"{type(error).__name__}: {error}"], "failed"
        status = status if reasons else "ok"
        answers.append({"name": name, "status": status, "reason": "; ".join(reasons), "impl": impl})
    return answers


def _implementations(mech: Mechanism) -> list[dict[str, str]]:
    from ..choice import candidates

    call = _questions()["causal"]
    found = []
    for one in candidates(mech):
        status = "unsupported"
        try:
            reasons = list(one.supports(mech, call))
        except Exception as error:  # as above
            reasons, status = [f"{type(error).__name__}: {error}"], "failed"
        status = status if reasons else "ok"
        found.append({"name": one.name, "status": status, "reason": "; ".join(reasons)})
    return found
