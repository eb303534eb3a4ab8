"""The method: one adapter, trained stage by stage, held near its previous state (Eq. 12).

    L_t = CE(D_t) + lam * sum_g KL( softmax(v_t^(g)) || softmax(v_{t-1}^(g)) ),   v_t starts at v_{t-1}
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minipeso import parallel
from minipeso.runs.checkpoint import Snapshot, restore
from minipeso.config import Config, UsageError, unknown
from minipeso.rivals.cumulative import InfLoRALinear, SDLoRALinear, SumLoRALinear, design_inflora, variants
from minipeso.runs.keeper import Keeper
from minipeso.llama import Llama
from minipeso.lora import LoRALinear, adapter_parameters, adapters, rewrap
from minipeso.objective import Loss, anchored, answer_loss, stage_loss
from minipeso.progress import Progress
from minipeso.proximal import PROXIMALS
from minipeso.stages import Example, Stage, examples
from minipeso.tokens import Batch, TokenSequence, Template, batches, collate, sequences


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
    adapter class with its own `factors` and `advance`, another choice of data, another penalty."""

    data: Callable[[list[Stage]], list[Stage]] = newest  # stages 1..t -> what stage t trains on
    restart: bool = False  # stage t starts from the base and a new adapter; otherwise v_t <- v_{t-1} (Eq. 4)
    proximal: str = "none"  # the penalty, unless --proximal names another
    adapter: type[LoRALinear] = LoRALinear  # from stage 2 on; D_1 is learnt by plain LoRA, once for all
    prepare: Callable | None = None  # (model, t, stages, D_{t-1}, D_t) before the adapter advances
    system: str = "llm"  # "evorec": stages learnt by evorec.py; "two-tower": another model (twotower.py)


METHODS = {
    "pretrain": Method(data=nothing),  # the D_1 model on every stage
    "single": Method(),  # Eq. 4, single evolving LoRA
    "peso": Method(proximal="kl"),  # Eq. 12
    "peso-quadratic": Method(proximal="quadratic"),  # Eq. 6 with Proposition 3's H; not in the paper's tables
    "retrain": Method(data=everything, restart=True),  # the costly reference; not in the paper's tables
    **{f"sumlora-{name}": Method(adapter=kind) for name, kind in variants(SumLoRALinear).items()},  # Eq. 5
    **{f"sdlora-{name}": Method(adapter=kind) for name, kind in variants(SDLoRALinear).items()},
    **{f"inflora-{name}": Method(adapter=kind, prepare=design_inflora)
       for name, kind in variants(InfLoRALinear).items()},
    "evorec": Method(system="evorec"),
    **{f"lightgcn-{name}": Method(system="two-tower") for name in ("pretrain", "finetune", "contrastive", "piw", "pisa")},
}


def method_named(name: str) -> Method:
    """The row of METHODS; UsageError lists the names and suggests the nearest."""
    if name not in METHODS:
        raise UsageError(unknown("method", name, METHODS))
    return METHODS[name]


def penalty_named(cfg: Config, method: Method) -> str:
    """The penalty's name in PROXIMALS, or "none"."""
    name = method.proximal if cfg.proximal == "method" else cfg.proximal
    known = (*PROXIMALS, "output-kl", "none")
    if name not in known:
        raise UsageError(unknown("proximal", name, known))
    return name


# -- one stage --------------------------------------------------------------------------------------

class Plan(NamedTuple):
    """What differs between training the base, D_1 and a later stage."""

    stage: int  # 0: the base
    epochs: int
    lr: float
    batch: int  # pairs a step
    penalty: str = "none"
    extra: Callable[[Llama], Tensor] | None = None  # a term of another system's (EvoRec's consistency)


class Objective(nn.Module):
    """stage_loss of a model by a plan, as a module: what torch can spread over processes. The CE of each is
    weighted by its share of the batch's pairs, times their number, so that the mean is that of the whole batch."""

    def __init__(self, model: Llama, plan: Plan, cfg: Config):
        super().__init__()
        self.model, self.plan, self.cfg = model, plan, cfg

    def forward(self, batch: Batch, weight: float = 1.0) -> Loss:
        cfg = self.cfg
        loss = stage_loss(self.model, batch, self.plan.penalty, cfg.lam, cfg.temperature, cfg.groups, cfg.reduction,
                          cfg.prox_scale)
        if self.plan.extra:
            loss = loss._replace(total=loss.total + self.plan.extra(self.model))
        return loss if weight == 1 else loss._replace(total=loss.total + (weight - 1) * loss.ce)


