"""A mask that transformers asked for, and that nobody has built yet.

transformers describes the mask of a forward once, for all layers, and hands it to each. A mechanism
needs the description alone; a layer that keeps its original attention has it built, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .clipped import Clip

_Read = tuple[str, Any]


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    if code is None:
        return {}
    return {n: c.cell_contents for n, c in zip(code.co_freevars, cells, strict=True)}


def _parts(function: Callable[..., Any]) -> list[_Read]:
    """What a mask function of transformers says, as (word, value) joined by AND.

    Its mask functions are closures that `masking_utils` makes, known by their qualified names; any
    other is `("custom", None)`.
    """
    own = _closure(function)
    maker = getattr(function, "__qualname__", "").partition(".<locals>")[0]
    if getattr(function, "__module__", "") != "transformers.masking_utils":
        return [("custom", None)]
    if maker == "and_masks":
        return [part for one in own["mask_functions"] for part in _parts(one)]
    if maker == "remap_positions_for_packed_sequence":
        # Positions restart in each document: so do ours.
        return _parts(own["mask_function"])
    known: dict[str, Callable[[], _Read]] = {
        "causal_mask_function": lambda: ("causal", None),
        "bidirectional_mask_function": lambda: ("bidirectional", None),
        "sliding_window_overlay": lambda: ("clip", Clip("causal_window", own["sliding_window"])),
        "sliding_window_bidirectional_overlay": lambda: (
            "clip",
            Clip("window", own["sliding_window"]),
        ),
        "chunked_overlay": lambda: ("clip", Clip("chunks", own["chunk_size"])),
        "packed_sequence_mask_function": lambda: ("segments", own["packed_sequence_mask"]),
    }
    return [known[maker]()] if maker in known else [("custom", None)]


class LazyMask:
    """The arguments of a mask function of transformers, kept.

    Whatever treats it as a tensor gets the dense mask that the model's original attention would
    have had.

    Attributes:
        batch, n, m: rows, queries, keys. q_offset, kv_offset: positions of the first of each.
        padding: True where a token may be seen, `[B, tokens]`, or None where all may.
        kind: "causal", "bidirectional", or "custom" where only the dense mask tells.
        clip: the model's own window, or None. segments: int `[B, n]`, or None.
    """

    def __init__(self, original: Callable[..., Any], given: dict[str, Any]) -> None:
        offset = given.get("q_offset", 0)
        if isinstance(offset, Tensor):
            # A static cache counts in place, and would have moved on when the mask is read.
            given = {**given, "q_offset": offset.clone()}
        self._original, self._given = original, given
        self._dense: Any = None
        self.batch: int = given["batch_size"]
        self.n: int = given["q_length"]
        self.m: int = given["kv_length"]
        self.q_offset = int(offset)
        self.kv_offset = int(given.get("kv_offset", 0))
        self.dtype: torch.dtype = given.get("dtype", torch.float32)
        words = _parts(given["mask_function"])
        said = {word for word, _ in words}
        self.kind = "causal" if "causal" in said else "bidirectional"
        clips = [value for word, value in words if word == "clip"]
        segments = [value for word, value in words if word == "segments"]
        if "custom" in said or len(clips) > 1 or len(segments) > 1:
            self.kind, clips, segments = "custom", [], []
        self.clip: Clip | None = clips[0] if clips else None
        self.segments: Tensor | None = segments[0] if segments else None
        padding: Tensor | None = given.get("attention_mask")
        if padding is not None and bool(padding.all()):
            # What lies beyond it is not written yet, which causal queries cannot see anyway.
            wide = padding.shape[1] >= self.kv_offset + self.m
            padding = None if wide or self.kind == "causal" else padding
        self.padding = padding

    def padding_of(self, start: int, count: int) -> Tensor | None:
        """Which of `count` keys from position `start` may be seen, bool `[B, count]`."""
        if self.padding is None:
            return None
        found = self.padding[:, start : start + count].to(torch.bool)
        missing = count - found.shape[1]
        return torch.nn.functional.pad(found, (0, missing)) if missing else found

    def dense(self) -> Any:
        """As the model's original attention would have had it; None where that needs none."""
        if self._dense is None:
            self._dense = (self._original(**self._given),)
        return self._dense[0]

    def allowed(self) -> Tensor:
        """Dense: bool `[B, 1, n, m]`."""
        from transformers.masking_utils import sdpa_mask

        skip = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        found = sdpa_mask(**{**self._given, **skip})
        assert found is not None  # it was asked not to skip
        return found

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch, 1, self.n, self.m))

    @property
    def ndim(self) -> int:
        return 4

    @property
    def device(self) -> torch.device:
        return torch.device(self._given.get("device", "cpu"))

    def to(self, *args: Any, **kwargs: Any) -> LazyMask:
        return self  # it says the same on every device, in every dtype

    def contiguous(self) -> LazyMask:
        return self

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor()[index]

    def _tensor(self) -> Tensor:
        dense = self.dense()
        return self.allowed() if dense is None else dense

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def plain(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(plain, value))
            return value._tensor() if isinstance(value, LazyMask) else value

        given = {name: plain(value) for name, value in (kwargs or {}).items()}
        return function(*map(plain, args), **given)
