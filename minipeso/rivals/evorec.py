"""EvoRec (arXiv 2511.16414) on our Llama and stages: Locate, Forget, Update. A baseline beside PESO.

    locate   the ~30 % of layers whose hidden states differ most between the histories before and after D_t
    forget   the past items that a small sequential model finds least relevant to where the user is now
    update   only the located layers' adapters, by cross-entropy on the shortened histories

Its code: github.com/Estadio-c/EvoRec; that of its filter, and its ratios, were not to be had: what is ours is marked.
There the backbone chooses titles from a list in the prompt; here it generates semantic IDs as everything else. The
consistency term of its code is switched off there, and absent here."""
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeso import continual
from minipeso.config import Config
from minipeso.evaluate import USERS
from minipeso.llama import Llama
from minipeso.lora import adapters
from minipeso.rivals.sasrec import SASRec, fit, relevance
from minipeso.rivals.settings import Flags
from minipeso.stages import Stage
from minipeso.tokens import Template


@dataclass(frozen=True)
class Settings(Flags):
    evo_layers: float = 0.32  # its code: 9 of 28 layers; its paper: about 30 % are updated
    evo_forget: float = 0.2  # ours: the share of a user's past items that is forgotten
    evo_newest: int = 3  # ours: past items that are never forgotten
    filter_epochs: int = 10  # ours: of SASRec, on each stage
    bounds: ClassVar = {"evo_layers": (0, 1), "evo_forget": (0, 1)}


def learn(run, name: str) -> dict[str, Tensor]:
    """D_2 .. D_T from the model of D_1 -> {stage: ranks (users,)} on the shortened histories."""
    system = EvoRec(run.n_items, run.cfg)
    for t in run.left(name):
        epochs = run.epochs(f"{name}-stage-{t}")
        shown = system.learn_stage(run.model, run.stages[:t], run.template, run.log(name), epochs)
        run.save(name, t, run.rank(t, shown))
    return run.ranks[name]


class EvoRec:
    """What lives from stage to stage besides the adapter: the filter, fine-tuned on every D_t."""
    def __init__(self, n_items: int, cfg: Config):
        torch.manual_seed(cfg.seed)
        self.filter, self.seen, self.cfg, self.s = SASRec(n_items), 0, cfg, Settings.of(cfg)

    def learn_stage(self, model: Llama, stages: Sequence[Stage], template: Template, log: Callable, epochs) -> Stage:
        """Stage t = len(stages) >= 2 -> D_t with shortened histories, to be ranked on."""
        t, shown = len(stages), self.forget(stages)
        located = locate(model, stages[-1], template, self.cfg, self.s.evo_layers)
        continual.choose_trainable(model, "adapter")
        log({"stage": t, "located": located, "touched": freeze_others(model, located)})
        if located:
            cfg = replace(self.cfg, lr=self.cfg.lr * self.cfg.later_lr, proximal="none")
            continual.train_stage(model, continual.stage_data([shown], template, cfg.window), t, cfg, log, epochs)
        return shown

    def forget(self, stages: Sequence[Stage]) -> Stage:
        """D_t, histories less their least relevant items. The filter first learns the training items new to it."""
        for stage in stages[self.seen:]:
            carts = [stage.history[u] + stage.training(u) for u in stage.current]
            fit(self.filter, carts, self.s.filter_epochs, self.cfg.seed * 1009 + stage.number)
        self.seen, stage = len(stages), stages[-1]
        users = [u for u, past in stage.history.items() if past]
        scores = relevance(self.filter, [stage.history[u] + stage.training(u) for u in users])
        shorter = {u: kept(stage.history[u], score.tolist(), self.s.evo_forget, self.s.evo_newest)
                   for u, score in zip(users, scores, strict=True)}
        return Stage(stage.number, stage.history | shorter, stage.current)


def kept(past: list[int], score: list[float], share: float, newest: int) -> list[int]:
    """`past` (oldest first) without its floor(share len(past)) items of lowest score; the newest stay in any case."""
    worst = sorted(range(len(past) - newest), key=lambda k: (score[k], k))[:math.floor(share * len(past))]
    return [item for k, item in enumerate(past) if k not in worst]


def locate(model: Llama, stage: Stage, template: Template, cfg: Config, share: float) -> list[int]:
    """The max(1, round(share L)) layers that are most often the one with the lowest cosine similarity between a user's
    pooled hidden states before and after D_t's training items; ties go to the lower layer. [] if no user has both a
    past and training items: then nothing is updated (ours). Original: pooled over padding too."""
    users = [u for u, past in stage.history.items() if past and stage.training(u)]
    if not users:
        return []
    similar, told = [], [(stage.history[u], stage.history[u] + stage.training(u)) for u in users]  # before, after
    for start in range(0, len(told), USERS):
        both = (pooled(model, [template.prompt(items[-cfg.window:]) for items in side])  # (layers, n, d)
                for side in zip(*told[start:start + USERS]))
        similar.append(F.cosine_similarity(*both, dim=-1))  # (layers, n)
    count = torch.bincount(torch.cat(similar, 1).argmin(0), minlength=len(model.model.layers))  # (layers,)
    n = max(1, round(share * len(count)))
    return sorted(torch.sort(count, descending=True, stable=True).indices[:n].tolist())


@torch.no_grad()
def pooled(model: Llama, prompts: list[Tensor]) -> Tensor:
    """Every layer's output, averaged over each prompt's own tokens in float32: (layers, prompts, d)."""
    model.eval()
    ids, real = (torch.nn.utils.rnn.pad_sequence(some, True).to(model.device)  # (n, l), 1 where a token is real
                 for some in (prompts, [torch.ones_like(p) for p in prompts]))
    means = []
    with ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.enter_context(layer.register_forward_hook(
                lambda module, args, x: means.append((x.float() * real[..., None]).sum(1) / real.sum(1, True))))
        model.model(ids)
    return torch.stack(means)


def freeze_others(model: Llama, located: list[int]) -> float:
    """Leaves a gradient to the located layers' adapters alone -> their share of all adapter parameters."""
    every = [(p, int(name.split("layers.")[1].split(".")[0]) in located)
             for name, layer in adapters(model) for p in layer.trained()]
    for p, inside in every:
        p.requires_grad_(inside)
    return sum(p.numel() * inside for p, inside in every) / sum(p.numel() for p, _ in every)
