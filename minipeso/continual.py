"""The method: one adapter, trained stage by stage, held near its previous state (Eq. 12).

    L_t = CE(D_t) + lam * sum_g KL( softmax(v_t^(g)) || softmax(v_{t-1}^(g)) ),   v_t starts at v_{t-1}
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeso.config import Config, UsageError, unknown
from minipeso.llama import Llama
from minipeso.lora import LoRALinear, adapter_parameters, adapters, rewrap
from minipeso.proximal import PROXIMALS
from minipeso.stages import Example, Stage, examples
from minipeso.tokens import IGNORE, Batch, Row, Template, batches, collate, rows


# -- the table of methods ---------------------------------------------------------------------------

def newest(stages: list[Stage]) -> list[Stage]:
    """Continual learning proper: at stage t, D_t and nothing else."""
    return stages[-1:]


def everything(stages: list[Stage]) -> list[Stage]:
    """Retraining: D_1 .. D_t."""
    return stages


def nothing(stages: list[Stage]) -> list[Stage]:
    """No adaptation."""
    return []


@dataclass(frozen=True)
class Method:
    """One row of the paper's tables. A new method is a row, and at most one file for its parts: an
    adapter class with its own `delta` and `advance`, another choice of data, another penalty."""

    data: Callable[[list[Stage]], list[Stage]] = newest  # stages 1..t -> what stage t trains on
    restart: bool = False  # stage t starts from the base and a new adapter; otherwise v_t <- v_{t-1} (Eq. 4)
    proximal: str = "none"  # the penalty, unless --proximal names another
    adapter: type[LoRALinear] = LoRALinear  # from stage 2 on; D_1 is learnt by plain LoRA, once for all


METHODS = {
    "pretrain": Method(data=nothing),  # the D_1 model on every stage
    "single": Method(),  # Eq. 4, single evolving LoRA
    "peso": Method(proximal="kl"),  # Eq. 12
    "retrain": Method(data=everything, restart=True),  # the costly reference; not in the paper's tables
}


def method_named(name: str) -> Method:
    """The row of METHODS; UsageError lists the names and suggests the nearest."""
    if name not in METHODS:
        raise UsageError(unknown("method", name, METHODS))
    return METHODS[name]


def penalty_named(cfg: Config, method: Method) -> str:
    """The penalty's name in PROXIMALS, or "none"."""
    name = method.proximal if cfg.proximal == "method" else cfg.proximal
    if name not in (*PROXIMALS, "none"):
        raise UsageError(unknown("proximal", name, [*PROXIMALS, "none"]))
    return name


# -- the objective ----------------------------------------------------------------------------------

