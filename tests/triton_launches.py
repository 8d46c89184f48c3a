"""What tests ask of the launchers in a process that has a triton: `python triton_launches.py WORD`.

Prints one JSON value. Nothing here needs a GPU, and but for `plants` nothing is compiled.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import gpu_calls
import gpu_compile
import torch
from gpu_calls import BAND, LISTS, Call
from gpu_compile import TARGETS
from torch.utils._python_dispatch import TorchDispatchMode

import sparseattn as sa
from sparseattn.engines.softmax.triton import config

SM_80, SM_90, GFX = TARGETS


def keys() -> dict[str, int]:
    """How many kernels compile in 50 launches of each kind, of other lengths, batches, windows."""

    def compiled(run: Callable[[int, int], Any]) -> int:
        found = set()
        for at in range(50):
            n, batch = 520 + 7 * at, 1 + at % 3
            for launch in gpu_compile.launches_of(SM_90, lambda n=n, b=batch: run(n, b)):
                found.add(gpu_compile.key_of(SM_90, launch))
        return len(found)

    def run(spec: str, n: int, batch: int, width: int, backward: bool = False) -> None:
        q, k, v = (torch.zeros(batch, 2, n, width, requires_grad=backward) for _ in range(3))
        out = sa.attention(q, k, v, spec, causal=True, impl="triton")
        if backward:
            torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))

    return {
        "band": compiled(lambda n, b: run(f"windowed(window={n // 3})", n, b, 64)),
        "lists": compiled(lambda n, b: run("bigbird(block=16)", n, b, 64)),
        "backward": compiled(lambda n, b: run(f"windowed(window={n // 3})", n, b, 64, True)),
        # Rows that begin anywhere: whether a head does at a multiple of 16 depends on the length.
        "width 24": compiled(lambda n, b: run(f"windowed(window={n // 3})", n, b, 24)),
        "two dtypes": compiled(
            lambda n, b: gpu_calls.Call(BAND, (torch.float16, torch.bfloat16)[n % 2]).run()
        ),
    }


class _ReadOnHost(Exception):
    """A value of a tensor was read, or sent to the device."""


class _NoScalars(TorchDispatchMode):
    """Refuses to read a number from a tensor, but for those made from Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default and not any(args[0] is x for x in self._made):
            raise _ReadOnHost(str(func))
        result = func(*args, **(kwargs or {}))
        if func is aten.lift_fresh.default:
            self._made.append(result)
        return result


@contextlib.contextmanager
def nothing_read() -> Iterator[None]:
    """Within it, reading a tensor on the host raises, and so does making one of an array."""

    def refuse(*given: Any, **named: Any) -> Any:
        raise _ReadOnHost

    with contextlib.ExitStack() as stack:
        for word in ("tolist", "numpy", "cpu", "__array__"):
            stack.enter_context(mock.patch.object(torch.Tensor, word, refuse))
        stack.enter_context(mock.patch.object(torch, "from_numpy", refuse))
        stack.enter_context(_NoScalars())
        yield


def reads() -> dict[str, str]:
    """For some calls made twice, what the second reads on the host; empty where nothing is."""
    calls = [Call(BAND), Call(BAND, backward=True), Call(LISTS), Call(LISTS, backward=True)]
    calls += [Call("full", group=4), Call("topk_blocks(block=16, top=4)"), Call("linear")]
    found = {}
    for call in [*calls, Call(BAND, holes=True)]:
        found[call.name] = ""
        try:
            gpu_compile.launches_of(SM_90, call.run)
        except gpu_calls.REFUSALS as error:
            found[call.name] = f"not served: {error}"
            continue
        made, grad = call.make()  # drawn before: what makes the inputs is no part of the call

        def second(call: Call = call, made: Any = made, grad: Any = grad) -> None:
            with mock.patch.object(Call, "make", lambda *_: (made, grad)), nothing_read():
                call.run()

        try:
            gpu_compile.launches_of(SM_90, second)
        except _ReadOnHost as error:
            found[call.name] = f"read: {error}"
    return found


def plants() -> dict[str, list[str]]:
    """What the checks say of kernels that are wrong on purpose."""

    def problems(call: Call, target: Any, **changed: Any) -> list[str]:
        with mock.patch.multiple(config, **changed):
            (found,), _ = gpu_compile.listing([call], [target])
        return gpu_compile.problems(gpu_compile.row_of(found))

    def tiles(*sizes: int) -> dict[str, Any]:
        return {"tiles": lambda *given, **named: config.Tiles(*sizes)}

    single = Call(LISTS, torch.float32, 64)
    return {
        "spills": problems(Call(LISTS, width=128), SM_80, **tiles(128, 64, 4, 2)),
        "spills on AMD": problems(Call(LISTS, width=256), GFX, **tiles(128, 64, 8, 1)),
        "shared memory": problems(Call(LISTS, width=256), SM_90, **tiles(128, 128, 16, 4)),
        "no tensor cores": problems(single, SM_80, precision=lambda *given: "ieee"),
        "no program": problems(single, SM_80, precision=lambda *given: "none"),
        "none": problems(single, SM_80, **tiles(32, 32, 8, 1)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"keys": keys, "reads": reads, "plants": plants}[sys.argv[1]]()))
