"""Slow, obvious versions of what the package computes fast: loops, textbook formulas."""
from __future__ import annotations

import math


def log_softmax(v: list[float]) -> list[float]:
    """log softmax of plain numbers, summed without rounding."""
    top = max(v)
    log_z = top + math.log(math.fsum(math.exp(x - top) for x in v))
    return [x - log_z for x in v]


def textbook_softmax_kl(v: list[float], v_prev: list[float]) -> tuple[float, list[float]]:
    """sum_i r_i log(r_i / p_i), and its gradient r_i (l_i - sum_j r_j l_j) with l = log(r / p).

    Good for steps down to about 1e-6; below that float64 itself cancels.
    """
    log_r, log_p = log_softmax(v), log_softmax(v_prev)
    r = [math.exp(x) for x in log_r]
    log_ratio = [a - b for a, b in zip(log_r, log_p)]
    kl = math.fsum(a * b for a, b in zip(r, log_ratio))
    return kl, [a * (b - kl) for a, b in zip(r, log_ratio)]
