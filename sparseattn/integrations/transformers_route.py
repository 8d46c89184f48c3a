"""Models that ask transformers for their attention function.

Such a module looks its function up by the name in its config. During a swap the modules of the
model, and no others, see a view of their config that differs in that name alone, so a model that
shares the config object goes on as it was.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..base import Mechanism
from ..errors import SwapError, UnsupportedCallError
from . import decoding, dense_mask, places
from .clipped import clipped, describe, is_relative
from .lazy_mask import LazyMask
from .places import Place

NAME = "sparseattn"
# Masks of more pairs are not built for `full`: our own engine then serves, within its budget, where
# torch's attention with a dense mask would have given the original's bits.
_DENSE_PAIRS = 2**26
# What modules pass along that changes no weight, or that the mask has said already.
_WORDLESS = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "deterministic",
    "is_causal",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}
_KNOWN = {"dropout", "scaling", "softcap", "s_aux", "position_bias"} | _WORDLESS
_views: dict[type, type] = {}
_lock = threading.Lock()
# Of each module: how many swaps hold it, and the configs that its attributes held.
_held: weakref.WeakKeyDictionary[nn.Module, tuple[int, dict[str, Any]]] = (
    weakref.WeakKeyDictionary()
)


def _configs(module: nn.Module) -> dict[str, Any]:
    library = sys.modules.get("transformers.configuration_utils")
    if library is None:
        return {}
    kind = library.PreTrainedConfig
    return {name: value for name, value in vars(module).items() if isinstance(value, kind)}


def _view(config: Any) -> Any:
    """A config that shares all with another, but names our attention."""
    kind = type(config)
    if kind not in _views:

        def name(self: Any) -> str:
            return NAME

        def set_name(self: Any, value: Any) -> None:
            if value != NAME:  # a model that is made of this config writes back what it read
                self.__dict__["_attn_implementation_internal"] = value

        def original(self: Any) -> Any:
            found = object.__new__(kind)
            object.__setattr__(found, "__dict__", self.__dict__)
            return found

        # Copies are the original's kind: a copied model is another model, and in no swap.
        _views[kind] = type(
            kind.__name__,
            (kind,),
            {
                "__module__": kind.__module__,
                "_attn_implementation_internal": property(name, set_name),
                "__copy__": lambda self: copy.copy(original(self)),
                "__deepcopy__": lambda self, memo: copy.deepcopy(original(self), memo),
                "__reduce_ex__": lambda self, protocol: (copy.copy, (original(self),)),
            },
        )
    found: Any = object.__new__(_views[kind])
    object.__setattr__(found, "__dict__", config.__dict__)
    return found


def hold(module: nn.Module, views: dict[int, Any]) -> None:
    """Show a module views of its configs; `views` has those made so far, by the config's id."""
    with _lock:
        count, configs = _held.get(module, (0, {}))
        if not count:
            configs = _configs(module)
            for name, config in configs.items():
                if id(config) not in views:
                    views[id(config)] = _view(config)
                vars(module)[name] = views[id(config)]
        _held[module] = (count + 1, configs)


def release(module: nn.Module) -> None:
    """Undo one `hold`."""
    with _lock:
        count, configs = _held.pop(module)
        if count > 1:
            _held[module] = (count - 1, configs)
            return
        for name, config in configs.items():
            # A config that the person put there meanwhile stays.
            if type(vars(module).get(name)) in _views.values():
                vars(module)[name] = config


@functools.cache
def install() -> None:
    """Register the attention function and its mask, once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def _original_name(config: Any) -> str:
    found: str = vars(config).get("_attn_implementation_internal") or "eager"
    if found == NAME:
        raise SwapError(
            f"the config's own attn_implementation is {NAME!r}, which is sparseattn.swap's to set; "
            'give it "sdpa", and call sparseattn.swap(model, spec)'
        )
    return found


@torch.compiler.disable
def make_mask(**given: Any) -> LazyMask:
    """The mask function behind the name: it only keeps what it was asked for."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    if isinstance(given.get("attention_mask"), LazyMask):
        # `generate` asked for it before the forward did, for a static cache.
        return given["attention_mask"]  # type: ignore[no-any-return]
    name = _original_name(given["config"]) if "config" in given else "sdpa"
    original: Callable[..., Any] = (
        eager_mask if name == "eager" else ALL_MASK_ATTENTION_FUNCTIONS[name]
    )
    return LazyMask(original, given)


