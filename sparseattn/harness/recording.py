"""q, k and v of a model that reads a text, layer by layer, in a file that `compare` takes.

The file is safetensors: `q [1, L * Hq, N, D]`, `k [1, L * Hkv, N, D]`, `v [1, L * Hkv, N, Dv]`, the
L layers side by side as heads of one call. Each layer is written when the model calls it, so that
never more than one is held. The metadata says which layer and head each is, and where it all comes
from.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidInputError, UnsupportedCallError
from .inputs import DEFAULT_LENGTH
from .manifest import sha256
from .models import LoadedModel, load, read_text, tokenize, tokens_sha256
from .observing import Seen, observe
from .store import replacing

MAX_MB = 512
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class _Layer:
    """What one attention call will bring: sizes, and what must agree between layers."""

    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    causal: bool
    more: dict[str, str]

    @classmethod
    def of(cls, seen: Seen) -> _Layer:
        q, k, v = seen.q, seen.k, seen.v
        return cls(
            q.shape[1], k.shape[1], q.shape[3], v.shape[3], seen.scale, seen.causal, seen.more
        )

    @property
    def alike(self) -> tuple[Any, ...]:
        """What all layers of one file share."""
        groups = self.q_heads / self.kv_heads
        return groups, self.head_dim, self.value_dim, self.scale, self.causal

    def parts(self, n: int) -> dict[str, tuple[int, int, int]]:
        """The shapes `[H, N, D]` of q, k and v."""
        return {
            "q": (self.q_heads, n, self.head_dim),
            "k": (self.kv_heads, n, self.head_dim),
            "v": (self.kv_heads, n, self.value_dim),
        }


def record(
    name: str,
    text: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    length: int | None = None,
    layers: Sequence[int] | None = None,
    dtype: str = "float16",
    max_mb: float = MAX_MB,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Save q, k and v of a model that reads a text.

    Args:
        name: the model, as in `models.load`; it runs in float32 on the CPU.
        text: a text file; the model reads it from its start.
        output: the safetensors file, replaced whole when all is there.
        length: N, tokens; by default 2,048, or as many as the model or the text has.
        layers: numbers of the attention calls to keep, counted from 0 as the model makes them;
            all by default.
        dtype: of the stored numbers: "float16", "bfloat16" or "float32".
        max_mb: the most megabytes (1e6 bytes) that the file may have.

    Returns:
        `file`, `bytes`, `sha256`, `length`, `layers`, `heads` (query heads a layer), `causal`,
        `dtype`, and `left_out`: what the model's attention does beyond softmax, which the file
        cannot say and `compare` does not do.

    Raises:
        InvalidInputError: an argument, the model or the text is not as expected, or the file would
            be larger than `max_mb`: before the model reads.
        UnsupportedCallError: the model's attention cannot be seen, or not be laid side by side.
    """
    if dtype not in DTYPES:
        raise InvalidInputError(f"dtype got {dtype!r:.80}; expected one of {', '.join(DTYPES)}")
    target = Path(output)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise InvalidInputError(f"output got {str(target)!r:.200}; expected a file in a folder")
    own = {Path(text).resolve(), Path(name).resolve()}
    if own & {target.resolve(), target.resolve().parent}:
        raise InvalidInputError(
            f"output got {str(target)!r:.200}, which would replace the text or a file of the "
            "model; give another path"
        )
    words = read_text(text)
    loaded = load(name, torch.float32, torch.device("cpu"))
    if loaded.model.config.is_encoder_decoder:
        raise InvalidInputError(
            f"{name} is an encoder-decoder model: it reads two texts; expected a decoder or an "
            "encoder"
        )
    ids = _ids(loaded, words, length)
    found = _probe(loaded, ids)
    kept = _kept(found, layers)
    file = _File(target, {at: found[at] for at in kept}, len(ids), dtype)
    if not file.size <= max_mb * 1e6:
        raise InvalidInputError(
            f"the file would have {file.size / 1e6:.0f} MB ({len(kept)} layers, {len(ids)} tokens, "
            f"{dtype}), and max_mb is {max_mb:g}; take fewer layers, a shorter length, or raise "
            "max_mb"
        )
    first = found[kept[0]]
    left_out = {
        key: value
        for at in kept
        for key, value in found[at].more.items()
        if key != "sliding_window" or int(value) < len(ids)
    }
    facts = {
        "what": "q, k, v of self-attention: after rotary positions, before the scale",
        **loaded.facts,
        "text": Path(text).name,
        "text_sha256": sha256(Path(text)),
        "tokens_sha256": tokens_sha256(ids),
        "context": str(len(ids)),
        "causal": json.dumps(first.causal),
        "scale": repr(first.scale),
        "layers": json.dumps(kept),
        "heads": json.dumps([f"{at} head {h}" for at in kept for h in range(found[at].q_heads)]),
        "left_out": json.dumps(left_out),
        "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
        **{key: metadata.version(key) for key in ("sparseattn", "torch", "transformers")},
    }
    with file.writing(facts):
        calls = 0

        def see(seen: Seen) -> None:
            nonlocal calls
            if calls in file.layers:
                file.put(calls, seen)
            calls += 1
            if progress is not None:
                progress(calls, len(found), f"layer {calls - 1} of {len(ids)} tokens")

        _read(loaded, ids, see)
    return {
        "file": str(target),
        "bytes": target.stat().st_size,
        "sha256": sha256(target),
        "length": len(ids),
        "layers": kept,
        "heads": first.q_heads,
        "causal": first.causal,
        "dtype": dtype,
        "left_out": left_out,
    }


