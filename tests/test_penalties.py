"""The objective on a whole model: cross-entropy, and every penalty of Figure 2 and Eq. 6 beside it."""
import copy

import pytest
import torch
from torch import Tensor

from minipeso.lora import adapter_parameters, adapters, advance, watching
from minipeso.objective import anchored, answer_loss, stage_loss
from minipeso.proximal import PENALTIES, proximal_term, quadratic
from minipeso.runs.run import Run
from minipeso.stages import examples
from minipeso.theory import block_metric, proximal_minimiser
from minipeso.tokens import IGNORE, Batch, collate, sequences
from tests.micro import learn_first, micro, set_up
from tests.reference import answer_log_p, textbook_softmax_kl, toy_llama


@pytest.fixture
def anchored_run(tmp_path) -> Run:
    """As stage 2 begins, in float64, without dropout."""
    now = set_up(micro(tmp_path, dropout=0.0))
    learn_first(now)
    advance(now.model.double())
    return now


def shaken(now: Run, size: float = 0.1) -> Run:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapter_parameters(now.model):
            p.add_(size * torch.randn(p.shape, generator=draw))
    return now


def pairs_of(now: Run, n: int = 9):
    return examples(now.stages[1], "train", now.cfg.window)[:n]


def batch_of(now: Run) -> Batch:
    return collate(sequences(pairs_of(now), now.template))


def inputs(now: Run) -> dict[str, Tensor]:
    """name -> x (tokens, d_in), what each adapted layer is given for the batch, one sequence at a time, unpadded."""
    seen: dict[str, list[Tensor]] = {}
    with watching(now.model, lambda name, layer, x: seen.setdefault(name, []).append(x[0])), torch.no_grad():
        for sequence in sequences(pairs_of(now), now.template):
            now.model.model(torch.tensor(sequence.ids)[None])
    return {name: torch.cat(parts) for name, parts in seen.items()}


def textbook_output_kl(now: Run, name: str, x: Tensor) -> float:
    """The mean over tokens of KL(softmax(s B A x) || softmax(s B_prev A_prev x)), from lists of numbers."""
    layer = dict(adapters(now.model))[name]
    y, y_prev = (layer.scale * x @ A.T @ B.T for A, B in ((layer.A, layer.B), (layer.A_prev, layer.B_prev)))
    return sum(textbook_softmax_kl(a, b)[0] for a, b in zip(y.tolist(), y_prev.tolist())) / len(x)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_answer_loss_is_the_mean_over_labelled_positions(temperature):
    """Position by position, with token 0 among the labels and positions without one."""
    model, ids = toy_llama(), torch.randint(96, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[IGNORE, 0, 5, IGNORE, 95, IGNORE], [7, IGNORE, IGNORE, 0, IGNORE, IGNORE]])
    log_p = [(model(ids[i:i + 1])[0, j] / temperature).log_softmax(-1)[labels[i, j]].item()
             for i, j in (labels != IGNORE).nonzero().tolist()]
    loss = answer_loss(model, Batch(ids, labels, None, None, torch.ones_like(ids, dtype=torch.bool), 2), temperature)
    assert len(log_p) == 5 and loss.item() == pytest.approx(-sum(log_p) / 5, rel=1e-12)


@pytest.mark.parametrize("grouping", [("module", "sum"), ("matrix", "mean")])
def test_stage_loss_is_eq_12(anchored_run, grouping):
    """CE from the answers' log-probabilities pair by pair, KL group by group from lists of numbers, CE + lam * KL."""
    now, (groups, reduction) = shaken(anchored_run, 0.3), grouping
    loss, bare = stage_loss(now.model, batch_of(now), "kl", 30.0, 1.0, grouping), stage_loss(now.model, batch_of(now))
    answers = [(now.template.prompt(e.history).tolist(), now.template.answer(e.target)) for e in pairs_of(now)]
    ce = -sum(answer_log_p(now.model, *pair) / len(pair[1]) for pair in answers) / len(answers)
    flat = [[M.flatten().tolist() for M in layer] for layer in anchored(now.model)]
    parts = [(A + B, P + Q) for A, B, P, Q in flat] if groups == "module" else [
        part for A, B, P, Q in flat for part in ((A, P), (B, Q))]
    kl = sum(textbook_softmax_kl(v, v_prev)[0] for v, v_prev in parts)
    kl /= len(flat) if reduction == "mean" else 1
    assert loss.ce.item() == pytest.approx(ce, rel=1e-9) and loss.prox.item() == pytest.approx(kl, rel=1e-6)
    assert loss.total.item() == pytest.approx(ce + 30 * kl, rel=1e-6)
    assert bare.total == bare.ce == loss.ce and bare.prox == 0 and not bare.prox.requires_grad


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_output_kl_is_the_textbook_kl_token_by_token(anchored_run, reduction):
    """For every layer and every real token of a padded batch, with the x of this very model; CE is untouched."""
    now = shaken(anchored_run, 0.3)
    assert not batch_of(now).real.all(), "some row must be padded"
    loss = stage_loss(now.model, batch_of(now), "output-kl", 3.0, 0.7, ("module", reduction))
    terms = [textbook_output_kl(now, name, x) for name, x in inputs(now).items()]
    total = sum(terms) / (len(terms) if reduction == "mean" else 1)
    assert loss.prox.item() == pytest.approx(total, rel=1e-6) and total > 1e-4
    assert loss.ce.item() == pytest.approx(answer_loss(now.model, batch_of(now), 0.7).item(), rel=1e-12)
    assert loss.total.item() == pytest.approx(loss.ce.item() + 3 * total, rel=1e-6)


