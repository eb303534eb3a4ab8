"""RQ-VAE: an item vector becomes L codes, coarse to fine: Section 2's "codebook-based tokenizer".

An encoder maps x (d_in,) to z (d,). Level l picks the codeword nearest to the residual that the
levels before it leave; the decoder rebuilds x from the sum of the L codewords (Lee et al. 2022; the
two losses: van den Oord et al. 2017). Items that share their first codes are alike, which is what
lets a language model generate the next item code by code.
Paper: names the method only. Release (the authors' code; so far LC-Rec's): every number here.

Letters: n items, L levels, K codes a level, d = d_latent.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeso.progress import Progress

RELEASE_HIDDEN = (2048, 1024, 512, 256, 128, 64)


class RQVAE(nn.Module):
    """Encoder MLP, L codebooks of K codewords, mirrored decoder MLP."""

    def __init__(self, d_in: int, levels: int = 4, codes: int = 256, d_latent: int = 32,
                 hidden: Sequence[int] = RELEASE_HIDDEN, generator: torch.Generator | None = None):
        super().__init__()
        sizes = [d_in, *hidden, d_latent]
        self.encoder = mlp(sizes, generator)
        self.decoder = mlp(sizes[::-1], generator)
        uniform = torch.rand(levels, codes, d_latent, generator=generator)
        self.codebooks = nn.Parameter((2 * uniform - 1) / codes)  # (L, K, d); see init_codebooks

    def loss(self, x: Tensor, beta: float = 0.25, sinkhorn_eps: float = 0.003,
             sinkhorn_iters: int = 50) -> tuple[Tensor, Tensor]:
        """(reconstruction, quantisation) of x (n, d_in); training minimises their plain sum.

        reconstruction = mean (D(z_q) - x)^2; quantisation = mean over levels of `quantise_level`'s
        loss. The last level is assigned by Sinkhorn, which spreads the batch evenly over the codes,
        so that items alike in all coarser codes get different last ones. sinkhorn_eps = 0: the
        nearest code there too.
        """
        residual = self.encoder(x)  # (n, d)
        z_q, losses = torch.zeros_like(residual), []
        for level, codebook in enumerate(self.codebooks, 1):
            eps = sinkhorn_eps if level == len(self.codebooks) else 0.0
            distances = squared_distances(residual.detach(), codebook.detach())  # (n, K)
            codes = assign(distances, eps, sinkhorn_iters)  # (n,)
            value, loss = quantise_level(residual, codebook[codes], beta)  # (n, d), ()
            # The straight-through value has the residual's gradient, so the next residual has none:
            # the commitment of level 1 alone reaches the encoder, and d z_q / d z = I. As in the
            # Release.
            residual, z_q = residual - value, z_q + value
            losses.append(loss)
        return F.mse_loss(self.decoder(z_q), x), torch.stack(losses).mean()

    @torch.no_grad()
    def encode(self, x: Tensor, part: int = 2048) -> Tensor:
        """z of all items, `part` of them at a time: at once, the widest hidden layer alone is 8 KiB an item.
        (n, d_in) -> (n, d)"""
        return torch.cat([self.encoder(some) for some in x.split(part)])

    @torch.no_grad()
    def quantise(self, x: Tensor) -> Tensor:
        """Greedy codes, the nearest codeword at every level. (n, d_in) -> (n, L) int64"""
        require_finite(x)
        return quantise_residuals(self.encode(x), self.codebooks)[0]

    @torch.no_grad()
    def init_codebooks(self, x: Tensor, generator: torch.Generator) -> None:
        """Start every level from k-means on the residuals of all items, level by level. x (n, d_in)

        Release: size-constrained k-means. Here: plain; it is Sinkhorn that spreads the last level.
        """
        require_finite(x)
        residual = self.encode(x)  # (n, d)
        for codebook in self.codebooks:
            codebook.copy_(kmeans(residual, len(codebook), generator))
            residual = residual - codebook[squared_distances(residual, codebook).argmin(1)]


def mlp(sizes: Sequence[int], generator: torch.Generator | None) -> nn.Sequential:
    """Linear layers, ReLU between and none after the last; Xavier-normal weights, zero biases."""
    layers: list[nn.Module] = []
    for d_in, d_out in zip(sizes, sizes[1:]):
        linear = nn.utils.skip_init(nn.Linear, d_in, d_out)  # its own start draws globally
        nn.init.xavier_normal_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """||x||^2 + ||e||^2 - 2 x.e, one matrix product. (..., n, d), (K, d) -> (..., n, K)"""
    return x.pow(2).sum(-1, keepdim=True) + codebook.pow(2).sum(-1) - 2 * x @ codebook.T


def quantise_level(residual: Tensor, codeword: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Straight-through value and loss of one level. r (n, d), e (n, d) -> (n, d), ()

    value = r + sg[e - r]: e forward, the gradient of r backward (sg = stop-gradient).
    loss = mean (sg[r] - e)^2 + beta mean (r - sg[e])^2: codewords move to their items, and the
    encoder commits to its codewords.
    """
    loss = F.mse_loss(codeword, residual.detach()) + beta * F.mse_loss(residual, codeword.detach())
    return residual + (codeword - residual).detach(), loss


