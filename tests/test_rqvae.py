"""RQ-VAE: losses and gradients against closed forms, Sinkhorn, k-means, training."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipeso import rqvae
from minipeso.rqvae import RQVAE, assign, kmeans, quantise_residuals, sinkhorn, train
from tests.conftest import draws
from tests.reference import full_matrix_sinkhorn


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def items(n: int = 60, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def small(seed: int = 0, **sizes) -> RQVAE:
    sizes = {"levels": 3, "codes": 5, "d_latent": 4, "hidden": (8,)} | sizes
    model = RQVAE(6, generator=seeded(seed), **sizes).double()
    model.init_codebooks(items(), seeded(seed))
    return model


class Given(nn.Module):
    """An "encoder" whose output is a free parameter, so that d loss / d z can be read off."""

    def __init__(self, z: torch.Tensor):
        super().__init__()
        self.z = nn.Parameter(z)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.z


def with_free_z() -> tuple[RQVAE, torch.Tensor, torch.Tensor]:
    model, x = small(), items()
    z = model.encoder(x).detach()
    with torch.no_grad():  # off the cluster means, where the gradient is zero
        model.codebooks += 0.1 * torch.randn(3, 5, 4, generator=seeded(7), dtype=torch.float64)
    model.encoder = Given(z.clone())
    return model, x, z


def test_architecture_is_the_releases():
    """in-2048-...-64-32 and back, ReLU between but not after the last, Xavier, zero bias."""
    model = RQVAE(768, generator=seeded())
    sizes = [768, 2048, 1024, 512, 256, 128, 64, 32]
    for net, want in ((model.encoder, sizes), (model.decoder, sizes[::-1])):
        linear = [layer for layer in net if isinstance(layer, nn.Linear)]
        assert [layer.in_features for layer in linear] + [linear[-1].out_features] == want
        assert [type(layer) for layer in net] == ([nn.Linear, nn.ReLU] * 7)[:-1]
        assert all((layer.bias == 0).all() for layer in linear)
        for layer in linear:
            want_std, std = math.sqrt(2 / sum(layer.weight.shape)), layer.weight.std().item()
            tolerance = 5 / math.sqrt(2 * layer.weight.numel())  # five standard errors of the std
            assert abs(std / want_std - 1) < tolerance, (layer, std, want_std)
            assert layer.weight.abs().max() > 2.5 * std, "normal; uniform would end at 1.7 std"
    assert model.codebooks.shape == (4, 256, 32)


def test_straight_through_gradient():
    """d reconstruction / d z is the decoder's gradient at z_q, the sum of the chosen codewords."""
    model, x, z = with_free_z()
    model.loss(x, sinkhorn_eps=0)[0].backward()
    codes, _ = quantise_residuals(z, model.codebooks.detach())
    z_q = sum(model.codebooks[level, codes[:, level]] for level in range(3))
    z_q = z_q.detach().requires_grad_()
    (model.decoder(z_q) - x).pow(2).mean().backward()
    error = (model.encoder.z.grad - z_q.grad).abs().max().item()
    assert error < 1e-15 and z_q.grad.abs().max() > 1e-4, (error, z_q.grad.abs().max())


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_quantisation_loss_and_gradients_in_closed_form(beta):
    """Loss, codebook gradient 2 (e - r) / (n d L), and the encoder's, from level 1 alone."""
    model, x, z = with_free_z()
    loss = model.loss(x, beta=beta, sinkhorn_eps=0)[1]
    loss.backward()
    n, d, L = len(z), 4, 3
    want, codebook_grad, r = 0.0, torch.zeros_like(model.codebooks), z.clone()
    for level in range(L):
        for i in range(n):  # item by item
            distances = [(r[i] - e).pow(2).sum() for e in model.codebooks[level].detach()]
            k = min(range(len(distances)), key=distances.__getitem__)
            e = model.codebooks[level, k].detach()
            want += (1 + beta) * (r[i] - e).pow(2).sum().item() / (n * d * L)
            codebook_grad[level, k] += 2 * (e - r[i]) / (n * d * L)
            r[i] -= e
            if level == 0 and i == 0:
                z_grad = beta * 2 * r[0] / (n * d * L)
    assert abs(loss.item() - want) < 1e-12, (loss.item(), want)
    error = (model.codebooks.grad - codebook_grad).abs().max().item()
    assert error < 1e-14, error
    error = (model.encoder.z.grad[0] - z_grad).abs().max().item()
    assert error < 1e-14, (beta, error)


