"""Whose call a swap takes: threads, failures, compiled code, models of both kinds."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from sdpa_modules import SPEC, Calls, CallsEarlyBound, band, close, draw, layers
from tiny_models import ARCHITECTURES
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as early_bound
from torch.utils.checkpoint import CheckpointError, checkpoint

import sparseattn as sa
from sparseattn.testing import budgets

TORCH_SDPA = F.scaled_dot_product_attention


class Mixed(nn.Module):
    """A transformers model, and attention of the person's own after it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ARCHITECTURES["BERT"].make()
        self.head = Calls()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body(ids)[0]
        return self.head(x, x, x)


@torch.no_grad()
def test_a_model_of_both_kinds() -> None:
    model, ids = Mixed(), tiny_models.tokens()
    before = model(ids)
    with sa.swap(model, SPEC) as swapped:
        found = model(ids)
    assert [r.calls for r in swapped.report] == [1, 1, 1]
    assert swapped.report[-1].module == "head"
    with sa.swap(model.body, SPEC):
        x = model.body(ids)[0]
    close(found, lambda x: early_bound(x, x, x, attn_mask=band(x.shape[1], x.shape[1], 0)), x)
    with sa.swap(model, SPEC, layers={"head": "full"}):
        assert torch.equal(model(ids), early_bound(x, x, x))
    assert torch.equal(model(ids), before)


def test_a_failed_call_leaves_nothing_entered() -> None:
    other = Calls()
    q = draw(1, 2, 20, 8)

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = Calls()

        def forward(self, q: Tensor) -> Tensor:
            self.calls(q, q, q)
            raise LookupError("mine")

    bad = Fails()
    with sa.swap(bad, SPEC):
        with pytest.raises(LookupError, match="mine"):
            bad(q)
        assert torch.equal(other(q, q, q), early_bound(q, q, q))
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), early_bound(q, q, q))
    assert F.scaled_dot_product_attention is TORCH_SDPA


class Interrupts:
    """The person's Ctrl-C while torch computes."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Tensor:
        raise KeyboardInterrupt


def test_an_interrupted_forward_leaves_other_models_alone() -> None:
    q = draw(1, 2, 20, 8)
    before = early_bound(q, q, q)

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.other = Calls(), Interrupts()

        def forward(self, q: Tensor) -> Tensor:
            torch.add(q, self.other)  # type: ignore[call-overload]
            return self.calls(q, q, q)  # type: ignore[no-any-return]

    model = Slow()
    handle = sa.swap(model, SPEC)
    with pytest.raises(KeyboardInterrupt):
        model(q)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), before)
    model.other = 1  # type: ignore[assignment]
    seen = band(20, 20, 0)
    close(model(q), lambda q: early_bound(q, q, q, attn_mask=seen), q)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), before)
    assert torch.overrides._get_current_function_mode_stack() == []
    handle.restore()


def test_restoring_inside_a_forward_leaves_nothing_entered() -> None:
    q = draw(1, 2, 20, 8)
    handles: list[Any] = []

    class Restores(Calls):
        def forward(self, q: Tensor) -> Tensor:
            handles.pop().restore()
            return super().forward(q, q, q)

    model = Restores()
    handles.append(sa.swap(model, SPEC))
    model(q)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert F.scaled_dot_product_attention is TORCH_SDPA


def test_threads_do_not_see_one_another() -> None:
    q = draw(1, 2, 40, 8)
    models = [Calls(), CallsEarlyBound(), Calls()]
    specs = ["windowed(window=2)", "windowed(window=9)", None]
    plain = early_bound(q, q, q)
    wanted = []
    for model, spec in zip(models, specs, strict=True):
        if spec is None:
            wanted.append(plain)
        else:
            with sa.swap(model, spec):
                wanted.append(model(q, q, q))
    wrong: list[int] = []
    start = threading.Barrier(3)

    def work(index: int) -> None:
        start.wait()
        for _ in range(20):
            if specs[index] is None:
                found = models[index](q, q, q)
            else:
                with sa.swap(models[index], specs[index]):
                    found = models[index](q, q, q)
            if not torch.equal(found, wanted[index]):
                wrong.append(index)

    tiny_models.at_once(work)
    assert not wrong
    assert F.scaled_dot_product_attention is TORCH_SDPA


@pytest.mark.parametrize(
    "spec", ["topk_blocks", "performer", "retention", "linear", "vertical_slash"]
)
def test_other_natures(spec: str) -> None:
    q = draw(1, 2, 40, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sa.swap(model := Calls(), spec) as swapped:
            found = model(q, q, q, is_causal=True)
    wanted = sa.attention(q, q, q, spec, causal=True)
    assert torch.equal(found, wanted)
    assert swapped.report[0].impl not in (None, "") and swapped.report[0].calls == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["encoder layer", "own"])
def test_compiled_before_or_within_a_swap(kind: str) -> None:
    """torch.compile does not look at hooks again: a swap must not be lost on compiled code."""
    x = draw(2, 20, 32)
    model: nn.Module = layers("encoder layer") if kind == "encoder layer" else Own()
    before = model(x)
    early = torch.compile(model, backend="eager")
    torch.testing.assert_close(early(x), before)
    with sa.swap(model, SPEC) as swapped:
        eager = model(x)
        for compiled in (early, torch.compile(model, backend="aot_eager")):
            torch.testing.assert_close(compiled(x), eager)
    assert sum(r.calls for r in swapped.report) == 3
    assert not torch.equal(eager, before)
    torch.testing.assert_close(early(x), before)
    torch.testing.assert_close(compiled(x), before)


class Own(nn.Module):
    """Attention two modules down, behind a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([CallsEarlyBound()])

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        return self.inner[0](x, x, x) + 1


def test_autocast_reaches_the_mechanism() -> None:
    model = layers("encoder layer")
    x = draw(2, 20, 32)
    with torch.no_grad(), sa.swap(model, SPEC), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        dense = model(x, ~band(20, 20, 0))
    with torch.no_grad():
        ref = layers("encoder layer").double()(x.double(), ~band(20, 20, 0))
    assert budgets.distance(found, ref) <= budgets.rule(dense, ref, torch.bfloat16)


class ChecksItself(nn.Module):
    """Checkpoints a function of its own, which no hook sees repeated."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def attend(self, x: Tensor) -> Tensor:
        x = x * 2
        return F.scaled_dot_product_attention(x, x, x)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attend, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_function_never_gives_the_gradients_of_another_mechanism(
    reentrant: bool,
) -> None:
    x = draw(1, 2, 20, 8).requires_grad_()
    with sa.swap(model := ChecksItself(reentrant), SPEC):
        with torch.no_grad():
            model(x.detach())
        with pytest.raises((sa.SwapError, CheckpointError)):
            model(x).sum().backward()


def test_a_forward_that_wants_no_gradients_is_served() -> None:
    class Frozen(Calls):
        @torch.no_grad()
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    q = draw(1, 2, 20, 8).requires_grad_()
    with sa.swap(model := Frozen(), SPEC) as swapped:
        model(q, q, q)
    assert swapped.report[0].calls == 1


def test_three_axes_are_a_batch_whose_padding_a_linear_mechanism_reads() -> None:
    q = draw(2, 20, 8)
    seen = (torch.arange(20) < torch.tensor([[20], [13]]))[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sa.swap(model := Calls(), "performer"):
            found = model(q, q, q, attn_mask=seen)
    four = q[:, None]
    wanted = sa.attention(four, four, four, "performer", key_mask=seen[:, 0])[:, 0]
    assert torch.equal(found, wanted)
