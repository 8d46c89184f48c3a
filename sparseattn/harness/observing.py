"""What a model's attention is given, call by call, while the model goes on as ever.

Models that ask transformers for their attention function find it wrapped; of all others, torch's
`scaled_dot_product_attention` is watched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..integrations import dense_mask, places

# What attention code passes along that changes the weights beyond softmax of scaled products.
_MORE_THAN_SOFTMAX = ("softcap", "s_aux", "position_bias", "sliding_window")


@dataclass(frozen=True)
class Seen:
    """One attention call of a model.

    Attributes:
        q, k, v: `[B, Hq, N, D]`, `[B, Hkv, M, D]`, `[B, Hkv, M, Dv]`, after rotary positions and
            before the scale: what attention is given.
        scale: what multiplies `q . k`.
        causal: whether later keys are hidden.
        more: what else the model's attention does, by name: softcap, sinks, its own window.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool
    more: dict[str, str]


@contextlib.contextmanager
def observe(model: Any, see: Callable[[Seen], None]) -> Iterator[None]:
    """While it is open, every attention call of the model is shown to `see` and then served as
    ever, bit for bit. Other models must not run meanwhile in the same thread."""
    if any(places.asks_transformers(module) for module in model.modules()):
        with _observe_transformers(model, see):
            yield
    else:
        with _ObserveTorch(see):
            yield


@contextlib.contextmanager
def _observe_transformers(model: Any, see: Callable[[Seen], None]) -> Iterator[None]:
    """Models that ask transformers for their attention function: it is wrapped under its name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = set(model.modules())

    def wrap(name: str) -> Callable[..., Any]:
        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **words: Any
        ) -> Any:
            eager = places.eager_function(module)
            original: Any = eager if name == "eager" else registered[name]
            if module in own:
                see(_seen(module, query, key, value, mask, words))
            return original(module, query, key, value, mask, **words)

        return attend

    registered = dict(ALL_ATTENTION_FUNCTIONS)
    names = {module.config._attn_implementation for module in own if hasattr(module, "config")}
    held = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    for name in names:
        ALL_ATTENTION_FUNCTIONS[name] = wrap(name)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping = held


def _seen(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, words: Mapping[str, Any]
) -> Seen:
    more = {
        name: "tensor" if isinstance(words[name], Tensor) else str(words[name])
        for name in _MORE_THAN_SOFTMAX
        if words.get(name) is not None
    }
    return _given(
        (q, k, v),
        words.get("scaling"),
        places.says_causal(module, words),
        # A window of the model's own is named, and its mask says no more.
        None if "sliding_window" in more else mask,
        more,
    )


def _given(
    inputs: tuple[Tensor, Tensor, Tensor],
    scale: float | None,
    causal: bool,
    mask: Any,
    more: dict[str, str],
) -> Seen:
    q, k, v = (x.detach() for x in inputs)
    if isinstance(mask, Tensor):
        said = dense_mask.read(mask, q.shape[0], q.shape[2], k.shape[2], q.dtype)
        causal = bool(said.pop("causal", False))
        more |= {"attn_mask": "tensor"} if said else {}
    return Seen(q, k, v, q.shape[-1] ** -0.5 if scale is None else float(scale), causal, more)


class _ObserveTorch(TorchFunctionMode):
    """Models that call torch's attention themselves."""

    def __init__(self, see: Callable[[Seen], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
            given = dict(zip(names, args, strict=False)) | kwargs
            self.see(
                _given(
                    (given["query"], given["key"], given["value"]),
                    given.get("scale"),
                    bool(given.get("is_causal")),
                    given.get("attn_mask"),
                    {},
                )
            )
        return func(*args, **kwargs)
