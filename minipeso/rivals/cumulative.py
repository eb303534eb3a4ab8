"""The cumulative LoRA family (Eq. 5): old adapters stay, frozen, and a new one is added to them.

    W_t = W_0 + s ( sum_{i<t} alpha_i B^_i A^_i + B_t A_t ),    B^ = B / ||B||_F,  A^ = A / ||A||_F

    SumLoRA   alpha_i = 1
    SD-LoRA   alpha_i, and one for B_t A_t, are learnt: a scalar per layer and adapter, from 1.0 at every stage
    InfLoRA   A_t is computed from the stage's inputs and frozen; B_t is learnt

Each comes in four variants: `all` sums every past adapter, `latest` only the last; `inherit` starts
(A_t, B_t) at (A_{t-1}, B_{t-1}), otherwise they start anew. The adapter of D_1 is the first of the sum.

The sum is one product of stacked factors, (k+1) r wide, whose hook (`factors`) serves forward, merging and export. A
past adapter counts with norm <= 1: without inheritance stage 2 begins from a shadow of D_1's."""
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minipeso.llama import Llama
from minipeso.lora import LoRALinear, watching
from minipeso.tokens import Batch

VARIANTS = ("all", "latest", "all-inherit", "latest-inherit")


class SumLoRALinear(LoRALinear):
    """Eq. 5 with alpha_i = 1. Paper and Release: normalised past, unnormalised present, s on both."""
    latest = inherit = False
    growing = ("A_past", "B_past")  # their length depends on the stage

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(linear, rank, alpha, dropout)
        self.register_buffer("A_past", self.A.new_empty(0, self.A.shape[1]))  # (k r, d_in), directions
        self.register_buffer("B_past", self.B.new_empty(self.B.shape[0], 0))  # (d_out, k r)

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.A_past, self.A]), torch.cat([self.B_past, self.B], 1)  # (k r + r, d_in), (d_out, ..)

    @torch.no_grad()
    def advance(self, generator: torch.Generator | None = None) -> None:
        """The trained adapter joins the past as a direction; then the new one inherits or starts anew."""
        A, B = (M / (M.norm() + 1e-8) for M in (self.A, self.B))
        keep = 0 if self.latest else len(self.A_past)
        self.A_past = torch.cat([self.A_past[:keep], A])
        self.B_past = torch.cat([self.B_past[:, :keep], B], 1)
        self.anchor() if self.inherit else self.reset(generator)

    def _load_from_state_dict(self, state: dict, prefix: str, *rest) -> None:
        """The past in a file may be longer or shorter than here: it takes the file's length."""
        for name in self.growing:
            if f"{prefix}{name}" in state:
                getattr(self, name).data = torch.empty_like(state[f"{prefix}{name}"], device=self.A.device)
        super()._load_from_state_dict(state, prefix, *rest)


