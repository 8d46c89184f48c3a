"""`MultiheadAttention`: torch's module with any mechanism in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import registry
from .arguments import check_number
from .base import Mechanism
from .cache import Cache, starts
from .call import AttentionCall
from .clauses import as_int
from .errors import InvalidInputError, UnsupportedCallError
from .functional import attention, attention_weights, checked_cache
from .rotary import rotate
from .torch_inputs import Inputs, check_causal, check_inputs, read_bias, read_nested, read_padding


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with any mechanism: the same parameters, the same call.

    With `mechanism="full"` it equals torch's module and loads its state_dict. What differs: a query
    that sees no key gets `out_proj` of 0, not NaN; `causal` needs no mask; positions are those of
    `sa.attention` (bottom-right).

    Args:
        embed_dim: E, of queries and outputs. num_heads: Hq; each is `E // Hq` wide.
        dropout: kept for torch's sake; a call with p > 0 while training is refused.
        bias: of the projections.
        add_bias_kv, add_zero_attn: refused: a key that stands nowhere has no meaning for a window.
        kdim, vdim: of keys and values; E where None.
        batch_first: `[B, N, E]` instead of `[N, B, E]`.
        device, dtype: of the parameters.
        mechanism: a name (with its options as further keywords), a spec, or an instance. It may be
            set later: `module.mechanism = "windowed(window=64)"`.
        num_kv_heads: Hkv, which divides Hq: grouped heads, with smaller projections of keys and
            values, rows `[Hq + 2 Hkv] * head_dim` of in_proj_weight. Hq where None.
        rotary_base: turn q and k by their positions (see `rotate`), 10000.0 in most models; None
            for no positions. They count as everywhere: bottom-right, from the first key that is
            not padding, from 0 in each segment.
        causal: every call is causal.
        impl: the implementation, as in `sa.attention`.

    Raises:
        InvalidInputError: sizes that do not fit together.
        UnsupportedCallError: add_bias_kv, add_zero_attn.
        UnknownMechanismError, UnknownOptionError: no such mechanism or option.
    """

    # nn.TransformerEncoderLayer asks for this before its fast path, which would take the parameters
    # and compute softmax attention itself, past any mechanism. False sends it through `forward`.
    _qkv_same_embed_dim = False

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mechanism: str | Mechanism = "full",
        num_kv_heads: int | None = None,
        rotary_base: float | None = None,
        causal: bool = False,
        impl: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        self.embed_dim = as_int("embed_dim", embed_dim, 1, "give the width of the queries")
        self.num_heads = as_int("num_heads", num_heads, 1, "give the number of query heads")
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_heads = as_int("num_kv_heads", kv_heads, 1, "give a divisor of num_heads")
        self.kdim = as_int("kdim", embed_dim if kdim is None else kdim, 1, "or leave it out")
        self.vdim = as_int("vdim", embed_dim if vdim is None else vdim, 1, "or leave it out")
        if embed_dim % num_heads:
            raise InvalidInputError(
                f"embed_dim is {embed_dim}, which is not a multiple of num_heads={num_heads}"
            )
        if num_heads % kv_heads:
            raise InvalidInputError(
                f"num_heads is {num_heads}, which is not a multiple of num_kv_heads={kv_heads}"
            )
        for name, given in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if given:
                raise UnsupportedCallError(
                    f"{name}=True adds a key that stands at no position: a window or a causal call "
                    "cannot place it. Leave it out; sink_logits of sparseattn.attention adds a "
                    "logit without a value"
                )
        self.head_dim = embed_dim // num_heads
        if rotary_base is not None:
            check_number("rotary_base", rotary_base)
            if rotary_base <= 0 or self.head_dim % 2:
                raise InvalidInputError(
                    f"rotary_base needs to be greater than 0, and heads of even width: got "
                    f"{rotary_base} and {self.head_dim}"
                )
        check_number("dropout", dropout)
        self.dropout, self.batch_first = dropout, batch_first
        self.causal, self.rotary_base, self.impl = causal, rotary_base, impl
        self._mechanism = registry.mechanism(mechanism, **options)

        rows = self._rows
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        shapes = {
            "q_proj_weight": (rows[0], embed_dim),
            "k_proj_weight": (rows[1], self.kdim),
            "v_proj_weight": (rows[2], self.vdim),
            "in_proj_weight": (sum(rows), embed_dim),
        }
        packed = self.kdim == self.vdim == embed_dim
        for name, shape in shapes.items():
            here = (name == "in_proj_weight") is packed
            weight = nn.Parameter(torch.empty(shape, **made)) if here else None
            self.register_parameter(name, weight)
        in_bias = nn.Parameter(torch.empty(sum(rows), **made)) if bias else None
        self.register_parameter("in_proj_bias", in_bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """As torch's module: the same numbers from the same seed."""
        for weight in self._weights():
            nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def _weights(self) -> list[Tensor]:
        found = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return [weight for weight in found if weight is not None]

    @property
    def _rows(self) -> tuple[int, int, int]:
        """Rows of the projections of queries, keys and values."""
        kv_dim = self.num_kv_heads * self.head_dim
        return self.embed_dim, kv_dim, kv_dim

    @classmethod
    def from_torch(
        cls, module: nn.MultiheadAttention, mechanism: str | Mechanism = "full", **keywords: Any
    ) -> MultiheadAttention:
        """A module with a copy of the parameters of a `torch.nn.MultiheadAttention`.

        Args:
            keywords: `causal`, `rotary_base`, `impl`, and the mechanism's options.

        Raises:
            InvalidInputError: another kind of module.
            UnsupportedCallError: the module has add_bias_kv or add_zero_attn.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise InvalidInputError(
                f"module must be a torch.nn.MultiheadAttention, got {type(module).__name__}"
            )
        weight = module.out_proj.weight
        found = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device=weight.device,
            dtype=weight.dtype,
            mechanism=mechanism,
            **keywords,
        )
        found.load_state_dict(module.state_dict())
        own = dict(found.named_parameters())
        for name, parameter in module.named_parameters():
            own[name].requires_grad_(parameter.requires_grad)
        return found.train(module.training)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        faults = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(error_msgs) > faults and self.num_kv_heads != self.num_heads:
            error_msgs.append(
                f"num_kv_heads is {self.num_kv_heads} of {self.num_heads} heads here, so that the "
                "projections of keys and values are smaller than those of "
                "torch.nn.MultiheadAttention; leave num_kv_heads out to load its state_dict"
            )

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism; set it by name, spec or instance."""
        return self._mechanism

    @mechanism.setter
    def mechanism(self, mechanism: str | Mechanism) -> None:
        self._mechanism = registry.mechanism(mechanism)

    def new_cache(self, batch: int, *, dtype: torch.dtype | None = None) -> Cache:
        """An empty decode cache of this module's mechanism and sizes, for `forward(cache=)`.

        Args:
            dtype: of the keys and values; the parameters' where None. Under autocast it is that of
                autocast.
        """
        weight = self.out_proj.weight
        return self._mechanism.new_cache(
            batch,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim,
            q_heads=self.num_heads,
            device=weight.device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        q_segments: Tensor | None = None,
        kv_segments: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of projected inputs; the arguments of `torch.nn.MultiheadAttention` and three.

        Args:
            query: `[N, E]`, or `[B, N, E]` with batch_first, else `[N, B, E]`. A nested tensor
                (strided, as nn.TransformerEncoder makes) is taken for self-attention.
            key, value: the same with M, kdim and vdim.
            key_padding_mask: `[B, M]` (`[M]` unbatched); bool, True where a key is *ignored*, or
                float of 0 and -inf.
            need_weights: return the attention map too, from the mechanism's definition in float64:
                memory N x M. Pass False where it is not wanted.
            attn_mask: `[N, M]` or `[B * Hq, N, M]`; bool, True where a pair is ignored, or float,
                added to the logits. Taken by static softmax mechanisms.
            average_attn_weights: average the map over heads.
            is_causal: the call is causal (bottom-right). Needs no attn_mask; one that is given must
                be the causal mask, and costs nothing.
            q_segments, kv_segments: int `[B, N]`, `[B, M]`: attend only where equal (packing).
            cache: from `new_cache`; inputs are then the new tokens alone, and need_weights is
                False.

        Returns:
            out, of query's shape; and the map `[B, N, M]`, `[B, Hq, N, M]` not averaged, without B
            for unbatched inputs, or None.

        Raises:
            InvalidInputError: an argument is malformed.
            UnsupportedCallError: the mechanism cannot serve the call; dropout while training.
        """
        if self.training and self.dropout > 0:
            raise UnsupportedCallError(
                f"dropout is {self.dropout} while training, and attention here has none; set "
                "module.dropout = 0.0"
            )
        if cache is not None:
            checked_cache(cache)
        if cache is not None and need_weights:
            raise UnsupportedCallError(
                "need_weights with a cache: it need not hold the keys of a map; pass "
                "need_weights=False"
            )
        inputs = (query, key, value)
        widths = (self.embed_dim, self.kdim, self.vdim)
        check_inputs(inputs, widths, self.out_proj.weight.dtype, self.batch_first)
        if query.is_nested:
            rest = (key_padding_mask, attn_mask, q_segments, kv_segments, cache)
            return self._forward_nested(inputs, rest, need_weights, average_attn_weights, is_causal)
        batched = query.dim() == 3
        q, k, v = self._project(inputs)
        if not batched:
            key_padding_mask, q_segments, kv_segments = (
                x[None] if isinstance(x, Tensor) else x  # what is none is refused below
                for x in (key_padding_mask, q_segments, kv_segments)
            )
        seen = k.shape[2] + (0 if cache is None else cache.length)
        masks: dict[str, Any] = {
            "key_mask": read_padding(key_padding_mask, k),
            "q_segments": q_segments,
            "kv_segments": kv_segments,
        }
        if self.rotary_base is not None:
            q, k = self._rotated(q, k, v, cache, masks)
        if is_causal and attn_mask is not None:
            check_causal(attn_mask, q, seen)
            attn_mask = None
        masks["bias"] = (
            None if attn_mask is None else read_bias(attn_mask, self._mechanism, q, seen)
        )
        masks["causal"] = self.causal or is_causal
        out = attention(q, k, v, self._mechanism, impl=self.impl, cache=cache, **masks)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        weights = None
        if need_weights:
            weights = attention_weights(q, k, self._mechanism, **masks)
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, inputs: Inputs) -> list[Tensor]:
        """q `[B, Hq, N, D]`, k and v `[B, Hkv, M, D]`."""
        query, key, value = inputs
        rows = self._rows
        packed = self.in_proj_weight
        if packed is not None and query is key and key is value:
            parts = F.linear(query, packed, self.in_proj_bias).split(rows, dim=-1)
        else:
            weights = self._weights() if packed is None else packed.split(rows)
            bias = self.in_proj_bias
            biases = (None,) * 3 if bias is None else bias.split(rows)
            parts = tuple(map(F.linear, inputs, weights, biases))
        if query.dim() == 2:
            parts = tuple(x[None] for x in parts)
        elif not self.batch_first:
            parts = tuple(x.transpose(0, 1) for x in parts)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        return [
            x.unflatten(2, (count, self.head_dim)).transpose(1, 2)
            for x, count in zip(parts, heads, strict=True)
        ]

    def _rotated(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Cache | None, masks: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        assert self.rotary_base is not None
        call = AttentionCall.make(q, k, v, cached=cache is not None, **masks)
        if cache is None:
            place = call.placement()
            at_q, at_k = place.q, place.k
        else:
            at_q = at_k = torch.arange(q.shape[2], device=q.device)[None] + cache.length
            first = starts(cache.first, cache.length, call, call.key_mask)
            if first is not None:
                at_q = at_k = at_q - torch.tensor(first, device=q.device)[:, None]
        return rotate(q, at_q, self.rotary_base), rotate(k, at_k, self.rotary_base)

    def _forward_nested(
        self, inputs: Any, rest: Any, need_weights: bool, average: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """nn.TransformerEncoder packs padded rows into a nested tensor before its layers."""
        if any(x is not None for x in rest):
            raise UnsupportedCallError(
                "a nested tensor comes alone, without masks, segments or cache: pad it and give "
                "key_padding_mask"
            )
        padded, ignored, lengths = read_nested(inputs[0])
        x = padded if self.batch_first else padded.transpose(0, 1)
        out, weights = self.forward(x, x, x, ignored, need_weights, None, average, is_causal)
        out = out if self.batch_first else out.transpose(0, 1)
        rows = [row[:length] for row, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows), weights

    def extra_repr(self) -> str:
        said = [f"{self.embed_dim}, {self.num_heads}, mechanism={self._mechanism!r}"]
        if self.num_kv_heads != self.num_heads:
            said.append(f"num_kv_heads={self.num_kv_heads}")
        unusual = {
            "dropout": 0.0,
            "kdim": self.embed_dim,
            "vdim": self.embed_dim,
            "batch_first": False,
            "rotary_base": None,
            "causal": False,
            "impl": "auto",
        }
        said += [
            f"{k}={getattr(self, k)!r}" for k, usual in unusual.items() if getattr(self, k) != usual
        ]
        return ", ".join(said)
