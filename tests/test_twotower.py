"""Two-tower baselines: the propagation as dense matrices, every loss as its written formula, weights at their limits."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import train
from minipeso import config
from minipeso.rivals import twotower
from minipeso.runs import report
from minipeso.rivals.lightgcn import (Neighbours, Questions, Tower, adjacency, bpr_loss, fit, full_ranks, propagate,
                               sample_negatives)
from minipeso.metrics import hit_at
from minipeso.rivals.pisa import PISA, PIW, Contrastive, largest, info_nce, js_divergence
from minipeso.stages import Stage
from tests.conftest import draws
from tests.micro import micro, run

U, I, D = 7, 9, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edges(seed: int = 0, m: int = 20) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, U - 1, (m,), generator=draw), torch.randint(0, I - 1, (m,), generator=draw)


def dense_adjacency(user: Tensor, item: Tensor) -> Tensor:
    """D^-1/2 A D^-1/2 entry by entry; the last user and item have no edge."""
    A = torch.zeros(U + I, U + I, dtype=torch.float64)
    for u, i in zip(user.tolist(), item.tolist()):
        A[u, U + i] = A[U + i, u] = 1.0
    degree = A.sum(1).clamp(min=1)
    return A / (degree[:, None] * degree).sqrt()


# -- LightGCN ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_propagation_is_the_mean_of_dense_powers(layers):
    """Value and gradient: (I + A + ... + A^layers) E / (layers + 1), by matrix powers."""
    user, item = edges()
    A, E = dense_adjacency(user, item), normal(U + I, D).requires_grad_(True)
    powers = sum(torch.linalg.matrix_power(A, k) for k in range(layers + 1)) / (layers + 1)
    g = normal(U + I, D, seed=1)
    H = propagate(E, adjacency(user, item, U, I).to(torch.float64), layers)
    assert torch.allclose(H, powers @ E, atol=1e-6) and torch.allclose(H[U - 1] * (layers + 1), E[U - 1])
    (gradient,) = torch.autograd.grad((H * g).sum(), E)
    assert torch.allclose(gradient, powers.T @ g, atol=1e-6)


def test_bpr_is_its_formula():
    """-mean log sigmoid(s+ - s-), term by term; the gradient by finite differences."""
    u, p, n = normal(4, D), normal(4, D, seed=1), normal(4, 3, D, seed=2)
    terms = [-math.log(1 / (1 + math.exp(-(float(u[b] @ p[b]) - float(u[b] @ n[b, k]))))) for b in range(4) for k in range(3)]
    assert bpr_loss(u, p, n).item() == pytest.approx(sum(terms) / 12, rel=1e-12)
    assert torch.autograd.gradcheck(bpr_loss, [x.requires_grad_(True) for x in (u, p, n)])


@draws(30)
@given(seed=st.integers(0, 10**6), known=st.sets(st.integers(0, I - 1), min_size=4))
def test_negatives_are_known_and_new_to_the_user(seed, known):
    """Every negative is an item known at the stage that the user has not had; all such items occur."""
    draw = torch.Generator().manual_seed(seed)
    users = torch.arange(3).repeat(40)
    taken = {u: set(sorted(known)[u:u + 2]) for u in range(3)}
    had = torch.tensor(sorted(u * I + i for u in taken for i in taken[u]))
    chosen = sample_negatives(users, 4, torch.tensor(sorted(known)), had, I, draw)
    for u in range(3):
        assert set(chosen[users == u].flatten().tolist()) == known - taken[u]


def test_full_ranks_are_a_loop_over_users():
    """Rank among known items, those had masked, ties to the smaller number; 0 beyond the top, for an unknown target and
    for one already had."""
    H = normal(U + 30, D).float()
    H[U + 3] = H[U + 4]
    known = torch.arange(0, 28)
    asked = Questions(torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([3, 4, 29, 8, 1, 20]),
                      torch.tensor([[0, 0, 3, 1, 5], [5, 9, 8, 7, 2]]))
    liked = (H[:U] @ H[U:U + 28].T).argsort(1, descending=True)
    asked.target[0], asked.target[1], asked.target[4], asked.target[5] = liked[0, 2], liked[1, 8], liked[4, 0], liked[5, 25]
    asked.seen[1, 0], asked.seen[1, 3] = liked[0, 0], liked[1, 3]
    wanted = []
    for k, (u, target) in enumerate(zip(asked.user.tolist(), asked.target.tolist())):
        had = {i for r, i in asked.seen.T.tolist() if r == k}
        order = sorted((i for i in known.tolist() if i not in had), key=lambda i: (-float(H[u] @ H[U + i]), i))
        wanted.append(order[:10].index(target) + 1 if target in order[:10] else 0)
    for batch in (2, 4, 100):
        assert full_ranks(H, U, known, asked, batch=batch).tolist() == wanted
    assert 0 in wanted and max(wanted) > 0


def test_fit_keeps_the_best_epoch_and_stops():
    """What is returned has the best validation Hit@10 of all tried epochs; patience bounds how many are tried."""
    user, item = edges(m=18)
    A, known = adjacency(user, item, U, I), torch.arange(I)
    check = Questions(torch.arange(4), torch.tensor([1, 2, 3, 4]), torch.zeros(2, 0, dtype=torch.long))
    calls = []

    class Count:
        def parameters(self):
            return ()

        def begin_epoch(self, H):
            calls.append(H)

        def __call__(self, H, users, items):
            return H.sum() * 0
    had = torch.unique(user * I + item)
    E = fit(normal(U + I, D).float(), (user, item), A, U, known, had, check,
            (Tower(2, 2, 0.01, 0.0, 8, 100, 3), torch.Generator().manual_seed(0), Count()))
    hit = [(full_ranks(H, U, known, check, top=10) > 0).float().mean() for H in calls]
    assert len(calls) < 100 and (full_ranks(propagate(E, A, 2), U, known, check) > 0).float().mean() >= max(hit[2::2])


def test_who_is_absent_stays():
    """A stage moves the vectors of its users and of known items; a user without an edge in it keeps every bit, weight
    decay or not (inside Adam it would shrink them)."""
    user, item = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 3])
    E, check = normal(U + I, D).float(), Questions(torch.tensor([0]), torch.tensor([4]), torch.zeros(2, 0, dtype=torch.long))
    A, had = adjacency(user, item, U, I), torch.unique(user * I + item)
    after = fit(E, (user, item), A, U, torch.arange(6), had, check,
                (Tower(2, 2, 0.01, 0.1, 2, 6, 3), torch.Generator().manual_seed(0), None))
    moved = (after != E).any(1)
    assert moved[:3].all() and not moved[3:U].any() and not moved[U + 6:].any()


@draws(20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 4))
def test_neighbours_are_sampled_from_the_lists(seed, k):
    """All neighbours of a node with at most k, k of them otherwise, none of anybody else's."""
    user, item = edges(seed)
    links = Neighbours(user.numpy(), U + item.numpy(), U + I)
    place, neighbour = links.sample(torch.arange(U), k, torch.Generator().manual_seed(seed))
    for u in range(U):
        own, drawn = (U + item[user == u]).tolist(), neighbour[place == u].tolist()
        assert len(drawn) == min(k, len(own)) and set(drawn) <= set(own)
        assert len(own) > k or sorted(drawn) == sorted(own)


