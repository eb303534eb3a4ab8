"""The methods by name: rows of the paper's tables. A new one is a row, and at most a file in rivals/."""
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minipeso.config import Config, UsageError, unknown
from minipeso.continual import choose_trainable, stage_data, train_stage
from minipeso.llama import Llama
from minipeso.lora import LoRALinear, rewrap
from minipeso.proximal import PENALTIES
from minipeso.rivals import counts, evorec, fisher, twotower
from minipeso.rivals.cumulative import InfLoRALinear, SDLoRALinear, SumLoRALinear, design_inflora, variants
from minipeso.stages import Stage
from minipeso.snapshot import restore
from minipeso.tokens import Template, batches, collate


@dataclass(frozen=True)
class Method:
    """How a stage t >= 2 is learnt. Without `learn` it is the loop in train.py: the adapter goes on from v_{t-1}."""
    proximal: str = "none"  # the penalty, unless --proximal names another
    adapter: type[LoRALinear] = LoRALinear  # from stage 2 on; D_1 is learnt by plain LoRA, once for all
    prepare: Callable | None = None  # (model, stages, template, cfg), before the anchor moves
    learn: Callable | None = None  # (run, name) -> found per stage: another way through the stages
    dataset: str = ""  # the only one that it can be used on
    language: bool = True  # whether it needs a language model at all

    def begin(self, model: Llama, stages: Sequence[Stage], template: Template, cfg: Config) -> None:
        """Before the anchor moves at stage t = len(stages): layers of the class needed, InfLoRA's next A, F."""
        rewrap(model, FISHERS.get(cfg.proximal, self.adapter))
        if self.prepare:
            self.prepare(model, stages, template, cfg)
        if cfg.proximal in FISHERS:  # measured on the last stage that had something to learn from
            past = next(filter(None, (stage_data([stage], template, cfg.window)[0] for stage in stages[-2::-1])))
            fisher.measure(model, past, cfg.batch, cfg.temperature)

    def settings(self, cfg: Config) -> Config:
        """Of a later stage: its learning rate, and which penalty. UsageError for what cannot be."""
        if self.dataset not in ("", cfg.dataset):
            raise UsageError(f"{cfg.method} knows the data set {self.dataset} alone\nfound --dataset {cfg.dataset}\n"
                             "leave it out")
        name = self.proximal if cfg.proximal == "method" else cfg.proximal
        known = (*PENALTIES, "output-kl", *FISHERS, "none")
        if name not in known:
            raise UsageError(unknown("proximal", name, known))
        if name in FISHERS and self.adapter is not LoRALinear:
            raise UsageError(f"--proximal {name} holds one evolving adapter\nfound {cfg.method}, a sum of several\n"
                             "use it with peso or single, or choose another penalty")
        return dataclasses.replace(cfg, lr=cfg.lr * cfg.later_lr, proximal=name)


def keep(run, name: str) -> dict[str, Tensor]:
    """No adaptation: the model of D_1 on every stage."""
    for t in run.left(name):
        run.save(name, t, run.recommend(t))
    return run.found[name]


def retrain(run, name: str) -> dict[str, Tensor]:
    """The costly reference: at every stage anew from the base, on D_1 .. D_t."""
    for t in run.left(name):
        data = stage_data(run.stages[:t], run.template, run.cfg.window)
        restore(run.model, run.base_state)
        choose_trainable(run.model, run.cfg.first_trains)
        cfg = dataclasses.replace(run.cfg, proximal="none")
        train_stage(run.model, data, t, cfg, run.log(name), run.epochs(f"{name}-stage-{t}"))
        run.save(name, t, run.recommend(t))
    return run.found[name]


def prepare_inflora(model: Llama, stages: Sequence[Stage], template: Template, cfg: Config) -> None:
    """The layers' next A, computed from what the training pairs of D_{t-1} and of D_t show them."""
    sequences = [stage_data([stage], template, cfg.window)[0] for stage in stages[-2:]]
    past, now = ((collate(some, model.device) for some in batches(part, 512, torch.Generator())) for part in sequences)
    design_inflora(model, len(stages), cfg.stages, past, now)


METHODS = {
    "pretrain": Method(learn=keep),
    "single": Method(),  # Eq. 4, single evolving LoRA
    "peso": Method(proximal="kl"),  # Eq. 12
    "peso-quadratic": Method(proximal="quadratic"),  # Eq. 6 with Proposition 3's H; not in the paper's tables
    "retrain": Method(learn=retrain),  # not in the paper's tables
    **{f"sumlora-{name}": Method(adapter=kind) for name, kind in variants(SumLoRALinear).items()},  # Eq. 5
    **{f"sdlora-{name}": Method(adapter=kind) for name, kind in variants(SDLoRALinear).items()},
    **{f"inflora-{name}": Method(adapter=k, prepare=prepare_inflora) for name, k in variants(InfLoRALinear).items()},
    "evorec": Method(learn=evorec.learn),
    **{f"lightgcn-{name}": Method(learn=twotower.learn, language=False)
       for name in ("pretrain", "finetune", "contrastive", "piw", "pisa")},
    **{name: Method(learn=counts.learn, language=False) for name in counts.NAMES},
    "oracle": Method(learn=counts.oracle, language=False, dataset="demo"),  # the ceiling on the demo's world
}
FISHERS = {"fisher": fisher.FisherLoRALinear, "fisher-product": fisher.ProductFisherLoRALinear}
ADAPTERS = {k.__name__: k for k in (LoRALinear, *FISHERS.values(), *(m.adapter for m in METHODS.values()))}
MEMORY = counts.memory  # what --memory mixes into every language model's search
SETTINGS = {"EvoRec": evorec.Settings, "the two-tower methods (lightgcn-...)": twotower.Settings}


def method_named(name: str) -> Method:
    """The row of METHODS (of "peso@lambda=20": peso's); UsageError lists the names and suggests the nearest."""
    name = name.partition("@")[0]
    if name not in METHODS:
        raise UsageError(unknown("method", name, METHODS))
    return METHODS[name]
