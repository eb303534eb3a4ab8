"""The method: what is minimised, what moves, what stays, and where every stage starts."""
from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from minipeso import continual
from minipeso.runs.checkpoint import restore, snapshot
from minipeso.continual import METHODS, Objective, Plan
from minipeso.llama import Llama
from minipeso.lora import LoRALinear, adapter_parameters, adapters, rewrap
from minipeso.objective import anchored, answer_loss, stage_loss
from minipeso.proximal import PROXIMALS
from minipeso.runs.run import Run
from minipeso.stages import examples
from minipeso.tokens import collate, sequences
from tests.micro import checkpoint, fingerprint, micro, run, set_up
from tests.reference import answer_log_p, textbook_softmax_kl

SILENT = lambda record: None  # noqa: E731
LLM = [name for name, method in METHODS.items() if method.system == "llm"]


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
    return setup._replace(model=copy.deepcopy(setup.model), cfg=dataclasses.replace(setup.cfg, **changes))


def learnt(setup: Run, **changes) -> Run:
    """After D_1, as stage 2 begins: anchored there."""
    now = fresh(setup, **changes)
    continual.learn_first(now.model, now.data.stages[:1], now.template, now.cfg, SILENT)
    for _, layer in adapters(now.model):
        layer.advance()
    return now


def later(now: Run, method: str, t: int = 2, base=None, log=SILENT) -> list[dict]:
    """Learns stage t -> the records of its training."""
    records = []
    continual.learn_stage(now.model, METHODS[method], now.data.stages[:t], now.template, now.cfg, base,
                          lambda record: (records.append(record), log(record)))
    return records


