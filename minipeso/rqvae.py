"""RQ-VAE: an item vector becomes L codes, coarse to fine: Section 2's "codebook-based tokenizer".

An encoder maps x (d_in,) to z (d,). Level l picks the codeword nearest to the residual that the levels before it leave;
the decoder rebuilds x from the sum of the L codewords (Lee et al. 2022; the two losses: van den Oord et al. 2017).
Items that share their first codes are alike, so a language model can generate the next item code by code.
Paper: its name. Release (the authors' code; so far LC-Rec's): all numbers. n items, L levels, K codes, d = d_latent."""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeso.state import Epochs, Progress, every_epoch

RELEASE_HIDDEN = (2048, 1024, 512, 256, 128, 64)
BATCH = 1024  # items per training step


class RQVAE(nn.Module):
    """Encoder MLP, L codebooks of K codewords, mirrored decoder MLP."""
    def __init__(self, d_in: int, levels: int = 4, codes: int = 256, d_latent: int = 32,
                 hidden: Sequence[int] = RELEASE_HIDDEN, generator: torch.Generator | None = None):
        super().__init__()
        sizes = [d_in, *hidden, d_latent]
        self.encoder, self.decoder = mlp(sizes, generator), mlp(sizes[::-1], generator)
        uniform = 2 * torch.rand(levels, codes, d_latent, generator=generator) - 1
        self.codebooks = nn.Parameter(uniform / codes)  # (L, K, d)

    def loss(self, x: Tensor, beta: float = 0.25, sinkhorn_eps: float = 0.003) -> tuple[Tensor, Tensor]:
        """(reconstruction, quantisation) of x (n, d_in); training minimises their plain sum.

        reconstruction = mean (D(z_q) - x)^2; quantisation = the mean over levels of (sg[r] - e)^2 + beta (r - sg[e])^2,
        where sg stops the gradient: codewords e move to their residuals r, and the encoder commits to its codewords.
        Sinkhorn assigns the last level: it spreads a batch evenly over the codes, so that items alike in all coarser
        codes get different last ones; sinkhorn_eps = 0: the nearest code there too."""
        r = self.encoder(x)  # (n, d)
        z_q, losses = torch.zeros_like(r), []
        for level, codebook in enumerate(self.codebooks, 1):
            eps = sinkhorn_eps if level == len(self.codebooks) else 0.0
            codes = assign(squared_distances(r.detach(), codebook.detach()), eps)  # (n,)
            e = codebook[codes]  # (n, d)
            losses.append(F.mse_loss(e, r.detach()) + beta * F.mse_loss(r, e.detach()))
            # Straight through: e forward, the gradient of r backward. So the next residual has no gradient: the
            # commitment of level 1 alone reaches the encoder, and d z_q / d z = I. As in the Release.
            value = r + (e - r).detach()  # (n, d)
            r, z_q = r - value, z_q + value
        return F.mse_loss(self.decoder(z_q), x), torch.stack(losses).mean()

    @torch.no_grad()
    def encode(self, x: Tensor, part: int = 2048) -> Tensor:
        """z of all items, `part` at a time: the widest hidden layer alone takes 8 KiB per item. (n, d_in) -> (n, d)"""
        require_finite(x)
        return torch.cat([self.encoder(some) for some in x.split(part)])

    @torch.no_grad()
    def quantise(self, x: Tensor) -> Tensor:
        """Greedy codes, the nearest codeword at every level. (n, d_in) -> (n, L) int64"""
        return quantise_residuals(self.encode(x), self.codebooks)[0]

    @torch.no_grad()
    def init_codebooks(self, x: Tensor, generator: torch.Generator) -> None:
        """Start every level from k-means on the residuals of all items. Release: of constrained sizes. x (n, d_in)"""
        residual = self.encode(x)  # (n, d)
        for codebook in self.codebooks:
            codebook.copy_(kmeans(residual, len(codebook), generator))
            residual = residual - codebook[squared_distances(residual, codebook).argmin(1)]


def mlp(sizes: Sequence[int], generator: torch.Generator | None) -> nn.Sequential:
    """Linear layers, ReLU between and none after the last; Xavier-normal weights, zero biases."""
    layers: list[nn.Module] = []
    for d_in, d_out in zip(sizes, sizes[1:]):
        layers += [nn.utils.skip_init(nn.Linear, d_in, d_out), nn.ReLU()]  # Linear's own start draws globally
        nn.init.xavier_normal_(layers[-2].weight, generator=generator)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """||x||^2 + ||e||^2 - 2 x.e, one matrix product. (..., n, d), (K, d) -> (..., n, K)"""
    return x.pow(2).sum(-1, keepdim=True) + codebook.pow(2).sum(-1) - 2 * x @ codebook.T


