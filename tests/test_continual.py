"""The method: what is minimised, what moves, what stays, and where every stage starts."""
import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

import train
from minipeso import continual, methods
from minipeso.continual import choose_trainable, stage_data, train_stage
from minipeso.llama import Llama
from minipeso.lora import LoRALinear, adapter_parameters, adapters, advance, rewrap
from minipeso.methods import method_named
from minipeso.objective import anchored, answer_loss, stage_loss
from minipeso.proximal import proximal_term, softmax_kl
from minipeso.runs.run import Run
from minipeso.snapshot import restore, snapshot
from minipeso.stages import examples
from minipeso.state import every_epoch
from minipeso.tokens import collate, sequences
from tests.micro import checkpoint, fingerprint, learn_first, micro, run, set_up
from tests.reference import answer_log_p, textbook_softmax_kl


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Run:
    """Before D_1, a base from scratch under recipe paper."""
    return set_up(micro(tmp_path_factory.mktemp("scratch"), epochs=2))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Run:
    """Before D_1, a toy checkpoint under recipe release, to the letter."""
    folder = checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return set_up(micro(tmp_path_factory.mktemp("words"), base=str(folder), recipe="release", epochs=2))


@pytest.fixture(params=["scratch", "words"])
def either(request) -> Run:
    return request.getfixturevalue(request.param)


def fresh(setup: Run, **changes) -> Run:
    """The same set-up with a model of its own, and perhaps other settings."""
    now = copy.copy(setup)
    now.model, now.cfg = copy.deepcopy(setup.model), dataclasses.replace(setup.cfg, **changes)
    return now


def learnt(setup: Run, **changes) -> Run:
    """After D_1, anchored there."""
    now = fresh(setup, **changes)
    learn_first(now)
    advance(now.model)
    now.base_state = snapshot(setup.model, True)
    return now


def later(now: Run, name: str, t: int = 2, look=lambda record: None) -> list[dict]:
    """Stage t by train.py's own loop -> the records of its training; look(record) at each."""
    method, trial, records = method_named(name), copy.copy(now), []
    vars(trial).update(  # one stage, without a disk and without ranking
        stages=now.stages[:t], found={name: {}}, left=lambda name: [t], epochs=lambda phase: every_epoch,
        log=lambda name: lambda record: (records.append(record), look(record)),
        recommend=lambda t: None, save=lambda name, t, found: None)
    if method.learn:
        method.learn(trial, name)
    else:
        train.learn_later(trial, name, method, method.settings(now.cfg.of(name)))
    return records


def learn(now: Run, t: int = 2, log=lambda record: None, **changes) -> None:
    """Trains the adapter on D_2, in steps of 8 pairs at 1e-3 and without a penalty, but for `changes`."""
    choose_trainable(now.model, "adapter")
    cfg = dataclasses.replace(now.cfg, **dict(epochs=1, lr=1e-3, batch=8, proximal="none") | changes)
    train_stage(now.model, stage_data(now.stages[1:2], now.template, cfg.window), t, cfg, log)


def state(model: Llama) -> dict[str, Tensor]:
    """Every tensor by name, a tied head under both of its names."""
    return {name: t.clone() for name, t in model.state_dict().items()}


def adapter(model: Llama) -> list[Tensor]:
    return [p.detach().clone() for p in adapter_parameters(model)]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The names whose tensors differ in any bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def kinds(names: set[str]) -> set[str]:
    """model.layers.0.self_attn.q_proj.A -> A; model.embed_tokens.rows -> embed_tokens.rows."""
    return {name if "tokens" in name or "head" in name else name.rpartition(".")[2]
            for name in (n.removeprefix("model.") for n in names)}


@torch.no_grad()
def perturb(model: Llama, std: float = 0.1) -> None:
    """Moves the adapter away from its anchor."""
    generator = torch.Generator().manual_seed(0)
    for p in adapter_parameters(model):
        p.add_(torch.randn(p.shape, generator=generator) * std)


def cross_entropy_by_hand(now: Run, pairs, temperature: float) -> float:
    """Mean over the answers' tokens of -log p, one pair and one plain forward at a time."""
    answers = [(now.template.prompt(e.history).tolist(), now.template.answer(e.target)) for e in pairs]
    losses = [answer_log_p(now.model, prompt, answer, temperature) for prompt, answer in answers]
    return -sum(losses) / sum(len(answer) for _, answer in answers)