# -- the regularisers -------------------------------------------------------------------------------

def info_nce_by_hand(x, z, own, w, tau) -> float:
    cos = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
    terms = [w[b] * math.log(math.exp(cos(x[b], z[own[b]]) / tau) / sum(math.exp(cos(x[b], zj) / tau) for zj in z))
             for b in range(len(x))]
    return -sum(map(float, terms)) / len(x)


def test_info_nce_is_its_formula():
    """Value from a double loop, gradient by finite differences, no reference: 0."""
    x, z, own, w = normal(6, D), normal(4, D, seed=1), torch.tensor([0, 1, 2, 3, 3, 0]), normal(6, seed=2).abs()
    assert info_nce(x, z, own, w, 0.5).item() == pytest.approx(info_nce_by_hand(x, z, own, w, 0.5), rel=1e-12)
    assert torch.autograd.gradcheck(lambda z, w: info_nce(x, z, own, w, 0.5), (z.requires_grad_(True), w.requires_grad_(True)))
    assert info_nce(x[:0], z, own[:0], w[:0], 0.5).item() == 0


def test_js_divergence_at_its_limits():
    """0 for no shift, log 2 for a full one, symmetric, and half the sum of the textbook KLs to the middle."""
    p, q = normal(5, 4).softmax(-1), normal(5, 4, seed=1).softmax(-1)
    by_hand = [sum(a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b)) for a, b in zip(x, y)) / 2
               for x, y in zip(p.tolist(), q.tolist())]
    assert torch.allclose(js_divergence(p, q), torch.tensor(by_hand, dtype=torch.float64))
    assert torch.equal(js_divergence(p, p), torch.zeros(5, dtype=torch.float64))
    one, other = torch.tensor([[1.0, 1e-30]]), torch.tensor([[1e-30, 1.0]])
    assert js_divergence(one, other).item() == pytest.approx(math.log(2))