def quantise_residuals(z: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy codes, and residuals before each level and after the last. (n, d), (L, K, d) -> (n, L), (L + 1, n, d)"""
    codes, residuals = [], [z]
    for codebook in codebooks:
        codes.append(squared_distances(residuals[-1], codebook).argmin(1))
        residuals.append(residuals[-1] - codebook[codes[-1]])
    return torch.stack(codes, 1), torch.stack(residuals)


def assign(distances: Tensor, eps: float) -> Tensor:
    """Nearest code, or with eps > 0 the largest share of the Sinkhorn plan. (..., n, K) -> (..., n)
    With fewer items than codes an item has several equal shares. Release: rounding picks one. Here: the nearest."""
    if not eps:
        return distances.argmin(-1)
    plan = sinkhorn(distances, eps)
    largest = plan >= plan.amax(-1, keepdim=True) * (1 - 1e-6)
    return distances.where(largest, torch.inf).argmin(-1)


def sinkhorn(distances: Tensor, eps: float = 0.003, iterations: int = 50) -> Tensor:
    """Optimal transport of n items to K equal codes (Cuturi 2013). (..., n, K) -> (..., n, K) float64

    Q = n u exp(-D / eps) v, with u (n,), v (K,) such that columns sum to n / K, and rows to 1 as far as `iterations`
    bring them; D: the distances, moved and scaled to [-1, 1]. e^(1 / 0.003) is beyond float32, below eps = 0.003
    float64 fails too: ValueError. Release: divides the whole matrix, in turn. Here: two vectors, the same Q."""
    if not eps >= 0.003:
        raise ValueError(f"Sinkhorn would overflow\nsinkhorn_eps = {eps}\nuse 0.003 or more, or 0 for the nearest code")
    D = distances.double()
    high, low = D.amax((-2, -1), keepdim=True), D.amin((-2, -1), keepdim=True)  # (..., 1, 1)
    middle = (high + low) / 2
    kernel = torch.exp(-(D - middle) / ((high - middle + 1e-5) * eps))  # (..., n, K)
    n, K = kernel.shape[-2:]
    v = kernel.new_ones(*kernel.shape[:-2], K, 1)
    for _ in range(iterations):
        u = 1 / (n * (kernel @ v))  # (..., n, 1)
        v = 1 / (K * (kernel.mT @ u))  # (..., K, 1)
    return n * u * kernel * v.mT


def kmeans(x: Tensor, k: int, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """Lloyd's k-means from k-means++ seeds, (n, d) -> (k, d). An empty one takes the item farthest from its centre."""
    centres = kmeans_plus_plus(x, k, generator)
    for _ in range(iterations):
        distance, code = squared_distances(x, centres).min(1)  # (n,), (n,)
        member = F.one_hot(code, k).to(x.dtype)  # (n, k); index_add_ would be random on a GPU
        count = member.sum(0)[:, None]  # (k, 1)
        centres = torch.where(count > 0, member.T @ x / count.clamp(min=1), centres)  # (k, d)
        empty = (count[:, 0] == 0).nonzero()[:, 0]
        farthest = distance.topk(min(len(empty), len(x))).indices
        centres[empty[:len(farthest)]] = x[farthest]
    return centres


def kmeans_plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k rows of x, drawn on the CPU by squared distance to those before (Arthur & Vassilvitskii 2007). -> (k, d)"""
    first, *draws = torch.rand(k, generator=generator).tolist()
    chosen, distance = [int(first * len(x))], torch.full_like(x[:, 0], torch.inf)  # (n,)
    for draw in draws:
        distance = distance.minimum((x - x[chosen[-1]]).pow(2).sum(1))
        mass = distance.double().cumsum(0)  # (n,)
        row = torch.searchsorted(mass, draw * mass[-1], right=True).clamp(max=len(x) - 1)  # past the end: no mass left
        chosen.append(int(row))
    return x[chosen]


def train(model: RQVAE, x: Tensor, epochs: int, generator: torch.Generator, lr: float = 1e-3,
          epochs_left: Epochs = every_epoch) -> None:
    """AdamW; ends in the state with the fewest collisions, of about ten tried. x (n, d_in). Release: 20,000 epochs.
    epochs_left(progress, epochs): those still to do, for a run that saves its state."""
    require_finite(x)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    progress = Progress(dict(model.named_parameters()), optimiser, generator)
    for epoch in epochs_left(progress, range(1, epochs + 1)):
        order, losses = torch.randperm(len(x), generator=generator), []
        for batch in order.tensor_split(-(-len(x) // BATCH)):  # equal parts, since Sinkhorn spreads each evenly
            loss = torch.stack(model.loss(x[batch])).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"RQ-VAE training diverged\nepoch {epoch}: loss {mean} at lr {lr}\n"
                                     "use a smaller learning rate")
        if epoch % max(1, epochs // 20) == 0 and epoch > epochs // 2:
            progress.keep_best(collisions(model.quantise(x)))
    progress.take_best()


def collisions(codes: Tensor) -> int:
    """Items minus distinct IDs. (n, L)"""
    return len(codes) - len(codes.unique(dim=0))


def require_finite(x: Tensor) -> None:
    """ValueError naming the first row with a NaN or an infinity."""
    if bad := (~x.isfinite().all(1)).nonzero()[:, 0].tolist():
        raise ValueError(f"item vectors must be finite\nrow {bad[0]} is not ({len(bad)} of {len(x)} rows)\n"
                         "look at that item's text and at the model that embedded it")