def test_release_objective_term_by_term(words):
    """The first step's log: CE of logits / 0.8 with <|end_of_text|>, the mean over modules of the KLs of A and of B."""
    now = fresh(words, epochs=1, proximal="kl")
    for _, layer in adapters(now.model):
        layer.dropout.p = 0.0
    perturb(now.model)
    pairs, records = examples(now.stages[1], "train", now.cfg.window), []
    assert "base" not in words.logs, "a checkpoint needs no base training"
    assert now.template.answer(pairs[0].target)[-1] == 2, "<|end_of_text|> of the toy vocabulary"
    ce = cross_entropy_by_hand(now, pairs, 0.8)
    flat = [[M.detach().double().flatten().tolist() for M in layer] for layer in anchored(now.model)]
    prox = sum(textbook_softmax_kl(A, P)[0] + textbook_softmax_kl(B, Q)[0] for A, B, P, Q in flat) / len(flat)
    learn(now, log=records.append, batch=len(pairs), proximal="kl")
    assert records[0]["ce"] == pytest.approx(ce, rel=1e-5), "one batch of all pairs, at the first step"
    assert records[0]["prox"] == pytest.approx(prox, rel=1e-4)


def test_prox_ce_ratio_is_the_ratio_of_the_gradients(scratch):
    """The logged ratio: || lam d prox / dv || / || d CE / dv ||, each by its own autograd.grad."""
    now = learnt(scratch, lam=40.0)
    perturb(now.model.eval())
    choose_trainable(now.model, "adapter")
    batch = collate(sequences(examples(now.stages[1], "train", now.cfg.window)[:6], now.template))
    v = adapter_parameters(now.model)
    ce, prox = (torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, v)]).norm().item() for loss in (
        answer_loss(now.model, batch), proximal_term(anchored(now.model), softmax_kl)))
    for penalty, ratio in (("kl", 40 * prox / ce), ("none", 0)):
        cfg = dataclasses.replace(now.cfg, proximal=penalty)
        record = continual.train_step(now.model, batch, torch.optim.AdamW(v), 2, cfg)
        assert record["prox_ce_ratio"] == pytest.approx(ratio, rel=1e-3) and (record["prox"] > 0) == (ratio > 0)


def test_the_anchor_is_the_end_of_the_stage_before(either):
    """A_prev and B_prev are A and B as the stage before left them, from the first step, where nothing pulls, on."""
    now = learnt(either)
    for t in (2, 3):
        end, anchors = adapter(now.model), []
        records = later(now, "peso", t, lambda record: anchors.append(
            [M.clone() for *_, A, B in anchored(now.model) for M in (A, B)]))
        assert anchors and all(same(anchor, end) for anchor in anchors) and not same(adapter(now.model), end)
        assert records[0]["prox"] == records[0]["prox_ce_ratio"] == 0 < records[1]["prox"]


def test_a_huge_lambda_keeps_the_adapter_at_its_anchor(scratch, monkeypatch):
    """The deviation of v - v_prev from a uniform shift shrinks as lam grows, to a hundredth; the KL to a 10,000th."""
    start, away, kl = learnt(scratch, epochs=6, later_lr=1.0, weight_decay=0.0), [], []
    falling = iter(range(99, 0, -1))  # so that the last epoch is kept, not one that has hardly begun
    monkeypatch.setattr(continual, "mean_loss", lambda *rest: float(next(falling)))
    for lam in (0.0, 1e2, 1e4, 1e6):
        now = fresh(start, lam=lam)
        later(now, "peso")
        groups = [[torch.cat([A.flatten(), B.flatten()]).detach() for A, B in (layer[:2], layer[2:])]
                  for layer in anchored(now.model)]
        steps = torch.cat([(v - u) - (v - u).mean() for v, u in groups])
        away.append(steps.square().mean().sqrt().item())
        kl.append(sum(textbook_softmax_kl(v.tolist(), u.tolist())[0] for v, u in groups))
    assert all(a > b for a, b in zip(away, away[1:])), f"rms deviation at lam 0, 1e2, 1e4, 1e6: {away}"
    assert away[-1] < 0.01 * away[0] and kl[-1] < 1e-4 * kl[0], (away, kl)