def links_of(pairs: tuple[Tensor, Tensor]) -> tuple[Neighbours, Neighbours]:
    user, item = pairs[0].numpy(), U + pairs[1].numpy()
    return Neighbours(user, item, U + I), Neighbours(item, user, U + I)


def shared(seed: int = 0, strength: float = 2.0, k: int = 50):
    """Everything a regulariser is made from, in float32; the last user and the last two items are new."""
    user, item = edges(seed)
    old = torch.ones(U + I, dtype=torch.bool)
    old[[U - 1, U + I - 2, U + I - 1]] = False
    links = links_of((user, item))
    return normal(U + I, D, seed=seed).float(), links, old, U, strength, 0.5, k, torch.Generator().manual_seed(seed)


def test_contrastive_is_its_four_terms():
    """beta [ I(u_prev, u) + I(i_prev, i) + I(items of u, u) + I(users of i, i) ]: only old nodes of the batch, every
    neighbour once."""
    prev, links, old, *rest = shared()
    H, user, item = normal(U + I, D, seed=9).float(), torch.tensor([0, 3, 3, U - 1]), torch.tensor([2, 5, I - 1, 2])
    got = Contrastive(prev, links, old, *rest)(H, user, item)
    us, is_ = torch.tensor([0, 3]), U + torch.tensor([2, 5])
    eu, ei = edges()
    total = info_nce_by_hand(prev[us], H[us], [0, 1], [1.0] * 2, 0.5) + info_nce_by_hand(prev[is_], H[is_], [0, 1], [1.0] * 2, 0.5)
    near = [(k, U + int(i)) for k, u in enumerate(us.tolist()) for i in ei[eu == u]]
    total += info_nce_by_hand(prev[[b for _, b in near]], H[us], [k for k, _ in near], [1.0] * len(near), 0.5)
    near = [(k, int(u)) for k, i in enumerate((is_ - U).tolist()) for u in eu[ei == i]]
    total += info_nce_by_hand(prev[[b for _, b in near]], H[is_], [k for k, _ in near], [1.0] * len(near), 0.5)
    assert got.item() == pytest.approx(2.0 * total, rel=1e-5)


def test_piw_without_a_shift_weighs_every_user_alike():
    """No shift: delta = 0, one weight softplus(MLP(0)) for all; a shifted user's differs. The weights learn."""
    piw = PIW(*shared(), clusters=4)
    with torch.no_grad():
        piw.bias[0].add_(0.1)
    piw.begin_epoch(piw.prev)
    same = piw.weights(piw.prev, torch.arange(5))
    at_zero = torch.nn.functional.softplus(torch.relu(piw.bias[0]) @ piw.mlp[1][0] + piw.bias[1])
    assert torch.allclose(same, at_zero.expand(5))
    H = piw.prev.clone()
    H[2] = -3 * H[2]
    w = piw.weights(H, torch.arange(5))
    assert torch.allclose(w[[0, 1, 3, 4]], same[:4]) and not torch.isclose(w[2], same[2])
    loss = piw(H.requires_grad_(True), torch.arange(5), torch.arange(5))
    gradients = torch.autograd.grad(loss, list(piw.parameters()))
    assert any(g.abs().sum() > 0 for g in gradients)


