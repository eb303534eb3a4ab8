"""One stage of continual learning: the adapter learns D_t and is held near its previous state (Eq. 12, objective.py).

The loop over the stages is train.py's; which methods there are, methods.py's."""
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.utils import get_total_norm as norm

from minipeso import parallel
from minipeso.config import Config
from minipeso.llama import Llama
from minipeso.lora import adapter_parameters, adapters
from minipeso.objective import anchored, answer_loss, stage_loss
from minipeso.stages import Stage, examples
from minipeso.state import Epochs, Progress, every_epoch
from minipeso.tokens import Batch, Template, TokenSequence, batches, collate, sequences

CLIP = 1.0  # norm of the gradient. Release: the Trainer's default
Data = tuple[list[TokenSequence], list[TokenSequence]]  # to train on, to validate on


def stage_data(stages: Sequence[Stage], template: Template, window: int) -> Data:
    """The training and the validation pairs of these stages as token sequences."""
    train, valid = ([e for stage in stages for e in examples(stage, part, window)] for part in ("train", "valid"))
    return sequences(train, template), sequences(valid, template)


def choose_trainable(model: Llama, what: str) -> None:
    """The adapter learns, and besides: "adapter" nothing, "rows" the new tokens' vectors, "tables" embedding and head
    apart. From D_2 on: Paper: LoRA alone (Assumption 1). Release: "tables", no penalty. Here: paper; tiny: "rows"."""
    model.requires_grad_(False)
    for _, layer in adapters(model):
        for p in layer.trained():
            p.requires_grad_(True)
    if what == "tables":
        model.untie()
    for table in {model.model.embed_tokens, model.lm_head}:
        table.weight.requires_grad_(what == "tables")  # (V_text, d)
        if table.rows is not None:
            table.rows.requires_grad_(what != "adapter")  # (V_new, d)


def train_stage(model: Llama, data: Data, t: int, cfg: Config, log: Callable[[dict], None] = lambda record: None,
                epochs: Epochs = every_epoch) -> float:
    """Minimises Eq. 12 over whatever requires a gradient, and keeps the epoch with the lowest validation cross-entropy
    (without the penalty, which says nothing about users). -> that cross-entropy.

    AdamW, warm-up and a cosine to 0, begun anew at every stage (Release). Dropout and the order of the data depend on
    (seed, t, epoch) alone: `epochs` may go on where an earlier start stopped. FloatingPointError: no longer finite."""
    train, valid = data
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(parameters.values(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    progress = Progress(parameters, optimiser, patience=cfg.patience)
    pairs = sum(sequence.pairs for sequence in train)
    steps = cfg.epochs * math.ceil(pairs / cfg.batch)
    for epoch in epochs(progress, range(cfg.epochs)):
        seed = (cfg.seed * 1009 + t) * 1009 + epoch
        torch.manual_seed(seed + (parallel.rank() << 40))  # dropout's only source
        model.train()
        whole = batches(train, cfg.batch, torch.Generator().manual_seed(seed))
        for chosen in whole:
            optimiser.param_groups[0]["lr"] = cfg.lr * learning_rate(progress.step, steps, cfg.warmup)
            # users come whole, so steps have more or fewer pairs: each counts by its own, so every pair alike (Eq. 2)
            weight = sum(sequence.pairs for sequence in chosen) * len(whole) / pairs
            batch = collate(parallel.part(chosen), model.device)._replace(weight=weight)
            record = train_step(model, batch, optimiser, t, cfg)
            progress.step += 1
            log({"stage": t, "epoch": epoch, "step": progress.step, "steps": steps, **record})
        loss = mean_loss(model, valid, cfg.temperature)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is no longer finite at stage {t}\n"
                                     f"found {loss} after epoch {epoch}\nlower --lr or --lambda")
        progress.keep_best(loss)
        log({"stage": t, "epoch": epoch, "step": progress.step, "steps": steps, "valid_ce": loss})
    progress.take_best()
    log({"stage": t, **movement(model)})
    return progress.lowest


def train_step(model: Llama, batch: Batch, optimiser: torch.optim.Optimizer, t: int, cfg: Config) -> dict:
    """One step of AdamW -> its log; prox_ce_ratio: how hard the anchor pulls, ||lam d prox/dv|| / ||d CE/dv||."""
    loss = stage_loss(model, batch, cfg.proximal, cfg.lam, cfg.temperature, (cfg.groups, cfg.reduction))
    v, parameters = [p for p in adapter_parameters(model) if p.requires_grad], optimiser.param_groups[0]["params"]
    optimiser.zero_grad()
    (batch.weight * loss.ce).backward()  # the two parts of loss.total one by one: neither is computed twice
    pull = torch.autograd.grad(cfg.lam * loss.prox, v) if loss.prox.requires_grad else []
    for p, g in zip(v, pull):
        p.grad += g
    parallel.average_gradients(parameters, batch.pairs)
    push = [p.grad - g for p, g in zip(v, pull)]
    ratio = norm(pull).item() / max(norm(push).item(), 1e-30) if pull else 0.0
    total = nn.utils.clip_grad_norm_(parameters, CLIP)
    if not math.isfinite(loss.total.item() + total.item()):
        raise FloatingPointError(f"the loss is no longer finite at stage {t}\nce {loss.ce.item()}, prox "
                                 f"{loss.prox.item()}, gradient norm {total.item()}\nlower --lr or --lambda")
    optimiser.step()
    return {"ce": loss.ce.item(), "prox": loss.prox.item(), "prox_ce_ratio": ratio,
            "lr": optimiser.param_groups[0]["lr"], "pairs": batch.pairs, "tokens": batch.ids.numel()}


def movement(model: Llama) -> dict:
    """{"moved": || v_t - v_{t-1} ||, "anchor": || v_{t-1} ||} of the whole adapter; {} without one."""
    layers = anchored(model)
    if not layers:
        return {}
    v, v_prev = ([M.detach() for layer in layers for M in layer[half:half + 2]] for half in (0, 2))
    return {"moved": norm([a - b for a, b in zip(v, v_prev)]).item(), "anchor": norm(v_prev).item()}


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """The factor at `step` of `steps`: linear over the first `warmup` of them, then a cosine to 0."""
    ramp = max(warmup * steps, 1.0)
    return min((step + 1) / ramp, 1.0) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


@torch.no_grad()
def mean_loss(model: Llama, data: list[TokenSequence], temperature: float, pairs: int = 512) -> float:
    """The cross-entropy of all pairs, every pair weighing the same."""
    model.eval()
    some = [collate(part, model.device) for part in parallel.share(batches(data, pairs, torch.Generator()))]
    total = sum(answer_loss(model, batch, temperature).item() * batch.pairs for batch in some)
    return parallel.total(torch.tensor(total, dtype=torch.float64)).item() / sum(sequence.pairs for sequence in data)
