"""The regularisers of Figure 2 and Eq. 6's quadratic on a whole model: what the shipped objective adds to cross-entropy."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from minipeso import continual
from minipeso.continual import METHODS
from minipeso.lora import adapter_parameters, adapters, watching
from minipeso.objective import anchored, answer_loss, stage_loss
from minipeso.proximal import PROXIMALS
from minipeso.runs.run import Run
from minipeso.stages import examples
from minipeso.theory import block_metric, proximal_minimiser
from minipeso.tokens import collate, sequences
from tests.micro import micro, set_up
from tests.reference import textbook_softmax_kl

SILENT = lambda record: None  # noqa: E731


@pytest.fixture
def anchored_run(tmp_path) -> Run:
    """As stage 2 begins, in float64, without dropout."""
    now = set_up(micro(tmp_path, dropout=0.0))
    continual.learn_first(now.model, now.data.stages[:1], now.template, now.cfg, SILENT)
    now.model.double()
    for _, layer in adapters(now.model):
        layer.advance()
    return now


def shaken(now: Run, size: float = 0.1) -> Run:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapter_parameters(now.model):
            p.add_(size * torch.randn(p.shape, generator=draw))
    return now


def pairs_of(now: Run, n: int = 9):
    return examples(now.data.stages[1], "train", now.cfg.window)[:n]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_output_kl_is_the_textbook_kl_token_by_token(anchored_run, reduction):
    """For every layer and every real token: KL(softmax(s B A x) || softmax(s B_prev A_prev x)) from lists of numbers, with
    the x of this very model, one row at a time; a mean over tokens, then the sum or mean over layers. The cross-entropy
    is untouched."""
    now = shaken(anchored_run, 0.3)
    now.model.eval()
    data = sequences(pairs_of(now), now.template)
    assert len({len(row.ids) for row in data}) > 1, "some row must be padded"
    loss = stage_loss(now.model, collate(data), "output-kl", 3.0, 1.0, "module", reduction)
    inputs: dict[str, list[Tensor]] = {}
    with watching(now.model, lambda name, layer, x: inputs.setdefault(name, []).append(x[0])), torch.no_grad():
        for row in data:
            now.model.model(torch.tensor(row.ids)[None])
    layers = dict(adapters(now.model))
    total = 0.0
    for name, seen in inputs.items():
        layer, x = layers[name], torch.cat(seen).detach()
        y, y_prev = (layer.scale * x @ A.detach().T @ B.detach().T for A, B in
                     ((layer.A, layer.B), (layer.A_prev, layer.B_prev)))
        total += sum(textbook_softmax_kl(a, b)[0] for a, b in zip(y.tolist(), y_prev.tolist())) / len(x)
    total /= len(layers) if reduction == "mean" else 1
    assert loss.prox.item() == pytest.approx(total, rel=1e-4) and total > 1e-4
    assert loss.ce.item() == pytest.approx(answer_loss(now.model, collate(data)).item(), rel=1e-12)
    assert loss.total.item() == pytest.approx(loss.ce.item() + 3 * loss.prox.item(), rel=1e-12)


@pytest.mark.parametrize("penalty", ["output-kl", "quadratic", "kl", "l2", "rank-kl"])
def test_at_the_anchor_nothing_pulls(anchored_run, penalty):
    """Value and gradient of every proximal penalty are 0 where the stage starts; a step away they are not."""
    now = anchored_run
    for step in (False, True):
        if step:
            shaken(now)
        prox = stage_loss(now.model, collate(sequences(pairs_of(now), now.template)), penalty, 1.0).prox
        pull = torch.autograd.grad(prox, adapter_parameters(now.model))
        assert (prox.item() > 1e-9) == step and any(g.abs().max() > 1e-12 for g in pull) == step, prox


def test_watching_sees_every_input_and_leaves_nothing_behind(anchored_run):
    """One call a layer and forward, with the layer's own input; after the block, no hook is left, even if it failed."""
    now, seen = anchored_run, []
    ids = torch.arange(5)[None]
    with pytest.raises(RuntimeError, match="on purpose"):
        with watching(now.model, lambda name, layer, x: seen.append((name, x.shape[-1] == layer.A.shape[1]))):
            now.model.model(ids)
            raise RuntimeError("on purpose")
    assert seen == [(name, True) for name, _ in adapters(now.model)]
    now.model.model(ids)
    assert len(seen) == len(list(adapters(now.model)))


def tangent_features(now: Run, n: int) -> Tensor:
    """Phi(x) (n, m) of Eq. 7: the gradient of the true next token's logit in the adapter, a pair a row."""
    features = []
    for example in pairs_of(now, n):
        prompt, first = now.template.prompt(example.history), now.template.answer(example.target)[0]
        logit = now.model(prompt[None])[0, -1, first].double()
        features.append(torch.cat([g.flatten() for g in torch.autograd.grad(logit, adapter_parameters(now.model))]))
    return torch.stack(features).double()


@pytest.mark.parametrize("lam", [0.5, 30.0])
def test_proposition_1_on_a_real_model(anchored_run, lam):
    """Sigma from a trained Llama's tangent features (Eq. 8), H from its adapter (Prop. 3): at Eq. 28's minimiser the
    gradient of the *shipped* quadratic penalty, taken on the model's own matrices, cancels the data term's; and the
    objective there is below its value at the anchor and at the new optimum."""
    now = anchored_run
    now.model.eval()
    v = adapter_parameters(now.model)
    Phi = tangent_features(now, 40)
    Sigma, v_prev = Phi.T @ Phi / len(Phi), torch.cat([p.detach().flatten() for p in v]).double()
    v_star = v_prev + 0.1 * torch.randn(len(v_prev), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    groups = [torch.cat([layer.A_prev.flatten(), layer.B_prev.flatten()]) for _, layer in adapters(now.model)]
    best = proximal_minimiser(Sigma, block_metric(groups), v_star, v_prev, lam)

    def objective(at: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for p, part in zip(v, at.split([p.numel() for p in v])):
                p.copy_(part.view_as(p))
        prox = PROXIMALS["quadratic"](anchored(now.model))
        pull = torch.cat([g.flatten() for g in torch.autograd.grad(prox, v)]).double()
        push = Sigma @ (at - v_star)
        return (at - v_star) @ push / 2 + lam * prox.detach(), (push + lam * pull, push)
    value, (gradient, push) = objective(best)
    assert gradient.norm() < 1e-8 * max(push.norm(), 1e-3), f"{gradient.norm()} of {push.norm()}"
    assert value < objective(v_prev)[0] and value < objective(v_star)[0]


def test_the_quadratic_row_is_kl_to_second_order(anchored_run):
    """peso-quadratic's penalty and peso's differ by a third-order remainder: halving the step cuts it by about 8."""
    assert METHODS["peso-quadratic"].proximal == "quadratic"
    apart = []
    for size in (0.04, 0.02, 0.01):
        now = shaken(anchored_run._replace(model=copy.deepcopy(anchored_run.model)), size)
        kl, quadratic = (PROXIMALS[name](anchored(now.model)).item() for name in ("kl", "quadratic"))
        apart.append(abs(kl - quadratic))
    assert apart[0] / apart[1] > 5 and apart[1] / apart[2] > 5, apart