def pisa(**changes) -> PISA:
    more = dict(next_model=normal(U + I, D, seed=5).float(), next_links=links_of(edges(3))[0], clusters=3,
                share=0.5) | changes
    return PISA(*shared(), **more)


def test_pisa_weights_at_their_limits():
    """No shift: w = 1/2 for everybody on both sides. One user shifts: it leads w+ and has no w-. share 1 keeps all."""
    both = pisa(share=1.0)
    both.begin_epoch(both.prev)
    plus, minus = both.split(both.prev, torch.arange(6))
    assert torch.equal(plus, torch.full((6,), 0.5)) and torch.equal(minus, torch.full((6,), 0.5))
    H = both.prev.clone()
    H[4] = -50 * H[4]
    plus, minus = both.split(H, torch.arange(6))
    assert plus.argmax() == 4 and torch.allclose(plus + minus, torch.ones(6))
    few = pisa(share=0.1)
    few.centres = both.centres
    plus, minus = few.split(H, torch.arange(6))
    assert plus.nonzero().flatten().tolist() == [4] and minus[4] == 0


def test_largest_keeps_the_largest_share():
    w = torch.tensor([0.1, 0.5, 0.3, 0.9, 0.7])
    assert largest(w, 0.4).tolist() == pytest.approx([0, 0, 0, 0.9, 0.7]) and torch.equal(largest(w, 1.0), w)


def test_pisa_is_its_four_terms():
    """alpha [ I(u_next, u; w+) + I(items_next of u now, u; w+) + I(u_prev, u; w-) + I(items_prev of u, u; w-) ]; a new user
    has only the second, with weight 1/2."""
    model = pisa()
    H, user = normal(U + I, D, seed=9).float(), torch.tensor([0, 3, 2, U - 1])
    model.begin_epoch(H)
    got = model(H, user, torch.tensor([1, 1, 1, 1]))
    us, everyone = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 3, U - 1])
    plus, minus = (w.tolist() for w in model.split(H, us))
    total = info_nce_by_hand(model.next[us], H[us], [0, 1, 2], plus, 0.5) + info_nce_by_hand(
        model.prev[us], H[us], [0, 1, 2], minus, 0.5)
    for reference, (eu, ei), nodes, w in ((model.prev, edges(), us, minus), (model.next, edges(3), everyone, [*plus, 0.5])):
        near = [(k, U + int(i)) for k, u in enumerate(nodes.tolist()) for i in ei[eu == u]]
        total += info_nce_by_hand(reference[[b for _, b in near]], H[nodes], [k for k, _ in near], [w[k] for k, _ in near], 0.5)
    assert got.item() == pytest.approx(2.0 * total, rel=1e-4)


# -- the whole --------------------------------------------------------------------------------------

TOWER = dict(tower_width=8, tower_batch=64, tower_epochs=4, tower_patience=2)
ALL = ["lightgcn-pretrain", "lightgcn-finetune", "lightgcn-contrastive", "lightgcn-piw", "lightgcn-pisa"]


def towers(out, **changes) -> dict[str, dict]:
    run(micro(out, method="lightgcn-pisa", compare=",".join(ALL), **TOWER | changes))
    return {name: report.load(out if name == "lightgcn-pisa" else out / name)[1] for name in ALL}


def test_a_run_of_two_towers_needs_no_language_model(tmp_path, monkeypatch):
    """train.py --method lightgcn-pisa: stages, ranks and results as always, seeded; no base, no semantic IDs; the
    methods part at D_2 and share D_1."""
    monkeypatch.setattr(train, "set_up", lambda cfg: pytest.fail("an LLM was set up"))
    found, again = towers(tmp_path / "a"), towers(tmp_path / "b")
    for name in ALL:
        assert list(found[name]) == ["1", "2", "3"] and all(torch.equal(found[name][t], again[name][t]) for t in "123")
        assert torch.equal(found[name]["1"], found["lightgcn-pretrain"]["1"])
        assert len(report.load(tmp_path / "a")[1]["2"]) == len(found[name]["2"])
    assert not (tmp_path / "a" / "semantic_ids.json").exists()


