"""The proximal penalties against loops, textbook formulas in float64, and finite differences."""
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from minipeso.proximal import (PENALTIES, l2, orthogonality, output_kl, per_rank_kl, proximal_term, quadratic,
                               softmax_kl)
from minipeso.theory import quadratic_prox, softmax_metric
from tests.conftest import draws
from tests.reference import exact_softmax_kl, textbook_softmax_kl

SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(1, 40)
EPS = torch.finfo(torch.float32).eps
quick = draws(40)
every_penalty = pytest.mark.parametrize("penalty", [*PENALTIES.values(), output_kl])
every_term = pytest.mark.parametrize("name, groups", [(n, g) for n in PENALTIES for g in ("module", "matrix")])


def normal(*shape: int, seed: int, std: float = 1.0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)


def textbook(v: Tensor, v_prev: Tensor) -> tuple[float, Tensor]:
    """Value and gradient of one group, from the numbers that v and v_prev really hold."""
    kl, gradient = textbook_softmax_kl(v.double().tolist(), v_prev.double().tolist())
    return kl, torch.tensor(gradient, dtype=torch.float64)


def value_and_gradient(penalty, v: Tensor, v_prev: Tensor) -> tuple[Tensor, Tensor]:
    v = v.detach().clone().requires_grad_()
    value = penalty(v, v_prev)
    return value.detach(), torch.autograd.grad(value, v)[0]


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@quick
@given(n=SIZES, seed=SEEDS, std=st.sampled_from([0.05, 1.0, 5.0]))
def test_softmax_kl_is_the_textbook_divergence_with_the_textbook_gradient(n, seed, std):
    """In float64, value and gradient equal sum r log(r/p) and r (l - sum r l) at any distance."""
    v, v_prev = normal(2, n, seed=seed, std=std)
    (value, gradient), (kl, want) = value_and_gradient(softmax_kl, v, v_prev), textbook(v, v_prev)
    assert abs(value - kl) <= 1e-12 * max(1, kl), f"{value} against {kl}"
    assert torch.allclose(gradient, want, rtol=1e-9, atol=1e-13), f"{gradient} against {want}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [0.02, 3.0, 300.0])
def test_value_and_gradient_are_exactly_zero_at_the_anchor(dtype, std):
    """v = v_prev, where training starts: value and gradient are 0.0 (d = 0 exactly, r and p are the same bits)."""
    v_prev = normal(3, 257, seed=0, std=std, dtype=dtype)
    value, gradient = value_and_gradient(softmax_kl, v_prev, v_prev)
    assert value == 0 and torch.count_nonzero(gradient) == 0, f"{value}, {gradient.abs().max()}"


@quick
@given(n=st.integers(2, 40), seed=SEEDS, shift=st.floats(-50, 50))
def test_softmax_kl_is_blind_to_a_uniform_shift_and_l2_is_not(n, seed, shift):
    """Adding one number to all of v, or to all of v_prev, changes nothing; l2 sees it."""
    v, v_prev = normal(2, n, seed=seed)
    kl = softmax_kl(v, v_prev)
    for shifted in (softmax_kl(v + shift, v_prev), softmax_kl(v, v_prev + shift)):
        assert abs(shifted - kl) <= 1e-11 * (1 + kl), f"{shifted} against {kl}, shift {shift}"
    assert abs(softmax_kl(v_prev + shift, v_prev)) < 1e-25
    assert math.isclose(l2(v_prev + shift, v_prev), n * shift**2 / 2, rel_tol=1e-9, abs_tol=1e-12)


def test_softmax_kl_is_not_negative_nor_symmetric_and_looks_from_the_current_adapter():
    """On 1,000 random fp32 pairs, steps of 1e-7 to 10: above -eps |d|, the rounding of either of its two terms. By
    hand: KL(current || previous) with r = (1/2, 1/2), p = (1/4, 3/4)."""
    for seed in range(1000):
        step = 10.0 ** (seed % 9 - 7)
        v_prev = normal(1 + seed % 50, seed=seed, std=3, dtype=torch.float32)
        v = v_prev + normal(*v_prev.shape, seed=seed + 5000, std=step).float()
        assert softmax_kl(v, v_prev) >= -EPS * (v - v_prev).abs().max(), f"seed {seed}: {softmax_kl(v, v_prev)}"
    v, v_prev, by_hand = torch.zeros(2).double(), torch.tensor([1.0, 3.0]).double().log(), math.log(4 / 3) / 2
    assert math.isclose(softmax_kl(v, v_prev), by_hand, rel_tol=1e-12) and abs(softmax_kl(v_prev, v) - by_hand) > 0.01


