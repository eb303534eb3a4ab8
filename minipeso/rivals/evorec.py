"""EvoRec (arXiv 2511.16414) on our Llama and stages: Locate, Forget, Update. A baseline beside PESO.

    locate   the ~30 % of layers whose hidden states differ most between the histories before and after D_t
    forget   the past items that a small sequential model finds least relevant to where the user is now
    update   only the located layers' adapters, by cross-entropy on the shortened histories

Its code: github.com/Estadio-c/EvoRec. Its filter's code and ratios were not to be had: what is ours is marked.
There the backbone chooses titles out of a list in the prompt; here it generates semantic IDs as everything else.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeso.config import Config
from minipeso.continual import NO_KEEPER, Log, Plan, choose_trainable, train_stage
from minipeso.runs.keeper import Keeper
from minipeso.llama import Llama
from minipeso.lora import adapters
from minipeso.rivals.sasrec import SASRec, fit, relevance
from minipeso.stages import Example, Stage, examples
from minipeso.tokens import IGNORE, Template, collate, sequences


class EvoRec:
    """What lives from stage to stage besides the adapter: the filter, fine-tuned on every D_t."""

    def __init__(self, n_items: int, cfg: Config):
        torch.manual_seed(cfg.seed)
        self.filter, self.cfg, self.seen = SASRec(n_items), cfg, 0

    def learn_stage(self, model: Llama, stages: Sequence[Stage], template: Template, log: Log,
                    keeper: Keeper = NO_KEEPER) -> Stage:
        """Stage t = len(stages) >= 2 -> D_t with shortened histories, to be ranked on."""
        cfg, shorter = self.cfg, self.forget(stages)
        located = locate(model, stages[-1], template, cfg)
        if not located:
            log({"stage": len(stages), "located": [], "touched": 0.0})
            return shorter
        choose_trainable(model, "adapter")
        touched = freeze_others(model, located)
        train, valid = (examples(shorter, part, cfg.window) for part in ("train", "valid"))
        plan = Plan(len(stages), cfg.epochs, cfg.lr * cfg.later_lr, cfg.batch)
        if cfg.evo_consistency:
            plan = plan._replace(extra=consistency(model, inactive(stages), template, cfg))
        train_stage(model, train, valid, template, plan, cfg, log, keeper)
        log({"stage": len(stages), "located": located, "touched": touched})
        return shorter

    def forget(self, stages: Sequence[Stage]) -> Stage:
        """D_t with every user's history less its least relevant items. The filter first learns what it has not
        seen yet of D_1 .. D_t, a stage at a time, training items only."""
        for stage in stages[self.seen:]:
            fit(self.filter, [stage.history[u] + taken[:-2] for u, taken in stage.current.items()], self.cfg.filter_epochs,
                self.cfg.seed * 1009 + stage.number)
        self.seen, stage = len(stages), stages[-1]
        users = [u for u, past in stage.history.items() if past]
        scores = relevance(self.filter, [stage.history[u] + stage.current[u][:-2] for u in users])
        kept = {u: forgotten(stage.history[u], score.tolist(), self.cfg.evo_forget, self.cfg.evo_newest)
                for u, score in zip(users, scores, strict=True)}
        return Stage(stage.number, stage.history | kept, stage.current)


def forgotten(past: list[int], score: list[float], share: float, newest: int) -> list[int]:
    """`past` (oldest first) without its floor(share len(past)) items of lowest score; the newest stay whatever
    their score. Ours: share 0.2 and 3 newest; the original gives no figures."""
    old = range(len(past) - newest)
    gone = set(sorted(old, key=lambda k: (score[k], k))[:math.floor(share * len(past))])
    return [item for k, item in enumerate(past) if k not in gone]


# -- locate -----------------------------------------------------------------------------------------

def locate(model: Llama, stage: Stage, template: Template, cfg: Config) -> list[int]:
    """The max(1, floor(evo_layers L)) layers that are most often the one with the lowest cosine similarity between
    a user's pooled hidden states before and after D_t's training items; ties go to the lower layer. [] if
    no user has both a past and training items: then nothing is located, and nothing updated (ours).

    Original: 9 of 28 layers, pooled over padding too. Here: real tokens only.
    """
    users = [u for u, past in stage.history.items() if past and len(stage.current[u]) > 2]
    if not users:
        return []
    similar = []
    for start in range(0, len(users), cfg.eval_batch):
        some = users[start:start + cfg.eval_batch]
        before = pooled(model, [template.prompt(stage.history[u][-cfg.window:]) for u in some])
        after = pooled(model, [template.prompt((stage.history[u] + stage.current[u][:-2])[-cfg.window:]) for u in some])
        similar.append(F.cosine_similarity(before, after, dim=-1))  # (layers, users)
    count = torch.bincount(torch.cat(similar, 1).argmin(0), minlength=len(model.model.layers))
    n = max(1, math.floor(cfg.evo_layers * len(count)))
    return sorted(torch.sort(count, descending=True, stable=True).indices[:n].tolist())


@torch.no_grad()
def pooled(model: Llama, prompts: list[Tensor]) -> Tensor:
    """Every layer's output, averaged over each prompt's own tokens: (layers, prompts, d)."""
    model.eval()
    ids = torch.nn.utils.rnn.pad_sequence(prompts, True).to(model.device)
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    real = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]  # (n, l)
    means = []
    hooks = [layer.register_forward_hook(lambda module, args, x: means.append(
        (x * real[..., None]).sum(1) / lengths[:, None])) for layer in model.model.layers]
    try:
        model.model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(means).float()


def freeze_others(model: Llama, located: list[int]) -> float:
    """Leaves a gradient to the located layers' adapters alone -> their share of all adapter parameters."""
    sizes = {True: 0, False: 0}
    for name, layer in adapters(model):
        inside = int(name.split("layers.")[1].split(".")[0]) in located
        for p in layer.trained():
            p.requires_grad_(inside)
            sizes[inside] += p.numel()
    return sizes[True] / sum(sizes.values())


# -- inactive users ---------------------------------------------------------------------------------

def inactive(stages: Sequence[Stage]) -> list[Example]:
    """U_I of the last stage: users of earlier stages who are not in it, each with its last known test question."""
    last = {}
    for stage in stages[:-1]:
        last |= {e.user: e for e in examples(stage, "test")}
    return [e for user, e in sorted(last.items()) if user not in stages[-1].current]


def consistency(model: Llama, users: list[Example], template: Template, cfg: Config) -> Callable[[Llama], Tensor]:
    """evo_consistency * mean_x sum_c -p_old(c | x) log p_new(c | x) on a batch of inactive users, drawn anew at every
    step; x runs over the answer's positions. Original: in the code, switched off (use_kl=False)."""
    order = torch.randperm(len(users), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    groups = [collate(sequences([users[i] for i in order[k:k + cfg.batch]], template), model.device)
              for k in range(0, min(len(order), 8 * cfg.batch), cfg.batch)]  # ours: one of 8 batches a step
    if not groups:
        return lambda model: model.model.norm.weight.new_zeros(())

    def log_p(batch) -> Tensor:
        return model.head(model.model(batch.ids, batch.positions, batch.mask)[batch.labels != IGNORE]).log_softmax(-1)
    model.eval()
    with torch.no_grad():
        old = [log_p(batch).exp() for batch in groups]

    def term(model: Llama) -> Tensor:
        k = int(torch.randint(len(groups), ()))  # from dropout's source, whose state a checkpoint keeps
        return -cfg.evo_consistency * (old[k] * log_p(groups[k])).sum(-1).mean()
    return term
