"""What a comparison is measured on: recorded q, k, v of a real model, generated ones, or a file.

| name | what it is |
|---|---|
| `recorded` | the default: heads of SmolLM2-135M reading Hamlet (see `data/README.md`) |
| `gaussian` | independent normal q, k, v: diffuse attention without structure |
| `clustered` | keys in runs of one topic, each query after one topic it has seen |
| `needle` | noise and one planted key a head that the second half of the queries must find |
| `sink_heavy` | the first key takes most of the mass of every query, and its value is small |

Any other name is an input that a plugin registered (`register_inputs`), or a safetensors file with
`q [B, Hq, N, D]`, `k [B, Hkv, M, D]` and `v [B, Hkv, M, Dv]`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..call import AttentionCall
from ..errors import InvalidInputError, did_you_mean

RECORDED = Path(__file__).parent / "data" / "recorded.safetensors"
DEFAULT_LENGTH = 2048
HeadName = tuple[int | None, int]  # layer, and head within it


@dataclass(frozen=True)
class Shape:
    """Sizes of generated inputs: B, Hq, Hkv and D = Dv."""

    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64


@dataclass(frozen=True, eq=False)
class Sample:
    """One input, in float32 or as stored, on the CPU.

    Attributes:
        q, k, v: `[B, Hq, N, D]`, `[B, Hkv, M, D]`, `[B, Hkv, M, Dv]`.
        scale: what multiplies `q . k`; None for the default `D ** -0.5`.
        provenance: where the numbers come from, for the manifest.
        needle_rows: index of the first query that must find the needle of its head, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    needle_rows: int | None = None


@dataclass(frozen=True)
class Source:
    """A named input: `make(length, seed, causal)` draws from it.

    Attributes:
        longest: the greatest length it has, or None where any length can be made.
        seeded: whether the seed changes anything.
        sha256: of the file, where there is one.
    """

    name: str
    make: Callable[[int, int, bool], Sample]
    default_length: int = DEFAULT_LENGTH
    longest: int | None = None
    seeded: bool = True
    sha256: str | None = None

    def check_length(self, length: int) -> None:
        """Refuse a length that the input does not have.

        Raises:
            InvalidInputError: it names the way to longer inputs.
        """
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise InvalidInputError(f"length must be an int of at least 1, got {length!r:.80}")
        if self.longest is not None and length > self.longest:
            raise InvalidInputError(
                f"input {self.name!r} holds {self.longest} positions, got length {length}. For "
                "longer real inputs record a model on a longer text with `sparseattn record MODEL` "
                "and pass the file as the input; generated inputs (gaussian, clustered, needle, "
                "sink_heavy) have any length"
            )


def _generator(name: str, seed: int) -> torch.Generator:
    # Inputs of one seed must not share their random numbers.
    return torch.Generator().manual_seed((zlib.crc32(name.encode()) << 31) ^ (seed % 2**31))


class _Draw:
    """Random tensors of one sample."""

    def __init__(self, name: str, seed: int, length: int, shape: Shape) -> None:
        self.gen = _generator(name, seed)
        self.shape, self.length = shape, length
        self.groups = shape.heads // max(shape.kv_heads, 1)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.gen)

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), size, generator=self.gen)

    def noise(self) -> tuple[Tensor, Tensor, Tensor]:
        s = self.shape
        q = self.normal(s.batch, s.heads, self.length, s.head_dim)
        k = self.normal(s.batch, s.kv_heads, self.length, s.head_dim)
        v = self.normal(s.batch, s.kv_heads, self.length, s.head_dim)
        return q, k, v

    def direction(self) -> Tensor:
        """A unit vector for each key-value head: `[B, Hkv, 1, D]`."""
        s = self.shape
        return torch.nn.functional.normalize(
            self.normal(s.batch, s.kv_heads, 1, s.head_dim), dim=-1
        )

    def for_queries(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.groups, dim=1)


def gaussian(length: int, seed: int, shape: Shape = Shape()) -> Sample:
    """Independent standard normal q, k and v: logits of variance 1, attention spread over all."""
    return Sample(*_Draw("gaussian", seed, length, shape).noise())