@pytest.mark.parametrize("step", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("n", [16, 4096, 16384])
def test_fp32_keeps_the_digits_of_small_steps(n, step):
    """Against float64: p and r carry a relative rounding of eps, a gradient of size d one of eps / step, the value 1 /
    sqrt(n) of that: at n = 16,384 and steps of 1e-5 1e-3 of the value, 1e-2 of the gradient. The formula as typed,
    sum r (log r - log p), is off by over 100 % there."""
    v_prev = normal(n, seed=n, std=0.02, dtype=torch.float32)
    v = v_prev + normal(n, seed=n + 1, std=step).float()
    value, gradient = value_and_gradient(softmax_kl, v, v_prev)
    kl, want = exact_softmax_kl(v.double(), v_prev.double())
    assert value.dtype == torch.float32 and abs(value / kl - 1) < 12 * EPS * (1 + 1 / (step * n**0.5)), f"{value}, {kl}"
    assert relative_error(gradient, want) < 1.5 * EPS * (1 + 1 / step), f"off by {relative_error(gradient, want):.2g}"
    if step >= 1e-3:  # where the textbook's float64 has digits enough, the oracle is the textbook
        oracle = textbook(v, v_prev)
        assert math.isclose(kl, oracle[0], rel_tol=1e-6) and relative_error(want, oracle[1]) < 1e-8
    typed = (v.softmax(-1) * (v.log_softmax(-1) - v_prev.log_softmax(-1))).sum()
    assert n < 16384 or step > 1e-4 or abs(typed / kl - 1) > 1, f"as typed {typed:.3g}, true {kl:.3g}"


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("std_prev, step", [(1, 1), (1, 3), (1, 10), (0.02, 30), (30, 200), (1000, 200), (1000, 1e4)])
def test_large_steps_are_finite_and_right(dtype, digits, std_prev, step):
    """Where exp(v - v_prev) overflows (entries to 1000, steps to 1e4) value and gradient hold."""
    for seed in range(10):
        v_prev = normal(50, seed=seed, std=std_prev).to(dtype)
        v = (v_prev.double() + normal(50, seed=seed + 100, std=step)).to(dtype)
        (value, gradient), (kl, want) = value_and_gradient(softmax_kl, v, v_prev), textbook(v, v_prev)
        size = max(v.abs().max(), v_prev.abs().max(), 1)  # v's last digit sets the result's
        assert abs(value - kl) <= digits * max(kl, size), f"value {value} against {kl}"
        assert (gradient - want).abs().max() <= digits * size, f"{gradient} against {want}"


@pytest.mark.parametrize("jump", [-1e4, -200.0, 2.0, 60.0, 79.0, 81.0, 89.0, 200.0, 1e4])
@pytest.mark.parametrize("peak", [-150.0, 0.0, 20.0])
def test_one_far_coordinate_among_near_ones(jump, peak):
    """An entry, of nearly none to nearly all mass, jumps while others move by 1e-3: right to the jump's last digit."""
    v_prev = normal(1000, seed=0, std=0.02, dtype=torch.float32)
    v_prev[7] += peak
    v = v_prev + normal(1000, seed=1, std=1e-3).float()
    v[7] += jump
    (value, gradient), (kl, want) = value_and_gradient(softmax_kl, v, v_prev), textbook(v, v_prev)
    assert abs(value - kl) < 1e-5 * kl + EPS * abs(jump), f"{value} against {kl}"
    assert (gradient - want).abs().max() < 5 * EPS * abs(jump), f"off by {(gradient - want).abs().max()}"
    both = torch.stack([v, near := v_prev + normal(1000, seed=2, std=1e-5).float()]), v_prev.expand(2, -1)
    beside, alone = value_and_gradient(softmax_kl, *both)[1], value_and_gradient(softmax_kl, near, v_prev)[1]
    assert torch.equal(beside[1], alone), "a group keeps its digits beside one that has gone far"


@every_penalty
def test_the_gradient_is_that_of_finite_differences_with_a_constant_anchor(penalty):
    """gradcheck and gradgradcheck in float64 near the anchor, away and far from it; v_prev gets no gradient even where
    it requires one; another shape is refused, not broadcast."""
    for std in (1e-2, 1.0, 6.0):
        v_prev = normal(2, 5, seed=3)
        v = (v_prev + normal(2, 5, seed=4, std=std)).requires_grad_()
        assert torch.autograd.gradcheck(lambda v: penalty(v, v_prev), v)
        assert torch.autograd.gradgradcheck(lambda v: penalty(v, v_prev), v)
    v, v_prev = normal(3, 4, seed=0).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    penalty(v, v_prev).backward()
    assert v_prev.grad is None and v.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"\(8, 4\) against \(1, 4\)") as error:
        penalty(torch.zeros(8, 4), torch.zeros(1, 4))
    assert str(error.value).count("\n") == 2


@every_penalty
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(penalty, dtype):
    """Inputs in bf16 and fp16 give the fp32 result of the numbers they hold; autocast changes nothing either."""
    v_prev, v = (normal(2, 500, seed=seed, std=0.02, dtype=dtype) for seed in (0, 1))
    value, gradient = value_and_gradient(penalty, v, v_prev)
    want, want_gradient = value_and_gradient(penalty, v.float(), v_prev.float())
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert value == want and gradient.equal(want_gradient.to(dtype))
    assert penalty(v.double(), v_prev).dtype == penalty(v, v_prev.double()).dtype == torch.float64
    v = v.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = penalty(v, v_prev.float())
    assert inside == want and torch.autograd.grad(inside, v)[0].equal(want_gradient)


