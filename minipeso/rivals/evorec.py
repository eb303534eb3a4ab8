"""EvoRec (arXiv 2511.16414) on our Llama and stages: Locate, Forget, Update. A baseline beside PESO.

    locate   the ~30 % of layers whose hidden states differ most between the histories before and after D_t
    forget   the past items that a small sequential model finds least relevant to where the user is now
    update   only the located layers' adapters, by cross-entropy on the shortened histories

Its code: github.com/Estadio-c/EvoRec; that of its filter, "like SASRec", and its ratios, were not to be had: what is
ours is marked. There the backbone chooses titles from a list in the prompt; here it generates semantic IDs as
everything else. The consistency term of its code is switched off there, and absent here."""
import math
from collections.abc import Sequence
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
from minipeso.rivals.counts import lists, recent, transitions
from minipeso.rivals.settings import Flags
from minipeso.stages import Stage
from minipeso.tokens import Template


@dataclass(frozen=True)
class Settings(Flags):
    evo_layers: float = 0.32  # its code: 9 of 28 layers; its paper: about 30 % are updated
    evo_forget: float = 0.2  # ours: the share of a user's past items that is forgotten
    evo_newest: int = 3  # ours: past items that are never forgotten
    bounds: ClassVar = {"evo_layers": (0, 1), "evo_forget": (0, 1)}


def learn(run, name: str) -> dict[str, Tensor]:
    """D_2 .. D_T from the model of D_1 -> {stage: found (users, 10)} on the shortened histories."""
    for t in run.left(name):
        run.save(name, t, run.recommend(t, learn_stage(run, name, t)))
    return run.found[name]


def learn_stage(run, name: str, t: int) -> Stage:
    """The located layers learn D_t with shortened histories -> D_t as they see it, to be ranked on."""
    model, cfg, s, log = run.model, run.cfg, Settings.of(run.cfg), run.log(name)
    shown = forget(run.stages[:t], run.n_items, s.evo_forget, s.evo_newest)
    located = locate(model, run.stages[t - 1], run.template, cfg, s.evo_layers)
    continual.choose_trainable(model, "adapter")
    log({"stage": t, "located": located, "touched": freeze_others(model, located)})
    if located:
        cfg = replace(cfg, lr=cfg.lr * cfg.later_lr, proximal="none")
        data = continual.stage_data([shown], run.template, cfg.window)
        continual.train_stage(model, data, t, cfg, log, run.epochs(f"{name}-stage-{t}"))
    return shown


def forget(stages: Sequence[Stage], n_items: int, share: float, newest: int) -> Stage:
    """D_t, histories less their least relevant items: those (ours) that transition counts would recommend last now."""
    C, stage = transitions(*lists(stages), n_items), stages[-1]  # (I, I)
    users = [u for u, past in stage.history.items() if past]
    score = C @ recent([stage.history[u] + stage.training(u) for u in users], n_items)  # (I, users)
    shorter = {u: kept(past := stage.history[u], score[past, k].tolist(), share, newest) for k, u in enumerate(users)}
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
