"""How far a training has come: its parameters, AdamW's moments, and the best parameters so far."""
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor, nn


@dataclass
class Progress:
    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.Optimizer
    generator: torch.Generator | None = None  # what the order of the data is drawn from, if not from the epoch's number
    patience: int = 0  # epochs in a row without a new best, after which training ends; 0: it goes to its end
    epoch: int = 0
    step: int = 0
    waited: int = 0  # epochs since the best one
    lowest: float = math.inf  # validation loss, or what else decides
    best: dict[str, Tensor] = field(default_factory=dict)  # the parameters that had it

    def left(self, epochs: range) -> Iterable[int]:
        """Those still to do, until `patience` of them in a row have brought no new best."""
        return takewhile(lambda epoch: not self.patience or self.waited < self.patience, epochs[self.epoch:])

    def keep_best(self, loss: float) -> None:
        self.waited += 1
        if loss < self.lowest:
            self.waited = 0
            self.lowest, self.best = loss, {name: p.detach().clone() for name, p in self.parameters.items()}

    def take_best(self) -> None:
        for name, kept in self.best.items():
            self.parameters[name].data.copy_(kept)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, facts): all that decides how the training goes on."""
        tensors = {f"parameter/{name}": p for name, p in self.parameters.items()}
        tensors |= {f"best/{name}": p for name, p in self.best.items()}
        tensors |= {f"adam/{key}/{name}": t for name, p in self.parameters.items()
                    for key, t in self.optimiser.state[p].items()}
        if self.generator:
            tensors["random"] = self.generator.get_state()
        facts = {"epoch": self.epoch, "step": self.step, "waited": self.waited}
        return tensors, facts | {"lowest": self.lowest if self.best else None}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], facts: dict) -> None:
        fused = self.optimiser.defaults.get("fused")  # only then AdamW's count of steps lies beside the parameters
        for name, p in self.parameters.items():
            p.copy_(tensors[f"parameter/{name}"])
            self.optimiser.state[p] = {k: tensors[f"adam/{k}/{name}"].to(p.device if fused or k != "step" else "cpu")
                                       for k in ("step", "exp_avg", "exp_avg_sq")}
        self.epoch, self.step, self.waited = facts["epoch"], facts["step"], facts["waited"]
        if facts["lowest"] is not None:
            self.lowest = facts["lowest"]
            self.best = {name: tensors[f"best/{name}"].to(p.device) for name, p in self.parameters.items()}
        if self.generator:
            self.generator.set_state(tensors["random"])


Epochs = Callable[[Progress, range], Iterable[int]]
every_epoch: Epochs = Progress.left  # of a training that nobody saves; runs/checkpoints.py's goes on after a crash