class Request:
    """One call of a module's attention function: `[B, Hq, N, D]`, `[B, Hkv, M, D]`, mask, words."""

    def __init__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, words: dict[str, Any]
    ) -> None:
        self.module, self.q, self.k, self.v, self.mask, self.words = module, q, k, v, mask, words
        self.config: Any = module.config  # it is where the module read our name
        self.original_name = _original_name(self.config)

    def original(self) -> tuple[Tensor, Any]:
        """What the module would have computed outside of the swap."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.original_name, places.eager_function(self.module)
        )
        mask = self.mask.dense() if isinstance(self.mask, LazyMask) else self.mask
        with places.inside():
            found: tuple[Tensor, Any] = function(
                self.module, self.q, self.k, self.v, mask, **self.words
            )
        return found

    def is_sdpa_small(self) -> bool:
        """Whether torch's own attention serves, with a mask that may be built."""
        pairs = self.q.shape[0] * self.q.shape[2] * self.k.shape[2]
        lazy = isinstance(self.mask, LazyMask)
        return self.original_name == "sdpa" and (not lazy or pairs <= _DENSE_PAIRS)

    def refused_words(self) -> list[str]:
        reasons = []
        if self.words.get("dropout"):
            reasons.append(
                f"attention dropout of {self.words['dropout']} while training is no part of a "
                "mechanism; call model.eval(), or set the config's attention dropout to 0"
            )
        maps = self.words.get("output_attentions")
        # Not by its property, which takes longer than all else here.
        if vars(self.config).get("_output_attentions") if maps is None else maps:
            reasons.append(
                "output_attentions=True asks for a dense map; use sparseattn.attention_weights"
            )
        reasons += [
            f"the module passes {name}, which the swap does not know"
            for name, value in self.words.items()
            if name not in _KNOWN and value is not None
        ]
        return reasons

    def numbers(self) -> dict[str, Any]:
        """scale, softcap and sink logits, as `attention` takes them."""
        found: dict[str, Any] = {}
        scaling = self.words.get("scaling")
        if scaling is not None and float(scaling) != self.q.shape[-1] ** -0.5:
            found["scale"] = float(scaling)
        if self.words.get("softcap") is not None:
            found["softcap"] = float(self.words["softcap"])
        if self.words.get("s_aux") is not None:
            found["sink_logits"] = self.words["s_aux"]
        return found

    def bias(self) -> Tensor | None:
        found: Tensor | None = self.words.get("position_bias")
        return None if found is None else found.to(self.q.dtype)


@torch.compiler.disable
def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **words: Any
) -> tuple[Tensor, Any]:
    """The attention function behind the name: `[B, N, Hq, Dv]`, and None for the weights."""
    request = Request(module, query, key, value, attention_mask, words)
    place = places.ruling(module)
    if place is None:
        # Another model, which was made of a swapped one's config.
        return request.original()
    layer = decoding.waiting(place, key)
    if place.now.crosses:
        chosen = place.swap.cross
        if chosen is None:
            place.count_exact(request.original_name)
            return request.original()
    else:
        chosen = place.swap.chosen(place.name)
    exact = chosen.nature == "exact" and layer is None and place.swap.impl in ("auto", "torch")
    if exact and request.is_sdpa_small() and not request.refused_words():
        place.count(chosen, "torch")
        return request.original()
    try:
        out, impl = _serve(request, chosen, place, layer)
    except UnsupportedCallError as error:
        if place.swap.on_unsupported == "raise" or layer is not None:
            way_out = (
                'Give it another mechanism with layers={...}, or on_unsupported="full"'
                if layer is None
                else "Use the model's own cache, or another mechanism"
            )
            raise UnsupportedCallError(
                f"module {place.name!r}: {error}. {way_out}", error.reasons
            ) from error
        place.count_fallback(chosen, request.original_name, error.reasons)
        return request.original()
    place.count(chosen, impl)
    return out.transpose(1, 2).contiguous(), None