def test_reconstruction_trains_no_codebook():
    """The reconstruction loss reaches encoder and decoder, and no codeword."""
    model = small()
    model.loss(items())[0].backward()
    assert model.codebooks.grad is None or not model.codebooks.grad.any()
    assert model.encoder[0].weight.grad.any() and model.decoder[0].weight.grad.any()


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 7), st.integers(0, 99))
@draws(40)
def test_residual_identity_and_greedy_codes(n, levels, K, seed):
    """z = sum of codewords + last residual, and each code is the brute-force nearest."""
    z, codebooks = items(n, 4, seed), items(levels * K, 4, seed + 1).view(levels, K, 4)
    codes, residuals = quantise_residuals(z, codebooks)
    assert codes.shape == (n, levels) and codes.dtype == torch.int64
    assert residuals.shape == (levels + 1, n, 4)
    total = residuals[-1] + sum(codebooks[level, codes[:, level]] for level in range(levels))
    assert (total - z).abs().max() < 1e-12
    for i in range(n):
        r = z[i].clone()
        for level in range(levels):
            distances = [math.dist(r.tolist(), e.tolist()) for e in codebooks[level]]
            assert distances[codes[i, level]] <= min(distances) + 1e-12, (i, level, distances)
            r -= codebooks[level, codes[i, level]]


def test_quantise_encodes_first():
    """`quantise` gives the greedy codes of the encoder's output, without a gradient."""
    model = small()
    codes = model.quantise(items())
    assert torch.equal(codes, quantise_residuals(model.encoder(items()), model.codebooks)[0])


def test_encoding_in_parts_is_encoding():
    """A part at a time: the same latents in the same order, and no more than a part is in the encoder at once."""
    model, sizes = small(), []
    model.encoder.register_forward_hook(lambda _, inputs, z: sizes.append(len(z)))
    parts = model.encode(items(), part=7)
    assert max(sizes) == 7 and sum(sizes) == len(items())
    assert (parts - model.encoder(items())).abs().max() < 1e-6 and not parts.requires_grad


def test_last_level_alone_uses_sinkhorn():
    """In training the last level, and no other, is spread evenly over the batch."""
    model, x, z = with_free_z()
    model.loss(x)[1].backward()
    greedy, residuals = quantise_residuals(z, model.codebooks.detach())
    for level in range(2):
        used = model.codebooks.grad[level].any(1)
        assert used.tolist() == [k in greedy[:, level] for k in range(5)]
    r, codebook = residuals[2], model.codebooks[2].detach()
    plan = full_matrix_sinkhorn((r[:, None] - codebook[None]).pow(2).sum(2), 0.003, 50)
    code = plan.argmax(1)
    want = torch.stack([(codebook[k] - r[code == k]).sum(0) for k in range(5)])
    want *= 2 / (len(z) * 4 * 3)
    assert (model.codebooks.grad[2] - want).abs().max() < 1e-14
    spread, nearest = torch.bincount(code, minlength=5), torch.bincount(greedy[:, 2], minlength=5)
    assert spread.max() - spread.min() < nearest.max() - nearest.min(), (spread, nearest)


@pytest.mark.parametrize("change", [{"beta": 0.5}, {"sinkhorn_eps": 1.0}, {"sinkhorn_eps": 0},
                                    {"sinkhorn_iters": 1}])
def test_every_loss_setting_is_alive(change):
    """Changing beta, sinkhorn_eps or sinkhorn_iters changes the gradient."""
    grads = []
    for settings_ in ({}, change):
        model = small(codes=16)
        sum(model.loss(items(), **settings_)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).abs().max() > 1e-6, change


# -- Sinkhorn ------------------------------------------------------------------------------------

@given(st.integers(2, 20), st.integers(2, 20), st.sampled_from([0.003, 0.01, 0.1, 1.0]),
       st.integers(1, 60), st.integers(0, 99))
@draws(60)
def test_sinkhorn_equals_the_full_matrix_iteration(n, K, eps, iterations, seed):
    """Scaling vectors give the Release's whole-matrix plan; columns sum to n / K."""
    distances = torch.rand(n, K, generator=seeded(seed), dtype=torch.float64) ** 3
    Q = sinkhorn(distances, eps, iterations)
    error = (Q - full_matrix_sinkhorn(distances, eps, iterations)).abs().max().item()
    assert error < 1e-9, (n, K, eps, error)
    assert (Q.sum(0) - n / K).abs().max() < 1e-9 * n, Q.sum(0)


