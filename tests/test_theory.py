"""The paper's propositions, each as two independent computations that must agree (float64)."""
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from minipeso.proximal import l2, softmax_kl
from minipeso.theory import (block_metric, generalised_eigen, interpolation, proximal_minimiser,
                             quadratic_prox, softmax_kl_remainder, softmax_metric, variance_form)
from tests.conftest import draws
from tests.reference import textbook_softmax_kl

SEEDS = st.integers(0, 2**31 - 1)
LAMS = st.floats(1e-2, 1e2)
KINDS = ["positive", "low rank", "softmax", "blocks"]
METRICS = st.sampled_from(KINDS)
quick = draws(40)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(m: int, rank: int, seed: int) -> Tensor:
    """E[Phi Phi^T] (Eq. 8) over `rank` random features: symmetric, PSD, of that rank."""
    Phi = normal(rank, m, seed=seed)
    return Phi.T @ Phi / rank


def metric(kind: str, m: int, seed: int) -> tuple[Tensor, int]:
    """A proximal metric (m, m) of each kind the paper speaks of, and its rank; m >= 4."""
    if kind == "positive":
        return second_moment(m, 3 * m, seed), m
    if kind == "low rank":
        return second_moment(m, m - 2, seed), m - 2
    if kind == "softmax":
        return softmax_metric(normal(m, seed=seed)), m - 1
    return block_metric([normal(2, seed=seed), normal(m - 2, seed=seed + 1)]), m - 2