def quantise_residuals(z: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy codes; residuals before each level and after the last. -> (n, L), (L + 1, n, d)

    z (n, d) = the sum of the chosen codewords + the last residual.
    """
    codes, residuals = [], [z]
    for codebook in codebooks:
        codes.append(squared_distances(residuals[-1], codebook).argmin(1))
        residuals.append(residuals[-1] - codebook[codes[-1]])
    return torch.stack(codes, 1), torch.stack(residuals)


def assign(distances: Tensor, eps: float, iterations: int) -> Tensor:
    """Nearest code, or with eps > 0 the largest share of the Sinkhorn plan. (..., n, K) -> (..., n)

    With fewer rows than codes a row has several codes to itself, all with the share n / K. Release:
    the argmax, so rounding picks one. Here: the nearest of them.
    """
    if not eps:
        return distances.argmin(-1)
    plan = sinkhorn(distances, eps, iterations)
    largest = plan >= plan.amax(-1, keepdim=True) * (1 - 1e-6)
    return distances.where(largest, torch.inf).argmin(-1)


def sinkhorn(distances: Tensor, eps: float = 0.003, iterations: int = 50) -> Tensor:
    """Optimal transport of n items to K equal codes (Cuturi 2013). (..., n, K) -> (..., n, K)

    Q = n u exp(-D / eps) v with u (n,), v (K,) such that rows sum to 1 and columns to n / K
    (columns exactly; rows as far as `iterations` bring them). D: the distances moved and scaled to
    [-1, 1]. Result in float64: e^(1 / 0.003) is beyond float32. Below eps = 0.003 float64 fails
    too: ValueError. Release: divides the whole matrix 4 x `iterations` times. Here: two vectors,
    the same Q, 4 x faster.
    """
    if not eps >= 0.003:
        raise ValueError(f"Sinkhorn would overflow\nsinkhorn_eps = {eps}\n"
                         "use 0.003 or more, or 0 for the nearest code")
    D = distances.double()
    high, low = D.amax((-2, -1), keepdim=True), D.amin((-2, -1), keepdim=True)
    middle = (high + low) / 2
    kernel = torch.exp(-(D - middle) / ((high - middle + 1e-5) * eps))  # (..., n, K)
    n, K = kernel.shape[-2:]
    v = kernel.new_ones(*kernel.shape[:-2], K, 1)
    for _ in range(iterations):
        u = 1 / (n * (kernel @ v))  # (..., n, 1)
        v = 1 / (K * (kernel.mT @ u))  # (..., K, 1)
    return n * u * kernel * v.mT


def kmeans(x: Tensor, k: int, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """Lloyd's k-means from k-means++ seeds. (n, d) -> (k, d)

    A cluster that loses its last item moves to the item farthest from its centre. With fewer than k
    distinct items every one of them is a centre and the other centres repeat some: never NaN.
    """
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
    """k rows of x, each drawn in proportion to its squared distance to those before it. -> (k, d)

    Arthur & Vassilvitskii 2007. The draws come from the CPU, whatever the device of x.
    """
    first, *draws = torch.rand(k, generator=generator).tolist()
    chosen = [int(first * len(x))]
    distance = torch.full_like(x[:, 0], torch.inf)  # (n,)
    for draw in draws:
        distance = distance.minimum((x - x[chosen[-1]]).pow(2).sum(1))
        mass = distance.double().cumsum(0)  # (n,)
        row = int(torch.searchsorted(mass, draw * mass[-1], right=True))
        chosen.append(min(row, len(x) - 1))  # past the end: no mass is left
    return x[chosen]


def train(model: RQVAE, x: Tensor, epochs: int, generator: torch.Generator, lr: float = 1e-3,
          weight_decay: float = 1e-4, batch: int = 1024,
          steps: Callable[[Progress, Sequence[int]], Iterator[int]] = Progress.steps, **quantiser) -> None:
    """AdamW; ends in the state with the fewest collisions, of about ten tried. x (n, d_in)

    `quantiser`: beta, sinkhorn_eps, sinkhorn_iters of `RQVAE.loss`. `steps(at, epochs)`: those epochs that are
    left, for who saves the progress or shows it. FloatingPointError when the loss is no longer finite.
    Release: the same, for 20,000 epochs.
    """
    require_finite(x)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    at = Progress(dict(model.named_parameters()), optimiser, generator)
    for epoch in steps(at, range(1, epochs + 1)):
        order, losses = torch.randperm(len(x), generator=generator), []
        for rows in order.tensor_split(-(-len(x) // batch)):  # equal parts: see Sinkhorn
            loss = torch.stack(model.loss(x[rows], **quantiser)).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean):
            raise FloatingPointError("RQ-VAE training diverged\n"
                                     f"epoch {epoch}: loss {mean} at lr {lr}\n"
                                     "use a smaller learning rate")
        if epoch % max(1, epochs // 20) == 0 and epoch > epochs // 2:
            at.keep_best(collisions(model.quantise(x)))
    at.take_best()


def collisions(codes: Tensor) -> int:
    """Items minus distinct IDs. (n, L)"""
    return len(codes) - len(codes.unique(dim=0))


def require_finite(x: Tensor) -> None:
    """ValueError naming the first row with a NaN or an infinity."""
    bad = (~x.isfinite().all(1)).nonzero()[:, 0]
    if len(bad):
        raise ValueError("item vectors must be finite\n"
                         f"row {int(bad[0])} is not ({len(bad)} of {len(x)} rows)\n"
                         "look at that item's text and at the model that embedded it")