@pytest.mark.parametrize("proximal, of_single, of_peso", [("method", "none", "kl"), ("l2", "l2", "l2")])
def test_what_every_method_trains_on(scratch, monkeypatch, proximal, of_single, of_peso):
    """single and peso: D_3 at the later rate; retrain: D_1 .. D_3 at the full one, unpenalised; pretrain: nothing."""
    now, seen = learnt(scratch, proximal=proximal), []
    for module in (train, methods):  # whoever learns a stage calls it by one of these names
        monkeypatch.setattr(module, "train_stage", lambda model, data, t, cfg, log, epochs: seen.append(
            (str(data), t, cfg.lr, cfg.proximal, cfg.epochs)))
    third, union = (str(stage_data(stages, now.template, now.cfg.window)) for stages in (now.stages[2:], now.stages))
    before, lr = state(now.model), now.cfg.lr
    for name in ("single", "peso", "pretrain", "retrain"):
        later(now, name, 3)
        if name == "pretrain":
            assert not moved(before, state(now.model)), "by no other way either"
    later_lr = lr * now.cfg.later_lr
    assert seen == [(third, 3, later_lr, of_single, 2), (third, 3, later_lr, of_peso, 2), (union, 3, lr, "none", 2)]


def test_a_new_adapter_is_drawn_from_the_seed_and_the_stage(scratch):
    """Where a method starts anew, each stage and each seed have an A_t of their own; D_1's joins the past, once."""
    start = learnt(scratch)

    def drawn(t: int, seed: int = 0) -> list[Tensor]:
        now = fresh(start, seed=seed)
        later(now, "sumlora-all", t)
        for (_, layer), A in zip(adapters(now.model), adapter(start.model)[::2]):
            assert torch.allclose(layer.A_past, A / A.norm())
        return [layer.A_prev for _, layer in adapters(now.model)]
    first = drawn(2)
    assert same(first, drawn(2)) and not any(map(torch.equal, first * 2, drawn(3) + drawn(2, seed=1)))


def test_inflora_is_shown_the_stage_before_and_this_one(scratch, monkeypatch):
    """Its memory takes in all training pairs of D_{t-1}, its next A is designed from all those of D_t."""
    now, shown = learnt(scratch), []

    def look(model, t, n_stages, *parts):
        shown.append((t, n_stages, *({str(ids[real].tolist()) for b in part for ids, real in zip(b.ids, b.real)}
                                     for part in parts)))
    monkeypatch.setattr(methods, "design_inflora", look)
    for t in (2, 3):
        later(now, "inflora-all", t)
    data = (stage_data([stage], now.template, now.cfg.window)[0] for stage in now.stages)
    pairs = [{str(s.ids.tolist()) for s in train_part} for train_part in data]
    assert shown == [(2, 3, *pairs[:2]), (3, 3, *pairs[1:])]


def test_lambda_0_is_single_step_for_step(tmp_path):
    """PESO at lam = 0 is the single evolving adapter: the same bytes, the same ranks, the same log but for prox."""
    run(micro(tmp_path, lam=0.0, epochs=2))
    files = fingerprint(tmp_path)
    for file in ("results.json", "ranks.json", *(f"adapters/stage-{t}/adapter_model.safetensors" for t in (2, 3))):
        assert files[file] == files[f"single/{file}"], file
    lines = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    single, peso = ([{k: v for k, v in line.items() if k not in ("name", "prox", "prox_ce_ratio")}
                     for line in lines if line["name"] == name] for name in ("single", "peso"))
    assert single == peso and len(peso) > 4


def test_retrain_is_learning_first_on_the_union_from_the_base(either):
    """At stage 3, coming from anywhere: restore the base, then learn_first on D_1 .. D_3, bit for bit."""
    expected, now = fresh(either), learnt(either)
    learn_first(expected, stages=3, t=3)
    later(now, "single", 2)
    later(now, "retrain", 3)
    assert not moved(state(expected.model), state(now.model))


TRAINED = {"adapter": {"A", "B"}, "rows": {"A", "B", "embed_tokens.rows", "lm_head.rows"}}
TRAINED["tables"] = TRAINED["rows"] | {"embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("name, changes, first, after", [
    ("scratch", {}, "rows", "adapter"), ("words", {}, "tables", "tables"),
    ("words", dict(first_trains="rows", later_trains="adapter"), "rows", "adapter"),
    ("words", dict(first_trains="adapter", later_trains="rows"), "adapter", "rows")])
