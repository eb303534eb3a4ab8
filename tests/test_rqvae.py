"""RQ-VAE: losses and gradients against closed forms, Sinkhorn, k-means, training."""
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from minipeso import rqvae
from minipeso.rqvae import RQVAE, assign, kmeans, quantise_residuals, sinkhorn, train
from tests.conftest import draws
from tests.reference import full_matrix_sinkhorn


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def items(n: int = 60, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def small(codes: int = 5) -> RQVAE:
    model = RQVAE(6, 3, codes, 4, (8,), seeded()).double()
    model.init_codebooks(items(), seeded())
    return model


def with_free_z() -> tuple[RQVAE, torch.Tensor, torch.Tensor]:
    """A model whose "encoder" gives z itself, a leaf, so that d loss / d z can be read off."""
    model, x = small(), items()
    z = model.encoder(x).detach().requires_grad_()
    with torch.no_grad():  # off the cluster means, where the gradient is zero
        model.codebooks += 0.1 * torch.randn(3, 5, 4, generator=seeded(7), dtype=torch.float64)
    del model.encoder
    model.encoder = lambda x: z
    return model, x, z


def test_architecture_is_the_releases():
    """in-2048-...-64-32 and back, ReLU between but not after the last, Xavier, zero bias."""
    model = RQVAE(768, generator=seeded())
    sizes = [768, 2048, 1024, 512, 256, 128, 64, 32]
    for net, want in ((model.encoder, sizes), (model.decoder, sizes[::-1])):
        assert [type(layer) for layer in net] == ([nn.Linear, nn.ReLU] * 7)[:-1]
        assert [layer.in_features for layer in net[::2]] + [net[-1].out_features] == want
        for layer in net[::2]:
            std, tolerance = math.sqrt(2 / sum(layer.weight.shape)), 5 / math.sqrt(2 * layer.weight.numel())
            assert abs(layer.weight.std().item() / std - 1) < tolerance, "five standard errors of a std"
            assert layer.weight.abs().max() > 2.5 * std, "normal; uniform would end at 1.7 std"
            assert not layer.bias.any()
    assert model.codebooks.shape == (4, 256, 32)


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_losses_and_gradients_in_closed_form(beta):
    """d reconstruction / d z is the decoder's gradient at z_q, the sum of the chosen codewords, which have none.
    Quantisation: loss, codebook gradient 2 (e - r) / (n d L), and the encoder's, from level 1 alone."""
    model, x, z = with_free_z()
    model.loss(x, sinkhorn_eps=0)[0].backward()
    assert model.codebooks.grad is None or not model.codebooks.grad.any()
    codes, _ = quantise_residuals(z.detach(), model.codebooks.detach())
    z_q = sum(model.codebooks[level, codes[:, level]] for level in range(3)).detach().requires_grad_()
    (model.decoder(z_q) - x).pow(2).mean().backward()
    assert (z.grad - z_q.grad).abs().max() < 1e-15 and z_q.grad.abs().max() > 1e-4
    model, x, z = with_free_z()
    loss = model.loss(x, beta=beta, sinkhorn_eps=0)[1]
    loss.backward()
    n, d, L = len(z), 4, 3
    want, codebook_grad, r = 0.0, torch.zeros_like(model.codebooks), z.detach().clone()
    for level in range(L):
        for i in range(n):  # item by item
            k = min(range(5), key=lambda k: (r[i] - model.codebooks[level, k]).pow(2).sum())
            e = model.codebooks[level, k].detach()
            want += (1 + beta) * (r[i] - e).pow(2).sum().item() / (n * d * L)
            codebook_grad[level, k] += 2 * (e - r[i]) / (n * d * L)
            r[i] -= e
            if level == 0 and i == 0:
                z_grad = beta * 2 * r[0] / (n * d * L)
    assert abs(loss.item() - want) < 1e-12, (loss.item(), want)
    assert (model.codebooks.grad - codebook_grad).abs().max() < 1e-14 and (z.grad[0] - z_grad).abs().max() < 1e-14


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 7), st.integers(0, 99))
@draws(40)
def test_residual_identity_and_greedy_codes(n, levels, K, seed):
    """z = sum of codewords + last residual, and each code is the brute-force nearest."""
    z, codebooks = items(n, 4, seed), items(levels * K, 4, seed + 1).view(levels, K, 4)
    codes, residuals = quantise_residuals(z, codebooks)
    assert codes.shape == (n, levels) and codes.dtype == torch.int64 and residuals.shape == (levels + 1, n, 4)
    total = residuals[-1] + sum(codebooks[level, codes[:, level]] for level in range(levels))
    assert (total - z).abs().max() < 1e-12
    for i in range(n):
        r = z[i].clone()
        for level in range(levels):
            distances = [math.dist(r.tolist(), e.tolist()) for e in codebooks[level]]
            assert distances[codes[i, level]] <= min(distances) + 1e-12, (i, level, distances)
            r -= codebooks[level, codes[i, level]]


