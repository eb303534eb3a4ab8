"""The paper's statements on the proximal term, for small float64 matrices (Section 4, Appendix B).

Near its optimum v_star a stage's loss is 1/2 (v - v_star)^T Sigma (v - v_star); near the anchor the proximal term is
lam/2 (v - v_prev)^T H (v - v_prev); their sum is Eq. 9. Prop. 1 minimises it; Prop. 3, Prop. 5 and Cor. 4 say which H
the softmax-KL has. Training uses none of this: it is what the tests hold the penalty against."""
import torch
from torch import Tensor

from minipeso.proximal import softmax_kl

TOLERANCE = 1e-12  # an eigenvalue below this share of the matrix's largest counts as zero


def softmax_metric(v_prev: Tensor) -> Tensor:
    """H = diag(p) - p p^T, p = softmax(v_prev): the softmax-KL's Hessian at the anchor (Eq. 44), PSD. (n,) -> (n, n)"""
    p = v_prev.double().softmax(0)  # (n,)
    return torch.diag(p) - torch.outer(p, p)  # (n, n)


def block_metric(v_prevs: list[Tensor]) -> Tensor:
    """blkdiag(H^(1), ..., H^(G)), the metric of the whole adapter (Eq. 13, Eq. 49)."""
    return torch.block_diag(*map(softmax_metric, v_prevs))  # (m, m), m = n_1 + ... + n_G


def quadratic_prox(delta: Tensor, H: Tensor) -> Tensor:
    """1/2 delta^T H delta, the proximal term of Eq. 6 without lam: (m,), (m, m) -> ()."""
    return delta.double() @ H.double() @ delta.double() / 2


def variance_form(delta: Tensor, p: Tensor) -> Tensor:
    """Var_p(delta) = sum_i p_i (delta_i - mu)^2, mu = sum_i p_i delta_i (Eq. 14): (n,), (n,) -> ().
    It is delta^T (diag(p) - p p^T) delta (Eq. 46): the softmax-KL is HALF of it, to second order."""
    delta, p = delta.double(), p.double()
    mu = p @ delta
    return p @ (delta - mu).square()


def softmax_kl_remainder(deltas: list[Tensor], v_prevs: list[Tensor]) -> Tensor:
    """K(delta) - 1/2 delta^T H delta -> (), which is o(||delta||^2) by Prop. 3 (by Prop. 5 for one group).
    K is softmax_kl summed over groups. Paper: Eq. 13 and Eq. 14 have lam inside, Eq. 47 has not. Here: as Eq. 47."""
    K = sum(softmax_kl(v.double() + d.double(), v.double()) for d, v in zip(deltas, v_prevs, strict=True))
    return K - quadratic_prox(torch.cat(deltas), block_metric(v_prevs))


def proximal_minimiser(Sigma: Tensor, H: Tensor, v_star: Tensor, v_prev: Tensor, lam: float) -> Tensor:
    """Eq. 9's minimiser, v = (Sigma + lam H)^{-1} (Sigma v_star + lam H v_prev) (Eq. 28).
    Sigma, H (m, m) symmetric PSD; v_star, v_prev (m,); lam > 0. ValueError for all else and without Assumption 5."""
    Sigma, H = Sigma.double(), H.double()
    _check_assumption_5(Sigma, H)
    if not 0 < lam < float("inf"):
        raise ValueError(f"the proximal weight must be positive and finite\nlam={lam}\nwithout it, v_star is minimal")
    b = Sigma @ v_star.double() + lam * H @ v_prev.double()  # (m,)
    return torch.linalg.solve(Sigma + lam * H, b)  # (m,)


def generalised_eigen(Sigma: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """Sigma q_k = rho_k H q_k, q_i^T H q_j = delta_ij: rho (k,) ascending, Q (m, k), k = rank(H).

    Paper: "generalized eigenpairs on range(H)". Here, for singular H: q itself is not in range(H). With N a basis of
    ker(H), Sigma q = rho H q forces N^T Sigma q = 0, so q = q_r - N (N^T Sigma N)^{-1} N^T Sigma q_r for some q_r in
    range(H), and rho belongs to the Schur complement Sigma - Sigma N (N^T Sigma N)^{-1} N^T Sigma. Eigenpairs of Sigma
    merely restricted to range(H) violate Eq. 10. By Assumption 5 the inverse exists."""
    Sigma, H = Sigma.double(), H.double()
    _check_assumption_5(Sigma, H)
    h, V = torch.linalg.eigh(H)  # (m,), (m, m)
    flat = h <= TOLERANCE * h[-1]
    N, W = V[:, flat], V[:, ~flat] / h[~flat].sqrt()  # (m, m - k), (m, k): W^T H W = I
    W = W - N @ torch.linalg.solve(N.T @ Sigma @ N, N.T @ Sigma @ W)  # now N^T Sigma W = 0 too
    rho, U = torch.linalg.eigh(W.T @ Sigma @ W)  # (k,), (k, k): W^T Sigma W is the Schur complement
    return rho.clamp(min=0), W @ U  # below zero there is only rounding: Sigma is PSD


def interpolation(rho: Tensor, lam: float) -> Tensor:
    """rho / (rho + lam), v_star's weight along q_k (Eq. 10; Eq. 11 with rho = sigma^2); v_prev has the rest."""
    return rho / (rho + lam)  # (k,)


def _check_assumption_5(Sigma: Tensor, H: Tensor) -> None:
    """ValueError unless both are symmetric PSD and no direction is flat in both (Eq. 24)."""
    joint = 0
    for name, M in (("Sigma", Sigma), ("H", H)):
        if M.ndim != 2 or M.shape[0] != M.shape[1] or not M.isfinite().all():
            raise ValueError(f"{name} is not a finite square matrix\nshape {tuple(M.shape)}\ngive (m, m), m = len(v)")
        asymmetry = (M - M.T).abs().max().item()
        low, high = torch.linalg.eigvalsh(M)[[0, -1]].tolist()
        if asymmetry > TOLERANCE * M.abs().max() or low < -TOLERANCE * abs(high):
            fact = f"|M - M^T| is up to {asymmetry:.3g}, the smallest eigenvalue {low:.3g}"
            raise ValueError(f"{name} is not symmetric positive semi-definite\n{fact}\n"
                             "give a second moment (Eq. 8) or a metric such as softmax_metric(v_prev)")
        joint = joint + M / (high or 1.0)  # (m, m)
    eigenvalues = torch.linalg.eigvalsh(joint)  # (m,)
    if flat := int((eigenvalues <= TOLERANCE * eigenvalues[-1]).sum()):
        raise ValueError(f"Assumption 5 fails: directions flat in Sigma and in H\n{flat} of {len(joint)}, where the "
                         f"smallest eigenvalue of Sigma/|Sigma| + H/|H| is {eigenvalues[0]:.3g}\n"
                         "the minimiser is not unique there: add data or a metric")
