"""Two-tower baselines: propagation as dense matrices, every loss as its written formula, weights at their limits."""
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from minipeso.config import Config
from minipeso.evaluate import reference_hits
from minipeso.files.reviews import read_reviews
from minipeso.metrics import hit_at
from minipeso.rivals import twotower
from minipeso.rivals.lightgcn import (Free, Lesson, Links, Questions, Settings, bpr_loss, fit, full_ranks, propagate,
                                      sample_negatives)
from minipeso.rivals.pisa import PISA, PIW, Contrastive, info_nce, js_divergence
from minipeso.stages import Stage, cut
from minipeso.synthetic import write_world
from tests.conftest import draws
from tests.micro import fingerprint, micro, run

U, I, D = 7, 9, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edges(seed: int = 0, m: int = 20) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, U - 1, (m,), generator=draw), torch.randint(0, I - 1, (m,), generator=draw)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_propagation_is_the_mean_of_dense_powers(layers):
    """Value and gradient: (I + A + ... + A^layers) E / (layers + 1), by matrix powers of the dense D^-1/2 A D^-1/2."""
    A, E = torch.zeros(U + I, U + I, dtype=torch.float64), normal(U + I, D).requires_grad_(True)
    for u, i in zip(*edges()):
        A[u, U + i] = A[U + i, u] = 1.0  # the last user and item have no edge
    degree = A.sum(1).clamp(min=1)
    A = A / (degree[:, None] * degree).sqrt()
    powers = sum(torch.linalg.matrix_power(A, k) for k in range(layers + 1)) / (layers + 1)
    g = normal(U + I, D, seed=1)
    H = propagate(E, Links(*edges(), U, I).A.to(torch.float64), layers)
    assert torch.allclose(H, powers @ E, atol=1e-6) and torch.allclose(H[U - 1] * (layers + 1), E[U - 1])
    (gradient,) = torch.autograd.grad((H * g).sum(), E)
    assert torch.allclose(gradient, powers.T @ g, atol=1e-6)


def info_nce_by_hand(x, z, own, w, tau) -> float:
    cos = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
    score = [[math.exp(cos(xb, zj) / tau) for zj in z] for xb in x]
    return -sum(float(w[b]) * math.log(score[b][own[b]] / sum(score[b])) for b in range(len(x))) / max(len(x), 1)


def test_losses_are_their_formulas():
    """-mean log sigmoid(s+ - s-) and InfoNCE term by term, gradients by finite differences, no reference: 0. JS: 0 for
    no shift, log 2 for a full one, half the sum of the textbook KLs to the middle."""
    u, p, n = normal(4, D), normal(4, D, seed=1), normal(4, 3, D, seed=2)
    terms = [math.log1p(math.exp(float(u[b] @ n[b, k]) - float(u[b] @ p[b]))) for b in range(4) for k in range(3)]
    assert bpr_loss(u, p, n).item() == pytest.approx(sum(terms) / 12, rel=1e-12)
    assert torch.autograd.gradcheck(bpr_loss, [x.requires_grad_(True) for x in (u, p, n)])
    x, z, own, w = normal(6, D), normal(4, D, seed=1), torch.tensor([0, 1, 2, 3, 3, 0]), normal(6, seed=2).abs()
    assert info_nce(x, z, own, w, 0.5).item() == pytest.approx(info_nce_by_hand(x, z, own, w, 0.5), rel=1e-12)
    assert torch.autograd.gradcheck(lambda z, w: info_nce(x, z, own, w, 0.5), (z.requires_grad_(), w.requires_grad_()))
    assert info_nce(x[:0], z, own[:0], w[:0], 0.5).item() == 0
    p, q = normal(5, 4).softmax(-1), normal(5, 4, seed=1).softmax(-1)
    by_hand = [sum(a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b)) for a, b in zip(x, y)) / 2
               for x, y in zip(p.tolist(), q.tolist())]
    assert js_divergence(p, q).tolist() == pytest.approx(by_hand) and not js_divergence(p, p).any()
    assert js_divergence(torch.tensor([1.0, 1e-30]), torch.tensor([1e-30, 1.0])).item() == pytest.approx(math.log(2))