PROVED = [
    ("tower_width", 12, ALL), ("tower_init", 0.5, ALL), ("tower_layers", 1, ALL), ("tower_negatives", 2, ALL), ("tower_lr", 0.2, ALL),
    ("tower_weight_decay", 3.0, ALL), ("tower_batch", 16, ALL), ("tower_epochs", 1, None), ("tower_patience", 1, None),
    ("contrast", 50.0, ALL[2:4]), ("pisa_alpha", 50.0, ALL[4:]), ("tower_tau", 0.05, ALL[2:]),
    ("tower_neighbours", 1, ALL[2:]), ("tower_clusters", 2, ALL[3:]), ("tower_share", 1.0, ALL[4:])]
TOWER_FIELDS = [field for field, *_ in PROVED]


@pytest.mark.parametrize("field, value, methods", PROVED)
def test_every_tower_setting_is_alive(field, value, methods, tmp_path, monkeypatch):
    """Another value changes the embeddings of the methods that it concerns, and of no other."""
    seen: dict[str, list[Tensor]] = {}

    def spy(E, *rest):
        kept.append(fit(E, *rest))
        return kept[-1]
    monkeypatch.setattr(twotower, "fit", spy)
    for side, changes in (("before", {}), ("after", {field: value})):
        cfg = micro(tmp_path / side, **TOWER | dict(tower_lr=0.05, contrast=5.0, pisa_alpha=5.0, tower_epochs=12) | changes)
        data, _ = train_load(cfg)
        kept: list[Tensor] = []
        models = twotower.TwoTowers(data.stages, data.known, len(data.keys), cfg)
        first = models.first[0]
        for name in ALL:
            kept = [first]
            models.learn(name)
            seen.setdefault(name, []).append(kept[-1])
    moved = [name for name, (a, b) in seen.items() if a.shape != b.shape or not torch.equal(a, b)]
    assert moved == methods if methods else moved, moved


def train_load(cfg):
    import contextlib
    import io

    from minipeso.runs.run import load
    with contextlib.redirect_stdout(io.StringIO()):
        return load(cfg)


def test_a_two_tower_model_learns(tmp_path):
    """On the drifting world: above popularity on D_1, and fine-tuning above pretrain on the later stages."""
    cfg = config.resolve(dict(out=str(tmp_path), world_users=600, method="lightgcn-finetune", tower_epochs=60,
                              tower_patience=8))
    data, _ = train_load(cfg)
    models = twotower.TwoTowers(data.stages, data.known, len(data.keys), cfg)
    ranks = {name: models.learn(name) for name in ALL[:2]}
    from minipeso.evaluate import reference_hits
    popular = reference_hits(data.stages, data.known)["1"]["popularity"]
    assert hit_at(ranks["lightgcn-finetune"]["1"], 10) > popular
    later = [sum(hit_at(ranks[name][t], 10) for t in "2345") / 4 for name in ALL[:2]]
    assert later[1] > later[0] + 0.05, later


def test_nothing_of_the_future_is_used():
    """Other test items change no training: graph, negatives, the epoch kept and so every vector of D_1 are the same."""
    base = {u: [u % 5, u % 5 + 1, 6, 7 + u % 2, 8 - u % 2] for u in range(6)}
    other = {u: [*items[:-1], (items[-1] + 1) % 9] for u, items in base.items()}
    cfg = config.resolve(dict(method="lightgcn-finetune", tower_epochs=2, tower_width=4))
    kept = [twotower.TwoTowers([Stage(1, {u: [] for u in first}, first)], [list(range(9))], 9, cfg).first[0]
            for first in (base, other)]
    assert torch.equal(*kept)


def test_methods_do_not_depend_on_their_order(tmp_path):
    """Each goes on from the same model and the same state of the generator after D_1."""
    cfg = micro(tmp_path, **TOWER)
    data, _ = train_load(cfg)
    alone = twotower.TwoTowers(data.stages, data.known, len(data.keys), cfg).learn("lightgcn-pisa")
    models = twotower.TwoTowers(data.stages, data.known, len(data.keys), cfg)
    after = [models.learn(name) for name in ALL][-1]
    assert all(torch.equal(alone[t], after[t]) for t in alone)
