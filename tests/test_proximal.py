"""The proximal penalties against loops, textbook formulas in float64, and autograd."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minipeso.proximal import (PROXIMALS, l2, orthogonality, output_kl, per_rank_kl, proximal_term, quadratic,
                               softmax_kl, stack_groups, stack_ranks)
from minipeso.theory import quadratic_prox, softmax_metric
from tests.conftest import draws
from tests.reference import textbook_softmax_kl

FORMULA = {"kl": softmax_kl, "l2": l2, "quadratic": quadratic, "rank-kl": per_rank_kl, "orthogonal": orthogonality}

SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(1, 40)
quick = draws(40)


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


def naive_kl(v: Tensor, v_prev: Tensor) -> Tensor:
    """The formula as one would type it, to show what the shipped form is for."""
    log_r = v.log_softmax(-1)
    return (log_r.exp() * (log_r - v_prev.log_softmax(-1))).sum()


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


# ---- softmax_kl: what it is


@quick
@given(n=SIZES, seed=SEEDS, std=st.sampled_from([0.05, 1.0, 5.0]))
def test_softmax_kl_is_the_textbook_divergence_with_the_textbook_gradient(n, seed, std):
    """In float64, value and gradient equal sum r log(r/p) and r (l - sum r l) at any distance."""
    v, v_prev = normal(n, seed=seed, std=std), normal(n, seed=seed + 1, std=std)
    value, gradient = value_and_gradient(softmax_kl, v, v_prev)
    kl, want = textbook(v, v_prev)
    assert abs(value - kl) <= 1e-12 * max(1, kl), f"{value} against {kl}"
    assert torch.allclose(gradient, want, rtol=1e-9, atol=1e-13), f"{gradient} against {want}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [0.02, 3.0, 300.0])
def test_value_and_gradient_are_exactly_zero_at_the_anchor(dtype, std):
    """v = v_prev gives 0.0, not 1e-9, whatever the dtype: training starts there."""
    v_prev = normal(3, 257, seed=0, std=std, dtype=dtype)
    value, gradient = value_and_gradient(softmax_kl, v_prev, v_prev)
    assert value == 0 and torch.count_nonzero(gradient) == 0, f"{value}, {gradient.abs().max()}"


@quick
@given(n=st.integers(2, 12), seed=SEEDS)
def test_hessian_at_the_anchor_is_diag_p_minus_p_p(n, seed):
    """Differentiating the shipped function twice at the anchor gives diag(p) - p p^T (Eq. 44)."""
    v_prev = normal(n, seed=seed)
    H = torch.autograd.functional.hessian(lambda v: softmax_kl(v, v_prev), v_prev)
    p = v_prev.exp() / v_prev.exp().sum()
    want = torch.tensor([[p[a] * (float(a == b) - p[b]) for b in range(n)] for a in range(n)])
    assert torch.allclose(H, want.double(), atol=1e-12), f"off by {(H - want).abs().max()}"


def test_gradient_and_hessian_pass_finite_differences():
    """torch's gradcheck and gradgradcheck hold away from the anchor, near it and far from it."""
    for std in (1e-2, 1.0, 6.0):
        v_prev = normal(2, 5, seed=3)
        v = (v_prev + normal(2, 5, seed=4, std=std)).requires_grad_()
        assert torch.autograd.gradcheck(lambda v: softmax_kl(v, v_prev), v)
        assert torch.autograd.gradgradcheck(lambda v: softmax_kl(v, v_prev), v)


@quick
@given(n=st.integers(2, 40), seed=SEEDS, shift=st.floats(-50, 50))
def test_softmax_kl_is_blind_to_a_uniform_shift_and_l2_is_not(n, seed, shift):
    """Adding one number to all of v, or to all of v_prev, changes nothing; l2 sees it."""
    v, v_prev = normal(n, seed=seed), normal(n, seed=seed + 1)
    kl = softmax_kl(v, v_prev)
    for shifted in (softmax_kl(v + shift, v_prev), softmax_kl(v, v_prev + shift)):
        assert abs(shifted - kl) <= 1e-11 * (1 + kl), f"{shifted} against {kl}, shift {shift}"
    assert softmax_kl(v_prev + shift, v_prev) < 1e-25
    assert math.isclose(l2(v_prev + shift, v_prev), n * shift**2 / 2, rel_tol=1e-9, abs_tol=1e-12)