def clustered(length: int, seed: int, shape: Shape = Shape(), clusters: int = 16) -> Sample:
    """Topics: keys are noisy copies of one of `clusters` centres, in runs of 32 to 96 positions.

    A query is a noisy copy of the centre of some position up to its own, so that its topic is
    visible under causal too. Its logits are about `sqrt(D)` within the topic and 0 elsewhere.
    """
    draw = _Draw("clustered", seed, length, shape)
    noise_q, noise_k, noise_v = draw.noise()
    batch, kv_heads, width = shape.batch, shape.kv_heads, shape.head_dim
    centres = draw.normal(batch, kv_heads, clusters, width)
    values = draw.normal(batch, kv_heads, clusters, width)
    runs = length // 32 + 1
    lengths = draw.integers(32, 97, runs)
    topic_of_run = draw.integers(0, clusters, runs)
    topic = topic_of_run.repeat_interleave(lengths)[:length]
    back = torch.rand(length, generator=draw.gen)
    seen = (back * torch.arange(1, length + 1)).long()
    k = centres[:, :, topic] + 0.5 * noise_k
    q = draw.for_queries(centres)[:, :, topic[seen]] + 0.5 * noise_q
    return Sample(q, k, values[:, :, topic] + 0.5 * noise_v)


def needle(length: int, seed: int, shape: Shape = Shape()) -> Sample:
    """One planted key a key-value head, between N/8 and N/2, that queries from N/2 on must find.

    In exact attention the needle takes nearly all the mass of those queries: a mechanism that does
    not see it gives them another output altogether.
    """
    draw = _Draw("needle", seed, length, shape)
    q, k, v = draw.noise()
    batch, kv_heads, width = shape.batch, shape.kv_heads, shape.head_dim
    direction = draw.direction()
    half = length // 2
    at = draw.integers(length // 8, half, batch, kv_heads).clamp(max=length - 1)
    # `sqrt(D)` in the queries makes the logit of a key `strength * direction` its strength. The
    # other keys' exponentials sum to about `M e`, so that log M + 10 leaves them e^-9.
    q[:, :, half:] += math.sqrt(width) * draw.for_queries(direction)
    strength = math.log(length) + 10.0
    index = at[:, :, None, None].expand(-1, -1, 1, width)
    k = k.scatter(2, index, strength * direction)
    return Sample(q, k, v, needle_rows=half)


def sink_heavy(length: int, seed: int, shape: Shape = Shape()) -> Sample:
    """An attention sink: key 0 takes about three quarters of the last query's mass, more of others.

    Its value is a tenth of the others', as in trained models (Xiao et al. 2023): the mass there
    says that a head has little to add. A mechanism that drops key 0 renormalises the rest up.
    """
    draw = _Draw("sink_heavy", seed, length, shape)
    q, k, v = draw.noise()
    direction = draw.direction()
    k = k - (k * direction).sum(-1, keepdim=True) * direction
    q = q + math.sqrt(shape.head_dim) * draw.for_queries(direction)
    k[:, :, :1] = (math.log(length) + 1.5) * direction
    v[:, :, :1] *= 0.1
    return Sample(q, k, v)


GENERATED: dict[str, Callable[..., Sample]] = {
    "gaussian": gaussian,
    "clustered": clustered,
    "needle": needle,
    "sink_heavy": sink_heavy,
}


@lru_cache(maxsize=4)
def _load(path: str, stamp: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors, metadata and sha256 of a file; `stamp` changes when the file does."""
    from safetensors import SafetensorError, safe_open

    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            missing = [name for name in ("q", "k", "v") if name not in names]
            if missing:
                raise InvalidInputError(
                    f"input file {path} has no tensor {', '.join(missing)} (it has "
                    f"{', '.join(sorted(names)) or 'none':.200}); expected q [B, Hq, N, D], "
                    "k [B, Hkv, M, D] and v [B, Hkv, M, Dv]"
                )
            tensors = {name: file.get_tensor(name) for name in ("q", "k", "v")}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(
            f"input file {path} cannot be read as safetensors: {error}"
        ) from error
    AttentionCall.make(tensors["q"], tensors["k"], tensors["v"])
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InvalidInputError(
                f"{name} in {path} has NaN or infinite numbers: no error could be measured on it"
            )
    return tensors, metadata, digest


def _file_source(name: str, path: Path) -> Source:
    stat = path.stat() if path.is_file() else None
    if stat is None:
        raise InvalidInputError(f"input file {path} does not exist")
    tensors, metadata, digest = _load(str(path), (stat.st_mtime_ns, stat.st_size))
    n, m = tensors["q"].shape[2], tensors["k"].shape[2]
    if min(n, m) < 1:
        raise InvalidInputError(
            f"input file {path} has N={n} queries and M={m} keys; expected some"
        )
    scale = _file_scale(path, metadata, tensors["q"].shape[3])

    def make(length: int, seed: int, causal: bool) -> Sample:
        parts = tensors
        if length != n:
            if n != m:
                raise InvalidInputError(
                    f"input file {path} has N={n} queries and M={m} keys: it cannot be cut to "
                    f"length {length}; leave the length out"
                )
            parts = {key: x[:, :, :length] for key, x in tensors.items()}
        facts = {"file": path.name, "sha256": digest, **metadata}
        return Sample(parts["q"], parts["k"], parts["v"], scale, facts)

    return Source(name, make, default_length=n, longest=n, seeded=False, sha256=digest)


def _file_scale(path: Path, metadata: Mapping[str, str], width: int) -> float | None:
    """The scale that the recorded model used, where it is not the default."""
    if "scale" not in metadata:
        return None
    try:
        scale = float(metadata["scale"])
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise InvalidInputError(
            f"the metadata of {path} has scale {metadata['scale']!r:.60}; expected a finite number"
        )
    return None if math.isclose(scale, width**-0.5, rel_tol=1e-6) else scale


def head_names(provenance: Mapping[str, Any], count: int) -> list[HeadName]:
    """The layer and the number there of each query head, as a recorded file's metadata has them.

    They stand under `heads`: JSON, a list with a string `LAYER head HEAD` for each query head.
    Where that is missing or of another form, the heads are counted and have no layer.
    """
    try:
        said = json.loads(provenance["heads"])
    except (KeyError, TypeError, ValueError):
        said = None
    names = said if isinstance(said, list) else []
    found = [re.fullmatch(r"(\d{1,9}) head (\d{1,9})", str(name)) for name in names]
    if len(found) == count and all(found):
        return [(int(match[1]), int(match[2])) for match in found if match]
    return [(None, head) for head in range(count)]


def _registered() -> Mapping[str, Callable[..., Any]]:
    from .. import registry

    return registry.inputs()


def _plugin_source(name: str, function: Callable[..., Any]) -> Source:
    def make(length: int, seed: int, causal: bool) -> Sample:
        made = function(length, seed, causal)
        if not isinstance(made, tuple) or len(made) != 3:
            raise InvalidInputError(
                f"input {name!r} returned {type(made).__name__}; expected a tuple (q, k, v)"
            )
        AttentionCall.make(*made)
        q, k, v = (x.detach().cpu() for x in made)
        if not all(torch.isfinite(x).all() for x in (q, k, v)):
            raise InvalidInputError(f"input {name!r} has NaN or infinite numbers")
        return Sample(q, k, v, None, {"registered": name, "seed": seed})

    return Source(name, make)


def source(name: str | os.PathLike[str], shape: Shape = Shape()) -> Source:
    """The input of that name: built in, registered by a plugin, or a file.

    Raises:
        InvalidInputError: there is none, or the file is no input.
    """
    label = os.fspath(name)
    if label == "recorded":
        return _file_source(label, RECORDED)
    if label in GENERATED:
        function = GENERATED[label]

        def make(length: int, seed: int, causal: bool) -> Sample:
            made = function(length, seed, shape)
            facts = {"generator": label, "seed": seed, **vars(shape)}
            return Sample(made.q, made.k, made.v, None, facts, made.needle_rows)

        return Source(label, make)
    plugins = _registered()
    if label in plugins:
        return _plugin_source(label, plugins[label])
    path = Path(label)
    if path.is_file() or path.suffix == ".safetensors" or os.sep in label:
        return _file_source(label, path)
    known = ["recorded", *GENERATED, *plugins]
    raise InvalidInputError(
        f"no input is named {label!r:.80}; expected {', '.join(known):.300}, or a safetensors file "
        f"with q, k and v.{did_you_mean(label, known)}"
    )
