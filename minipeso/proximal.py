"""The proximal term of PESO: how far the adapter has moved from its anchor (Section 4, Fig. 2).

    L_t = CE + lam * sum_g KL( softmax(v_t^(g)) || softmax(v_{t-1}^(g)) )                   Eq. 12

v is a flattened adapter, v_prev its anchor (the adapter at the end of the previous stage), g a group of coordinates.
Every penalty (v, v_prev) -> () is a pure function, without lam, in float32 or better; the anchor gets no gradient.

How large is it? The softmax of n small numbers is almost uniform, p_i = 1/n, so the KL of a group is about
1/2 mean((v - v_prev)^2) (Cor. 4): l2 divided by n, which is r (d_in + d_out) for one module."""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Layer = tuple[Tensor, Tensor, Tensor, Tensor]  # A (r, d_in), B (d_out, r), A_prev, B_prev of one module
Penalty = Callable[[Tensor, Tensor], Tensor]


def softmax_kl(v: Tensor, v_prev: Tensor) -> Tensor:
    """KL(softmax(v) || softmax(v_prev)): softmax over the last axis, summed over the others.

    With r = softmax(v), p = softmax(v_prev) and d = v - v_prev, shifted to E_p[d] = 0: KL = E_r[d] - log E_p[e^d].
    At v = v_prev the value and every entry of the gradient are exactly 0.0. Paper: E_r[log r - log p]. Release: that,
    from probabilities + 1e-8, clamped at 0. Here: two terms of second order in d, as float32 loses log r - log p."""
    v, v_prev = _comparable(v, v_prev)  # (..., n)
    p = v_prev.softmax(-1)
    d = v - v_prev
    d = d - (p * d).sum(-1, keepdim=True)
    near = (p * torch.expm1(d.clamp(max=80))).sum(-1).log1p()  # (...): log E_p[e^d]
    far = (v_prev.log_softmax(-1) + d).logsumexp(-1)  # (...): the same where e^d overflows
    kl = (v.softmax(-1) * d).sum(-1) - torch.where(d.amax(-1) > 80, far, near)
    return kl.sum()


def l2(v: Tensor, v_prev: Tensor) -> Tensor:
    """1/2 ||v - v_prev||^2, Eq. 6 with H = I. Release: each matrix's norm, which has no gradient at the anchor."""
    v, v_prev = _comparable(v, v_prev)
    return (v - v_prev).square().sum() / 2


def quadratic(v: Tensor, v_prev: Tensor) -> Tensor:
    """1/2 d^T H d (Eq. 6) with Prop. 3's H = diag(p) - p p^T, p = softmax(v_prev); in Cor. 4's form, 1/2 Var_p(d)."""
    v, v_prev = _comparable(v, v_prev)  # (..., n)
    p = v_prev.softmax(-1)
    d = v - v_prev
    d = d - (p * d).sum(-1, keepdim=True)
    return (p * d.square()).sum() / 2


def per_rank_kl(M: Tensor, M_prev: Tensor) -> Tensor:
    """Softmax-KL of every rank component, a row of M: A's rows, B's columns (pass B.T). Paper: no formula (Fig. 2)."""
    return softmax_kl(M, M_prev)  # M (..., r, n)


def orthogonality(M: Tensor, M_prev: Tensor) -> Tensor:
    """||M M_prev^T||_F^2, the overlap of the row spaces; pass A, and B as B.T. Not zero at the anchor.
    Paper: named in Fig. 2, no formula. Release and here: after O-LoRA's (A alone, absolute values, not squares)."""
    M, M_prev = _comparable(M, M_prev)  # (..., r, n)
    with torch.autocast(M.device.type, enabled=False):  # autocast would round the product to bf16
        return (M @ M_prev.mT).square().sum()  # M M_prev^T (..., r, r)


def output_kl(y: Tensor, y_prev: Tensor) -> Tensor:
    """Mean over tokens of KL(softmax(y) || softmax(y_prev)): y = s B A x, y_prev the anchor's for the same x.
    Paper: named in Fig. 2, no formula. Release: absent. Here: a mean, so that lam is free of the batch size."""
    return softmax_kl(y, y_prev) * y.shape[-1] / y.numel()  # y (..., d_out)


PENALTIES = {"kl": softmax_kl, "l2": l2, "quadratic": quadratic, "rank-kl": per_rank_kl, "orthogonal": orthogonality}


def proximal_term(layers: list[Layer], penalty: Penalty, groups: str = "module", reduction: str = "sum") -> Tensor:
    """The penalty of all groups of all modules -> (), to be multiplied by lam (Eq. 6, Eq. 12).

    Paper: groups "module", reduction "sum". Release: "matrix", "mean" over modules: lam_sum = lam_mean / n_modules."""
    for name, value, known in (("groups", groups, ("module", "matrix")), ("reduction", reduction, ("sum", "mean"))):
        if value not in known:
            raise ValueError(f"unknown {name} of the proximal term\n{name}={value!r}\n"
                             f"use {' or '.join(map(repr, known))}")
    if not layers:
        raise ValueError("no adapter to hold near its anchor\nthe list of (A, B, A_prev, B_prev) is empty\n"
                         "inject LoRA before asking for a proximal term")
    total = sum(penalty(v, v_prev) for layer in layers for v, v_prev in groups_of(layer, penalty, groups))
    return total / len(layers) if reduction == "mean" else total


def groups_of(layer: Layer, penalty: Penalty, groups: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The groups g of one module, (v, v_prev) each; for penalties of matrices its A and B^T, whatever `groups`."""
    A, B, A_prev, B_prev = layer
    if penalty in (per_rank_kl, orthogonality):
        yield A, A_prev  # (r, d_in)
        yield B.mT, B_prev.mT  # (r, d_out)
    elif groups == "matrix":
        yield A.flatten(), A_prev.flatten()  # (r d_in,)
        yield B.flatten(), B_prev.flatten()  # (d_out r,)
    else:
        yield tuple(torch.cat([a.flatten(), b.flatten()]) for a, b in ((A, B), (A_prev, B_prev)))  # (r d_in + d_out r,)


def _comparable(v: Tensor, v_prev: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or in float64 if either is; the anchor cut from the graph."""
    if v.shape != v_prev.shape:
        raise ValueError(f"adapter and anchor differ in shape\n{tuple(v.shape)} against {tuple(v_prev.shape)}\n"
                         "compare the same module, at the same rank, at two stages")
    dtype = torch.promote_types(torch.promote_types(v.dtype, v_prev.dtype), torch.float32)
    return v.to(dtype), v_prev.detach().to(dtype)