def test_what_moves_at_d1_and_later(name, changes, first, after, request):
    """What the recipe (paper, release) or the flags name, and the anchor after D_1; all others keep their bits."""
    now = fresh(request.getfixturevalue(name), **changes)
    before = state(now.model)
    learn_first(now)
    middle = state(now.model)
    trained = {name for name, p in now.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert kinds(moved(before, middle)) == kinds(trained) == TRAINED[first]
    later(now, "peso")
    assert kinds(moved(middle, state(now.model))) == TRAINED[after] | {"A_prev", "B_prev"}


def test_tied_tables_stay_one_and_untied_ones_are_two(words):
    """Rows: embedding and head remain one table. Tables: two, which start equal and go their own ways."""
    one, now = learnt(words, first_trains="rows").model, fresh(words)
    assert one.lm_head is one.model.embed_tokens
    choose_trainable(now.model, "tables")
    head, embedding = now.model.lm_head, now.model.model.embed_tokens
    pairs = [(head.weight, embedding.weight), (head.rows, embedding.rows)]
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    learn_first(now)
    assert now.model.lm_head is head and not any(torch.equal(a, b) for a, b in pairs), "untied once, not again"


@pytest.mark.parametrize("when", ["before D1", "after D1", "after D1, the only stage with tables"])
def test_restore_undoes_training(either, when):
    """Every tensor and logit, after training, untying and another adapter; then by way of the base, which is tied."""
    changes = {"first_trains": "tables", "later_trains": "adapter"} if "only" in when else {}
    now = fresh(either) if when == "before D1" else learnt(either, **changes)
    saved, before, ids = snapshot(now.model, True), state(now.model), torch.arange(12)[None]
    logits = now.model.eval()(ids)
    learn_first(now)
    rewrap(now.model, type("Halved", (LoRALinear,), {"delta": lambda layer, x: LoRALinear.delta(layer, x) / 2}))
    perturb(now.model)
    assert not torch.equal(now.model.eval()(ids), logits)
    for _ in range(2):
        restore(now.model, saved)
        assert not moved(before, state(now.model)) and torch.equal(now.model.eval()(ids), logits)
        assert all(type(layer) is LoRALinear for _, layer in adapters(now.model))
        assert (now.model.lm_head is now.model.model.embed_tokens) == saved.tied
        restore(now.model, snapshot(either.model, True))
        assert now.model.lm_head is now.model.model.embed_tokens


@pytest.mark.parametrize("losses, patience, done", [
    ([], 0, 0), ([3, 1, 2], 0, 3), ([1, 2, 3], 0, 3), ([3, 2, 1], 0, 3), ([2, 1, 1], 0, 3), ([3, 1, 2, 1, 0], 2, 4),
    ([3, 4, 1, 2, 2, 0], 2, 5), ([1, 2, 0], 1, 2), ([3, 2, 1], 1, 3), ([1, 2, 0], 3, 3)])
def test_the_epoch_with_the_lowest_validation_loss_is_kept(scratch, losses, patience, done, monkeypatch):
    """Of equal ones the first; without any the model stays as it is. `patience` epochs without a new best end it."""
    now, told = learnt(scratch), iter(losses)
    after = [adapter(now.model)]
    monkeypatch.setattr(continual, "mean_loss", lambda model, *rest: after.append(adapter(model)) or next(told))
    learn(now, epochs=len(losses), patience=patience)
    kept = 1 + losses.index(min(losses[:done])) if losses else 0
    assert [same(adapter(now.model), state) for state in after] == [k == kept for k in range(done + 1)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_it_is_the_validation_pairs_that_decide(scratch, temperature):
    """The validation loss is by hand, at the training temperature, without a penalty, however batched; it decides."""
    now, seen = learnt(scratch), []
    pairs = examples(now.stages[1], "valid", now.cfg.window)
    learn(now, epochs=4, lr=0.1, temperature=temperature, proximal="kl", log=lambda record: "valid_ce" in record and
          seen.append((record["valid_ce"], cross_entropy_by_hand(now, pairs, temperature))))
    assert [a for a, _ in seen] == pytest.approx([b for _, b in seen], rel=1e-4)
    batched = continual.mean_loss(now.model, sequences(pairs, now.template), temperature, 7)
    lowest = pytest.approx(min(a for a, _ in seen), rel=1e-4)
    assert cross_entropy_by_hand(now, pairs, temperature) == lowest == batched


def test_all_pairs_of_an_epoch_weigh_alike(scratch, monkeypatch):
    """The mean of an epoch's gradients, at rate 0, is that of Eq. 12 with its pairs one by one, although no two steps
    need have as many pairs; what is logged is each step's mean over its own pairs."""
    now, seen, records = learnt(scratch), [], []
    monkeypatch.setattr(continual, "CLIP", 1e6)
    perturb(now.model)
    v = adapter_parameters(now.model)
    for module in now.model.modules():
        module.p = 0.0  # of every dropout
    learn(now, log=lambda record: "ce" in record and (records.append(record), seen.append([p.grad.clone() for p in v])),
          lr=0.0, lam=30.0, proximal="kl")
    pairs = examples(now.stages[1], "train", now.cfg.window)
    ce = sum(answer_loss(now.model, collate([one])) for one in sequences(pairs, now.template, share=False)) / len(pairs)
    wanted = torch.autograd.grad(ce + 30 * proximal_term(anchored(now.model), softmax_kl), v)
    for p, *steps in zip(wanted, *seen):
        torch.testing.assert_close(sum(steps) / len(steps), p, rtol=1e-4, atol=1e-6)
    counts = [record["pairs"] for record in records]
    assert sum(counts) == len(pairs) and max(counts) > 1.2 * min(counts), counts
    assert sum(r["ce"] * r["pairs"] for r in records) / len(pairs) == pytest.approx(ce.item(), rel=1e-5)


def test_the_rate_and_the_steps_in_the_log(scratch):
    """lr follows the schedule, linear up over the first share of the steps, times a cosine from 1 to 0 (by the
    half-angle identity); steps count up; after each epoch a validation, and last how far the adapter moved."""
    for steps, warmup in ((4, 0.0), (100, 0.01), (100, 0.2), (7, 0.5), (1, 0.01)):
        for step in range(steps):
            ramp = min(1.0, (step + 1) / (warmup * steps)) if warmup * steps > 1 else 1.0
            wanted = ramp * math.cos(math.pi * step / steps / 2) ** 2
            assert continual.learning_rate(step, steps, warmup) == pytest.approx(wanted), (step, steps, warmup)
    assert continual.learning_rate(0, 100, 0.1) == pytest.approx(0.1) and continual.learning_rate(9, 9, 0.0) < 1e-12
    now, records = learnt(scratch), []
    learn(now, log=records.append, epochs=2, lr=3e-3)
    steps, checks = ([r for r in records if name in r] for name in ("ce", "valid_ce"))
    total = 2 * math.ceil(len(examples(now.stages[1], "train", now.cfg.window)) / 8)
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1)) and len(steps) <= total == steps[0]["steps"]
    for r in steps:
        assert r["lr"] == pytest.approx(3e-3 * continual.learning_rate(r["step"] - 1, total, now.cfg.warmup))
    assert [r["epoch"] for r in checks] == [0, 1] and sum(r["tokens"] for r in steps) > 0
    v, v_prev = (torch.cat([M.detach().flatten() for layer in anchored(now.model) for M in layer[half:half + 2]])
                 for half in (0, 2))
    assert records[-1]["moved"] == pytest.approx((v - v_prev).norm().item(), rel=1e-5)
    assert records[-1]["anchor"] == pytest.approx(v_prev.norm().item(), rel=1e-5)