def _serve(
    request: Request, mechanism: Mechanism, place: Place, layer: decoding.MechanismLayer | None
) -> tuple[Tensor, str]:
    reasons = request.refused_words()
    if reasons:
        raise UnsupportedCallError.of("a swapped module", reasons)
    q, k, v, mask = request.q, request.k, request.v, request.mask
    arguments = request.numbers()
    bias = request.bias()
    if layer is not None:
        if isinstance(mask, Tensor):
            raise UnsupportedCallError("a cache of sparseattn.make_cache takes no mask of its own")
        arguments["causal"] = True
        if isinstance(mask, LazyMask):
            layer.check_position(mask.q_offset)
            if mask.kind != "causal" or mask.segments is not None:
                raise UnsupportedCallError("a cache serves causal attention of unpacked rows alone")
            arguments["key_mask"] = mask.padding_of(layer.get_seq_length(), q.shape[2])
            # From the first token on: a cache is one mechanism's, also once the window is full.
            mechanism = _clip(mechanism, mask, layer.get_seq_length() + q.shape[2], at_once=True)
        with places.inside():
            return layer.attend(mechanism, q, k, v, impl=place.swap.impl, bias=bias, **arguments)
    if isinstance(mask, LazyMask):
        k, v, mechanism, said = _read_lazy(mask, k, v, mechanism, q)
    elif isinstance(mask, Tensor):
        said = dense_mask.read(mask, q.shape[0], q.shape[2], k.shape[2], q.dtype)
    elif mask is None and places.says_causal(request.module, request.words):
        n, m = q.shape[2], k.shape[2]
        said = {"causal": True} | ({"q_offset": 0} if n > 1 and n != m else {})
    else:
        said = {}
    own = said.pop("bias", None)
    if own is not None:
        bias = own if bias is None else bias + own
    with places.inside():
        out, _, impl = functional.serve(
            mechanism, q, k, v, impl=place.swap.impl, bias=bias, **arguments, **said
        )
    return out, impl


def _clip(mechanism: Mechanism, mask: LazyMask, keys: int, at_once: bool = False) -> Mechanism:
    """The mechanism cut to the model's own window; itself where that hides none of the keys."""
    spared = mask.clip is None or mask.clip.spares(keys)
    if mask.clip is None or (spared and not at_once):
        return mechanism
    found = clipped(mechanism, mask.clip)
    if found is None and spared:
        return mechanism
    if found is None:
        raise UnsupportedCallError(
            f"mechanism {mechanism!r} cannot be cut to {describe(mask.clip)}: only static patterns "
            "of softmax attention can"
        )
    return found


def _read_lazy(
    mask: LazyMask, k: Tensor, v: Tensor, mechanism: Mechanism, q: Tensor
) -> tuple[Tensor, Tensor, Mechanism, dict[str, Any]]:
    """Keys, values, mechanism and arguments that mean what a lazy mask says."""
    n, m, start = q.shape[2], k.shape[2], mask.kv_offset
    if mask.kind == "custom":
        if m != mask.m:
            raise UnsupportedCallError(
                f"a mask of the model's own is {mask.m} keys wide, and this layer keeps {m}"
            )
        allowed = mask.allowed()
        return k, v, mechanism, dense_mask.read(allowed, q.shape[0], n, m, q.dtype)
    if m != mask.m:
        # One mask serves all layers; this one keeps other keys than the layer it was sized for.
        start = mask.q_offset + n - m
    end = mask.q_offset + n - start
    if mask.kind == "causal" and end < m:
        k, v, m = k[:, :, :end], v[:, :, :end], end  # room of a static cache, not yet written
    mechanism = _clip(mechanism, mask, start + m)
    if start and not is_relative(mechanism):
        raise UnsupportedCallError(
            f"mechanism {mechanism!r} goes by absolute positions, and the model's cache has "
            "dropped the first keys; generate with the cache of sparseattn.make_cache(model)"
        )
    said: dict[str, Any] = {"causal": mask.kind == "causal"}
    if mask.segments is not None:
        return k, v, mechanism, said | {"q_segments": mask.segments.expand(q.shape[0], -1)}
    padding = mask.padding_of(start, m)
    if padding is not None:
        said["key_mask"] = padding.expand(q.shape[0], -1)
    offset = mask.q_offset - start
    if offset != m - n or padding is not None:
        said["q_offset"] = offset
    return k, v, mechanism, said