class SDLoRALinear(SumLoRALinear):
    """Eq. 5 with learnt magnitudes, one for every past adapter and one for the present (k + 1,).
    Original (Wu et al. 2025): one scalar per task for all layers, from 0.8. Paper: from 1.0. Release: a scalar per
    layer; s is applied inside its loop over adapters, so it counts again and again. Here: one per layer, and s once."""
    growing = (*SumLoRALinear.growing, "magnitude")

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(linear, rank, alpha, dropout)
        self.magnitude = nn.Parameter(self.A.new_ones(1))

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, B * self.magnitude.repeat_interleave(len(self.A))

    def trained(self) -> list[nn.Parameter]:
        return [self.A, self.B, self.magnitude]

    def advance(self, generator: torch.Generator | None = None) -> None:
        super().advance(generator)
        self.magnitude = nn.Parameter(self.A.new_ones(len(self.A_past) // len(self.A) + 1))


class InfLoRALinear(SumLoRALinear):
    """A_t spans the strongest input directions of D_t that earlier stages left free; only B_t learns.

    Original (Liang & Li 2024): B_t = 0 and an unnormalised sum. Paper: as one of Eq. 5's family.
    Release: absent. Here: Eq. 5's directions; `inherit` keeps B_{t-1}, for A_t is computed anew.
    The memory of an input is kept by the first layer that reads it (q of q, k, v; gate of gate, up)."""
    growing = (*SumLoRALinear.growing, "memory")

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(linear, rank, alpha, dropout)
        self.register_buffer("memory", self.A.new_empty(self.A.shape[1], 0))  # (d_in, m), orthonormal columns
        self.register_buffer("retain", torch.tensor(False))  # memory spans: False what is taken, True what is free
        self.design: Tensor | None = None  # (r, d_in), the coming stage's A

    def trained(self) -> list[nn.Parameter]:
        return [self.B]

    @torch.no_grad()
    def advance(self, generator: torch.Generator | None = None) -> None:
        super().advance(generator)
        if self.design is not None:
            self.A.copy_(self.design)
        self.anchor()


def variants(family: type[SumLoRALinear]) -> dict[str, type[SumLoRALinear]]:
    """{variant: class} of one family."""
    return {name: type(f"{family.__name__}_{name}", (family,), {flag: flag in name for flag in ("latest", "inherit")})
            for name in VARIANTS}


def design_inflora(model: Llama, t: int, n_stages: int, past: Iterable[Batch], now: Iterable[Batch]) -> None:
    """Before stage t: the memory takes in D_{t-1} as the trained model sees it; then every layer's next
    A = U[:, :r]^T / sqrt(3), U the left singular vectors of D_t's input covariance C outside the memory. Its threshold
    after stage i = t - 2 (from 0) of T: 0.95 + 0.05 i / T (the original's, for CIFAR-100). sqrt(3) gives A's vectors
    the size of a fresh LoRA's. Original: r vectors always. Here: 0 for a singular value below 1e-5 ||C||_F, whose
    vector is rounding noise and points into the memory as likely as not."""
    for layers, C in covariances(model, past):
        first = layers[0]
        first.memory, retain = update_memory(first.memory, bool(first.retain), C, 0.95 + 0.05 * (t - 2) / n_stages)
        first.retain.fill_(retain)
    for layers, C in covariances(model, now):
        energy, U = free_directions(layers[0].memory, bool(layers[0].retain), C)
        U = U * (energy > 1e-10 * C.square().sum())  # (d_in, d_in)
        for layer in layers:
            layer.design = U[:, :len(layer.A)].mT / math.sqrt(3)


@torch.no_grad()
def covariances(model: Llama, batches: Iterable[Batch]) -> list[tuple[list[InfLoRALinear], Tensor]]:
    """(the layers that share an input, C = mean x x^T (d_in, d_in)) of every distinct input, one pass, without padding.
    All C are held at once, 4 d_in^2 bytes each: 5.1 GB at the 1B shape, and the memories up to half of that."""
    model.eval()
    sums, readers = {}, {}  # by the first layer's name: sum of x x^T; the layers that read x
    count, last = 0, (None, "")
    def see(name: str, layer: InfLoRALinear, x: Tensor) -> None:
        nonlocal last
        if x is not last[0]:  # q, k and v are handed one tensor, one after another
            last, seen = (x, name), x[real].to(layer.A.dtype)  # (tokens, d_in)
            sums[name] = sums.get(name, 0) + seen.mT @ seen
        readers.setdefault(last[1], {})[name] = layer
    with watching(model, see):
        for batch in batches:
            real, count = batch.real, count + int(batch.real.sum())
            model.model(batch.ids, batch.positions, batch.mask)
    return [(list(readers[name].values()), C / count) for name, C in sums.items()]


def free_directions(M: Tensor, retain: bool, C: Tensor) -> tuple[Tensor, Tensor]:
    """(squared singular values (d,), largest first, left singular vectors as columns (d, d)) of X, C's part in the free
    directions: M M^T C or (I - M M^T) C. As eigenvectors of X X^T in float64, several times cheaper than an SVD."""
    held = M @ (M.mT @ C)  # (d, d)
    X = (held if retain else C - held).double()
    energy, U = torch.linalg.eigh(X @ X.mT)
    return energy.flip(0).clamp(min=0), U.flip(1).float()


def update_memory(M: Tensor, retain: bool, C: Tensor, threshold: float) -> tuple[Tensor, bool]:
    """DualGPM: the smallest space that holds `threshold` of the energy ||C||_F^2 and all that was held before. M (d, m)
    spans it or, past half of R^d, its complement (retain=True). Its published code drops a vector of the first one."""
    energy, U = free_directions(M, retain, C)
    total = C.double().square().sum()
    free = energy.sum() - energy.cumsum(0)  # what stays outside if the first 1, 2, .. vectors join
    joining = 0 if energy.sum() <= (1 - threshold) * total else 1 + int((free > (1 - threshold) * total).sum())
    U = U[:, :joining]  # (d, j)
    if retain:
        return basis(M - U @ (U.mT @ M), M.shape[1] - joining), True
    M = torch.cat([M, U], 1)
    if 2 * M.shape[1] <= len(M):
        return M, False
    return basis(torch.eye(len(M), device=M.device) - M @ M.mT, len(M) - M.shape[1]), True


def basis(X: Tensor, m: int) -> Tensor:
    """An orthonormal basis (d, m) of X's column space, whose dimension is m."""
    return torch.linalg.svd(X, full_matrices=False)[0][:, :m].contiguous()
