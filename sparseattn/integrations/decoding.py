"""`make_cache`: a transformers cache whose layers keep what the swapped mechanisms need."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..base import Mechanism
from ..cache import Cache
from ..errors import InvalidInputError, SwapError
from . import places


class MechanismLayer:
    """What `make_cache` puts in place of a transformers cache layer, beside its base class.

    transformers has a layer store new keys, and then asks for attention over what it returns.
    This one returns the new tokens alone and waits; the swapped attention function finds it there,
    and a decode cache of the mechanism keeps what that needs.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = weakref.ref(module)
        self._new: Tensor | None = None
        self.cache: Cache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        module = self._module()
        place = None if module is None else places.ruling(module)
        if place is None or not place.now.awaited:
            raise SwapError(
                "a cache of sparseattn.make_cache was used outside of the swap it was made in, or "
                "by another model; make another where you use it"
            )
        if self._new is not None:
            raise SwapError(
                f"the last new keys of module {place.name!r} never reached the swapped attention; "
                "reset() this cache, or use the model's own"
            )
        self.lazy_initialization(key_states, value_states)
        self._new, place.now.layer = key_states, self
        return key_states, value_states

    def check_position(self, start: int) -> None:
        """Raise where the model stands at another token than this layer."""
        if start != self.get_seq_length():
            raise SwapError(
                f"the model is at token {start}, and this layer of its cache at "
                f"{self.get_seq_length()}: a forward failed halfway; reset() the cache, or make "
                "another with sparseattn.make_cache(model)"
            )

    def attend(
        self, mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, **arguments: Any
    ) -> tuple[Tensor, str]:
        """Attention of the new tokens over all, which are then kept; and the implementation."""
        q, k, v = functional.autocast(q, k, v)
        cache = self.cache
        if cache is None:
            cache = mechanism.new_cache(
                *(k.shape[0], k.shape[1], k.shape[3], v.shape[3]),
                q_heads=q.shape[1],
                device=k.device,
                dtype=k.dtype,
            )
        elif cache.mechanism != mechanism:
            raise SwapError(
                f"a cache of {cache.mechanism!r} was used where {mechanism!r} is swapped in; make "
                "another with sparseattn.make_cache(model)"
            )
        out, _, impl = functional.serve(mechanism, q, k, v, cache=cache, **arguments)
        self.cache = cache
        return out, impl

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.cache is None else self.cache.length

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        """The memory held, in bytes."""
        return 0 if self.cache is None else self.cache.nbytes

    def reset(self) -> None:
        self._new = self.cache = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(beam_idx.to(self.cache.device, torch.int64))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self._refuse("cannot forget its last tokens: what it dropped for them is gone")

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats != 1:
            self._refuse("keeps its batch size")

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse("keeps its batch size")

    def _refuse(self, why: str) -> None:
        if self.cache is not None:
            raise SwapError(
                f"a cache of {self.cache.mechanism!r} {why}; use the model's own cache for this "
                "way of generating"
            )


def waiting(place: places.Place, key: Tensor) -> MechanismLayer | None:
    """The layer whose new keys these are; it waits no longer."""
    now = place.now
    layer: MechanismLayer | None = now.layer
    now.awaited, now.layer = False, None
    if layer is None:
        return None
    new, layer._new = layer._new, None
    if new is not key:
        raise SwapError(
            "the keys that reached the swapped attention are not those that its cache of "
            "sparseattn.make_cache was given: this model changes them in between; use its own cache"
        )
    return layer


def make_cache(model: nn.Module) -> Any:
    """An empty transformers cache for a model, to pass to `generate` as `cache` (before
    transformers 5.24, as `past_key_values`).

    In a swap, each layer keeps what its mechanism needs: the last keys for a window, a state for
    linear attention, all keys for `full`. Out of one it is what transformers itself would make.

    Args:
        model: a transformers model.

    Raises:
        InvalidInputError: not a transformers model.
        SwapError: its layers cannot be told apart.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise InvalidInputError(
            f"model must be a transformers model, got {type(model).__name__}; for other modules "
            "use mechanism.new_cache(...)"
        )
    from transformers.cache_utils import CacheLayerMixin, DynamicCache, EncoderDecoderCache

    global _Layer
    if _Layer is None:
        _Layer = type("MechanismCacheLayer", (MechanismLayer, CacheLayerMixin), {})
    text = config.get_text_config(decoder=True)
    cache = DynamicCache(config=text)
    both = bool(getattr(config, "is_encoder_decoder", False))
    decoder = model.get_decoder() if both else model  # type: ignore[operator]
    for index, module in _self_attention(decoder).items():
        place = places.ruling(module)
        if place is None or place.swap.chosen(place.name).nature == "exact":
            continue
        if index >= len(cache.layers):
            raise SwapError(
                f"module {place.name!r} says it is layer {index}, but {type(model).__name__} has "
                f"a cache of {len(cache.layers)} layers"
            )
        cache.layers[index] = _Layer(module)
    return EncoderDecoderCache(cache, DynamicCache(config=text)) if both else cache


_Layer: Any = None


def _self_attention(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention of each layer, by its index."""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        last = name.rpartition(".")[2].lower()
        other = any(word in last for word in ("cross", "encoder_attn", "encdec"))
        if isinstance(index, int) and places.asks_transformers(module) and not other:
            found.setdefault(index, module)
    return found


def nbytes(cache: Any) -> int:
    """The memory that the layers of a transformers cache hold, in bytes."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MechanismLayer):
            total += layer.nbytes
        else:
            kept = (getattr(layer, "keys", None), getattr(layer, "values", None))
            total += sum(x.untyped_storage().nbytes() for x in kept if isinstance(x, torch.Tensor))
    return total