@draws(30)
@given(seed=st.integers(0, 10**6), known=st.sets(st.integers(0, I - 1), min_size=4))
def test_negatives_are_known_and_new_to_the_user(seed, known):
    """Every negative is an item known at the stage that the user has not had; all such items occur."""
    users, draw = torch.arange(3).repeat(40), torch.Generator().manual_seed(seed)
    taken = {u: set(sorted(known)[u:u + 2]) for u in range(3)}
    had = torch.tensor(sorted(u * I + i for u in taken for i in taken[u]))
    chosen = sample_negatives(users, 4, torch.tensor(sorted(known)), had, I, draw)
    for u in range(3):
        assert set(chosen[users == u].flatten().tolist()) == known - taken[u]


@draws(20)
@given(seed=st.integers(0, 10**6))
def test_full_ranks_are_a_loop_over_users(seed):
    """Among known items less those had, ties to the smaller number; 0 beyond ten, if unknown and if already had."""
    draw, wanted = np.random.default_rng(seed), []
    H, known = torch.from_numpy(draw.integers(-2, 3, (U + 30, 3))).float(), sorted(draw.permutation(30)[:25].tolist())
    user, target, seen = draw.integers(U, size=9), draw.integers(30, size=9), draw.integers([[9], [30]], size=(2, 40))
    for k in range(9):
        score = {i: float(H[user[k]] @ H[U + i]) for i in known if i not in seen[1, seen[0] == k]}
        order = sorted(score, key=lambda i: (-score[i], i))[:10]
        wanted.append(order.index(target[k]) + 1 if target[k] in order else 0)
    asked = Questions(*map(torch.from_numpy, (user, target, seen)))
    for batch in (2, 4, 100):
        assert full_ranks(H, U, torch.tensor(known), asked, batch=batch).tolist() == wanted


def lesson(user: Tensor, item: Tensor, known: int) -> Lesson:
    check = Questions(torch.arange(4), torch.tensor([1, 2, 3, 4]), torch.zeros(2, 0, dtype=torch.long))
    return Lesson(user, item, Links(user, item, U, I), torch.arange(known), torch.unique(user * I + item), check)


def test_fit_keeps_the_best_epoch_and_stops_and_who_is_absent_stays():
    """Returned is the best validation Hit@10 of all tried epochs; patience bounds how many are tried. A user without an
    edge in the stage keeps every bit; weight decay inside Adam would shrink them."""
    calls, task = [], lesson(*edges(m=18), I)
    s = Settings(tower_negatives=2, tower_weight_decay=0.0, tower_batch=8, tower_epochs=100, tower_patience=3)
    watcher = Free()
    watcher.begin_epoch = calls.append
    E = fit(normal(U + I, D).float(), task, s, torch.Generator().manual_seed(0), watcher)
    hit = [hit_at(full_ranks(H, U, task.known, task.check), 10) for H in (*calls[2::2], propagate(E, task.links.A, 2))]
    assert len(calls) < 100 and hit[-1] >= max(hit)
    E, task = normal(U + I, D).float(), lesson(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 3]), 6)
    s = Settings(tower_negatives=2, tower_weight_decay=0.1, tower_batch=2, tower_epochs=6, tower_patience=3)
    moved = (fit(E, task, s, torch.Generator().manual_seed(0)) != E).any(1)
    assert moved[:3].all() and not moved[3:U].any() and not moved[U + 6:].any()