def _ids(loaded: LoadedModel, words: str, length: int | None) -> list[int]:
    """The tokens that the model reads: those that it can, unless a length was asked for."""
    tokens = tokenize(loaded, words)
    closed = not loaded.predicts
    if length is None:
        around = len(tokens.before) + (len(tokens.after) if closed else 0)
        length = min(DEFAULT_LENGTH, loaded.longest or DEFAULT_LENGTH, len(tokens.ids) + around)
    loaded.check_length("length", length)
    return tokens.window(0, length, closed)


def _read(loaded: LoadedModel, ids: Sequence[int], see: Callable[[Seen], None]) -> None:
    """Run the model without its head."""
    body = loaded.model.base_model
    with torch.inference_mode(), observe(body, see):
        body(input_ids=torch.tensor([ids]))


def _probe(loaded: LoadedModel, ids: Sequence[int]) -> list[_Layer]:
    """What each attention call brings, from a run on two tokens."""
    found: list[_Layer] = []
    _read(loaded, ids[:2], lambda seen: found.append(_Layer.of(seen)))
    if not found:
        raise UnsupportedCallError(
            f"{loaded.facts['architecture']} neither asks transformers for an attention function "
            "nor calls torch's scaled_dot_product_attention: its q, k and v cannot be seen"
        )
    return found


def _kept(found: Sequence[_Layer], layers: Sequence[int] | None) -> list[int]:
    """The numbers of the layers to keep, in order; they must fit into one call."""
    kept = sorted(set(range(len(found)) if layers is None else layers))
    if not kept or not all(0 <= at < len(found) for at in kept):
        raise InvalidInputError(
            f"layers got {kept}; expected numbers from 0 to {len(found) - 1}, one at least"
        )
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for at in kept:
        kinds.setdefault(found[at].alike, []).append(at)
    if len(kinds) > 1:
        raise UnsupportedCallError(
            "these layers do not fit into one call, since they differ in head dimension, group "
            f"size, scale or causality; record them apart: {' | '.join(map(str, kinds.values()))}"
        )
    return kept


class _File:
    """A safetensors file whose tensors are written piece by piece, in any order.

    Args:
        layers: of each layer that is kept, by its number, what it brings.
        n: tokens.
    """

    def __init__(self, path: Path, layers: Mapping[int, _Layer], n: int, dtype: str) -> None:
        self.path, self.layers, self.n, self.dtype = path, layers, n, dtype
        self._width = torch.finfo(getattr(torch, dtype)).bits // 8
        self._starts: dict[tuple[int, str], int] = {}
        self._spans: dict[str, tuple[list[int], int, int]] = {}
        at = 0
        for name in ("q", "k", "v"):
            start, heads, width = at, 0, 0
            for number, layer in layers.items():
                self._starts[number, name] = at
                count, _, width = layer.parts(n)[name]
                heads += count
                at += count * n * width * self._width
            self._spans[name] = ([1, heads, n, width], start, at)
        self.size = at

    @contextlib.contextmanager
    def writing(self, facts: Mapping[str, str]) -> Iterator[None]:
        """While it is open, `put` writes; the file gets its name when every piece is there."""
        header = self._header(facts)
        with replacing(self.path) as self._out:
            self._out.write(header)
            self._begin, self._missing = len(header), set(self.layers)
            yield
            if self._missing:
                raise UnsupportedCallError(
                    f"the model did not call its layers {sorted(self._missing)} on this text"
                )

    def _header(self, facts: Mapping[str, str]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": dict(sorted(facts.items()))}
        for name, (shape, start, end) in self._spans.items():
            entries[name] = {
                "dtype": DTYPES[self.dtype],
                "shape": shape,
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def put(self, number: int, seen: Seen) -> None:
        """Write one layer's q, k and v `[1, H, N, D]`."""
        for name, shape in self.layers[number].parts(self.n).items():
            x = getattr(seen, name)
            if tuple(x.shape) != (1, *shape):
                raise UnsupportedCallError(
                    f"layer {number} gave {name} as {list(x.shape)}; expected {[1, *shape]}"
                )
            small = x.to(getattr(torch, self.dtype)).contiguous()
            if not bool(torch.isfinite(small).all()):
                raise UnsupportedCallError(
                    f"{name} of layer {number} has numbers that {self.dtype} does not hold (the "
                    f"greatest is {float(x.abs().max()):.3g}); record it in float32"
                )
            self._out.seek(self._begin + self._starts[number, name])
            self._out.write(small.view(torch.uint8).numpy().data)
        self._missing.discard(number)
