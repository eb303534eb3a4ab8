"""docs/peso_in_one_file.py, which imports nothing from the package, computes what the package computes."""
import ast
import runpy
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from minipeso import theory
from minipeso.lora import LoRALinear
from minipeso.objective import anchored
from minipeso.proximal import proximal_term, softmax_kl

PATH = Path(__file__).parents[1] / "docs" / "peso_in_one_file.py"
one = SimpleNamespace(**runpy.run_path(PATH))


def test_it_is_one_file():
    """250 lines at most, torch and the standard library alone."""
    text = PATH.read_text()
    tops = {node.names[0].name if isinstance(node, ast.Import) else node.module.split(".")[0]
            for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert len(text.splitlines()) <= 250 and tops == {"argparse", "math", "torch"}


def test_its_loss_is_the_packages_and_trains_to_the_same_adapter():
    """One stage, learnt by the file's vector v and by LoRALinear with proximal_term: Eq. 3, Eq. 12 and the minimum."""
    world, linear = one.World(0, 0.5), torch.nn.Linear(one.FEATURES, one.ITEMS, bias=False)
    world.W_0 = world.normal(*world.W_0.shape)
    users, v_prev = world.come(1)[:40], one.new_adapter(world.random) + 0.3
    x, y = world.x[users], world.take(users)
    linear.weight.data = world.W_0
    layer = LoRALinear(linear, one.RANK, one.SCALE * one.RANK).double()
    layer.A.data, layer.B.data = (M.clone() for M in one.factors(v_prev))
    layer.anchor()

    def loss() -> torch.Tensor:
        return F.cross_entropy(layer(x), y) + 3 * proximal_term(anchored(layer), softmax_kl)
    optimiser = torch.optim.LBFGS([layer.A, layer.B], max_iter=40, history_size=20, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-10, tolerance_change=1e-14)
    optimiser.step(lambda: (optimiser.zero_grad(), (value := loss()).backward(), value)[-1])
    v = one.learn(world, users, y, v_prev, 3.0)
    assert (v - v_prev).norm() > 0.5
    torch.testing.assert_close(v, torch.cat([layer.A.flatten(), layer.B.flatten()]).detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.stage_loss(v, v_prev, x, y, world.W_0, 3.0), loss().detach(), rtol=1e-7, atol=0)
    for step in (1e-5, 0.1, 5.0):
        torch.testing.assert_close(one.softmax_kl(v_prev + step * v, v_prev), softmax_kl(v_prev + step * v, v_prev))


def test_its_proposition_1_is_theory_pys():
    """Directions and weights are the package's; Eq. 10 holds on a measured stage to the digits shown."""
    M = torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = theory.softmax_metric(M[0])
    for a, b in zip(one.directions(M @ M.T, H), theory.generalised_eigen(M @ M.T, H)):
        torch.testing.assert_close(a.abs(), b.abs(), rtol=1e-6, atol=1e-8)  # a direction's sign is free
    rho, whole, quadratic, trained = one.one_stage(0, 1.0)
    assert (quadratic - theory.interpolation(rho, 1.0) * whole).norm() < 2e-3 * whole.norm()
    assert (trained - quadratic).norm() < 0.25 * whole.norm(), "the real loss and term are nearly quadratic"


def test_it_shows_forgetting_the_anchor_and_an_interior_best_lambda():
    """In either of two worlds: no anchor forgets those who stay away, no adaptation fails those present."""
    for present, away, moved in (one.live(seed, 0.5).T for seed in range(2)):
        both = (present + away) / 2
        best = one.LAMBDAS[int(both.argmin())]
        assert best not in (0, one.LAMBDAS[-1]) and both.min() < 0.8 * min(both[0], both[-1])
        assert away[0] > 3 * away[-1] and present[-1] > 2 * present[0] and moved[0] > 3 * moved[-2] > moved[-1] == 0