def test_encoding_in_parts_is_encoding():
    """The same latents in the same order, no more than a part in the encoder at once; `quantise` is of these."""
    model, sizes = small(), []
    model.encoder.register_forward_hook(lambda _, inputs, z: sizes.append(len(z)))
    parts = model.encode(items(), part=7)
    assert max(sizes) == 7 and sum(sizes) == len(items())
    assert (parts - model.encoder(items())).abs().max() < 1e-6 and not parts.requires_grad
    assert torch.equal(model.quantise(items()), quantise_residuals(parts, model.codebooks)[0])


def test_last_level_alone_uses_sinkhorn():
    """In training the last level, and no other, is spread evenly over the batch."""
    model, x, z = with_free_z()
    model.loss(x)[1].backward()
    greedy, residuals = quantise_residuals(z.detach(), model.codebooks.detach())
    for level in range(2):
        assert model.codebooks.grad[level].any(1).tolist() == [k in greedy[:, level] for k in range(5)]
    r, codebook = residuals[2], model.codebooks[2].detach()
    code = full_matrix_sinkhorn((r[:, None] - codebook[None]).pow(2).sum(2), 0.003, 50).argmax(1)
    want = torch.stack([(codebook[k] - r[code == k]).sum(0) for k in range(5)]) * 2 / (len(z) * 4 * 3)
    assert (model.codebooks.grad[2] - want).abs().max() < 1e-14
    spread, nearest = torch.bincount(code, minlength=5), torch.bincount(greedy[:, 2], minlength=5)
    assert spread.max() - spread.min() < nearest.max() - nearest.min(), (spread, nearest)


@given(st.integers(2, 20), st.integers(2, 20), st.sampled_from([0.003, 0.01, 0.1, 1.0]), st.integers(1, 60),
       st.integers(0, 99))
@draws(60)
def test_sinkhorn_equals_the_full_matrix_iteration(n, K, eps, iterations, seed):
    """Scaling vectors give the Release's whole-matrix plan; columns sum to n / K and, once converged, rows to 1."""
    distances = torch.rand(2, n, K, generator=seeded(seed), dtype=torch.float64) ** 3
    for one, Q in zip(distances, sinkhorn(distances, eps, iterations), strict=True):  # leading dimensions: a batch
        assert (Q - full_matrix_sinkhorn(one, eps, iterations)).abs().max() < 1e-9
        assert (Q.sum(0) - n / K).abs().max() < 1e-9 * n, Q.sum(0)
    Q = sinkhorn(torch.rand(40, 8, generator=seeded(seed)), eps=0.5, iterations=500)  # shrinks errors by 0.93 a turn
    assert (Q.sum(1) - 1).abs().max() < 1e-9, Q.sum(1)


def test_sinkhorn_is_finite_at_the_released_eps():
    """No overflow at eps 0.003, at any distances, in float32 too; smaller is refused. Equal shares: the nearest."""
    for distances in (torch.zeros(4, 6), torch.ones(1, 6) * 7, torch.tensor([[0.0, 1e6], [1e6, 0.0]]),
                      torch.eye(50) * 1e3, 1e30 * torch.rand(64, 32, generator=seeded()),
                      torch.cat([torch.zeros(30, 1), torch.ones(30, 9)], 1)):
        Q = sinkhorn(distances, eps=0.003)
        assert Q.dtype == torch.float64 and Q.isfinite().all() and (Q >= 0).all(), Q
    for eps in (0.002, 0.0, -1.0, math.nan):  # below 0.003 float64 itself overflows
        with pytest.raises(ValueError, match=f"sinkhorn_eps = {eps}"):
            sinkhorn(torch.rand(4, 4), eps=eps)
    # two items, six codes: each item has three codes to itself and takes the nearest of these
    distances = torch.tensor([[0.3, 0.1, 0.2, 0.9, 0.8, 0.7], [0.9, 0.8, 0.7, 0.2, 0.3, 0.1]])
    shares = sinkhorn(distances)
    assert torch.allclose(shares[0, :3], torch.full((3,), 1 / 3, dtype=torch.float64)), shares
    assert assign(distances, 0.003).tolist() == [1, 5] and assign(torch.ones(4, 6), 0.003).tolist() == [0, 0, 0, 0]


