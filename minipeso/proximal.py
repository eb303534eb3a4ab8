"""The proximal term of PESO: how far the adapter has moved from its anchor (Section 4, Fig. 2).

    L_t = CE + lam * sum_g KL( softmax(v_t^(g)) || softmax(v_{t-1}^(g)) )                   Eq. 12

v is a flattened adapter, v_prev its anchor (the adapter at the end of the stage before), g a group
of coordinates. Every penalty f(v, v_prev) is a pure function to a scalar tensor, without lam. It is
computed in fp32, or in fp64 if the input is; the anchor receives no gradient.

How large is it? softmax over n small numbers is almost uniform, so the KL of a group is about
1/2 mean((v - v_prev)^2), its gradient about (v - v_prev)/n: l2's, divided by n = 16,384 or so.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor, Tensor, Tensor]  # a module's A (r, d_in), B (d_out, r), A_prev, B_prev
Penalty = Callable[[Tensor, Tensor], Tensor]


def softmax_kl(v: Tensor, v_prev: Tensor) -> Tensor:
    """KL(softmax(v) || softmax(v_prev)): softmax over the last axis, summed over the others.

    v, v_prev (..., n) -> (). G groups of one size, stacked to (G, n), give Eq. 12's sum at once.
    Zero in value and in gradient, exactly, at the anchor; blind to a uniform shift of a group.
    Paper: the formula. Release: from probabilities + 1e-8, clamped at 0; rounding hides small steps
    (emulated in bf16, the value is 10-400 times too large). Here: a form that keeps fp32's digits.
    """
    return _SoftmaxKL.apply(*_comparable(v, v_prev))


def l2(v: Tensor, v_prev: Tensor) -> Tensor:
    """1/2 ||v - v_prev||^2, Eq. 6 with H = I, for any shape -> ().

    Paper: squared. Release: the norm of each matrix, not squared, which has no gradient at the
    anchor, where training starts. Here: the paper's.
    """
    v, v_prev = _comparable(v, v_prev)
    return (v - v_prev).square().sum() / 2


def quadratic(v: Tensor, v_prev: Tensor) -> Tensor:
    """1/2 Delta^T H Delta, Delta = v - v_prev, with Proposition 3's metric H = diag(p) - p p^T and
    p = softmax(v_prev), fixed during a stage (Eq. 6) -> (). Softmax over the last axis, summed over
    the others. As Corollary 4 writes it, 1/2 Var_p(Delta): n numbers in place of an (n, n) matrix.
    """
    v, v_prev = _comparable(v, v_prev)
    p, delta = v_prev.softmax(-1), v - v_prev
    delta = delta - (p * delta).sum(-1, keepdim=True)
    return (p * delta.square()).sum() / 2


def per_rank_kl(M: Tensor, M_prev: Tensor) -> Tensor:
    """Softmax-KL with one group per rank component: each row of M (..., r, n) has a softmax -> ().

    The rank components of A (r, d_in) are its rows, those of B (d_out, r) its columns: pass B.T.
    Paper: named in Fig. 2, no formula. Release: absent. Here: the sum over components.
    """
    return softmax_kl(M, M_prev)


def orthogonality(M: Tensor, M_prev: Tensor) -> Tensor:
    """||M M_prev^T||_F^2, the overlap of the row spaces: M (..., r, n) -> (). Pass A, and B as B.T.

    Not zero at the anchor: it pushes an inherited adapter away from the first step on.
    Paper: named in Fig. 2, no formula. Release and here: this, after O-LoRA's (A only, entries in
    absolute value instead of squared).
    """
    M, M_prev = _comparable(M, M_prev)
    with torch.autocast(M.device.type, enabled=False):  # autocast would round the product to bf16
        return (M @ M_prev.mT).square().sum()


def output_kl(y: Tensor, y_prev: Tensor) -> Tensor:
    """Mean over tokens of KL(softmax(y) || softmax(y_prev)) of adapter outputs (..., d_out) -> ().

    y is alpha/r B A x, y_prev the anchor's output for the same x; without padding and dropout.
    Paper: named in Fig. 2, no formula. Release: absent. Here: a mean, so that lam does not depend
    on the batch size.
    """
    n_tokens = y.numel() // y.shape[-1]
    return softmax_kl(y, y_prev) / n_tokens


def stack_groups(pairs: list[Pair], by: str) -> list[tuple[Tensor, Tensor]]:
    """The groups g of Eq. 12, stacked by size: a list of (v (G_k, n_k), v_prev (G_k, n_k)).

    by="module": v^(g) is A and B of a module, flattened and concatenated (the paper).
    by="matrix": A is a group and B another (the release).
    """
    if by not in ("module", "matrix"):
        raise ValueError(f"unknown kind of proximal group\nby={by!r}\n"
                         "use 'module' (paper) or 'matrix' (release)")
    sizes = defaultdict(list)  # n -> [(matrices of the group, their anchors)]
    for A, B, A_prev, B_prev in pairs:
        module = [((A, B), (A_prev, B_prev))]
        matrices = [((A,), (A_prev,)), ((B,), (B_prev,))]
        for now, before in module if by == "module" else matrices:
            sizes[sum(M.numel() for M in now)].append((now, before))
    return [tuple(_rows(side, n) for side in zip(*groups)) for n, groups in sizes.items()]


def stack_ranks(pairs: list[Pair]) -> list[tuple[Tensor, Tensor]]:
    """Every A and every B^T, stacked by shape: a list of (M, M_prev), each (G_k, r, n_k)."""
    shapes = defaultdict(list)  # (r, n) -> [(M, M_prev)]
    for A, B, A_prev, B_prev in pairs:
        for M, M_prev in ((A, A_prev), (B.mT, B_prev.mT)):
            shapes[M.shape].append((M, M_prev))
    return [tuple(torch.stack(side) for side in zip(*matrices)) for matrices in shapes.values()]


def proximal_term(pairs: list[Pair], penalty: Penalty, by: str = "module",
                  reduction: str = "sum", scale: str = "none") -> Tensor:
    """The penalty of all modules -> (), to be multiplied by lam (Eq. 6, Eq. 12).

    A few kernels per distinct size, not per module. per_rank_kl and orthogonality see A and B^T as
    matrices, whatever `by`; the other penalties see stack_groups(pairs, by).
    Paper: by="module", reduction="sum". Release: by="matrix", reduction="mean", the sum divided by
    the number of modules. For the same `by`, exactly: lam_sum = lam_mean / n_modules.
    Ours: scale="size" weighs each group (or rank) by its number of entries n, which undoes softmax's 1/n.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"unknown reduction of the proximal term\nreduction={reduction!r}\n"
                         "use 'sum' (paper) or 'mean' over modules (release)")
    if not pairs:
        raise ValueError("no adapter to hold near its anchor\nthe list of (A, B, A_prev, B_prev) "
                         "is empty\ninject LoRA before asking for a proximal term")
    on_matrices = penalty in (per_rank_kl, orthogonality)
    stacks = stack_ranks(pairs) if on_matrices else stack_groups(pairs, by)
    total = torch.stack([penalty(v, v_prev) * (v.shape[-1] if scale == "size" else 1) for v, v_prev in stacks]).sum()
    return total / len(pairs) if reduction == "mean" else total


