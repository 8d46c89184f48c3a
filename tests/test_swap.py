"""sa.swap as a contract: what it changes, what it leaves alone, what it refuses, how it ends."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import sys
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import sparseattn as sa
from sparseattn.integrations import transformers_route

WINDOW = "windowed(window=8, sinks=0)"
TORCH_SDPA = F.scaled_dot_product_attention
IDS = tiny_models.tokens()


def llama() -> Any:
    return ARCHITECTURES["Llama"].make()


@torch.no_grad()
def logits(model: nn.Module, **words: Any) -> Tensor:
    return model(IDS, **words).logits  # type: ignore[no-any-return]


def state(model: nn.Module) -> list[Any]:
    """All that a swap might leave behind: attributes, hooks and the config of every module."""
    found: list[Any] = [F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()]
    for name, module in model.named_modules():
        found.append((name, type(module), sorted(module.__dict__)))
        hooks = [v for k, v in module.__dict__.items() if "hooks" in k and hasattr(v, "keys")]
        found += [list(hook) for hook in hooks]
        config = getattr(module, "config", None)
        if config is not None:
            found += [id(config), config.to_dict(), config._attn_implementation]
    return found


@pytest.fixture
def model() -> Any:
    return llama()


def test_a_context_swaps_and_gives_everything_back(model: Any) -> None:
    before, was = logits(model), state(model)
    with sa.swap(model, "windowed", window=8) as swapped:
        within = logits(model)
    assert not torch.equal(within, before)
    assert torch.equal(logits(model), before)
    assert state(model) == was
    assert [vars_of(record) for record in swapped.report] == [
        (f"model.layers.{i}.self_attn", WINDOW, 1, 0) for i in range(2)
    ]
    assert F.scaled_dot_product_attention is TORCH_SDPA


def vars_of(record: Any) -> tuple[str, str, int, int]:
    return record.module, record.mechanism, record.calls, record.fallback


def test_a_handle_restores_once_and_twice(model: Any) -> None:
    before, was = logits(model), state(model)
    handle = sa.swap(model, WINDOW)
    handle.restore()  # never called: restore() does not mind
    assert state(model) == was
    handle.restore()
    assert torch.equal(logits(model), before) and state(model) == was


def test_restore_within_a_context_ends_it(model: Any) -> None:
    before, was = logits(model), state(model)
    with sa.swap(model, WINDOW) as swapped:
        logits(model)
        swapped.restore()
        assert torch.equal(logits(model), before)
    assert state(model) == was and swapped.report[0].calls == 1


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)]
)
@pytest.mark.parametrize("part", [False, True])
def test_nested_swaps_restore_in_any_order(order: tuple[int, ...], part: bool) -> None:
    model = llama()
    before, was = logits(model), state(model)
    alone = []
    targets = [model, model.model.layers[1] if part else model, model]
    for target, window in zip(targets, (3, 8, 12), strict=True):
        with sa.swap(target, "windowed", window=window):
            alone.append(logits(model))
    if not part:
        handles = [sa.swap(model, "windowed", window=w) for w in (3, 8, 12)]
        standing = {0, 1, 2}
        for index in order:
            assert torch.equal(logits(model), alone[max(standing)])
            handles[index].restore()
            standing.remove(index)
    else:
        handles = [
            sa.swap(t, "windowed", window=w) for t, w in zip(targets, (3, 8, 12), strict=True)
        ]
        for index in order:
            handles[index].restore()
    assert torch.equal(logits(model), before)
    assert state(model) == was


def test_a_swap_of_a_part_wins_over_the_whole_and_leaves_the_rest(model: Any) -> None:
    with sa.swap(model, WINDOW, layers={"model.layers.1": "full"}):
        wanted = logits(model)
    with sa.swap(model, WINDOW), sa.swap(model.model.layers[1], "full") as inner:
        assert torch.equal(logits(model), wanted)
    assert [record.module for record in inner.report] == ["self_attn"]


def test_an_exception_in_the_context_survives_and_the_model_is_restored(model: Any) -> None:
    before, was = logits(model), state(model)
    with pytest.raises(ZeroDivisionError), sa.swap(model, WINDOW):
        1 / 0  # noqa: B018
    assert state(model) == was

    def fails(*_: Any) -> None:
        raise LookupError("inside")

    hook = model.model.layers[1].mlp.register_forward_hook(fails)
    with pytest.raises(LookupError, match="inside"), sa.swap(model, WINDOW):
        logits(model)
    hook.remove()
    with sa.swap(model, WINDOW):  # a caught one leaves the swap in use
        hook = model.model.layers[1].mlp.register_forward_hook(fails)
        with pytest.raises(LookupError):
            logits(model)
        hook.remove()
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    assert F.scaled_dot_product_attention is TORCH_SDPA


def test_a_swap_that_was_never_called_raises_on_exit(model: Any) -> None:
    was = state(model)
    with pytest.raises(sa.SwapError, match="never called"), sa.swap(model, WINDOW):
        pass
    assert state(model) == was


def test_a_model_with_no_attention_raises_at_entry() -> None:
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU())):
        with pytest.raises(sa.SwapError, match=type(model).__name__) as caught:
            sa.swap(model, "full")
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("family", ["Bloom", "Mpt", "DebertaV2"])
def test_an_architecture_out_of_reach_raises_at_entry_with_its_class(family: str) -> None:
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    small |= {"n_layer": 1, "n_head": 2, "intermediate_size": 32, "d_model": 32, "n_layers": 1}
    small |= {"n_heads": 2}
    config = getattr(transformers, f"{family}Config")(**small)
    model = getattr(transformers, f"{family}Model")(config)
    with pytest.raises(sa.SwapError, match="Attention"):
        sa.swap(model, "full")


# Others are left alone.


def test_a_model_that_shares_the_config_is_left_alone() -> None:
    first = llama()
    second = LlamaForCausalLM(first.config).eval()
    second.load_state_dict(first.state_dict())
    before, was = logits(second), state(second)
    with sa.swap(first, WINDOW):
        swapped = logits(first)
        assert torch.equal(logits(second), before)
        logits(first)
        assert state(second)[3:] == was[3:]
    assert not torch.equal(swapped, before)


def test_a_model_made_of_a_swapped_ones_config_is_in_no_swap(model: Any) -> None:
    before = logits(model)
    with sa.swap(model, WINDOW):
        logits(model)
        other = LlamaForCausalLM(model.config).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(logits(other), before)
    assert torch.equal(logits(other), before)


def test_our_name_in_a_config_is_not_a_swap(model: Any) -> None:
    with sa.swap(model, WINDOW):
        logits(model)
    model.set_attn_implementation("sparseattn")
    with pytest.raises(sa.SwapError, match=r"sparseattn\.swap"):
        logits(model)


def test_threads_each_see_their_own_model() -> None:
    """Two models swapped differently and one not at all, at the same time."""
    models = [llama() for _ in range(3)]
    specs = ["windowed(window=3)", "windowed(window=12)", None]
    wanted = []
    for model, spec in zip(models, specs, strict=True):
        if spec is None:
            wanted.append(logits(model))
            continue
        with sa.swap(model, spec):
            wanted.append(logits(model))
    wrong: list[int] = []
    together = threading.Barrier(3)

    def work(index: int) -> None:
        together.wait()
        for _ in range(3):
            if specs[index] is None:
                found = logits(models[index])
            else:
                with sa.swap(models[index], specs[index]):
                    found = logits(models[index])
            if not torch.equal(found, wanted[index]):
                wrong.append(index)

    tiny_models.at_once(work)
    assert not wrong
    assert F.scaled_dot_product_attention is TORCH_SDPA


def test_a_copy_of_a_swapped_model_is_a_plain_model(model: Any) -> None:
    before, was, before_config = logits(model), state(model), model.config
    with sa.swap(model, WINDOW):
        within = logits(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(twin), before)
            assert type(twin.config) is type(before_config) and twin.config is not before_config
            with sa.swap(twin, WINDOW):
                assert torch.equal(logits(twin), within)
    assert state(model) == was


def test_what_is_saved_says_nothing_of_the_swap(model: Any, tmp_path: Path) -> None:
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "plain")
    with sa.swap(model, WINDOW):
        logits(model)
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path / "swapped")
    plain, swapped = (
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("plain", "swapped")
    )
    assert plain == swapped
    assert "sparse" not in json.dumps(json.loads(swapped["config.json"]))


def test_nothing_keeps_a_restored_or_a_swapped_model_alive() -> None:
    for restored in (True, False):
        model = llama()
        handle = sa.swap(model, WINDOW)
        logits(model)
        if restored:
            handle.restore()
        gone = weakref.ref(model)
        del model, handle
        gc.collect()
        assert gone() is None
    assert F.scaled_dot_product_attention is TORCH_SDPA


# Arguments.


def test_layers_choose_by_glob_and_the_last_match_wins(model: Any) -> None:
    with sa.swap(
        model,
        "full",
        layers={"*.self_attn": "windowed(window=3)", "model.layers.1": sa.mechanism(WINDOW)},
    ) as swapped:
        logits(model)
    assert [r.mechanism for r in swapped.report] == ["windowed(window=3, sinks=0)", WINDOW]
    with sa.swap(model, WINDOW, layers={"*layers.1*": "full", "*": "windowed(window=2)"}) as again:
        logits(model)
    assert [r.mechanism for r in again.report] == ["windowed(window=2, sinks=0)"] * 2


@pytest.mark.parametrize(
    ("error", "said", "given"),
    [
        (sa.UnknownMechanismError, "windoed", {"mechanism": "windoed"}),
        (sa.UnknownOptionError, "windw", {"mechanism": "windowed", "windw": 3}),
        (sa.InvalidInputError, "window", {"mechanism": "windowed", "window": 0}),
        (sa.InvalidInputError, "nope", {"mechanism": WINDOW, "layers": {"nope.*": "full"}}),
        (sa.InvalidInputError, "layers", {"mechanism": WINDOW, "layers": "full"}),
        (sa.InvalidInputError, "the key 3", {"mechanism": WINDOW, "layers": {3: "full"}}),
        (sa.UnknownMechanismError, "ful1", {"mechanism": WINDOW, "layers": {"*": "ful1"}}),
        (sa.UnknownMechanismError, "ful1", {"mechanism": WINDOW, "cross": "ful1"}),
        (sa.InvalidInputError, "on_unsupported", {"mechanism": WINDOW, "on_unsupported": "warn"}),
        (sa.SparseAttnError, "cuda9", {"mechanism": WINDOW, "impl": "cuda9"}),
        (sa.UnknownOptionError, "window", {"mechanism": WINDOW, "window": 4}),
        (sa.InvalidInputError, "mechanism", {"mechanism": 7}),
        (sa.InvalidInputError, "impl", {"mechanism": WINDOW, "impl": None}),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict | str) else "",
)
def test_wrong_arguments_are_refused_before_anything(
    model: Any, error: type[Exception], said: str, given: dict[str, Any]
) -> None:
    was = state(model)
    with pytest.raises(error, match=said) as caught:
        sa.swap(model, **given)
    assert len(str(caught.value)) < 600
    assert state(model) == was


def test_options_beside_an_instance_and_a_model_that_is_none(model: Any) -> None:
    with pytest.raises(sa.UnknownOptionError, match="window"):
        sa.swap(model, sa.mechanism(WINDOW), window=3)
    with pytest.raises(sa.InvalidInputError, match="model"):
        sa.swap("model", WINDOW)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        {"mechanism": "linear"},
        {"mechanism": "full", "layers": {"*layers.1*": "linear"}},
        {"mechanism": "full", "cross": "linear"},
    ],
    ids=str,
)
def test_a_different_function_warns_once_and_says_so(given: dict[str, Any]) -> None:
    model = llama()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        handle = sa.swap(model, on_unsupported="full", **given)
        said = [str(w.message) for w in seen if "different_function" in str(w.message)]
        logits(model)
        logits(model)
        after = [str(w.message) for w in seen if "different_function" in str(w.message)]
    handle.restore()
    assert len(said) == 1 and after == said and "linear" in said[0]


def test_threads_that_hold_one_module_leave_it_as_it_was(model: Any) -> None:
    module, failed = model.model.layers[0].self_attn, []

    def work() -> None:
        try:
            for _ in range(1000):
                transformers_route.hold(module, {})
                transformers_route.release(module)
        except KeyError as error:
            failed.append(error)

    before, interval = module.config, sys.getswitchinterval()
    threads = [threading.Thread(target=work) for _ in range(6)]
    sys.setswitchinterval(1e-6)  # a race that there is shows
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed and module.config is before
