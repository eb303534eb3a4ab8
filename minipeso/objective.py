"""What a stage minimises: cross-entropy on its answers, and a pull towards the previous adapter (Eq. 12).

    L_t = CE(D_t) + lam * sum_g KL( softmax(v_t^(g)) || softmax(v_{t-1}^(g)) )"""
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from minipeso.llama import KVCache, Llama
from minipeso.lora import LoRALinear, adapters, watching
from minipeso.proximal import PENALTIES, Layer, output_kl, proximal_term
from minipeso.tokens import IGNORE, Batch


def answer_loss(model: Llama, batch: Batch, temperature: float = 1.0, reduction: str = "mean") -> Tensor:
    """CE, the mean of -log p over the answers' tokens (Eq. 2). The head sees only their positions.
    Paper, literally: the sum over an item's four tokens. Release, here: their mean; lam weighs four times as much."""
    p, cache = batch.preamble, KVCache()
    if p:  # the preamble is computed once for all sequences
        model.model(batch.ids[:1, :p], cache=cache, states=False)
    positions, mask = (batch.positions[:, p:], batch.mask[:, :, p:]) if p else (batch.positions, batch.mask)
    hidden = model.model(batch.ids[:, p:], positions, mask, cache)  # (n, l - p, d)
    labels = batch.labels[:, p:]  # (n, l - p)
    real = labels != IGNORE
    logits = model.lm_head.logits(hidden[real]) / temperature  # (answers * L, V)
    return F.cross_entropy(logits, labels[real], reduction=reduction)


def anchored(model: nn.Module) -> list[Layer]:
    return [(layer.A, layer.B, layer.A_prev, layer.B_prev) for _, layer in adapters(model)]


class Loss(NamedTuple):
    ce: Tensor
    prox: Tensor  # before lam
    total: Tensor


def stage_loss(model: Llama, batch: Batch, penalty: str = "none", lam: float = 0.0, temperature: float = 1.0,
               grouping: tuple[str, str] = ("module", "sum")) -> Loss:
    """CE + lam * penalty over the groups of the adapter: Eq. 12 with penalty "kl", Eq. 6 with "l2" or "quadratic".
    penalty: a name of PENALTIES, "output-kl", "none", or the layers' own. grouping: (groups, reduction)."""
    if penalty == "output-kl":
        ce, prox = output_loss(model, batch, temperature, grouping[1])
    else:
        ce = answer_loss(model, batch, temperature)
        if penalty == "none":
            return Loss(ce, ce.new_zeros(()), batch.weight * ce)
        if penalty in PENALTIES:
            prox = proximal_term(anchored(model), PENALTIES[penalty], *grouping)
        else:  # rivals/fisher.py
            terms = [layer.penalty() for _, layer in adapters(model)]
            prox = sum(terms) / (len(terms) if grouping[1] == "mean" else 1)
    return Loss(ce, prox, batch.weight * ce + lam * prox)


def output_loss(model: Llama, batch: Batch, temperature: float, reduction: str) -> tuple[Tensor, Tensor]:
    """(CE, output_kl summed or averaged over layers). A layer's input x, read off the CE's own forward pass, on
    real tokens and without dropout, is a constant of the penalty: it pulls on the layer's own A and B alone."""
    layers = []
    def see(name: str, layer: LoRALinear, x: Tensor) -> None:
        x = layer.scale * x.detach()[batch.real].to(layer.A.dtype)  # (tokens, d_in)
        y, y_prev = x @ layer.A.T @ layer.B.T, x @ layer.A_prev.T @ layer.B_prev.T  # (tokens, d_out)
        layers.append(output_kl(y, y_prev))
    with watching(model, see):
        ce = answer_loss(model, batch._replace(preamble=0), temperature)  # the layers see every token of every sequence
    return ce, sum(layers) / (len(layers) if reduction == "mean" else 1)