def test_softmax_kl_is_never_negative():
    """On 1,000 random fp32 pairs, from almost equal to far apart, no value is below zero."""
    for seed in range(1000):
        v_prev = normal(1 + seed % 50, seed=seed, std=3, dtype=torch.float32)
        v = v_prev + normal(*v_prev.shape, seed=seed + 5000, std=10.0 ** (seed % 9 - 7)).float()
        assert softmax_kl(v, v_prev) >= 0, f"seed {seed}: {softmax_kl(v, v_prev)}"


def test_softmax_kl_is_not_symmetric_and_looks_from_the_current_adapter():
    """KL(current || previous), worked by hand: r = (1/2, 1/2), p = (1/4, 3/4)."""
    v, v_prev = torch.zeros(2).double(), torch.tensor([1.0, 3.0]).double().log()
    by_hand = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert math.isclose(softmax_kl(v, v_prev), by_hand, rel_tol=1e-12)
    assert abs(softmax_kl(v_prev, v) - by_hand) > 0.01


@pytest.mark.parametrize("penalty", [softmax_kl, l2, per_rank_kl, orthogonality, output_kl])
def test_the_anchor_receives_no_gradient(penalty):
    """v_prev is a constant of the stage, even when it happens to require a gradient."""
    v, v_prev = normal(3, 4, seed=0).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    penalty(v, v_prev).backward()
    assert v_prev.grad is None and v.grad.abs().sum() > 0


@pytest.mark.parametrize("penalty", [softmax_kl, l2, per_rank_kl, orthogonality, output_kl])
def test_unequal_shapes_are_an_error_not_a_broadcast(penalty):
    """An anchor of another rank is refused with both shapes."""
    with pytest.raises(ValueError, match=r"\(8, 4\) against \(1, 4\)"):
        penalty(torch.zeros(8, 4), torch.zeros(1, 4))


# ---- softmax_kl: digits