@draws(20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 4))
def test_neighbours_are_sampled_from_the_lists(seed, k):
    """All neighbours of a node with at most k, k of them otherwise, none of anybody else's."""
    (user, item), draw = edges(seed), torch.Generator().manual_seed(seed)
    nodes = torch.cat([torch.arange(U), U + item[:1]])
    place, neighbour = Links(user, item, U, I).sample(nodes, k, draw)
    for u, node in enumerate(nodes.tolist()):
        own = {*(U + item[user == node]).tolist(), *user[U + item == node].tolist()}
        drawn = neighbour[place == u].tolist()
        assert len(drawn) == min(k, len(own)) and set(drawn) <= own and (len(own) > k or set(drawn) == own)


SETTINGS = Settings(contrast=2.0, pisa_alpha=2.0, tower_neighbours=50, tower_clusters=3, tower_share=0.5)


def held(s: Settings = SETTINGS):
    """Everything a regulariser is made from, in float32; the last user and the last two items are new."""
    old = torch.ones(U + I, dtype=torch.bool)
    old[[U - 1, U + I - 2, U + I - 1]] = False
    return normal(U + I, D).float(), Links(*edges(), U, I), old, s, torch.Generator().manual_seed(0)


def near_by_hand(reference: Tensor, H: Tensor, nodes: Tensor, w: list[float], pairs: tuple[Tensor, Tensor]) -> float:
    """I(neighbours of a node, the node; w), every neighbour once, by loops over the edges."""
    both = {(int(a), int(b)) for u, i in zip(*pairs) for a, b in ((u, U + i), (U + i, u))}
    near = [(k, b, w[k]) for k, node in enumerate(nodes.tolist()) for a, b in sorted(both) if a == node]
    own, neighbour, weight = zip(*near) if near else ((), (), ())
    return info_nce_by_hand(reference[list(neighbour)], H[nodes], own, weight, 0.5)


def test_contrastive_is_its_four_terms():
    """beta [ I(u_prev, u) + I(i_prev, i) + I(items of u, u) + I(users of i, i) ]: only old nodes of the batch."""
    prev, H = held()[0], normal(U + I, D, seed=9).float()
    got = Contrastive(*held())(H, torch.tensor([0, 3, 3, U - 1]), torch.tensor([2, 5, I - 1, 2]))
    total, ones = 0.0, [1.0, 1.0]
    for nodes in (torch.tensor([0, 3]), U + torch.tensor([2, 5])):
        total += info_nce_by_hand(prev[nodes], H[nodes], [0, 1], ones, .5) + near_by_hand(prev, H, nodes, ones, edges())
    assert got.item() == pytest.approx(2.0 * total, rel=1e-5)


def test_piw_without_a_shift_weighs_every_user_alike():
    """No shift: delta = 0, one weight softplus(MLP(0)) for all; a shifted user's differs. The weights learn."""
    piw = PIW(*held())
    with torch.no_grad():
        piw.bias[0].add_(0.1)
    piw.begin_epoch(piw.prev)
    same = piw.weights(piw.prev, torch.arange(5))
    without = torch.nn.functional.softplus(torch.relu(piw.bias[0]) @ piw.mlp[1][0] + piw.bias[1])
    assert torch.allclose(same, without.expand(5))
    H = piw.prev * torch.tensor([1.0, 1.0, -3.0] + [1.0] * (U + I - 3))[:, None]
    w = piw.weights(H, torch.arange(5))
    assert torch.allclose(w[[0, 1, 3, 4]], same[:4]) and not torch.isclose(w[2], same[2])
    learnt = lambda: torch.autograd.grad(piw(H, torch.arange(5), torch.arange(5)), piw.parameters())  # noqa: E731
    whole, piw.s = learnt(), Settings(contrast=2.0, tower_neighbours=0)  # neighbours give the weights no gradient
    assert all(torch.equal(a, b) for a, b in zip(whole, learnt())) and any(g.any() for g in whole)


NEXT = torch.cat([torch.stack(edges(3)), torch.tensor([[U - 1, U - 1], [0, I - 1]])], 1)  # the new user is there