@quick
@given(n=SIZES, r=st.integers(1, 5), seed=SEEDS)
def test_a_matrix_is_the_sum_over_its_rows(n, r, seed):
    """softmax_kl, per_rank_kl, l2 and quadratic of (r, n) are sums over rows of any scale, written out; orthogonality
    ||M M_prev^T||_F^2 sums squared inner products of rows, 0 for orthogonal row spaces."""
    v_prev = normal(r, n, seed=seed)
    v = v_prev + torch.logspace(-4, 1, r, dtype=torch.float64)[:, None] * normal(r, n, seed=seed + 1)
    total = sum(textbook(v[g], v_prev[g])[0] for g in range(r))
    squares = sum((a - b) ** 2 for a, b in zip(v.flatten().tolist(), v_prev.flatten().tolist())) / 2
    forms = sum(float(quadratic_prox(v[g] - v_prev[g], softmax_metric(v_prev[g]))) for g in range(r))
    assert math.isclose(softmax_kl(v, v_prev), total, rel_tol=1e-7, abs_tol=1e-14)
    assert per_rank_kl(v, v_prev) == softmax_kl(v, v_prev)
    assert math.isclose(l2(v, v_prev), squares, rel_tol=1e-12)
    assert math.isclose(quadratic(v, v_prev), forms, rel_tol=1e-9, abs_tol=1e-12)
    M, M_prev = normal(2, r, n, seed=seed)
    loops = sum(math.fsum(a * b for a, b in zip(x, y)) ** 2 for x in M.tolist() for y in M_prev.tolist())
    assert math.isclose(orthogonality(M, M_prev), loops, rel_tol=1e-9, abs_tol=1e-12)
    assert orthogonality(torch.cat([M, 0 * M], dim=1), torch.cat([0 * M, M], dim=1)) == 0


@quick
@given(shape=st.lists(st.integers(1, 4), min_size=0, max_size=3), d=SIZES, seed=SEEDS)
def test_output_kl_is_the_mean_over_tokens(shape, d, seed):
    """Any leading shape, (batch, length) or none, is a set of tokens to average over."""
    y, y_prev = normal(2, *shape, d, seed=seed)
    tokens = [textbook(a, b)[0] for a, b in zip(y.reshape(-1, d), y_prev.reshape(-1, d))]
    assert math.isclose(output_kl(y, y_prev), math.fsum(tokens) / len(tokens), rel_tol=1e-9, abs_tol=1e-12)


def adapters(seed: int) -> list[tuple[Tensor, ...]]:
    """(A, B, A_prev, B_prev) per module; two share shapes, and the last one's A and B a size."""
    return [tuple(normal(*shape, seed=seed + 4 * k + j) for j, shape in enumerate([(3, i), (o, 3)] * 2))
            for k, (o, i) in enumerate([(4, 6), (5, 6), (4, 6), (8, 8)])]


def by_definition(name: str, v: Tensor, v_prev: Tensor) -> float:
    """The penalty of one flat group or, for penalties of matrices, of one matrix."""
    if name in ("kl", "rank-kl"):
        return sum(textbook(a, b)[0] for a, b in zip(torch.atleast_2d(v), torch.atleast_2d(v_prev)))
    if name == "l2":
        return float(((v - v_prev) ** 2).sum()) / 2
    if name == "quadratic":  # Eq. 6 with Proposition 3's H written out as a matrix
        return float(quadratic_prox(v - v_prev, softmax_metric(v_prev)))
    return float(((v @ v_prev.T) ** 2).sum())


@every_term
def test_proximal_term_by_definition(name, groups):
    """Groups, sum and mean over modules, by hand; the paper by default."""
    layers, plain = adapters(seed=11), []
    for A, B, P, Q in layers:
        if name in ("rank-kl", "orthogonal"):
            parts = [(A, P), (B.T, Q.T)]
        else:
            parts = [(A.reshape(-1), P.reshape(-1)), (B.reshape(-1), Q.reshape(-1))]
            parts = parts if groups == "matrix" else [tuple(map(torch.cat, zip(*parts)))]
        plain += [by_definition(name, v, v_prev) for v, v_prev in parts]
    for reduction, modules in (("sum", 1), ("mean", 4)):
        got = proximal_term(layers, PENALTIES[name], groups, reduction)
        assert got.shape == () and math.isclose(got, math.fsum(plain) / modules, rel_tol=1e-10), f"{got}"
    if groups == "module":
        assert math.isclose(proximal_term(layers, PENALTIES[name]), math.fsum(plain), rel_tol=1e-10)


@pytest.mark.parametrize("wrong", [{"groups": "layer"}, {"reduction": "max"}, {"layers": []}])
def test_unknown_options_are_errors_in_three_lines(wrong):
    """What failed, the value found, what to do."""
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}" if value else "empty") as error:
        proximal_term(**{"layers": adapters(0), "penalty": softmax_kl} | wrong)
    assert str(error.value).count("\n") == 2