def lbfgs(Sigma: Tensor, H: Tensor, v_star: Tensor, v_prev: Tensor, lam: float) -> Tensor:
    """Eq. 9 as written, minimised numerically from the anchor."""
    v = v_prev.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([v], lr=1, max_iter=2000, max_eval=4000, history_size=50, tolerance_grad=1e-13,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        data, moved = v - v_star, v - v_prev
        loss = 0.5 * data @ Sigma @ data + lam / 2 * moved @ H @ moved
        loss.backward()
        return loss
    optimiser.step(closure)
    return v.detach()


def problem(kind: str, m: int, seed: int) -> tuple[Tensor, Tensor, int, Tensor, Tensor]:
    """Sigma, H, rank(H), v_star, v_prev; Sigma of full rank, as Eq. 8 with enough data."""
    H, rank = metric(kind, m, seed)
    Sigma, v_star, v_prev = second_moment(m, 3 * m, seed + 7), *normal(2, m, seed=seed + 8)
    return Sigma, H, rank, v_star, v_prev


@quick
@given(m=st.integers(4, 8), seed=SEEDS, kind=METRICS, lam=LAMS)
def test_proposition_1_closed_form_equals_lbfgs(m, seed, kind, lam):
    """Eq. 28 is where an optimiser that knows only Eq. 9 ends up."""
    Sigma, H, _, v_star, v_prev = problem(kind, m, seed)
    v, condition = proximal_minimiser(Sigma, H, v_star, v_prev, lam), torch.linalg.cond(Sigma + lam * H)
    error = (v - lbfgs(Sigma, H, v_star, v_prev, lam)).norm() / (1 + v.norm())
    assert error < 1e-8 * condition, f"off by {error:.2g} at condition number {condition:.2g}"


@quick
@given(m=st.integers(4, 12), seed=SEEDS, kind=METRICS, lam=LAMS, flat=st.booleans())
def test_proposition_1_interpolates_in_every_generalised_eigendirection(m, seed, kind, lam, flat):
    """Eq. 10 in rank(H) directions: <v, q>_H mixes <v_star, q>_H and <v_prev, q>_H by rho."""
    Sigma, H, rank, v_star, v_prev = problem(kind, m, seed)
    if flat:  # in one direction the data says nothing
        Sigma = second_moment(m, m - 1, seed + 7)
    rho, Q = generalised_eigen(Sigma, H)
    weight = interpolation(rho, lam)
    got = Q.T @ H @ proximal_minimiser(Sigma, H, v_star, v_prev, lam)
    want = weight * (Q.T @ H @ v_star) + (1 - weight) * (Q.T @ H @ v_prev)
    assert Q.shape == (m, rank) and rho.shape == (rank,) and rho.min() >= 0, f"{rho}"
    assert (got - want).norm() < 1e-7 * (1 + want.norm()), f"{got} against {want}"


@quick
@given(m=st.integers(4, 12), seed=SEEDS, kind=METRICS)
def test_generalised_eigenpairs_satisfy_their_definition(m, seed, kind):
    """Sigma q = rho H q in all of R^m, Q^T H Q = I, rho >= 0 and ascending, also for singular H; for H > 0 the
    eigenvalues that LAPACK's own solver of the pencil (Sigma, H) has."""
    Sigma, H, rank, _, _ = problem(kind, m, seed)
    rho, Q = generalised_eigen(Sigma, H)
    residual = (Sigma @ Q - H @ Q * rho).norm() / (Sigma @ Q).norm()
    assert residual < 1e-8, f"Sigma q - rho H q is {residual:.2g} of Sigma q"
    assert torch.allclose(Q.T @ H @ Q, torch.eye(rank).double(), atol=1e-8)
    assert rho.min() >= 0 and (rho.diff() >= 0).all(), f"{rho}"
    for factor in (1e-9, 1e9):  # rho and Q of (Sigma, c H): rho / c
        assert torch.allclose(factor * generalised_eigen(Sigma, factor * H)[0], rho, rtol=1e-6, atol=1e-8)
    if kind == "positive":
        assert np.allclose(rho.numpy(), scipy.linalg.eigh(Sigma.numpy(), H.numpy(), eigvals_only=True), rtol=1e-8)


def test_restriction_to_range_of_h_would_violate_equation_10():
    """With singular H, pairs of Sigma restricted to range(H) fail Eq. 10; the shipped ones hold."""
    lam = 0.7
    Sigma, H, _, v_star, v_prev = problem("softmax", 6, seed=1)
    v = proximal_minimiser(Sigma, H, v_star, v_prev, lam)
    h, V = torch.linalg.eigh(H)
    W = V[:, 1:] / h[1:].sqrt()  # H's range, without the part of q in its kernel
    rho, U = torch.linalg.eigh(W.T @ Sigma @ W)

    def violation(rho: Tensor, Q: Tensor) -> float:
        want = rho / (rho + lam) * (Q.T @ H @ v_star) + lam / (rho + lam) * (Q.T @ H @ v_prev)
        return float((Q.T @ H @ v - want).norm() / want.norm())

    naive, shipped = violation(rho, W @ U), violation(*generalised_eigen(Sigma, H))
    assert shipped < 1e-10 and naive > 1e-2, f"shipped {shipped:.2g}, naive {naive:.2g}"


@pytest.mark.parametrize("kind", KINDS)
def test_proposition_1_limits(kind):
    """lam -> 0 gives v_star everywhere; lam -> inf the anchor as far as H sees it; no data the anchor for any lam."""
    Sigma, H, _, v_star, v_prev = problem(kind, 6, seed=3)
    free = proximal_minimiser(Sigma, H, v_star, v_prev, 1e-11)
    assert (free - v_star).norm() < 1e-7
    held = proximal_minimiser(Sigma, H, v_star, v_prev, 1e9)
    off = (H @ (held - v_prev)).norm() / (H @ (v_star - v_prev)).norm()
    assert off < 1e-5, f"on range(H) still {off:.2g} of the way to v_star"
    if kind == "softmax":  # a uniform shift is free, so the data alone decides it
        assert abs(torch.ones(6).double() @ Sigma @ (held - v_star)) < 1e-6 and (held - v_prev).norm() > 1e-2
    # where rho = 0 the component of the stage before is kept, for any lam (after Corollary 2)
    q = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    Phi = normal(50, 3, seed=0)
    Phi = Phi - torch.outer(Phi @ q, q)  # no example touches q
    v_star, v_prev = normal(2, 3, seed=1)
    v = proximal_minimiser(Phi.T @ Phi / 50, torch.eye(3), v_star, v_prev, lam=0.01)
    assert math.isclose(q @ v, q @ v_prev, abs_tol=1e-12) and abs(q @ (v_star - v_prev)) > 0.1
    assert interpolation(torch.tensor([0.0, 0.01, 1e9]), 0.01).tolist() == pytest.approx([0, 0.5, 1])


def test_assumption_5_violation_is_an_error():
    """A direction flat in Sigma and in H is refused, with how many and how flat; no scale is small by itself."""
    ones, Phi = torch.ones(5).double(), normal(20, 5, seed=0)
    Phi = Phi - torch.outer(Phi @ ones, ones) / 5  # blind to uniform shifts, as H is
    Sigma, H = Phi.T @ Phi, softmax_metric(normal(5, seed=1))
    for solve, more in ((proximal_minimiser, (ones, ones, 1.0)), (generalised_eigen, ())):
        with pytest.raises(ValueError, match=r"Assumption 5 fails(.|\n)*\n1 of 5.* is -?\d"):
            solve(Sigma, H, *more)
    proximal_minimiser(Sigma + torch.outer(ones, ones), H, ones, ones, 1.0)
    one, other = torch.eye(2).double()
    v = proximal_minimiser(torch.diag(one), 1e-14 * torch.diag(other), 3 * one + 5 * other, 2 * one + 7 * other, 1.0)
    assert v.tolist() == pytest.approx([3, 7]) and generalised_eigen(torch.eye(3), torch.zeros(3, 3))[0].shape == (0,)
    with pytest.raises(ValueError, match="\n2 of 2"):
        generalised_eigen(torch.zeros(2, 2), torch.zeros(2, 2))


@pytest.mark.parametrize("Sigma, lam, message", [
    (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 1.0, r"Sigma is not symmetric(.|\n)*up to 0.5"),
    (1e-9 * torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 1.0, "Sigma is not symmetric"),
    (1e-9 * torch.diag(torch.tensor([1.0, -0.25])), 1.0, "Sigma is not symmetric"),
    (torch.diag(torch.tensor([1.0, -0.25])), 1.0, r"Sigma is not symmetric(.|\n)*eigenvalue -0.25"),
    (torch.ones(2, 3), 1.0, r"Sigma is not a finite square matrix\nshape \(2, 3\)"),
    (torch.diag(torch.tensor([1.0, math.nan])), 1.0, "Sigma is not a finite"),
    (torch.eye(2), 0.0, "lam=0.0"), (torch.eye(2), -1.0, "lam=-1.0"), (torch.eye(2), math.inf, "lam=inf")])
def test_inputs_outside_the_proposition_are_errors(Sigma, lam, message):
    """Asymmetric, indefinite, non-square, non-finite Sigma, and lam outside (0, inf), are named."""
    with pytest.raises(ValueError, match=message) as error:
        proximal_minimiser(Sigma, torch.eye(2), torch.zeros(2), torch.zeros(2), lam)
    assert str(error.value).count("\n") == 2
    with pytest.raises(ValueError, match="^H is not symmetric"):
        proximal_minimiser(torch.eye(2), torch.eye(2) + torch.diag(torch.ones(1), 1), *torch.zeros(2, 2), 1.0)


@quick
@given(m=st.integers(1, 10), seed=SEEDS, lam=LAMS)
def test_corollary_2_l2_case(m, seed, lam):
    """H = I, as in the shipped l2: Sigma's own eigenpairs, and the weight on v_star is sigma^2/(sigma^2 + lam)."""
    Sigma, v_star, v_prev = second_moment(m, 2 * m, seed), normal(m, seed=seed + 1), normal(m, seed=seed + 2)
    v = proximal_minimiser(Sigma, torch.eye(m), v_star, v_prev, lam)
    _, sigma, Q = torch.linalg.svd(Sigma)  # Sigma is PSD: singular values are eigenvalues, sigma^2
    want = sigma / (sigma + lam) * (Q @ v_star) + lam / (sigma + lam) * (Q @ v_prev)
    assert torch.allclose(Q @ v, want, atol=1e-10), f"{Q @ v} against {want}"
    assert torch.allclose(generalised_eigen(Sigma, torch.eye(m))[0], sigma.flip(0), atol=1e-10)
    assert math.isclose(l2(v_star, v_prev), quadratic_prox(v_star - v_prev, torch.eye(m)), rel_tol=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [[30], [3, 17, 40]])
def test_proposition_3_and_5_remainder_is_of_third_order(seed, sizes):
    """One group (Prop. 5) or groups of unequal size (Prop. 3): the sum of KLs less 1/2 delta^T blkdiag(H) delta falls
    8-fold when the step halves; at any step it is the textbook's KL(current || previous) less that form."""
    v_prevs, deltas = ([normal(n, seed=seed + n + more) for n in sizes] for more in (0, 100))
    left = [abs(float(softmax_kl_remainder([d / 2**k for d in deltas], v_prevs))) for k in range(7, 12)]
    orders = [math.log2(a / b) for a, b in zip(left, left[1:])]
    assert all(abs(order - 3) < 0.1 for order in orders), f"{orders}"
    with pytest.raises(ValueError):
        softmax_kl_remainder(deltas, v_prevs + v_prevs)
    for step in (1e-3, 1.0):
        moved = [step * d for d in deltas]
        K = sum(textbook_softmax_kl((u + d).tolist(), u.tolist())[0] for u, d in zip(v_prevs, moved))
        form = float(quadratic_prox(torch.cat(moved), block_metric(v_prevs)))
        assert softmax_kl_remainder(moved, v_prevs).item() == pytest.approx(K - form, rel=1e-4), f"{K} and {form}"
        assert step > 0.1 or abs(K / form - 1) < 5e-3, f"K {K:.6g}, quadratic form {form:.6g}"


@quick
@given(n=st.integers(2, 12), seed=SEEDS)
def test_proposition_5_metric_is_the_hessian_of_the_shipped_penalty(n, seed):
    """What autograd finds at the anchor of one group, and of two: no term between them; a group's kernel: constants."""
    v_prev, more = normal(n, seed=seed), normal(n + 1, seed=seed + 1)
    H, both = softmax_metric(v_prev), block_metric([v_prev, more])
    hessian = torch.autograd.functional.hessian(
        lambda v: softmax_kl(v[:n], v_prev) + softmax_kl(v[n:], more), torch.cat([v_prev, more]))
    assert torch.allclose(both, hessian, atol=1e-12), f"off by {(both - hessian).abs().max():.2g}"
    assert both[:n, :n].equal(H) and not both[:n, n:].any() and not both[n:, :n].any()
    eigenvalues = torch.linalg.eigvalsh(H)
    assert abs(eigenvalues[0]) < 1e-15 < eigenvalues[1] and (H @ torch.ones(n).double()).abs().max() < 1e-15


@quick
@given(n=st.integers(1, 30), seed=SEEDS, shift=st.floats(-5, 5))
def test_corollary_4_variance_form(n, seed, shift):
    """Var_p(delta) = delta^T (diag(p) - p p^T) delta = numpy's weighted variance."""
    v_prev, delta = normal(n, seed=seed), normal(n, seed=seed + 1) + shift
    p = np.exp(v_prev.numpy()) / np.exp(v_prev.numpy()).sum()
    variance, peer = variance_form(delta, torch.tensor(p)), np.cov(delta.numpy(), aweights=p, ddof=0) if n > 1 else 0
    assert math.isclose(variance, peer, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(quadratic_prox(delta, softmax_metric(v_prev)), variance / 2, rel_tol=1e-9, abs_tol=1e-12)


def test_corollary_4_protects_mass_and_forgives_shifts():
    """(i) reshuffling costs more than as large a shift; (ii) heavier coordinates cost more."""
    v_prev = torch.tensor([2.0, 0.0, -2.0]).double()
    shift, reshuffle = 0.1 * torch.ones(3).double(), torch.tensor([0.1, -0.1, 0.1]).double()
    assert softmax_kl(v_prev + shift, v_prev) < 1e-20 < softmax_kl(v_prev + reshuffle, v_prev)
    middle, light = (softmax_kl(v_prev + 0.1 * torch.eye(3).double()[i], v_prev) for i in (1, 2))
    assert middle > 2 * light, f"p = {v_prev.softmax(0)}: {middle:.3g} and {light:.3g}"