def test_kmeans_finds_clusters_reseeds_empty_ones_and_lowers_the_loss(monkeypatch):
    """Of twelve tight clusters of unequal size every centre is the mean of one. A centre without items moves to the
    item farthest from its own; at the end all are used. Codebooks from it give a lower loss than the uniform start,
    level by level."""
    model, x, left = RQVAE(6, 3, 16, 4, (8,), seeded()).double(), items(300), []
    for start in (lambda: None, lambda: model.init_codebooks(x, seeded())):
        start()
        left.append(quantise_residuals(model.encoder(x), model.codebooks)[1].pow(2).mean((1, 2)).tolist())
    before, after = left
    assert all(a < b for a, b in zip(after[1:], before[1:])) and after == sorted(after, reverse=True), (before, after)
    owner = torch.arange(12).repeat_interleave(torch.arange(3, 15))
    x = 10 * items(12, 5, seed=1)[owner] + 0.01 * items(len(owner), 5, seed=2)
    want = torch.stack([x[owner == k].mean(0) for k in range(12)])
    distance = torch.cdist(kmeans(x, 12, seeded()), want)
    assert distance.min(1).values.max() < 1e-6 and distance.argmin(1).unique().numel() == 12
    x = items(200, 3)
    monkeypatch.setattr(rqvae, "kmeans_plus_plus", lambda x, k, generator: x[:1] + 1000 * torch.arange(k)[:, None])
    centres = kmeans(x, 2, seeded(), iterations=1)
    assert torch.equal(centres[1], x[(x - x[0]).norm(dim=1).argmax()])
    assert torch.cdist(x, kmeans(x, 10, seeded())).argmin(1).unique().numel() == 10


def trained(x: torch.Tensor, seed: int = 0, epochs: int = 4, **settings) -> dict[str, torch.Tensor]:
    model = small()
    train(model, x, epochs, seeded(seed), **settings)
    return model.state_dict()


def distance(a: dict, b: dict) -> float:
    return max((a[key] - b[key]).abs().max().item() for key in a)


def test_an_epoch_is_steps_of_adamw(monkeypatch):
    """Three equal parts of a random order of 50 items, a step of torch's AdamW on the summed losses of each. The
    generator and the settings alone decide; torch's own generator is left alone."""
    monkeypatch.setattr(rqvae, "BATCH", 20)
    model, generator = small(), seeded()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1e-4)
    order = torch.randperm(50, generator=generator)
    for rows in (order[:17], order[17:34], order[34:]):
        optimiser.zero_grad()
        sum(model.loss(items(50)[rows])).backward()
        optimiser.step()
    assert distance(trained(items(50), epochs=1, lr=0.01), model.state_dict()) == 0
    state, usual = torch.get_rng_state(), trained(items())
    assert distance(trained(items()), usual) == 0 == distance(trained(items(), epochs=0), small().state_dict())
    assert all(distance(trained(items(), **change), usual) > 0 for change in ({"epochs": 5}, {"lr": 1e-4}, {"seed": 1}))
    assert torch.equal(state, torch.get_rng_state())


def test_the_state_with_fewest_collisions_is_kept(monkeypatch):
    """Training ends with the weights of the tried epoch that had the fewest collisions, whoever counts the epochs."""
    states, model, counts = {}, small(), dict.fromkeys(range(1, 21), 5) | {15: 2, 18: 3}

    def epochs_left(progress, epochs):
        for epoch in epochs:
            monkeypatch.setattr(rqvae, "collisions", lambda codes: counts[epoch])
            yield epoch
            states[epoch] = {key: value.clone() for key, value in model.state_dict().items()}

    train(model, items(), 20, seeded(), epochs_left=epochs_left)
    assert len(states) == 20 and distance(states[15], model.state_dict()) == 0
    assert distance(states[20], model.state_dict()) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_errors(bad):
    """NaN or infinity in an item vector names the row, before any work; a diverging loss the epoch and the rate."""
    x, model = items(), small()
    x[7, 2] = bad
    for call in (model.quantise, lambda x: model.init_codebooks(x, seeded()), lambda x: train(model, x, 1, seeded())):
        with pytest.raises(ValueError, match=r"row 7 is not \(1 of 60 rows\)"):
            call(x)
    with pytest.raises(FloatingPointError, match=r"epoch \d+: loss (nan|inf) at lr 1e\+200"):
        trained(items(), lr=1e200)
