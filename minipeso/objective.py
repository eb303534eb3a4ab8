"""What a stage minimises (Eq. 12): cross-entropy on the stage's answers, and a pull towards the previous adapter.

    L_t = CE(D_t) + lam * sum_g KL( softmax(v_t^(g)) || softmax(v_{t-1}^(g)) )
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeso.cache import Beginning
from minipeso.llama import Llama
from minipeso.lora import LoRALinear, adapters, watching
from minipeso.proximal import PROXIMALS, output_kl
from minipeso.tokens import IGNORE, Batch


def answer_loss(model: Llama, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Eq. 2: the mean of -log p over the answers' tokens. The head sees only their positions."""
    start = None
    if batch.preamble is not None:
        start, end = Beginning(), batch.preamble.new_tensor([[batch.preamble.shape[1] - 1]])
        model.model(batch.preamble, cache=start, at=end)
    hidden = model.model(batch.ids, batch.positions, batch.mask, start, batch.at)  # (n, l or m, d)
    labels = batch.labels if batch.at is None else batch.labels.gather(1, batch.at)
    real = labels != IGNORE
    logits = model.head(hidden[real])  # (answers * L, V)
    return F.cross_entropy(logits if temperature == 1 else logits / temperature, labels[real])


def anchored(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(A, B, A_prev, B_prev) of every adapted layer."""
    return [(layer.A, layer.B, layer.A_prev, layer.B_prev) for _, layer in adapters(model)]


class Loss(NamedTuple):
    ce: Tensor
    prox: Tensor  # before lam
    total: Tensor


def stage_loss(model: Llama, batch: Batch, penalty: str, lam: float, temperature: float = 1.0,
               groups: str = "module", reduction: str = "sum", scale: str = "none") -> Loss:
    """Eq. 12 (Eq. 6 with penalty "l2" or "quadratic"): CE + lam * penalty over the groups of the adapter."""
    if penalty == "none":
        ce = answer_loss(model, batch, temperature)
        return Loss(ce, ce.new_zeros(()), ce)
    if penalty == "output-kl":
        ce, prox = output_loss(model, batch, temperature, reduction)
    else:
        ce = answer_loss(model, batch, temperature)
        prox = PROXIMALS[penalty](anchored(model), groups, reduction, scale)
    return Loss(ce, prox, ce + lam * prox)


def output_loss(model: Llama, batch: Batch, temperature: float, reduction: str) -> tuple[Tensor, Tensor]:
    """(CE, sum or mean over layers of output_kl): what each adapter and its anchor make of the layer's
    input in this very forward pass, on real tokens, without dropout."""
    layers = []

    def see(name: str, layer: LoRALinear, x: Tensor) -> None:
        x = x[batch.real].to(layer.A.dtype) * layer.scale  # (tokens, d_in)
        y, y_prev = F.linear(F.linear(x, layer.A), layer.B), F.linear(F.linear(x, layer.A_prev), layer.B_prev)
        layers.append(output_kl(y, y_prev))

    with watching(model, see):
        ce = answer_loss(model, batch, temperature)
    total = torch.stack(layers).sum()
    return ce, total / len(layers) if reduction == "mean" else total
