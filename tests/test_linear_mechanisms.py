"""The kernelised mechanisms themselves: their maps, their options, and what they refuse."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import sparseattn as sa
from sparseattn_linear import Cosformer, Linear, Performer, Plugin, Retention, Taylor
from sparseattn_linear.features import draw, projection

MECHANISMS = [Linear, Performer, Taylor, Cosformer, Retention]
EPS = torch.finfo(torch.float64).eps


def rows(count: int, dim: int, seed: int = 0, heads: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, count, dim, generator=generator, dtype=torch.float64)


def call(q: Tensor, k: Tensor, **options: Any) -> sa.AttentionCall:
    return sa.AttentionCall.make(q, k, k, **options)


def products(mechanism: sa.KernelizedLinear, q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """`phi(q_i) . phi(k_j)` at positions 0, 1, ...: `[1, H, N, M]`."""
    made = call(q, k, **options)
    i, j = (torch.arange(x.shape[2])[None, None] for x in (q, k))
    return mechanism.query_map(q, i, made) @ mechanism.feature_map(k, j, made).mT


def close(result: Tensor, expected: Tensor, terms: int, mass: Tensor | None = None) -> None:
    """Within the rounding of a float64 sum of so many terms, whose absolute sum is `mass`."""
    mass = expected.abs() if mass is None else mass
    assert ((result - expected).abs() <= 4 * (terms + 4) * EPS * mass).all()


# Every one.


@pytest.mark.parametrize(
    ("spec", "nature", "honours"),
    [
        ("linear", "different_function", set()),
        ("performer(features=256, seed=0, orthogonal=True)", "softmax_estimate", {"scale"}),
        ("taylor", "different_function", {"scale"}),
        ("cosformer(horizon=8192)", "different_function", set()),
        ("retention", "different_function", {"scale"}),
    ],
)
def test_names_defaults_and_natures(spec: str, nature: str, honours: set[str]) -> None:
    mechanism = sa.mechanism(spec.split("(")[0])
    assert repr(mechanism) == spec
    assert mechanism == sa.mechanism(spec)
    assert mechanism.nature == nature and mechanism.honours == honours
    assert not mechanism.looks_ahead
    assert "arXiv" in mechanism.source
    assert pickle.loads(pickle.dumps(mechanism)) == mechanism


def test_the_plugin_registers_all_of_them() -> None:
    found: list[Any] = []
    Plugin().register_mechanisms(found.append)
    assert found == MECHANISMS
    for one in found:
        summary = one.__doc__.split("\n\n")[0]
        assert "\n" not in summary and summary.endswith(".")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Performer(features=0),
        lambda: Performer(features=2.0),  # type: ignore[arg-type]
        lambda: Performer(features=True),
        lambda: Performer(features=10**9),
        lambda: Performer(seed=-1),
        lambda: Performer(seed=2**64),
        lambda: Performer(orthogonal=1),  # type: ignore[arg-type]
        lambda: Cosformer(horizon=0),
        lambda: Cosformer(horizon=None),  # type: ignore[arg-type]
    ],
)
def test_ill_chosen_options_are_refused(make: Any) -> None:
    with pytest.raises(sa.InvalidInputError, match=r"option .* got .*, expected"):
        make()


@pytest.mark.parametrize(
    ("spec", "options", "word"),
    [
        ("linear", {"scale": 1.0}, "scale"),
        ("cosformer", {"scale": 1.0}, "scale"),
        ("performer", {"scale": 0.0}, "scale"),
        ("performer", {"scale": -1.0}, "scale"),
        ("retention", {}, "causal=True"),
        ("cosformer(horizon=7)", {}, "horizon"),
        ("linear", {"causal": True, "softcap": 3.0}, "softcap"),
        ("taylor", {"bias": torch.zeros(1, 1, 1, 8)}, "bias"),
        ("retention", {"causal": True, "sink_logits": torch.zeros(1)}, "sink_logits"),
        ("performer", {"return_lse": True}, "lse"),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_refusals(spec: str, options: dict[str, Any], word: str, impl: str) -> None:
    x = torch.zeros(1, 1, 8, 4)
    with pytest.raises(sa.UnsupportedCallError, match=word) as caught:
        sa.attention(x, x, x, spec, impl=impl, **options)
    assert caught.value.reasons and len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", MECHANISMS)
def test_a_row_of_features_depends_on_no_other_row(kind: Any) -> None:
    mechanism, x = kind(), rows(40, 8)
    made = call(x, x, causal=True)
    at = torch.arange(40)[None, None]
    changed = torch.cat([x[:, :, :20], 50 * x[:, :, 20:]], dim=2)
    for name in ("feature_map", "query_map"):
        phi = getattr(mechanism, name)
        assert torch.equal(phi(x, at, made)[:, :, :20], phi(changed, at, made)[:, :, :20])
        alone = phi(x[:, :, 20:], at[..., 20:], made)
        whole = phi(x, at, made)[:, :, 20:]
        assert ((alone - whole).abs() <= 16 * EPS * (1 + whole.abs())).all()


@pytest.mark.parametrize("kind", MECHANISMS)
def test_maps_leave_their_input_alone(kind: Any) -> None:
    mechanism, x = kind(), rows(5, 8)
    kept, made = x.clone(), call(x, x, causal=True)
    for phi in (mechanism.feature_map, mechanism.query_map):
        phi(x, torch.arange(5)[None, None], made)
        assert torch.equal(x, kept)


# linear, taylor, cosformer, retention.


def test_elu_plus_one() -> None:
    q, k = torch.tensor([[[[-1.0, 2.0]]]]).double(), torch.tensor([[[[0.0, -3.0]]]]).double()
    expected = math.exp(-1) * 1 + 3 * math.exp(-3)
    close(products(Linear(), q, k), torch.full((1, 1, 1, 1), expected, dtype=q.dtype), 2)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("scale", [None, 2.0, -0.7, 0.0])
def test_taylor_features_make_the_polynomial(dim: int, scale: float | None) -> None:
    q, k = rows(9, dim), rows(11, dim, seed=1)
    factor = dim**-0.5 if scale is None else scale
    x, size = factor * (q @ k.mT), abs(factor) * (q.abs() @ k.abs().mT)
    result = products(Taylor(), q, k, scale=scale)
    close(result, 1 + x + x * x / 2, dim**2, 1 + size + size * size / 2)
    phi = Taylor().feature_map(k, torch.arange(11)[None, None], call(q, k))
    assert phi.shape[-1] == 1 + dim + dim * (dim + 1) // 2


def test_cosformer_weighs_by_the_cosine_of_the_distance() -> None:
    q, k = rows(50, 8), rows(50, 8, seed=1)
    distance = torch.arange(50)[:, None] - torch.arange(50)
    near = torch.cos(math.pi * distance.double() / 128)
    mass = q.clamp(min=0) @ k.clamp(min=0).mT
    close(products(Cosformer(horizon=64), q, k), mass * near, 16, mass)


@pytest.mark.parametrize(
    ("n", "m", "options", "served"),
    [
        (64, 64, {}, True),
        (65, 65, {}, False),
        (1, 64, {}, True),
        (4, 64, {"q_offset": 60}, True),
        (4, 64, {"q_offset": 61}, False),
        (4, 64, {"q_offset": -1}, False),
        (4, 64, {"q_offset": -1, "causal": True}, True),
    ],
)
def test_cosformer_refuses_longer_spans(
    n: int, m: int, options: dict[str, Any], served: bool
) -> None:
    made = call(torch.zeros(1, 1, n, 4), torch.zeros(1, 1, m, 4), **options)
    assert (Cosformer(horizon=64).refusals(made) == []) == served


def test_retention_is_its_recurrence() -> None:
    q, k = rows(90, 6, heads=4), rows(90, 6, seed=1, heads=4)
    v = rows(90, 3, seed=2, heads=4)
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(4)]).double()[None, :, None, None]
    state, mass = torch.zeros(1, 4, 6, 3).double(), torch.zeros(1, 4, 6, 3).double()
    out, size = [], []
    for t in range(90):  # equation 6: S_t = gamma S_{t-1} + k_t^T v_t, o_t = q_t S_t
        state = gamma * state + k[:, :, t, :, None] * v[:, :, t, None]
        mass = gamma * mass + (k[:, :, t, :, None] * v[:, :, t, None]).abs()
        out.append(0.3 * q[:, :, t, None] @ state)
        size.append(0.3 * q[:, :, t, None].abs() @ mass)
    result = sa.attention(q, k, v, "retention", causal=True, scale=0.3)
    close(result, torch.cat(out, 2), 90 * 6, torch.cat(size, 2))


def test_decay_follows_the_query_head() -> None:
    q, k = rows(30, 6, heads=4), rows(30, 6, seed=1, heads=2)
    made = call(q, k, causal=True)
    gamma = Retention().decay(made)
    assert gamma.dtype == torch.float64
    assert gamma.tolist() == [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256]
    # A float32 decay could not tell the heads beyond the twentieth from no decay at all.
    many = torch.zeros(1, 24, 1, 4)
    assert (Retention().decay(call(many, many, causal=True)) < 1).all()


# performer.


def test_projection_rows_are_orthogonal_within_blocks() -> None:
    w = draw(40, 16, 0, True)
    assert w.shape == (40, 16) and w.dtype == torch.float64
    for start in (0, 16, 32):
        block = w[start : start + 16]
        gram = block @ block.T
        lengths = block.norm(dim=1)
        off = (gram - gram.diagonal().diag()).abs() / (lengths[:, None] * lengths)
        assert off.max() <= 64 * EPS
    assert not torch.equal(w[:16], w[16:32])
    free = draw(40, 16, 0, False)
    assert (free @ free.T).fill_diagonal_(0).abs().max() > 1


def z_scores(samples: Tensor, expected: Tensor) -> Tensor:
    """How many standard errors the mean of samples `[S, ...]` lies off what is expected."""
    return (samples.mean(0) - expected).abs() / (samples.std(0) / samples.shape[0] ** 0.5)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_projection_rows_are_standard_normal(orthogonal: bool) -> None:
    # The mean of an entry shows signs that were not corrected: QR alone leaves the first column of
    # Q with one sign. The second and fourth moments of lengths show a distribution other than chi.
    dim, most = 4, 5.0  # five standard errors: 1 in 10^6 for each of 40 numbers, at a fixed seed
    samples = torch.stack([draw(dim, dim, seed, orthogonal) for seed in range(4000)])
    assert (z_scores(samples, torch.zeros(dim, dim)) <= most).all()
    assert (z_scores(samples.square(), torch.ones(dim, dim)) <= most).all()
    lengths = samples.square().sum(-1)
    assert (z_scores(lengths.square(), torch.full((dim,), dim * (dim + 2.0))) <= most).all()


def test_a_projection_whose_signs_are_not_corrected_is_caught() -> None:
    rotations = [torch.linalg.qr(draw(4, 4, seed, False))[0] for seed in range(4000)]
    assert (z_scores(torch.stack(rotations), torch.zeros(4, 4)) > 5.0).any()


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.05])
def test_products_estimate_the_softmax_kernel_without_bias(
    orthogonal: bool, scale: float | None
) -> None:
    q, k = 0.5 * rows(5, 8), 0.5 * rows(6, 8, seed=1)
    made, at = call(q, k, scale=scale), torch.arange(6)[None, None]
    samples = []
    for seed in range(2000):
        mechanism = Performer(features=16, seed=seed, orthogonal=orthogonal)
        # `query_map` drops a factor of each row, so the map of the keys serves both sides here.
        phi_q = mechanism.feature_map(q, at[..., :5], made)
        samples.append(phi_q @ mechanism.feature_map(k, at, made).mT)
    expected = torch.exp((8**-0.5 if scale is None else scale) * (q @ k.mT))
    assert (z_scores(torch.stack(samples), expected) <= 5.0).all()


def test_queries_drop_a_factor_of_their_row_alone() -> None:
    q, mechanism = rows(20, 8), Performer(features=32)
    made, at = call(q, q), torch.arange(20)[None, None]
    ratio = mechanism.query_map(q, at, made) / mechanism.feature_map(q, at, made)
    assert ((ratio - ratio[..., :1]).abs() <= 256 * EPS * ratio).all()
    assert (mechanism.query_map(q, at, made).amax(-1) == 1).all()


def errors_by_features(orthogonal: bool) -> list[float]:
    """Mean relative error against exact attention, over 8 seeds, with 16, 64, 256 features."""
    q, k, v = (x.float() for x in (0.4 * rows(64, 16), 0.4 * rows(64, 16, 1), rows(64, 8, 2)))
    exact = sa.attention(q, k, v, "full", causal=True)
    return [
        sum(
            float(
                (
                    sa.attention(
                        q, k, v, Performer(features, seed, orthogonal), causal=True, impl="torch"
                    )
                    - exact
                ).norm()
                / exact.norm()
            )
            for seed in range(8)
        )
        / 8
        for features in (16, 64, 256)
    ]


def test_it_converges_to_softmax_and_orthogonal_rows_help() -> None:
    apart, together = errors_by_features(False), errors_by_features(True)
    for errors in (apart, together):
        # Sixteen times the features quarter a standard error; of a quotient, a little less.
        assert errors[0] > errors[1] > errors[2] and errors[0] > 2 * errors[2]
    assert together[0] < apart[0]


def test_the_same_seed_draws_the_same_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = draw(20, 8, 5, True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(first, draw(20, 8, 5, True))
    assert not torch.equal(first, draw(20, 8, 6, True))
    held, longest = projection(20, 8, 5, True, torch.float32, torch.device("cpu"))
    assert torch.equal(held, first.float())
    assert math.isclose(longest, float(first.square().sum(1).max()))
    q = rows(30, 8).float()
    run = [sa.attention(q, q, q, "performer(features=20, seed=5)", causal=True) for _ in range(2)]
    assert torch.equal(*run)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_no_key_overflows(dim: int) -> None:
    # The worst keys there are lie along the rows of the projection, and are as long: the exponent
    # of such a key is |w|^2 / 2.
    keys = (draw(256, dim, 0, True) * dim**0.25).float()[None, None]
    values = torch.full((1, 1, 256, 3), 1000.0)
    for causal in (False, True):
        out = sa.attention(keys, keys, values, "performer", causal=causal, impl="torch")
        # A mean of equal values is that value, to the rounding of 256 terms.
        assert ((out - values).abs() <= 256 * torch.finfo(torch.float32).eps * values).all()


@pytest.mark.parametrize("dim", [128, 256])
def test_a_wide_head_loses_nothing_of_typical_keys(dim: int) -> None:
    q, k, v = rows(40, dim).float(), rows(40, dim, 1).float(), rows(40, 4, 2).float()
    out = sa.attention(q, k, v, "performer", causal=True, impl="torch").double()
    x, y = (t.double() * dim**-0.25 for t in (q, k))
    w = draw(256, dim, 0, True)
    phi_x, phi_y = (torch.exp(t @ w.T - t.square().sum(-1, keepdim=True) / 2) for t in (x, y))
    weights = (phi_x @ phi_y.mT).tril()
    expected = weights @ v.double() / weights.sum(-1, keepdim=True)
    # An exponent is a float32 sum of dim terms and a square, so e^it is off by so much of itself.
    size = (x.abs() @ w.abs().T).max() + x.square().sum(-1).max()
    bound = 4 * torch.finfo(torch.float32).eps * float(size) * float(v.abs().max())
    assert (out - expected).abs().max() <= bound