def pisa(**changes) -> PISA:
    return PISA(*held(dataclasses.replace(SETTINGS, **changes)), next_model=normal(U + I, D, seed=5).float(),
                next_links=Links(*NEXT, U, I))


def test_pisa_weights_at_their_limits():
    """No shift: w = 1/2 for everybody on both sides. One user shifts: it leads w+ and has no w-. share 1 keeps all."""
    both = pisa(tower_share=1.0)
    both.begin_epoch(both.prev)
    assert all(torch.equal(w, torch.full((6,), 0.5)) for w in both.split(both.prev, torch.arange(6)))
    H = both.prev.clone()
    H[4] *= -50
    plus, minus = both.split(H, torch.arange(6))
    assert plus.argmax() == 4 and torch.allclose(plus + minus, torch.ones(6))
    few = pisa(tower_share=0.1)
    few.centres = both.centres
    plus, minus = few.split(H, torch.arange(6))
    assert plus.nonzero().flatten().tolist() == [4] and minus[4] == 0


@pytest.mark.parametrize("users", [[0, 3, 2, U - 1], [U - 1]])
def test_pisa_is_its_four_terms(users):
    """I(u_next, u; w+) + I(items_next, u; w+) + I(u_prev, u; w-) + I(items_prev, u; w-); newcomers: 2nd, w+ = 1/2."""
    model, H = pisa(), normal(U + I, D, seed=9).float()
    model.begin_epoch(H)
    got = model(leaf := H.clone().requires_grad_(True), torch.tensor(users), torch.ones(len(users), dtype=torch.long))
    us, everyone = torch.tensor(sorted({*users} - {U - 1}), dtype=torch.long), torch.tensor(sorted(users))
    plus, minus = (w.tolist() for w in model.split(H, us))
    own = range(len(us))
    total = sum(info_nce_by_hand(x[us], H[us], own, w, 0.5) for x, w in ((model.next, plus), (model.prev, minus)))
    total += near_by_hand(model.prev, H, us, minus, edges()) + near_by_hand(model.next, H, everyone, [*plus, 0.5], NEXT)
    assert got.item() == pytest.approx(2.0 * total, rel=1e-4) and torch.autograd.grad(got, leaf)[0].isfinite().all()


ALL = ["lightgcn-pretrain", "lightgcn-finetune", "lightgcn-contrastive", "lightgcn-piw", "lightgcn-pisa"]
TOWER = dict(tower_width=8, tower_batch=64, tower_epochs=4, tower_patience=2)


def world(folder: Path, users: int, items: int, stages: int, **rivals) -> SimpleNamespace:
    """All that a method asks of a run: the drifting world's stages, and a finished phase from memory."""
    events, kept, cfg = read_reviews(write_world(folder, users, items)), {}, Config(rivals=rivals)
    stages = cut(events, stages=stages)
    known = [sorted(set().union(*(s.items for s in stages[:t]))) for t in range(1, len(stages) + 1)]
    once = lambda phase, compute: kept.get(phase) or kept.setdefault(phase, compute())  # noqa: E731
    return SimpleNamespace(stages=stages, known=known, n_items=len(events.items), cfg=cfg, once=once, kept=kept)


def test_methods_share_the_model_of_d1_and_do_not_depend_on_their_order(tmp_path):
    """Each goes on from the same model and state of the generator, learnt or read; they part at D_2."""
    one, other = (world(tmp_path, 60, 60, 3, **TOWER) for _ in range(2))
    ranks, alone = {name: twotower.learn(one, name) for name in ALL}, twotower.learn(other, "lightgcn-pisa")
    assert list(one.kept) == ["towers-first"] and list(alone) == ["1", "2", "3"]
    assert all(torch.equal(alone[t], ranks["lightgcn-pisa"][t]) for t in alone)
    assert all(torch.equal(r["1"], alone["1"]) and len(r["2"]) == len(one.stages[1].users) for r in ranks.values())
    assert len({str([r["2"].tolist(), r["3"].tolist()]) for r in ranks.values()}) == 5


