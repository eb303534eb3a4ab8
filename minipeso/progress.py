"""How far a training has come, and all that decides how it goes on: parameters, AdamW's moments, the best parameters
so far, the random state, the position. keeper.py writes it to the disk."""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn


@dataclass
class Progress:
    """The order of the data is a function of the position, or drawn from `generator`, whose state is kept too."""

    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.Optimizer
    generator: torch.Generator | None = None
    epoch: int = 0
    done: int = 0  # steps of this epoch
    step: int = 0  # of all epochs
    lowest: float = math.inf  # validation loss, or what else decides
    best: dict[str, Tensor] = field(default_factory=dict)  # the parameters that had it
    random: dict[str, Tensor] = field(default_factory=dict)  # dropout's state, where an epoch is to be gone on with

    def left(self, batches: Iterable) -> Iterator:
        """What is left of an epoch's batches. Dropout's random state is restored as the last thing before the first."""
        if self.done:
            set_random_state(self.random)
        return islice(batches, self.done, None)

    def count(self) -> None:
        self.done, self.step = self.done + 1, self.step + 1

    def steps(self, batches: Iterable) -> Iterator:
        """left(batches), each counted when its step is done."""
        for batch in self.left(batches):
            yield batch
            self.count()

    def end_epoch(self, loss: float) -> None:
        self.keep_best(loss)
        self.epoch, self.done = self.epoch + 1, 0

    def keep_best(self, loss: float) -> None:
        if loss < self.lowest:
            self.lowest, self.best = loss, {name: p.detach().clone() for name, p in self.parameters.items()}

    def take_best(self) -> None:
        for name, kept in self.best.items():
            self.parameters[name].data.copy_(kept)

    def packed(self) -> tuple[dict[str, Tensor], dict]:
        tensors = {f"parameter/{name}": p for name, p in self.parameters.items()}
        tensors |= {f"best/{name}": p for name, p in self.best.items()}
        tensors |= {f"adam/{key}/{name}": t for name, p in self.parameters.items()
                    for key, t in self.optimiser.state[p].items()}
        tensors |= {f"random/{device}": t for device, t in random_state().items()}
        if self.generator:
            tensors["random/own"] = self.generator.get_state()
        return tensors, {"epoch": self.epoch, "done": self.done, "step": self.step,
                         "lowest": self.lowest if self.best else None}

    @torch.no_grad()
    def unpack(self, tensors: dict[str, Tensor], facts: dict) -> None:
        fused = self.optimiser.defaults.get("fused")  # then, and only then, the count of steps lies beside the parameters
        for name, p in self.parameters.items():
            p.copy_(tensors[f"parameter/{name}"])
            self.optimiser.state[p] = {key: tensors[f"adam/{key}/{name}"].to(p.device if fused or key != "step" else "cpu")
                                       for key in ("step", "exp_avg", "exp_avg_sq")}
        self.epoch, self.done, self.step = facts["epoch"], facts["done"], facts["step"]
        if facts["lowest"] is not None:
            self.lowest = facts["lowest"]
            self.best = {name: tensors[f"best/{name}"].to(p.device) for name, p in self.parameters.items()}
        self.random = {device: tensors[f"random/{device}"] for device in random_state() if f"random/{device}" in tensors}
        if self.generator:
            self.generator.set_state(tensors["random/own"])


def random_state() -> dict[str, Tensor]:
    """torch's, of every device that dropout may draw from."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