def test_output_kls_gradient_is_that_of_each_layer_at_fixed_inputs(anchored_run):
    """Central differences along random directions, matrix by matrix, with the recorded inputs held fixed."""
    now, draw, h = shaken(anchored_run, 0.3), torch.Generator().manual_seed(1), 1e-6
    v, names = adapter_parameters(now.model), [name for name, _ in adapters(now.model) for _ in "AB"]
    pull, fixed = torch.autograd.grad(stage_loss(now.model, batch_of(now), "output-kl", 1.0).prox, v), inputs(now)
    for name, p, gradient in zip(names, v, pull):
        way, values = torch.randn(p.shape, generator=draw, dtype=p.dtype), []
        for step in (h * way, -h * way):
            p.data += step
            values.append(textbook_output_kl(now, name, fixed[name]))
            p.data -= step
        slope, want = (gradient * way).sum().item(), (values[0] - values[1]) / (2 * h)
        assert slope == pytest.approx(want, rel=5e-6, abs=1e-8), name


@pytest.mark.parametrize("penalty", [*PENALTIES, "output-kl"])
def test_where_the_stage_starts_nothing_pulls(anchored_run, penalty):
    """v_t <- v_{t-1}: value and every entry of the gradient are exactly 0.0, but for orthogonality; a step away not."""
    away = copy.copy(anchored_run)
    away.model = copy.deepcopy(anchored_run.model)
    for now in (anchored_run, shaken(away)):
        prox = stage_loss(now.model, batch_of(now), penalty, 1.0).prox
        pull = sum(g.abs().sum().item() for g in torch.autograd.grad(prox, adapter_parameters(now.model)))
        moved = now is not anchored_run or penalty == "orthogonal"
        assert (prox.item() > 1e-9 and pull > 1e-9) if moved else prox.item() == pull == 0, f"{prox}, {pull}"


def test_watching_sees_every_input_and_leaves_nothing_behind(anchored_run):
    """One call per layer and forward, with the layer's own input; no hook is left behind, even after an error."""
    now, seen = anchored_run, []
    with pytest.raises(RuntimeError, match="on purpose"):
        with watching(now.model, lambda name, layer, x: seen.append((name, x.shape[-1] == layer.A.shape[1]))):
            now.model.model(torch.arange(5)[None])
            raise RuntimeError("on purpose")
    now.model.model(torch.arange(5)[None])
    assert seen == [(name, True) for name, _ in adapters(now.model)]


def tangent_features(now: Run, n: int) -> Tensor:
    """Phi(x) (n, m) of Eq. 7: the gradient of the true next token's logit in the adapter, one pair per row."""
    features = []
    for example in pairs_of(now, n):
        prompt, first = now.template.prompt(example.history), now.template.answer(example.target)[0]
        logit = now.model(prompt[None])[0, -1, first]
        features.append(torch.cat([g.flatten() for g in torch.autograd.grad(logit, adapter_parameters(now.model))]))
    return torch.stack(features)


@pytest.mark.parametrize("lam", [0.5, 30.0])
def test_proposition_1_on_a_real_model(anchored_run, lam):
    """Sigma from a trained Llama's tangent features (Eq. 8), H from its adapter (Prop. 3): at Eq. 28's minimiser the
    gradient of the *shipped* quadratic penalty, taken on the model's own matrices, cancels the data term's; and the
    objective there is below its value at the anchor and at the new optimum."""
    now = anchored_run
    v = adapter_parameters(now.model)
    Phi = tangent_features(now, 40)
    Sigma, v_prev = Phi.T @ Phi / len(Phi), torch.cat([p.detach().flatten() for p in v])
    v_star = v_prev + 0.1 * torch.randn(len(v_prev), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    groups = [torch.cat([layer.A_prev.flatten(), layer.B_prev.flatten()]) for _, layer in adapters(now.model)]
    best = proximal_minimiser(Sigma, block_metric(groups), v_star, v_prev, lam)

    def objective(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            for p, part in zip(v, point.split([p.numel() for p in v])):
                p.copy_(part.view_as(p))
        prox = proximal_term(anchored(now.model), quadratic)
        pull = torch.cat([g.flatten() for g in torch.autograd.grad(prox, v)])
        push = Sigma @ (point - v_star)
        return (point - v_star) @ push / 2 + lam * prox.detach(), push + lam * pull, push
    value, gradient, push = objective(best)
    assert gradient.norm() < 1e-8 * max(push.norm(), 1e-3), f"{gradient.norm()} of {push.norm()}"
    assert value < objective(v_prev)[0] and value < objective(v_star)[0]