@pytest.mark.parametrize("step", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("n", [16, 4096, 16384])
def test_fp32_value_and_gradient_are_within_1e_3_of_float64(n, step):
    """At the size of a real adapter the fp32 value and gradient keep three digits."""
    v_prev = normal(n, seed=n, std=0.02, dtype=torch.float32)
    v = v_prev + normal(n, seed=n + 1, std=step).float()
    value, gradient = value_and_gradient(softmax_kl, v, v_prev)
    kl, want = textbook(v, v_prev)
    assert value.dtype == torch.float32
    assert abs(value / kl - 1) < 1e-3, f"value {value:.6g} against {kl:.6g}"
    assert relative_error(gradient, want) < 1e-3, f"off by {relative_error(gradient, want):.2g}"


@pytest.mark.parametrize("step", [1e-5, 1e-4])
def test_the_formula_as_typed_fails_in_fp32(step):
    """Why the stable form exists: sum r (log r - log p) in fp32 is off by over 100 %."""
    v_prev = normal(16384, seed=0, std=0.02, dtype=torch.float32)
    v = v_prev + normal(16384, seed=1, std=step).float()
    value, _ = value_and_gradient(naive_kl, v, v_prev)
    kl, _ = textbook(v, v_prev)
    assert abs(value / kl - 1) > 1, f"naive {value:.3g}, true {kl:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    """bf16 and fp16 adapters give the fp32 result of the numbers they hold, as an fp32 scalar."""
    v_prev, v = (normal(2, 500, seed=seed, std=0.02, dtype=dtype) for seed in (0, 1))
    for penalty in (softmax_kl, l2, per_rank_kl, orthogonality, output_kl):
        value, gradient = value_and_gradient(penalty, v, v_prev)
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        assert value == penalty(v.float(), v_prev.float()), penalty.__name__
    assert softmax_kl(v.double(), v_prev).dtype == torch.float64


def test_autocast_does_not_lower_the_precision():
    """Under bf16 autocast every penalty gives fp32's value and gradient (backward outside)."""
    v_prev, v = normal(4, 64, seed=0).float(), normal(4, 64, seed=1).float().requires_grad_()
    for penalty in (softmax_kl, l2, per_rank_kl, orthogonality, output_kl):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = penalty(v, v_prev)
        outside = penalty(v, v_prev)
        assert inside.equal(outside), f"{penalty.__name__}: {inside} against {outside}"
        assert torch.autograd.grad(inside, v)[0].equal(torch.autograd.grad(outside, v)[0])


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("std_prev, step", [(1, 1), (1, 3), (1, 10), (0.02, 30), (30, 200),
                                            (1000, 200), (1000, 1000)])
def test_large_steps_are_finite_and_right(dtype, digits, std_prev, step):
    """Where exp(v - v_prev) overflows (entries and steps to 1000) value and gradient hold."""
    for seed in range(10):
        v_prev = (normal(50, seed=seed, std=std_prev).clamp(-1000, 1000)).to(dtype)
        v = (v_prev.double() + normal(50, seed=seed + 100, std=step)).clamp(-1000, 1000).to(dtype)
        value, gradient = value_and_gradient(softmax_kl, v, v_prev)
        kl, want = textbook(v, v_prev)
        size = max(v.abs().max(), v_prev.abs().max(), 1)  # v's last digit sets the result's
        assert abs(value - kl) <= digits * max(kl, size), f"value {value} against {kl}"
        assert (gradient - want).abs().max() <= digits * size, f"{gradient} against {want}"


@pytest.mark.parametrize("jump", [-200.0, 200.0])
@pytest.mark.parametrize("peak", [0.0, 20.0])
def test_one_far_coordinate_among_near_ones(jump, peak):
    """An entry, light or with nearly all mass, jumps by +-200 while the others move by 1e-3."""
    v_prev = normal(1000, seed=0, std=0.02, dtype=torch.float32)
    v_prev[7] += peak
    v = v_prev + normal(1000, seed=1, std=1e-3).float()
    v[7] += jump
    kl, want = textbook(v, v_prev)
    value, gradient = value_and_gradient(softmax_kl, v, v_prev)
    assert abs(value - kl) < 1e-4 * kl, f"{value} against {kl}"
    assert (gradient - want).abs().max() < 1e-4


# ---- the other penalties


@quick
@given(n=SIZES, groups=st.integers(1, 5), seed=SEEDS)
def test_stacked_groups_give_the_sum_of_single_groups(n, groups, seed):
    """softmax_kl and l2 of a (G, n) stack are sums over its rows, whatever the rows' scales."""
    scale = torch.logspace(-4, 1, groups, dtype=torch.float64)[:, None]
    v_prev = normal(groups, n, seed=seed)
    v = v_prev + scale * normal(groups, n, seed=seed + 1)
    total = sum(textbook(v[g], v_prev[g])[0] for g in range(groups))
    assert math.isclose(softmax_kl(v, v_prev), total, rel_tol=1e-7, abs_tol=1e-14)
    squares = sum((a - b) ** 2 for a, b in zip(v.flatten().tolist(), v_prev.flatten().tolist())) / 2
    assert math.isclose(l2(v, v_prev), squares, rel_tol=1e-12)


@quick
@given(r=st.integers(1, 6), n=SIZES, seed=SEEDS)
def test_per_rank_kl_is_the_sum_of_the_one_row_cases(r, n, seed):
    """Each rank component, a row of A or a column of B, has its own softmax."""
    A, A_prev = normal(r, n, seed=seed), normal(r, n, seed=seed + 1)
    rows = sum(textbook(A[k], A_prev[k])[0] for k in range(r))
    assert math.isclose(per_rank_kl(A, A_prev), rows, rel_tol=1e-9, abs_tol=1e-12)
    B, B_prev = normal(n, r, seed=seed + 2), normal(n, r, seed=seed + 3)
    columns = sum(textbook(B[:, k], B_prev[:, k])[0] for k in range(r))
    assert math.isclose(per_rank_kl(B.T, B_prev.T), columns, rel_tol=1e-9, abs_tol=1e-12)


@quick
@given(r=st.integers(1, 5), n=SIZES, seed=SEEDS)
def test_orthogonality_is_the_sum_of_squared_inner_products(r, n, seed):
    """||M M_prev^T||_F^2 sums squared inner products of rows; 0 for orthogonal row spaces."""
    M, M_prev = normal(r, n, seed=seed), normal(r, n, seed=seed + 1)
    loops = sum(math.fsum(a * b for a, b in zip(x, y)) ** 2
                for x in M.tolist() for y in M_prev.tolist())
    assert math.isclose(orthogonality(M, M_prev), loops, rel_tol=1e-9, abs_tol=1e-12)
    left, right = torch.cat([M, 0 * M], dim=1), torch.cat([0 * M, M], dim=1)
    assert orthogonality(left, right) == 0


@quick
@given(shape=st.lists(st.integers(1, 4), min_size=0, max_size=3), d=SIZES, seed=SEEDS)
def test_output_kl_is_the_mean_over_tokens(shape, d, seed):
    """Any leading shape, (batch, length) or none, is a set of tokens to average over."""
    y, y_prev = normal(*shape, d, seed=seed), normal(*shape, d, seed=seed + 1)
    tokens = [textbook(a, b)[0] for a, b in zip(y.reshape(-1, d), y_prev.reshape(-1, d))]
    mean = math.fsum(tokens) / len(tokens)
    assert math.isclose(output_kl(y, y_prev), mean, rel_tol=1e-9, abs_tol=1e-12)


# ---- all modules of a model


def adapters(seed: int) -> list[tuple[Tensor, ...]]:
    """(A, B, A_prev, B_prev) per module; two share shapes, and the last one's A and B a size."""
    return [(normal(r, i, seed=seed + 4 * k), normal(o, r, seed=seed + 4 * k + 1),
             normal(r, i, seed=seed + 4 * k + 2), normal(o, r, seed=seed + 4 * k + 3))
            for k, (o, i, r) in enumerate([(4, 6, 3), (5, 6, 3), (4, 6, 3), (8, 8, 3)])]


def kl_of(*groups: tuple[list[Tensor], list[Tensor]]) -> float:
    """Sum over groups, each given as its matrices and their anchors."""
    flat = [[torch.cat([M.flatten() for M in side]) for side in group] for group in groups]
    return sum(textbook(v, v_prev)[0] for v, v_prev in flat)


def quadratic_of(*groups: tuple[list[Tensor], list[Tensor]]) -> float:
    """Eq. 6 with Proposition 3's H written out as a matrix."""
    total = 0.0
    for now, before in groups:
        v, v_prev = (torch.cat([M.flatten() for M in side]) for side in (now, before))
        total += float(quadratic_prox(v - v_prev, softmax_metric(v_prev)))
    return total


def by_definition(name: str, by: str, A: Tensor, B: Tensor, P: Tensor, Q: Tensor) -> float:
    """One module's penalty; P and Q are the anchors of A and B."""
    if name == "kl":
        return kl_of(([A, B], [P, Q])) if by == "module" else kl_of(([A], [P]), ([B], [Q]))
    if name == "rank-kl":
        return kl_of(*(([A[k]], [P[k]]) for k in range(len(A))),
                     *(([B[:, k]], [Q[:, k]]) for k in range(len(A))))
    if name == "l2":
        return float(((A - P) ** 2).sum() + ((B - Q) ** 2).sum()) / 2
    if name == "quadratic":
        return quadratic_of(([A, B], [P, Q])) if by == "module" else quadratic_of(([A], [P]), ([B], [Q]))
    return float(((A @ P.T) ** 2).sum() + ((B.T @ Q) ** 2).sum())


@pytest.mark.parametrize("name", PROXIMALS)
@pytest.mark.parametrize("by", ["module", "matrix"])
def test_proximal_term_equals_a_plain_loop_over_modules(name, by):
    """Stacking by size is only an arrangement; sum and mean over modules follow the loop."""
    pairs = adapters(seed=11)
    numbers = [by_definition(name, by, *pair) for pair in pairs]
    got_sum, got_mean = PROXIMALS[name](pairs, by, "sum"), PROXIMALS[name](pairs, by, "mean")
    assert math.isclose(got_sum, math.fsum(numbers), rel_tol=1e-10), f"{got_sum} against {numbers}"
    assert math.isclose(got_mean, math.fsum(numbers) / len(pairs), rel_tol=1e-10), f"{got_mean}"


@pytest.mark.parametrize("name", PROXIMALS)
@pytest.mark.parametrize("by", ["module", "matrix"])
def test_scale_by_size_is_a_loop_with_every_group_times_its_entries(name, by):
    """prox_scale "size": the stacks of one width n, alone, weigh n times what they weigh unscaled."""
    pairs = adapters(seed=12)
    wanted = 0.0
    for A, B, P, Q in pairs:
        if name in ("kl", "l2", "quadratic"):
            groups = [([A, B], [P, Q])] if by == "module" else [([A], [P]), ([B], [Q])]
            flat = [[torch.cat([M.flatten() for M in side]) for side in group] for group in groups]
            wanted += sum(len(v) * float(FORMULA[name](v, v_prev)) for v, v_prev in flat)
        else:
            wanted += sum(M.shape[1] * float(FORMULA[name](M, M_prev)) for M, M_prev in ((A, P), (B.T, Q.T)))
    assert math.isclose(PROXIMALS[name](pairs, by, "sum", "size"), wanted, rel_tol=1e-10)


@pytest.mark.parametrize("name", PROXIMALS)
def test_the_gradient_reaches_every_matrix_through_the_stacks(name):
    """The stacked term's gradient with respect to each A and B is that of the module alone."""
    pairs = adapters(seed=23)
    for A, B, _, _ in pairs:
        A.requires_grad_(), B.requires_grad_()
    PROXIMALS[name](pairs, "module", "sum").backward()
    for A, B, A_prev, B_prev in pairs:
        alone = PROXIMALS[name]([(A, B, A_prev, B_prev)], "module", "sum")
        for M, want in zip((A, B), torch.autograd.grad(alone, (A, B))):
            assert torch.allclose(M.grad, want, rtol=1e-10, atol=1e-14), f"{M.grad} against {want}"


@quick
@given(seed=SEEDS, lam_mean=st.floats(0.01, 1e3), by=st.sampled_from(["module", "matrix"]))
def test_lam_of_the_sum_is_lam_of_the_mean_over_the_number_of_modules(seed, lam_mean, by):
    """lam_sum = lam_mean / n_modules is the same term: the release's 2.0 is 2/112 = 0.018."""
    pairs = adapters(seed)
    lam_sum = lam_mean / len(pairs)
    paper = lam_sum * PROXIMALS["kl"](pairs, by, "sum")
    release = lam_mean * PROXIMALS["kl"](pairs, by, "mean")
    assert math.isclose(paper, release, rel_tol=1e-12), f"{paper} against {release}"


def test_stacks_are_by_size_and_hold_every_number_once():
    """Modules of one size share a stack: a handful of kernels, not hundreds."""
    pairs = adapters(seed=0)
    by_module = {tuple(v.shape) for v, _ in stack_groups(pairs, "module")}
    by_matrix = {tuple(v.shape) for v, _ in stack_groups(pairs, "matrix")}
    by_rank = {tuple(v.shape) for v, _ in stack_ranks(pairs)}
    assert by_module == {(2, 30), (1, 33), (1, 48)}  # 3*6 + 4*3 twice, 3*6 + 5*3, 3*8 + 8*3
    assert by_matrix == {(3, 18), (2, 12), (1, 15), (2, 24)}
    assert by_rank == {(3, 3, 6), (2, 3, 4), (1, 3, 5), (2, 3, 8)}
    everything = sorted(x for A, B, _, _ in pairs for M in (A, B) for x in M.flatten().tolist())
    for stacks in (*(stack_groups(pairs, by) for by in ("module", "matrix")), stack_ranks(pairs)):
        assert sorted(x for v, _ in stacks for x in v.flatten().tolist()) == everything


def test_defaults_are_the_paper_and_differ_from_the_release():
    """Without options: a group is a module, summed (Eq. 12); the release's groups differ."""
    pairs = adapters(seed=5)
    paper = PROXIMALS["kl"](pairs, "module", "sum")
    assert proximal_term(pairs, softmax_kl) == PROXIMALS["kl"](pairs) == paper
    assert abs(paper - PROXIMALS["kl"](pairs, "matrix", "sum")) > 1e-3


def test_proximal_term_starts_at_exactly_zero_for_an_inherited_adapter():
    """v_t <- v_{t-1} at the start of a stage: 0.0 in value and gradient, but for orthogonality."""
    for name, term in PROXIMALS.items():
        pairs = [(A.requires_grad_(), B.requires_grad_(), A.detach().clone(), B.detach().clone())
                 for A, B, _, _ in adapters(seed=7)]
        value = term(pairs)
        value.backward()
        size = value.item() + sum(M.grad.abs().sum().item() for A, B, _, _ in pairs for M in (A, B))
        assert (size > 1) if name == "orthogonal" else (size == 0), f"{name}: {size}"


@pytest.mark.parametrize("call, message", [
    (lambda: proximal_term(adapters(0), softmax_kl, by="layer"), "by='layer'"),
    (lambda: proximal_term(adapters(0), softmax_kl, reduction="max"), "reduction='max'"),
    (lambda: proximal_term([], softmax_kl), "empty"),
])
def test_unknown_options_are_errors_in_three_lines(call, message):
    """What failed, the value found, what to do."""
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert str(error.value).count("\n") == 2