def test_a_run_of_two_towers_needs_no_language_model(tmp_path):
    """train.py --method lightgcn-pisa: stages, ranks and results as always, seeded; no base, no semantic IDs."""
    for out in (tmp_path / "a", tmp_path / "b"):
        run(micro(out, method="lightgcn-pisa", compare=",".join(ALL), rivals=TOWER))
    kept = fingerprint(tmp_path / "a")
    assert kept == fingerprint(tmp_path / "b") and not (tmp_path / "a" / "semantic_ids.json").exists()
    assert all(list(kept[f"{folder}results.json"]["stages"]) == ["1", "2", "3"] for folder in ("", "lightgcn-piw/"))


PROVED = [
    ("tower_width", 12, ALL), ("tower_init", 0.5, ALL), ("tower_layers", 1, ALL), ("tower_negatives", 2, ALL),
    ("tower_lr", 0.2, ALL), ("tower_weight_decay", 3.0, ALL), ("tower_batch", 16, ALL), ("tower_epochs", 1, None),
    ("tower_patience", 1, None), ("tower_tau", .05, ALL[2:]), ("contrast", 50.0, ALL[2:4]), ("tower_share", 1, ALL[4:]),
    ("pisa_alpha", 50.0, ALL[4:]), ("tower_neighbours", 1, ALL[2:]), ("tower_clusters", 2, ALL[3:])]


@pytest.mark.parametrize("field, value, methods", PROVED)
def test_every_tower_setting_is_alive(field, value, methods, tmp_path, monkeypatch):
    """Another value changes the embeddings of the methods that it concerns, and of no other; no setting is left out."""
    assert {name for name, *_ in PROVED} == {f.name for f in dataclasses.fields(Settings)}
    ends, kept, base = [], [], TOWER | dict(tower_lr=0.05, contrast=5.0, pisa_alpha=5.0, tower_epochs=12)
    monkeypatch.setattr(twotower, "fit", lambda *task: kept.append(fit(*task)) or kept[-1])
    for changes in ({}, {field: value}):
        now = world(tmp_path, 60, 60, 3, **base | changes)
        ends.append({name: twotower.learn(now, name) and kept[-1] for name in ALL})  # pretrain's is that of D_1
    moved = [name for name in ALL if not torch.equal(ends[0][name], ends[1][name])]
    assert moved == methods if methods else moved, moved


def test_nothing_of_the_future_is_used():
    """Other validation and test items change no training: graph, negatives and so every vector of D_1 are the same."""
    base = {u: [u % 5, u % 5 + 1, 6, 7 + u % 2, 8 - u % 2] for u in range(6)}
    other = {u: [*items[:-2], *((i + 1) % 9 for i in items[-2:])] for u, items in base.items()}
    cfg = Config(rivals=dict(tower_epochs=2, tower_width=4))
    kept = [twotower.TwoTowers([Stage(1, {u: [] for u in carts}, carts)], [list(range(9))], 9, cfg).first()["E"]
            for carts in (base, other)]
    assert torch.equal(*kept)


def test_a_two_tower_model_learns(tmp_path):
    """On the drifting world: above popularity on D_1, and fine-tuning above pretrain on the later stages."""
    now = world(tmp_path, 600, 600, 5, tower_epochs=60, tower_patience=8)
    ranks = {name: twotower.learn(now, name) for name in ALL[:2]}
    assert hit_at(ranks["lightgcn-finetune"]["1"], 10) > reference_hits(now.stages, now.known)["1"]["popularity"]
    later = [sum(hit_at(ranks[name][t], 10) for t in "2345") / 4 for name in ALL[:2]]
    assert later[1] > later[0] + 0.05, later