def answer_loss(model: Llama, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Eq. 2: the mean of -log p over the answers' tokens. The head sees only their positions."""
    at = batch.labels != IGNORE  # (n, l)
    hidden = model.model(batch.ids, batch.positions, batch.mask)[at]  # (answers * L, d)
    return F.cross_entropy(model.head(hidden) / temperature, batch.labels[at])


def anchored(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(A, B, A_prev, B_prev) of every adapted layer."""
    return [(layer.A, layer.B, layer.A_prev, layer.B_prev) for _, layer in adapters(model)]


class Loss(NamedTuple):
    ce: Tensor
    prox: Tensor  # before lam
    total: Tensor


def stage_loss(model: Llama, batch: Batch, penalty: str, lam: float, temperature: float = 1.0,
               groups: str = "module", reduction: str = "sum") -> Loss:
    """Eq. 12 (Eq. 6 with penalty "l2"): CE + lam * penalty over the groups of the adapter."""
    ce = answer_loss(model, batch, temperature)
    if penalty == "none":
        return Loss(ce, ce.new_zeros(()), ce)
    prox = PROXIMALS[penalty](anchored(model), groups, reduction)
    return Loss(ce, prox, ce + lam * prox)


# -- one stage --------------------------------------------------------------------------------------

class Plan(NamedTuple):
    """What differs between training the base, D_1 and a later stage."""

    stage: int  # 0: the base
    epochs: int
    lr: float
    batch: int  # pairs a step
    penalty: str = "none"


Log = Callable[[dict], None]


def learn_base(model: Llama, first: Stage, template: Template, cfg: Config, log: Log) -> None:
    """The stand-in for a pretrained LLM (ours, for `--base tiny` and `small`): all parameters, on D_0,
    the training pairs of a seeded share of D_1's users. What only D_1 knows is left to the adapter."""
    order = torch.randperm(len(first.users), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    users = {first.users[i] for i in order[:math.ceil(cfg.base_share * len(order))]}
    train, valid = ([e for e in examples(first, part, cfg.window) if e.user in users] for part in ("train", "valid"))
    train_stage(model, train, valid, template, Plan(0, cfg.base_epochs, cfg.base_lr, cfg.base_batch), cfg, log)


def learn_first(model: Llama, stages: list[Stage], template: Template, cfg: Config, log: Log) -> None:
    """D_1 by a new adapter, the same for every method: LoRA and what cfg.first_trains names, at the
    full rate, without a penalty (there is no previous state). More stages: retraining on all of them."""
    choose_trainable(model, cfg.first_trains)
    _learn(model, stages, Plan(stages[-1].number, cfg.epochs, cfg.lr, cfg.batch), template, cfg, log)


def learn_stage(model: Llama, method: Method, stages: list[Stage], template: Template, cfg: Config,
                base: Snapshot, log: Log) -> None:
    """Stage t = len(stages) >= 2, from the model of stage t - 1 (v_t <- v_{t-1}): what cfg.later_trains
    names, at cfg.later_lr of the rate, with the method's penalty. One that restarts goes to `base`."""
    data = [stage for stage in method.data(stages) if any(len(taken) > 2 for taken in stage.current.values())]
    if not data:
        return
    if method.restart:
        restore(model, base)
        return learn_first(model, data, template, cfg, log)
    rewrap(model, method.adapter)
    choose_trainable(model, cfg.later_trains)
    plan = Plan(len(stages), cfg.epochs, cfg.lr * cfg.later_lr, cfg.batch, penalty_named(cfg, method))
    _learn(model, data, plan, template, cfg, log)


def _learn(model: Llama, data: list[Stage], plan: Plan, template: Template, cfg: Config, log: Log) -> None:
    train, valid = ([e for stage in data for e in examples(stage, part, cfg.window)] for part in ("train", "valid"))
    train_stage(model, train, valid, template, plan, cfg, log)
    for _, layer in adapters(model):
        layer.advance()  # the anchor moves up


class Snapshot(NamedTuple):
    """All that training may have changed: methods share one D_1 model by going back to it."""

    tensors: dict[str, Tensor]
    tied: bool


def snapshot(model: Llama, cfg: Config) -> Snapshot:
    """Adapters, anchors, rows of new tokens; whole tables only if the recipe trains them."""
    kept = {"A", "B", "A_prev", "B_prev", "rows"}
    tables = ("embed_tokens.weight", "lm_head.weight") if "tables" in (cfg.first_trains, cfg.later_trains) else ()
    return Snapshot({name: t.clone() for name, t in model.state_dict().items()
                     if name.rpartition(".")[2] in kept or name.endswith(tables)},
                    model.lm_head is model.model.embed_tokens)


def restore(model: Llama, saved: Snapshot) -> None:
    rewrap(model, LoRALinear)
    if saved.tied:
        model.lm_head = model.model.embed_tokens
    else:
        model.untie()
    state = model.state_dict()
    for name, tensor in saved.tensors.items():
        state[name].copy_(tensor)


def choose_trainable(model: Llama, what: str) -> None:
    """The adapter, and besides: "adapter" nothing, "rows" the new tokens' vectors, "tables" embedding
    and head as two independent tables (Release: also at every later stage, without a penalty)."""
    model.requires_grad_(False)
    for p in adapter_parameters(model):
        p.requires_grad_(True)
    if what == "tables":
        model.untie()
    for table in {model.model.embed_tokens, model.lm_head}:
        table.weight.requires_grad_(what == "tables")
        if table.rows is not None:
            table.rows.requires_grad_(what != "adapter")


def train_stage(model: Llama, train: list[Example], valid: list[Example], template: Template, plan: Plan,
                cfg: Config, log: Log = lambda record: None) -> None:
    """Minimises stage_loss over whatever requires a gradient, and keeps the epoch with the lowest
    validation cross-entropy (without the penalty, which says nothing about users).

    AdamW, warm-up and a cosine to 0, restarted every stage (Release). The order of the data depends
    on (seed, stage, epoch) alone. FloatingPointError if the loss or its gradient is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=cfg.weight_decay, fused=True)
    data, checks = rows(train, template), rows(valid, template)
    steps = plan.epochs * math.ceil(len(train) / plan.batch)
    best, step = (math.inf, parameters), 0
    for epoch in range(plan.epochs):
        seed = (cfg.seed * 1009 + plan.stage) * 1009 + epoch
        torch.manual_seed(seed)  # dropout's only source
        model.train()
        for chosen in batches(data, plan.batch, torch.Generator().manual_seed(seed)):
            optimiser.param_groups[0]["lr"] = plan.lr * learning_rate(step, steps, cfg.warmup)
            record = train_step(model, collate(chosen, model.device), optimiser, plan, cfg)
            step += 1
            log({"stage": plan.stage, "epoch": epoch, "step": step, "steps": steps, **record})
        loss = mean_loss(model, checks, cfg.temperature)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is no longer finite at stage {plan.stage}\n"
                                     f"found {loss} after epoch {epoch}\nlower --lr or --lambda")
        log({"stage": plan.stage, "epoch": epoch, "step": step, "steps": steps, "valid_ce": loss,
             "last": epoch == plan.epochs - 1})
        if loss < best[0]:
            best = loss, [p.detach().clone() for p in parameters]
    for p, kept in zip(parameters, best[1], strict=True):
        p.data.copy_(kept)


def train_step(model: Llama, batch: Batch, optimiser, plan: Plan, cfg: Config) -> dict[str, float]:
    """One step of AdamW; what the log should know of it. prox_ce_ratio is
    || lam d prox/dv || / || d CE/dv || over the adapter: how hard the anchor pulls."""
    loss = stage_loss(model, batch, plan.penalty, cfg.lam, cfg.temperature, cfg.groups, cfg.reduction)
    v = adapter_parameters(model)
    pull = torch.autograd.grad(cfg.lam * loss.prox, v, retain_graph=True) if loss.prox.requires_grad else []
    optimiser.zero_grad()
    loss.total.backward()
    push = [p.grad - g for p, g in zip(v, pull)]
    ratio = (norm(pull) / norm(push)).item() if pull else 0.0
    total = nn.utils.clip_grad_norm_((p for group in optimiser.param_groups for p in group["params"]), cfg.clip)
    if not math.isfinite(loss.total.item() + total.item()):
        raise FloatingPointError(f"the loss is no longer finite at stage {plan.stage}\nce {loss.ce.item()}, prox "
                                 f"{loss.prox.item()}, gradient norm {total.item()}\nlower --lr or --lambda")
    optimiser.step()
    return {"ce": loss.ce.item(), "prox": loss.prox.item(), "prox_ce_ratio": ratio,
            "lr": optimiser.param_groups[0]["lr"], "tokens": int(batch.ids.numel())}


def norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """The factor at `step` of `steps`: linear over the first `warmup` of them, then a cosine to 0."""
    ramp = max(warmup * steps, 1.0)
    return min((step + 1) / ramp, 1.0) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


@torch.no_grad()
def mean_loss(model: Llama, data: list[Row], temperature: float, pairs: int = 512) -> float:
    """The cross-entropy of all pairs, every pair weighing the same."""
    model.eval()
    chosen = [collate(some, model.device) for some in batches(data, pairs, torch.Generator())]
    total = sum(answer_loss(model, batch, temperature).item() * batch.pairs for batch in chosen)
    return total / sum(batch.pairs for batch in chosen)