def test_sinkhorn_rows_sum_to_one():
    """Once converged, rows sum to 1 and columns to n / K."""
    Q = sinkhorn(torch.rand(40, 8, generator=seeded()), eps=0.05, iterations=500)
    assert (Q.sum(1) - 1).abs().max() < 1e-9, Q.sum(1)
    assert (Q.sum(0) - 5).abs().max() < 1e-9, Q.sum(0)


@pytest.mark.parametrize("distances", [
    torch.zeros(4, 6), torch.ones(1, 6) * 7, torch.tensor([[0.0, 1e6], [1e6, 0.0]]),
    torch.eye(50) * 1e3, 1e30 * torch.rand(64, 32, generator=seeded()),
    torch.cat([torch.zeros(30, 1), torch.ones(30, 9)], 1)])
def test_sinkhorn_is_finite_at_the_released_eps(distances):
    """No overflow at eps 0.003, with equal, extreme or one-sided distances, also in float32."""
    Q = sinkhorn(distances, eps=0.003)
    assert Q.dtype == torch.float64 and Q.isfinite().all() and (Q >= 0).all(), Q


def test_sinkhorn_of_a_batch_is_matrix_by_matrix():
    """Leading dimensions are separate problems."""
    distances = torch.rand(3, 7, 5, generator=seeded())
    for one, Q in zip(distances, sinkhorn(distances)):
        assert (sinkhorn(one) - Q).abs().max() < 1e-12


def test_of_equal_shares_the_nearest_code():
    """Two items, six codes: each item has three codes to itself and takes the nearest of these."""
    distances = torch.tensor([[0.3, 0.1, 0.2, 0.9, 0.8, 0.7], [0.9, 0.8, 0.7, 0.2, 0.3, 0.1]])
    shares = sinkhorn(distances)
    assert torch.allclose(shares[0, :3], torch.full((3,), 1 / 3, dtype=torch.float64)), shares
    assert assign(distances, 0.003, 50).tolist() == [1, 5]
    assert assign(torch.ones(4, 6), 0.003, 50).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("eps", [0.002, 0.0, -1.0, math.nan])
def test_sinkhorn_refuses_what_would_overflow(eps):
    """Below 0.003 float64 itself overflows: ValueError with the value."""
    with pytest.raises(ValueError, match=f"sinkhorn_eps = {eps}"):
        sinkhorn(torch.rand(4, 4), eps=eps)


# -- k-means -------------------------------------------------------------------------------------

def inertia(x: torch.Tensor, centres: torch.Tensor) -> float:
    return torch.cdist(x, centres).min(1).values.pow(2).sum().item()


def test_kmeans_finds_separated_clusters():
    """Twelve tight clusters of unequal size: every centre is the mean of one of them."""
    means = items(12, 5, seed=1) * 10
    owner = torch.arange(12).repeat_interleave(torch.arange(3, 15))
    x = means[owner] + 0.01 * items(len(owner), 5, seed=2)
    want = torch.stack([x[owner == k].mean(0) for k in range(12)])
    distance = torch.cdist(kmeans(x, 12, seeded()), want)
    assert distance.min(1).values.max() < 1e-6 and distance.argmin(1).unique().numel() == 12


def test_kmeans_iterations_lower_the_inertia():
    """Lloyd's steps lower the inertia of the k-means++ seeds, and those that of random items."""
    x = items(500, 3)
    seeds, start, end = (inertia(x, c) for c in (x[:20], rqvae.kmeans_plus_plus(x, 20, seeded()),
                                                 kmeans(x, 20, seeded())))
    assert end < 0.9 * start and start < seeds, (seeds, start, end)


def test_empty_clusters_are_reseeded(monkeypatch):
    """A centre without items moves to the item farthest from its own; at the end all are used."""
    x = items(200, 3)
    monkeypatch.setattr(rqvae, "kmeans_plus_plus",
                        lambda x, k, generator: x[:1] + 1000 * torch.arange(k)[:, None])
    centres = kmeans(x, 2, seeded(), iterations=1)
    assert torch.equal(centres[1], x[(x - x[0]).norm(dim=1).argmax()])
    assert torch.cdist(x, kmeans(x, 10, seeded())).argmin(1).unique().numel() == 10


