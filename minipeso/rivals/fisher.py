"""An anchor that knows what the stage before has taught: Eq. 6 with H = diag(F), the Fisher information of D_{t-1}.

    1/2 sum_i F_i (v - v_{t-1})_i^2,    F_i = mean over D_{t-1}'s sequences of (d log p(answers) / dv_i)^2 at v_{t-1}

v is A and B (fisher: EWC, Kirkpatrick et al. 2017) or s B A (fisher-product: EWC-LoRA, Zheng et al. 2026). Ours: the
paper allows any H and tries none of data. Originals: F adds up over the stages. Here: only the anchor's own stage."""
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from minipeso.llama import Llama
from minipeso.lora import LoRALinear, adapter_parameters, adapters
from minipeso.objective import answer_loss
from minipeso.tokens import IGNORE, TokenSequence, batches, collate


class FisherLoRALinear(LoRALinear):
    """With the F of A and B, flattened: in float32 as large as the two."""
    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(linear, rank, alpha, dropout)
        self.register_buffer("fisher", torch.zeros_like(self.moved()))

    def moved(self) -> Tensor:
        return torch.cat([(self.A - self.A_prev).flatten(), (self.B - self.B_prev).flatten()])  # (r d_in + d_out r,)

    def slopes(self, x: Tensor, dy: Tensor) -> Tensor:
        """d log p / dv of each sequence, from the layer's input x (n, l, d_in) and dy = d log p / dy (n, l, d_out)."""
        A, B = (dy @ self.B).mT @ x, dy.mT @ (x @ self.A.mT)  # (n, r, d_in), (n, d_out, r)
        return self.scale * torch.cat([A.flatten(1), B.flatten(1)], 1)  # (n, r d_in + d_out r)

    def penalty(self) -> Tensor:
        return (self.fisher * self.moved().square()).sum() / 2  # ()


class ProductFisherLoRALinear(FisherLoRALinear):
    """With the F of s B A, in float32 as large as W_0: 3.9 GB at the 1B shape, in memory and in every checkpoint, and
    3.9 GB more in a step. Measuring takes, for one layer at a time, 2 x 67 MB per sequence of a batch."""
    def moved(self) -> Tensor:  # B A - B_prev A_prev, as two terms that are exactly 0 at the anchor
        return self.scale * ((self.B - self.B_prev) @ self.A + self.B_prev @ (self.A - self.A_prev))  # (d_out, d_in)

    def slopes(self, x: Tensor, dy: Tensor) -> Tensor:
        return dy.mT @ x  # (n, d_out, d_in)


def measure(model: Llama, data: list[TokenSequence], pairs: int, temperature: float = 1.0) -> None:
    """Every layer's F in one pass, without dropout. Padding adds nothing: no answer depends on it, its dy is 0."""
    def see(layer: FisherLoRALinear, args: tuple[Tensor], y: Tensor) -> None:
        def add(dy: Tensor) -> None:
            x, dy = (t.detach().to(layer.A.dtype) for t in (args[0], dy))  # (n, l, d_in), (n, l, d_out)
            layer.fisher += layer.slopes(x, dy).square().sum(0) / len(data)
        y.register_hook(add)
    model.eval()
    with ExitStack() as hooks:
        for _, layer in adapters(model):
            layer.fisher.zero_()
            hooks.enter_context(layer.register_forward_hook(see))
        for batch in (collate(some, model.device) for some in batches(data, pairs, torch.Generator())):
            mean = answer_loss(model, batch._replace(preamble=0), temperature)  # each sequence has its own preamble
            torch.autograd.grad(mean * (batch.labels != IGNORE).sum(), adapter_parameters(model))