@pytest.mark.parametrize("broken", ["loss", "gradient", "validation"])
def test_what_is_not_finite_is_an_error_before_the_step(scratch, broken, monkeypatch):
    """A loss or a gradient that is not finite raises before any weight has changed; a validation loss, later."""
    now = learnt(scratch)
    before = state(now.model)
    if broken == "loss":
        monkeypatch.setattr(continual, "stage_loss", lambda *args: (loss := stage_loss(*args))._replace(
            total=loss.total * math.nan))
    elif broken == "gradient":
        adapter_parameters(now.model)[0].register_hook(lambda g: g * math.inf)
    else:
        monkeypatch.setattr(continual, "mean_loss", lambda *rest: math.nan)
    with pytest.raises(FloatingPointError, match="validation.*stage 2" if broken == "validation" else "stage 2"):
        later(now, "peso")
    assert bool(moved(before, state(now.model))) == (broken == "validation")


def test_the_order_of_the_data_depends_on_seed_stage_and_epoch_only(scratch, monkeypatch):
    """Not on the weights, the rate, the penalty or what was drawn before; and on each of the three."""
    now, ids = learnt(scratch), []
    monkeypatch.setattr(continual, "collate", lambda some, *rest: ids.append([s.ids.tolist() for s in some]) or
                        collate(some, *rest))

    def order(stage=2, noise=0, **changes):
        trial, epochs = fresh(now), ([], [])
        perturb(trial.model, 0.01 * noise)
        torch.manual_seed(noise)
        learn(trial, stage, lambda r: "ce" in r and epochs[r["epoch"]].append(ids[-1]), epochs=2, **changes)
        return epochs
    first, second = order()
    assert order(lr=1e-2, proximal="kl", noise=5) == (first, second)
    assert order(stage=3)[0] != first and order(seed=1)[0] != first and second != first
    every = [sorted(ids for batch in epoch for ids in batch) for epoch in (first, second)]
    wanted = sequences(examples(now.stages[1], "train", now.cfg.window), now.template)
    assert every[0] == every[1] == sorted(s.ids.tolist() for s in wanted), "each epoch sees all"