@pytest.mark.parametrize("distinct, copies", [(1, 1), (1, 5), (3, 1), (3, 4), (8, 2)])
def test_fewer_items_than_codes(distinct, copies):
    """With fewer distinct items than codes each is a centre; the rest repeat, none is NaN."""
    x = items(distinct, 4).repeat(copies, 1)
    centres = kmeans(x, 8, seeded())
    assert centres.shape == (8, 4) and centres.isfinite().all()
    assert inertia(x, centres) < 1e-20


def test_kmeans_start_lowers_the_loss():
    """Codebooks from k-means give a lower loss than the uniform start, level by level."""
    x = items(300)
    model = RQVAE(6, 3, 16, 4, (8,), seeded()).double()
    before = quantise_residuals(model.encoder(x), model.codebooks)[1].pow(2).mean((1, 2)).tolist()
    loss = model.loss(x)[1].item()
    model.init_codebooks(x, seeded())
    after = quantise_residuals(model.encoder(x), model.codebooks)[1].pow(2).mean((1, 2)).tolist()
    assert model.loss(x)[1].item() < 0.5 * loss
    assert all(a < b for a, b in zip(after[1:], before[1:])), (before, after)
    assert all(a < b for a, b in zip(after[1:], after)), ("each level leaves less", after)


# -- training ------------------------------------------------------------------------------------

def trained(x: torch.Tensor | None = None, seed: int = 0, **settings_) -> dict[str, torch.Tensor]:
    model = small()
    settings_ = {"epochs": 4, "batch": 20} | settings_
    train(model, items() if x is None else x, generator=seeded(seed), **settings_)
    return model.state_dict()


def distance(a: dict, b: dict) -> float:
    return max((a[key] - b[key]).abs().max().item() for key in a)


def test_training_lowers_reconstruction():
    """Reconstruction after training is far below that at the start, and the codes stay in use."""
    x = torch.cat([items(20, seed=seed) * 0.1 + items(1, seed=seed + 9) for seed in range(6)])
    model = RQVAE(6, 3, 8, 4, (16,), seeded()).double()
    model.init_codebooks(x, seeded())
    before = model.loss(x)[0].item()
    train(model, x, 150, seeded(), lr=3e-3, batch=60)
    after = model.loss(x)[0].item()
    assert after < 0.3 * before, (before, after)
    used = [column.unique().numel() for column in model.quantise(x).T]
    assert min(used) >= 4, used


def test_training_is_reproducible_and_leaves_the_global_generator_alone():
    """The same generator gives the same weights bit for bit; the global one is not touched."""
    state = torch.get_rng_state()
    assert distance(trained(), trained()) == 0
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("change", [{"epochs": 5}, {"lr": 1e-4}, {"weight_decay": 0.5},
                                    {"batch": 60}, {"seed": 1}, {"beta": 2.0}, {"sinkhorn_eps": 0}])
def test_every_training_setting_is_alive(change):
    """Changing any setting changes the weights."""
    assert distance(trained(), trained(**change)) > 0, change


def test_the_state_with_fewest_collisions_is_kept(monkeypatch):
    """Training ends with the weights of the tried epoch that had the fewest collisions."""
    states, model = {}, small()
    counts = {epoch: 5 for epoch in range(1, 21)} | {15: 2, 18: 3}

    def steps(at, epochs):
        for epoch in at.steps(epochs):
            monkeypatch.setattr(rqvae, "collisions", lambda codes: counts[epoch])
            yield epoch
            states[epoch] = {key: value.clone() for key, value in model.state_dict().items()}

    train(model, items(), 20, seeded(), steps=steps)
    assert len(states) == 20 and distance(states[15], model.state_dict()) == 0
    assert distance(states[20], model.state_dict()) > 0


def test_no_epoch_leaves_the_model_alone():
    """epochs = 0 changes nothing."""
    assert distance(trained(epochs=0), small().state_dict()) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_items_that_are_not_finite_are_named(bad):
    """NaN or infinity in an item vector: ValueError naming the row, before any work."""
    x = items()
    x[7, 2] = bad
    model = small()
    for call in (model.quantise, lambda x: model.init_codebooks(x, seeded()),
                 lambda x: train(model, x, 1, seeded())):
        with pytest.raises(ValueError, match=r"row 7 is not \(1 of 60 rows\)"):
            call(x)


def test_divergence_is_an_error():
    """A loss that is no longer finite stops training with epoch and learning rate."""
    with pytest.raises(FloatingPointError, match=r"epoch \d+: loss (nan|inf) at lr 1e\+200"):
        trained(lr=1e200)