Log = Callable[[dict], None]
NO_KEEPER = Keeper()


def learn_base(model: Llama, first: Stage, template: Template, cfg: Config, log: Log,
               keeper: Keeper = NO_KEEPER) -> None:
    """The stand-in for a pretrained LLM (ours, for `--base tiny` and `small`): all parameters, on D_0,
    the training pairs of a seeded share of D_1's users. What only D_1 knows is left to the adapter."""
    order = torch.randperm(len(first.users), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    users = {first.users[i] for i in order[:math.ceil(cfg.base_share * len(order))]}
    train, valid = ([e for e in examples(first, part, cfg.window) if e.user in users] for part in ("train", "valid"))
    plan = Plan(0, cfg.base_epochs, cfg.base_lr, cfg.base_batch)
    train_stage(model, train, valid, template, plan, cfg, log, keeper)


def learn_first(model: Llama, stages: list[Stage], template: Template, cfg: Config, log: Log,
                keeper: Keeper = NO_KEEPER) -> None:
    """D_1 by a new adapter, the same for every method: LoRA and what cfg.first_trains names, at the
    full rate, without a penalty (there is no previous state). More stages: retraining on all of them."""
    choose_trainable(model, cfg.first_trains)
    _learn(model, stages, Plan(stages[-1].number, cfg.epochs, cfg.lr, cfg.batch), template, cfg, log, keeper)


def learn_stage(model: Llama, method: Method, stages: list[Stage], template: Template, cfg: Config,
                base: Snapshot, log: Log, keeper: Keeper = NO_KEEPER) -> None:
    """Stage t = len(stages) >= 2, from the model of stage t - 1 (v_t <- v_{t-1}): what cfg.later_trains
    names, at cfg.later_lr of the rate, with the method's penalty. One that restarts goes to `base`."""
    data = [stage for stage in method.data(stages) if any(len(taken) > 2 for taken in stage.current.values())]
    if not data:
        return
    if method.restart:
        restore(model, base)
        return learn_first(model, data, template, cfg, log, keeper)
    t = len(stages)
    rewrap(model, method.adapter)
    if method.prepare:
        past, now = (training_batches(stage, template, cfg, model.device) for stage in stages[-2:])
        method.prepare(model, t, cfg.stages, past, now)
    generator = torch.Generator().manual_seed(cfg.seed * 1009 + t)
    for _, layer in adapters(model):
        layer.advance(generator)  # the anchor moves up
    choose_trainable(model, cfg.later_trains)
    plan = Plan(t, cfg.epochs, cfg.lr * cfg.later_lr, cfg.batch, penalty_named(cfg, method))
    _learn(model, data, plan, template, cfg, log, keeper)


def _learn(model: Llama, data: list[Stage], plan: Plan, template: Template, cfg: Config, log: Log,
           keeper: Keeper) -> None:
    train, valid = ([e for stage in data for e in examples(stage, part, cfg.window)] for part in ("train", "valid"))
    train_stage(model, train, valid, template, plan, cfg, log, keeper)
    v, v_prev = ([M for pair in anchored(model) for M in pair[half:half + 2]] for half in (0, 2))
    log({"stage": plan.stage, "moved": norm(a.detach() - b for a, b in zip(v, v_prev)).item(),
         "anchor": norm(v_prev).item()})


def training_batches(stage: Stage, template: Template, cfg: Config, device) -> Iterator[Batch]:
    """A stage's training pairs once, without shuffling, for methods that look at their inputs."""
    data = sequences(examples(stage, "train", cfg.window), template)
    return (collate(some, device) for some in batches(data, 512, torch.Generator().manual_seed(0)))


def choose_trainable(model: Llama, what: str) -> None:
    """The adapter, and besides: "adapter" nothing, "rows" the new tokens' vectors, "tables" embedding
    and head as two independent tables (Release: also at every later stage, without a penalty)."""
    model.requires_grad_(False)
    for _, layer in adapters(model):
        for p in layer.trained():
            p.requires_grad_(True)
    if what == "tables":
        model.untie()
    for table in {model.model.embed_tokens, model.lm_head}:
        table.weight.requires_grad_(what == "tables")
        if table.rows is not None:
            table.rows.requires_grad_(what != "adapter")


def train_stage(model: Llama, train: list[Example], valid: list[Example], template: Template, plan: Plan,
                cfg: Config, log: Log = lambda record: None, keeper: Keeper = NO_KEEPER) -> None:
    """Minimises stage_loss over whatever requires a gradient, and keeps the epoch with the lowest
    validation cross-entropy (without the penalty, which says nothing about users).

    AdamW, warm-up and a cosine to 0, restarted every stage (Release). The order of the data depends
    on (seed, stage, epoch) alone, so `keeper` goes on after an interruption as if there had been none.
    FloatingPointError if the loss or its gradient is not finite.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(parameters.values(), lr=plan.lr, weight_decay=cfg.weight_decay, fused=True)
    data, checks = sequences(train, template), sequences(valid, template)
    steps = plan.epochs * math.ceil(len(train) / plan.batch)
    objective = parallel.adding_up(Objective(model, plan, cfg))
    preamble = None if plan.penalty == "output-kl" else template.preamble  # which compares layers at every token
    at = keeper.begin(Progress(parameters, optimiser))
    for epoch in range(at.epoch, plan.epochs):
        seed = (cfg.seed * 1009 + plan.stage) * 1009 + epoch
        torch.manual_seed(seed + (parallel.rank() << 40))  # dropout's only source
        model.train()
        for chosen in keeper.steps(at, batches(data, plan.batch, torch.Generator().manual_seed(seed))):
            optimiser.param_groups[0]["lr"] = plan.lr * learning_rate(at.step, steps, cfg.warmup)
            pairs, mine = sum(row.pairs for row in chosen), parallel.share(chosen)
            batch = collate(mine or chosen[:1], model.device, preamble)
            weight = batch.pairs * parallel.size() / pairs if mine else 0.0
            record = train_step(objective, batch, optimiser, plan, cfg, weight)
            log({"stage": plan.stage, "epoch": epoch, "step": at.step + 1, "steps": steps, "pairs": pairs, **record})
        loss = mean_loss(model, checks, cfg.temperature, template.preamble)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is no longer finite at stage {plan.stage}\n"
                                     f"found {loss} after epoch {epoch}\nlower --lr or --lambda")
        log({"stage": plan.stage, "epoch": epoch, "step": at.step, "steps": steps, "valid_ce": loss,
             "last": epoch == plan.epochs - 1})
        keeper.end_epoch(at, loss)
    at.take_best()


def train_step(objective: nn.Module, batch: Batch, optimiser, plan: Plan, cfg: Config, weight: float = 1.0) -> dict:
    """One step of AdamW; what the log should know of it. prox_ce_ratio is
    || lam d prox/dv || / || d CE/dv || over the adapter: how hard the anchor pulls."""
    loss = objective(batch, weight)
    v = [p for p in adapter_parameters(objective) if p.requires_grad]
    pull = torch.autograd.grad(cfg.lam * loss.prox, v, retain_graph=True) if loss.prox.requires_grad else []
    optimiser.zero_grad()
    loss.total.backward()
    push = [p.grad - g for p, g in zip(v, pull)]
    ratio = norm(pull).item() / max(norm(push).item(), 1e-30) if pull else 0.0
    total = nn.utils.clip_grad_norm_((p for group in optimiser.param_groups for p in group["params"]), cfg.clip)
    if not math.isfinite(loss.total.item() + total.item()):
        raise FloatingPointError(f"the loss is no longer finite at stage {plan.stage}\nce {loss.ce.item()}, prox "
                                 f"{loss.prox.item()}, gradient norm {total.item()}\nlower --lr or --lambda")
    optimiser.step()
    ce = parallel.total(weight * loss.ce.detach()).item() / parallel.size()
    return {"ce": ce, "prox": loss.prox.item(), "prox_ce_ratio": ratio,
            "lr": optimiser.param_groups[0]["lr"], "tokens": batch.ids.numel() * parallel.size()}


def norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """The factor at `step` of `steps`: linear over the first `warmup` of them, then a cosine to 0."""
    ramp = max(warmup * steps, 1.0)
    return min((step + 1) / ramp, 1.0) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


@torch.no_grad()
def mean_loss(model: Llama, data: list[TokenSequence], temperature: float, preamble: Sequence[int] = (), pairs: int = 512) -> float:
    """The cross-entropy of all pairs, every pair weighing the same."""
    model.eval()
    chosen = [collate(some, model.device, preamble) for some in parallel.share(batches(data, pairs, torch.Generator()))]
    total = sum(answer_loss(model, batch, temperature).item() * batch.pairs for batch in chosen)
    return parallel.total(torch.tensor(total, dtype=torch.float64)).item() / sum(row.pairs for row in data)