def _over_modules(penalty: Penalty) -> Callable[..., Tensor]:
    return lambda pairs, by="module", reduction="sum", scale="none": proximal_term(pairs, penalty, by, reduction, scale)


# Command-line name -> f(pairs, by, reduction, scale). output_kl is absent: it needs activations.
PROXIMALS = {
    "kl": _over_modules(softmax_kl),
    "l2": _over_modules(l2),
    "quadratic": _over_modules(quadratic),
    "rank-kl": _over_modules(per_rank_kl),
    "orthogonal": _over_modules(orthogonality),
}


class _SoftmaxKL(torch.autograd.Function):
    """Value and gradient by formulas without cancellation, where autograd would lose fp32's digits.

    With p = softmax(v_prev), r = softmax(v), d = v - v_prev and x_i = log(p_i / r_i):
        KL       = sum_i r_i (exp(x_i) - 1 - x_i)     no term is negative; sum_i r_i exp(x_i) = 1
        dKL/dv_i = r_i (d_i - sum_j r_j d_j)          itself differentiable: Hessians work
    """

    @staticmethod
    def forward(ctx, v: Tensor, v_prev: Tensor) -> Tensor:
        ctx.save_for_backward(v, v_prev)
        r, p = v.softmax(-1), v_prev.softmax(-1)
        x = _log_ratio(v, v_prev, p)
        return torch.where(x.abs() < 0.1, r * _exp_minus_tangent(x), p - r - r * x).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        v, v_prev = ctx.saved_tensors
        r, d = v.softmax(-1), v - v_prev
        return grad * r * (d - (r * d).sum(-1, keepdim=True)), None  # the anchor is a constant


def _log_ratio(v: Tensor, v_prev: Tensor, p: Tensor) -> Tensor:
    """log(p / softmax(v)) = log E_p[exp(d)] - d, with d = v - v_prev shifted to E_p[d] = 0."""
    d = v - v_prev
    d = d - (p * d).sum(-1, keepdim=True)
    small = torch.log1p((p * torch.expm1(d.clamp(max=1))).sum(-1, keepdim=True))  # (..., 1)
    large = torch.logsumexp(v_prev.log_softmax(-1) + d, -1, keepdim=True)  # no overflow of exp(d)
    return torch.where(d.amax(-1, keepdim=True) > 1, large, small) - d


def _exp_minus_tangent(x: Tensor) -> Tensor:
    """exp(x) - 1 - x for |x| < 0.1, to fp64: x^2/2 (1 + x/3 (1 + x/4 (1 + ... x/11)))."""
    one = series = torch.ones_like(x)
    for k in range(11, 2, -1):
        series = torch.addcmul(one, x, series, value=1 / k)
    return x * x / 2 * series


def _comparable(v: Tensor, v_prev: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp32 or better (bf16 and fp16 go up, fp64 stays), the anchor cut from the graph."""
    if v.shape != v_prev.shape:
        raise ValueError("adapter and anchor differ in shape\n"
                         f"{tuple(v.shape)} against {tuple(v_prev.shape)}\n"
                         "compare the same module, at the same rank, at two stages")
    dtype = torch.promote_types(torch.promote_types(v.dtype, v_prev.dtype), torch.float32)
    return v.to(dtype), v_prev.detach().to(dtype)


def _rows(groups: tuple[tuple[Tensor, ...], ...], n: int) -> Tensor:
    return torch.cat([M.flatten() for group in groups for M in group]).view(-1, n)  # (G_k, n)