def state(model: Llama) -> dict[str, Tensor]:
    """Every tensor by name, a tied head under both of its names."""
    return {name: t.clone() for name, t in model.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The names whose tensors differ in any bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def kinds(names: set[str]) -> set[str]:
    """model.layers.0.self_attn.q_proj.A -> A; model.embed_tokens.rows -> embed_tokens.rows."""
    return {name if "tokens" in name or "head" in name else name.rpartition(".")[2]
            for name in (n.removeprefix("model.") for n in names)}


@torch.no_grad()
def perturb(model: Llama, std: float = 0.1, seed: int = 0) -> None:
    """Moves the adapter away from its anchor."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(model):
        p.add_(torch.randn(p.shape, generator=generator) * std)


def first_batch(now: Run, t: int = 2, n: int = 6, share: bool = True):
    return collate(sequences(examples(now.data.stages[t - 1], "train", now.cfg.window)[:n], now.template, share))


# -- the objective ----------------------------------------------------------------------------------

def cross_entropy_by_hand(now: Run, pairs, temperature: float) -> float:
    """Mean over the answers' tokens of -log p, one pair and one plain forward at a time."""
    total, tokens = 0.0, 0
    for example in pairs:
        prompt, answer = now.template.prompt(example.history).tolist(), now.template.answer(example.target)
        with torch.no_grad():
            logits = now.model(torch.tensor([[*prompt, *answer]]))[0].double() / temperature
        for i, token in enumerate(answer):
            total -= logits[len(prompt) - 1 + i].log_softmax(-1)[token].item()
        tokens += len(answer)
    return total / tokens


def penalty_by_hand(model: Llama, groups: str, reduction: str) -> float:
    """Textbook KLs of plain lists of numbers, summed in a loop over modules (Eq. 12; methods.md 1.3)."""
    flat = lambda *matrices: [x for M in matrices for x in M.detach().double().flatten().tolist()]  # noqa: E731
    total, modules = 0.0, 0
    for _, layer in adapters(model):
        modules += 1
        if groups == "module":
            total += textbook_softmax_kl(flat(layer.A, layer.B), flat(layer.A_prev, layer.B_prev))[0]
        else:
            total += textbook_softmax_kl(flat(layer.A), flat(layer.A_prev))[0]
            total += textbook_softmax_kl(flat(layer.B), flat(layer.B_prev))[0]
    return total / (modules if reduction == "mean" else 1)


@pytest.mark.parametrize("groups", ["module", "matrix"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_stage_loss_is_eq_12(either, groups, reduction):
    """CE + lam sum_g KL(softmax v || softmax v_prev): cross-entropy pair by pair, KL from lists of numbers."""
    now = fresh(either)
    now.model.eval()
    perturb(now.model)
    pairs = examples(now.data.stages[1], "train", now.cfg.window)[:6]
    loss = stage_loss(now.model, collate(sequences(pairs, now.template)), "kl", 30.0, 1.0, groups, reduction)
    ce, prox = cross_entropy_by_hand(now, pairs, 1.0), penalty_by_hand(now.model, groups, reduction)
    assert loss.ce.item() == pytest.approx(ce, rel=1e-5), "cross-entropy"
    assert prox > 1e-4 and loss.prox.item() == pytest.approx(prox, rel=1e-4), "penalty"
    assert loss.total.item() == pytest.approx(ce + 30 * prox, rel=1e-5)


def test_cross_entropy_is_the_mean_log_probability_of_the_answers(scratch):
    """Eq. 2 once more, by the reference that the beam search is tested with."""
    now = fresh(scratch)
    now.model.eval()
    pairs = examples(now.data.stages[0], "train", 4)[:5]
    loss = answer_loss(now.model, collate(sequences(pairs, now.template)))
    log_p = [answer_log_p(now.model, now.template.prompt(e.history).tolist(), now.template.answer(e.target))
             for e in pairs]
    assert loss.item() == pytest.approx(-sum(log_p) / (5 * now.cfg.levels), rel=1e-5)


def test_release_objective_term_by_term(words):
    """Recipe release: CE of logits / 0.8 with <|end_of_text|> in the answer, and lam / modules times the KLs of A
    and of B apart; the training step minimises just that (its log says so)."""
    now = fresh(words, dropout=0.0)
    for _, layer in adapters(now.model):
        layer.dropout.p = 0.0
    perturb(now.model)
    cfg, stage = now.cfg, now.data.stages[1]
    assert (cfg.temperature, cfg.groups, cfg.reduction, cfg.learn_end) == (0.8, "matrix", "mean", True)
    pairs = examples(stage, "train", cfg.window)
    assert now.template.answer(pairs[0].target)[-1] == 2, "<|end_of_text|> of the toy vocabulary"
    ce, prox = cross_entropy_by_hand(now, pairs, 0.8), penalty_by_hand(now.model, "matrix", "mean")
    records = []
    plan = Plan(2, 1, 1e-3, len(pairs), "kl")
    continual.choose_trainable(now.model, cfg.later_trains)
    continual.train_stage(now.model, pairs, pairs, now.template, plan, cfg, records.append)
    assert records[0]["ce"] == pytest.approx(ce, rel=1e-5), "one batch of all pairs, at the first step"
    assert records[0]["prox"] == pytest.approx(prox, rel=1e-4)


def test_no_penalty_is_cross_entropy_alone(scratch):
    """Penalty "none": total is ce itself and prox is 0, wherever the adapter stands."""
    now = fresh(scratch)
    perturb(now.model)
    loss = stage_loss(now.model.eval(), first_batch(now), "none", 1e9)
    assert loss.total is loss.ce and loss.prox.item() == 0 and not loss.prox.requires_grad


# -- where a stage starts ---------------------------------------------------------------------------

@pytest.mark.parametrize("penalty", ["kl", "l2", "rank-kl"])
def test_at_the_first_step_the_penalty_and_its_gradient_are_0(either, penalty):
    """v_t starts at v_{t-1}: value and gradient are exactly 0, and the log of the first step says so."""
    now = learnt(either, proximal=penalty)
    rewrap(now.model, LoRALinear)
    loss = stage_loss(now.model, first_batch(now), penalty, 1e9)
    gradient = torch.autograd.grad(loss.prox, adapter_parameters(now.model))
    assert loss.prox.item() == 0 and not any(g.any() for g in gradient) and torch.equal(loss.total, loss.ce)
    records = later(now, "peso")
    assert records[0]["prox"] == records[0]["prox_ce_ratio"] == 0
    assert records[1]["prox"] > 0, "it grows from the second step on"


def test_the_anchor_is_the_end_of_the_stage_before(scratch):
    """At every stage, from its first step to its last, A_prev and B_prev are A and B as the stage before left them."""
    now = learnt(scratch)
    for t in (2, 3):
        end = [p.detach().clone() for p in adapter_parameters(now.model)]
        anchors = []

        def look(record):
            anchors.append([M.clone() for *_, A, B in anchored(now.model) for M in (A, B)])
        later(now, "peso", t, log=look)
        assert anchors and all(torch.equal(a, e) for anchor in anchors for a, e in zip(anchor, end, strict=True))
        assert not all(torch.equal(p, e) for p, e in zip(adapter_parameters(now.model), end))


# -- the methods ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def all_methods(tmp_path_factory) -> dict[str, object]:
    """The fingerprint of one run with every row of METHODS."""
    out = tmp_path_factory.mktemp("all")
    run(micro(out, compare=",".join(LLM), lam=3.0))
    return fingerprint(out)


def adapter_of(found: dict, method: str, t: int) -> bytes:
    folder = "" if method == "peso" or t == 1 else f"{method}/"
    return found[f"{folder}adapters/stage-{t}/adapter_model.safetensors"]


def test_every_method_does_what_it_says(all_methods):
    """pretrain leaves the D_1 adapter as it is, bit for bit, at every stage; all others change it at every stage,
    each in its own way; D_1 is the same model for all."""
    for method in LLM:
        stages = [adapter_of(all_methods, method, t) for t in (1, 2, 3)]
        assert len(set(stages)) == (1 if method == "pretrain" else 3), method
        ranks = json.loads(all_methods["ranks.json" if method == "peso" else f"{method}/ranks.json"])
        assert set(ranks) == {"1", "2", "3"} and ranks["1"] == json.loads(all_methods["ranks.json"])["1"]
    # at stage 2 there is one past adapter: `all` and `latest` are the same yet
    alike = sum(name.endswith(("latest", "latest-inherit")) for name in LLM)
    for t, distinct in ((2, len(LLM) - alike), (3, len(LLM))):
        assert len({adapter_of(all_methods, method, t) for method in LLM}) == distinct


def test_what_every_method_trains_on(scratch, monkeypatch):
    """Data, rate and penalty of stage 3: single and peso see D_3 at the later rate, retrain D_1 .. D_3 at the full
    one, pretrain nothing; only peso has a penalty, unless --proximal names one for all that continue."""
    seen = []

    def spy(model, train, valid, template, plan, cfg, log, keeper):
        seen.append(({e.stage for e in train}, {e.stage for e in valid}, plan))
    now = learnt(scratch)
    base = snapshot(now.model, True)
    monkeypatch.setattr(continual, "train_stage", spy)
    cfg = now.cfg
    for proximal, penalties in (("method", {"single": "none", "peso": "kl"}), ("l2", {"single": "l2", "peso": "l2"})):
        now = now._replace(cfg=dataclasses.replace(cfg, proximal=proximal))
        for method, penalty in penalties.items():
            later(now, method, 3)
            assert seen.pop() == ({3}, {3}, Plan(3, cfg.epochs, cfg.lr * cfg.later_lr, cfg.batch, penalty))
        later(now, "retrain", 3, base)
        assert seen.pop() == ({1, 2, 3}, {1, 2, 3}, Plan(3, cfg.epochs, cfg.lr, cfg.batch, "none"))
        later(now, "pretrain", 3)
        assert not seen


def test_lambda_0_is_single_step_for_step(tmp_path):
    """PESO at lam = 0 is the single evolving adapter: the same bytes at every stage, the same ranks, and the same
    line at every step, but for what the penalty alone decides."""
    run(micro(tmp_path, lam=0.0, epochs=2))
    found = fingerprint(tmp_path)
    for t in (2, 3):
        assert adapter_of(found, "peso", t) == adapter_of(found, "single", t), f"D{t}"
    assert found["ranks.json"] == found["single/ranks.json"] and found["results.json"] == found["single/results.json"]
    lines = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    single, peso = ([{k: v for k, v in line.items() if k not in ("name", "prox", "prox_ce_ratio")}
                     for line in lines if line["name"] == name] for name in ("single", "peso"))
    assert single == peso and len(peso) > 4


def test_retrain_is_learning_first_on_the_union_from_the_base(either):
    """At stage 3, coming from anywhere: restore the base, then learn_first on D_1 .. D_3, bit for bit."""
    expected = fresh(either)
    continual.learn_first(expected.model, expected.data.stages[:3], expected.template, expected.cfg, SILENT)
    now = fresh(either)
    base = snapshot(now.model, True)
    continual.learn_first(now.model, now.data.stages[:1], now.template, now.cfg, SILENT)
    later(now, "single", 2)
    later(now, "retrain", 3, base)
    assert not moved(state(expected.model), state(now.model))


def test_an_empty_stage_changes_nothing(scratch):
    """A stage without users, or with users who have nothing to train on, leaves the model as it was; retrain
    learns from the others."""
    now = learnt(scratch)
    base = snapshot(now.model, True)
    for nobody in ({}, {1: [3, 4]}):
        stage = dataclasses.replace(now.data.stages[1], history={u: [] for u in nobody}, current=nobody)
        empty = now._replace(data=dataclasses.replace(now.data, stages=[now.data.stages[0], stage]))
        before = state(now.model)
        assert later(empty, "peso") == [] and not moved(before, state(now.model))
    assert later(empty, "retrain", base=base)


# -- how strong the anchor is -----------------------------------------------------------------------

def test_a_huge_lambda_keeps_the_adapter_at_its_anchor(scratch, monkeypatch):
    """What the penalty sees of v - v_prev, its deviation from a uniform shift of the group, shrinks as lam grows,
    to less than a hundredth of what lam = 0 leaves; the textbook KL, to less than a 10,000th."""
    start, away, kl = learnt(scratch, epochs=6, later_lr=1.0, weight_decay=0.0), [], []
    falling = iter(range(99, 0, -1))  # so that the last epoch is kept, not one that has hardly begun
    monkeypatch.setattr(continual, "mean_loss", lambda *rest: float(next(falling)))
    for lam in (0.0, 1e2, 1e4, 1e6):
        now = fresh(start, lam=lam)
        module = lambda at: [torch.cat([A.flatten(), B.flatten()]).detach()  # noqa: E731
                             for A, B in (m[at:at + 2] for m in anchored(now.model))]
        before = module(0)
        later(now, "peso")
        steps = torch.cat([(v - u) - (v - u).mean() for v, u in zip(module(0), before, strict=True)])
        away.append(steps.square().mean().sqrt().item())
        kl.append(sum(textbook_softmax_kl(v.tolist(), u.tolist())[0] for v, u in zip(module(0), before)))
    assert all(a > b for a, b in zip(away, away[1:])), f"rms deviation at lam 0, 1e2, 1e4, 1e6: {away}"
    assert away[-1] < 0.01 * away[0] and kl[-1] < 1e-4 * kl[0], (away, kl)


def test_the_penalty_does_not_hold_a_uniform_shift_of_a_group(scratch):
    """The softmax-KL's invariance: v_prev + c costs nothing and is not pulled back, at any lam; l2 does both."""
    now = learnt(scratch)
    with torch.no_grad():
        for k, (_, layer) in enumerate(adapters(now.model)):
            layer.A.add_(0.1 * (k + 1))
            layer.B.add_(0.1 * (k + 1))
    loss = stage_loss(now.model.eval(), first_batch(now), "kl", 1.0)
    pull = torch.autograd.grad(loss.prox, adapter_parameters(now.model))
    assert loss.prox.item() < 1e-9 and max(g.abs().max() for g in pull) < 1e-6, loss.prox
    assert stage_loss(now.model, first_batch(now), "l2", 1.0).prox.item() > 0.1


def test_prox_ce_ratio_is_the_ratio_of_the_gradients(scratch):
    """The logged ratio: || lam d prox / dv || / || d CE / dv ||, each by its own autograd.grad."""
    now = learnt(scratch, lam=40.0)
    for _, layer in adapters(now.model):
        layer.dropout.p = 0.0
    perturb(now.model)
    continual.choose_trainable(now.model, "adapter")
    batch, v = first_batch(now), adapter_parameters(now.model)
    ce = torch.autograd.grad(answer_loss(now.model, batch), v)
    prox = torch.autograd.grad(PROXIMALS["kl"](anchored(now.model), "module", "sum"), v)
    flat = lambda gradients: torch.cat([g.double().flatten() for g in gradients])  # noqa: E731
    wanted = 40 * flat(prox).norm() / flat(ce).norm()
    def step(plan: Plan) -> dict:
        return continual.train_step(Objective(now.model, plan, now.cfg), batch, torch.optim.AdamW(v), plan, now.cfg)

    record = step(Plan(2, 1, 1e-3, 6, "kl"))
    assert record["prox_ce_ratio"] == pytest.approx(wanted.item(), rel=1e-3)
    record = step(Plan(2, 1, 1e-3, 6))
    assert record["prox_ce_ratio"] == record["prox"] == 0


# -- what trains ------------------------------------------------------------------------------------

ADAPTER = {"A", "B", "A_prev", "B_prev"}
ROWS = {"embed_tokens.rows", "lm_head.rows"}
TABLES = ROWS | {"embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("name, first, after", [
    ("scratch", ADAPTER | ROWS, ADAPTER), ("words", ADAPTER | TABLES, ADAPTER | TABLES)])
def test_what_moves_at_d1_and_later(name, first, after, request):
    """Recipe paper: LoRA and the new tokens' rows, then LoRA alone. Recipe release: LoRA and both whole tables,
    always. Every other tensor, the old tokens' rows included, keeps its bits."""
    now = fresh(request.getfixturevalue(name))
    before = state(now.model)
    continual.learn_first(now.model, now.data.stages[:1], now.template, now.cfg, SILENT)
    middle = state(now.model)
    assert kinds(moved(before, middle)) == first - {"A_prev", "B_prev"}, "the anchor moves when stage 2 begins"
    later(now, "peso")
    assert kinds(moved(middle, state(now.model))) == after


@pytest.mark.parametrize("what, expected", [
    ("adapter", ADAPTER), ("rows", ADAPTER | ROWS), ("tables", ADAPTER | TABLES)])
def test_each_choice_trains_what_it_names(words, what, expected):
    """--first-trains adapter, rows or tables: these tensors get a gradient and move, and no others."""
    now = fresh(words, first_trains=what)
    before = state(now.model)
    continual.learn_first(now.model, now.data.stages[:1], now.template, now.cfg, SILENT)
    assert kinds(moved(before, state(now.model))) == expected - {"A_prev", "B_prev"}
    trained = {name for name, p in now.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert kinds(trained) == expected - {"A_prev", "B_prev"}


def test_tied_tables_stay_one_and_untied_ones_are_two(words):
    """Rows: embedding and head remain one table. Tables: two, which start equal and go their own ways."""
    rows_only, tables = learnt(words, first_trains="rows").model, fresh(words).model
    assert rows_only.lm_head is rows_only.model.embed_tokens
    continual.choose_trainable(tables, "tables")
    head, embedding = tables.lm_head, tables.model.embed_tokens
    assert head is not embedding
    for name in ("weight", "rows"):
        a, b = getattr(head, name), getattr(embedding, name)
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    continual.learn_first(tables, words.data.stages[:1], words.template, words.cfg, SILENT)
    assert tables.lm_head is head, "untied once, not again"
    assert not torch.equal(head.rows, embedding.rows) and not torch.equal(head.weight, embedding.weight)


# -- going back -------------------------------------------------------------------------------------

class Halved(LoRALinear):
    """Another method's adapter: half the effect, and a note of how often it advanced."""

    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) / 2

    def advance(self, generator=None) -> None:
        super().advance(generator)
        self.advanced = getattr(self, "advanced", 0) + 1


@pytest.mark.parametrize("when", ["before D1", "after D1", "after D1, the only stage with tables"])
def test_restore_undoes_training(either, when):
    """Back to a snapshot, exactly: every tensor and every logit, after training, untying and another adapter."""
    changes = {"first_trains": "tables", "later_trains": "adapter"} if "only" in when else {}
    now = fresh(either) if when == "before D1" else learnt(either, **changes)
    saved, before = snapshot(now.model, True), state(now.model)
    ids = torch.arange(12)[None]
    logits = now.model.eval()(ids)
    continual.learn_first(now.model, now.data.stages[:1], now.template, now.cfg, SILENT)
    rewrap(now.model, Halved)
    perturb(now.model)
    assert not torch.equal(now.model.eval()(ids), logits)
    restore(now.model, saved)
    assert not moved(before, state(now.model)) and torch.equal(now.model.eval()(ids), logits)
    assert all(type(layer) is LoRALinear for _, layer in adapters(now.model))
    assert (now.model.lm_head is now.model.model.embed_tokens) == saved.tied


def test_restore_goes_from_tied_to_untied_too(words):
    """A snapshot with two tables is restored into a model that has been tied again: two tables, with their values."""
    now = fresh(words)
    base = snapshot(now.model, True)
    continual.learn_first(now.model, now.data.stages[:1], now.template, now.cfg, SILENT)
    first, wanted = snapshot(now.model, True), state(now.model)
    restore(now.model, base)
    assert now.model.lm_head is now.model.model.embed_tokens
    restore(now.model, first)
    assert now.model.lm_head is not now.model.model.embed_tokens and not moved(wanted, state(now.model))


def test_a_snapshot_is_a_copy(scratch):
    """Training after the snapshot does not change it."""
    now = fresh(scratch)
    saved = snapshot(now.model, True)
    kept = {name: t.clone() for name, t in saved.tensors.items()}
    continual.learn_first(now.model, now.data.stages[:1], now.template, now.cfg, SILENT)
    assert all(torch.equal(saved.tensors[name], kept[name]) for name in kept)


def test_a_method_may_bring_its_own_adapter(scratch, monkeypatch):
    """A row of METHODS with an adapter class: layers of that class from stage 2 on, starting at the D_1 state,
    advanced once a stage; the next method gets plain LoRA back."""
    monkeypatch.setitem(METHODS, "halved", continual.Method(adapter=Halved))
    now = learnt(scratch)
    saved, before = snapshot(now.model, True), [p.detach().clone() for p in adapter_parameters(now.model)]
    later(now, "halved")
    layers = [layer for _, layer in adapters(now.model)]
    assert all(type(layer) is Halved and layer.advanced == 1 for layer in layers)
    assert not any(torch.equal(p, b) for p, b in zip(adapter_parameters(now.model), before))
    restore(now.model, saved)
    assert all(torch.equal(p, b) for p, b in zip(adapter_parameters(now.model), before))


# -- one stage --------------------------------------------------------------------------------------

def stage_data(now: Run, t: int = 2):
    return (examples(now.data.stages[t - 1], part, now.cfg.window) for part in ("train", "valid"))


@pytest.mark.parametrize("losses", [[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [2.0, 1.0, 1.0]])
def test_the_epoch_with_the_lowest_validation_loss_is_kept(scratch, losses, monkeypatch):
    """Whatever comes after it; of equal ones the first."""
    now, after = learnt(scratch), []
    told = iter(losses)

    def validate(model, *rest):
        after.append([p.detach().clone() for p in adapter_parameters(model)])
        return next(told)
    monkeypatch.setattr(continual, "mean_loss", validate)
    continual.choose_trainable(now.model, "adapter")
    continual.train_stage(now.model, *stage_data(now), now.template, Plan(2, 3, 1e-3, 8), now.cfg)
    same = [all(torch.equal(p, q) for p, q in zip(adapter_parameters(now.model), kept)) for kept in after]
    assert same == [k == losses.index(min(losses)) for k in range(3)]


def test_the_validation_loss_is_the_mean_over_pairs(scratch):
    """However the pairs are batched, every pair weighs the same, and the penalty is not in it."""
    now = learnt(scratch)
    now.model.eval()
    pairs = examples(now.data.stages[0], "valid", now.cfg.window)
    wanted = cross_entropy_by_hand(now, pairs, 0.7)
    for size in (512, 7):
        assert continual.mean_loss(now.model, sequences(pairs, now.template), 0.7, (), size) == pytest.approx(wanted, rel=1e-5)


def test_learning_rate_schedule():
    """Linear up over the first share of the steps, times a cosine from 1 to 0: by the half-angle identity."""
    for steps, warmup in ((4, 0.0), (100, 0.01), (100, 0.2), (7, 0.5), (1, 0.01)):
        for step in range(steps):
            ramp = min(1.0, (step + 1) / (warmup * steps)) if warmup * steps > 1 else 1.0
            wanted = ramp * math.cos(math.pi * step / steps / 2) ** 2
            assert continual.learning_rate(step, steps, warmup) == pytest.approx(wanted), (step, steps, warmup)
    assert continual.learning_rate(0, 100, 0.01) == 1 and continual.learning_rate(50, 100, 0.0) == pytest.approx(0.5)
    assert continual.learning_rate(0, 100, 0.1) == pytest.approx(0.1) and continual.learning_rate(9, 9, 0.0) < 1e-12


def test_the_rate_and_the_steps_in_the_log(scratch):
    """lr follows the schedule from the plan's rate; steps count up to the plan's number; the last epoch is marked."""
    now, records = learnt(scratch), []
    continual.choose_trainable(now.model, "adapter")
    train_pairs, valid = stage_data(now)
    continual.train_stage(now.model, train_pairs, valid, now.template, Plan(2, 2, 3e-3, 8), now.cfg, records.append)
    steps = [r for r in records if "ce" in r]
    checks = [r for r in records if "valid_ce" in r]
    total = 2 * math.ceil(len(train_pairs) / 8)
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1)) and len(steps) <= total == steps[0]["steps"]
    for r in steps:
        assert r["lr"] == pytest.approx(3e-3 * continual.learning_rate(r["step"] - 1, total, now.cfg.warmup))
    assert [(r["epoch"], r["last"]) for r in checks] == [(0, False), (1, True)]
    assert sum(r["tokens"] for r in steps) > 0


def test_nan_is_an_error_before_the_step(scratch, monkeypatch):
    """A loss that is not finite raises before any weight has changed; a validation loss, after its epoch."""
    now = learnt(scratch, lam=math.inf)  # inf x 0 at the first step
    before = state(now.model)
    with pytest.raises(FloatingPointError, match="stage 2"):
        later(now, "peso")
    assert not moved(before, state(now.model))
    monkeypatch.setattr(continual, "mean_loss", lambda *rest: math.nan)
    with pytest.raises(FloatingPointError, match="validation"):
        later(now, "single")


def test_a_gradient_that_is_not_finite_is_an_error_too(scratch):
    """The loss may be finite where its gradient is not."""
    now = learnt(scratch)
    continual.choose_trainable(now.model, "adapter")
    adapter_parameters(now.model)[0].register_hook(lambda g: g * math.inf)
    before = state(now.model)
    with pytest.raises(FloatingPointError):
        continual.train_stage(now.model, *stage_data(now), now.template, Plan(2, 1, 1e-3, 8), now.cfg)
    assert not moved(before, state(now.model))


def test_no_epoch_leaves_the_model_alone(scratch):
    """A base of 0 epochs is the random one."""
    now = fresh(scratch)
    before = state(now.model)
    continual.train_stage(now.model, *stage_data(now), now.template, Plan(0, 0, 1e-3, 8), now.cfg)
    assert not moved(before, state(now.model))


def test_the_order_of_the_data_depends_on_seed_stage_and_epoch_only(scratch):
    """Not on the weights, the rate, the penalty or what was drawn before; and on each of the three."""
    now = learnt(scratch)
    pairs, valid = stage_data(now)

    def order(stage=2, seed=0, lr=1e-3, penalty="none", noise=0):
        trial, ids, epochs = fresh(now, seed=seed), [], ([], [])
        perturb(trial.model, 0.01 * noise)
        torch.manual_seed(noise)
        continual.choose_trainable(trial.model, "adapter")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(continual, "collate", lambda rows, device, preamble: (ids.append([r.ids.tolist() for r in rows]),
                                                                      collate(rows, device, preamble))[1])
            plan = Plan(stage, 2, lr, 8, penalty)
            continual.train_stage(trial.model, pairs, valid, now.template, plan, trial.cfg,
                                  lambda record: epochs[record["epoch"]].append(ids[-1]) if "ce" in record else None)
        return epochs
    first, second = order()
    assert order(lr=1e-2, penalty="kl", noise=5) == (first, second)
    assert order(stage=3)[0] != first and order(seed=1)[0] != first and second != first
    every = [sorted(row for batch in epoch for row in batch) for epoch in (first, second)]
    assert every[0] == every[1] == sorted(r.ids.tolist() for r in sequences(pairs, now.template)), "each epoch sees all"


def test_the_base_learns_d0_alone(scratch, monkeypatch):
    """D_0: the training and validation pairs of a seeded share of D_1's users; no test item, no later stage."""
    seen = []
    monkeypatch.setattr(continual, "train_stage", lambda model, train, valid, template, plan, cfg, log, keeper: seen.append(
        (train, valid, plan)))
    stage = scratch.data.stages[0]
    for share, seed in ((0.5, 0), (0.5, 1), (1.0, 0)):
        cfg = dataclasses.replace(scratch.cfg, base_share=share, seed=seed)
        continual.learn_base(scratch.model, stage, scratch.template, cfg, SILENT)
    users = [{e.user for e in valid} for _, valid, _ in seen]
    assert [len(u) for u in users] == [math.ceil(len(stage.users) / 2)] * 2 + [len(stage.users)]
    assert users[0] != users[1]
    for (pairs, valid, plan), chosen in zip(seen, users):
        assert set(pairs) == {e for e in examples(stage, "train", scratch.cfg.window) if e.user in chosen}
        assert set(valid) == {e for e in examples(stage, "valid", scratch.cfg.window) if e.user in chosen}
        assert (plan.stage, plan.penalty) == (0, "none")


def test_unknown_names_are_refused_with_the_nearest():
    """A method or a penalty that does not exist: the message lists those that do."""
    with pytest.raises(ValueError, match="did you mean peso"):
        continual.method_named("pesso")
    with pytest.raises(ValueError, match="rank-kl"):
        continual.penalty_named(micro("x", proximal="rank"), METHODS["peso"])
    assert continual.penalty_named(micro("x", proximal="none"), METHODS["peso"]) == "none"
