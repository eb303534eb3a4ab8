"""LoRA (Eq. 3) with the anchor that PESO needs: one adapter, and a frozen copy of its previous state.

    W = W_0 + s B A        A (r, d_in)   B (d_out, r)   s = alpha / r

A method of the cumulative family is a subclass with its own `factors`, `advance`, `trained`: rivals/cumulative.py."""
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Release: all seven projections of every layer. Paper: "e.g. attention layers". Here: `inject`'s argument, no flag.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """y = W_0 x + s B A dropout(x), with W_0 frozen (Eq. 3).

    A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)) and B = 0, so that a new adapter changes nothing. A_prev and B_prev are v_{t-1},
    the state at the end of the previous stage. All stay float32: a bfloat16 layer's type would lose a step of 1e-5."""
    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        if rank < 1:
            raise ValueError(f"a LoRA adapter needs a rank of at least 1\nrank={rank}\ngive a rank >= 1, such as 8")
        d_out, d_in = linear.weight.shape
        self.weight = linear.weight.requires_grad_(False)  # (d_out, d_in), under the checkpoint's name
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)
        like = {"dtype": torch.float32, "device": linear.weight.device}
        self.A = nn.Parameter(torch.empty(rank, d_in, **like))
        self.B = nn.Parameter(torch.empty(d_out, rank, **like))
        self.register_buffer("A_prev", torch.empty(rank, d_in, **like))
        self.register_buffer("B_prev", torch.empty(d_out, rank, **like))
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """A new adapter, anchored at itself. The bound is that of loralib and peft: kaiming_uniform, a = sqrt(5)."""
        bound = 1 / math.sqrt(self.A.shape[1])
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
        self.B.zero_()
        self.anchor()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with W = W_0 + s B A: what the layer computes, merges and exports."""
        return self.A, self.B  # (r, d_in), (d_out, r)

    def trained(self) -> list[nn.Parameter]:
        """What a stage may move."""
        return [self.A, self.B]

    def delta(self, x: Tensor) -> Tensor:
        """s B A dropout(x): (..., d_in) -> (..., d_out)."""
        A, B = (M.to(x.dtype) for M in self.factors())  # (r, d_in), (d_out, r)
        return F.linear(self.scale * F.linear(self.dropout(x), A), B)  # s where x is narrow, (..., r)

    @torch.no_grad()
    def anchor(self) -> None:
        """v_{t-1} <- v_t."""
        self.A_prev.copy_(self.A)  # (r, d_in)
        self.B_prev.copy_(self.B)  # (d_out, r)

    def advance(self, generator: torch.Generator | None = None) -> None:
        """A new stage begins. `generator` is for subclasses that draw a new adapter."""
        self.anchor()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).add_(self.delta(x))  # (..., d_out), in place: no third array of this size

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W_0 + s B A in the layer's dtype, rounded once."""
        A, B = self.factors()  # (r, d_in), (d_out, r)
        return (self.weight + self.scale * B @ A).to(self.weight.dtype)  # (d_out, d_in)


def inject(model: nn.Module, rank: int, alpha: float, dropout: float = 0.0, targets=TARGETS,
           generator: torch.Generator | None = None) -> None:
    """An adapter around every nn.Linear whose last name is in `targets`; all must be there. The rest is frozen."""
    model.requires_grad_(False)
    linears = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
               if isinstance(child, nn.Linear)]
    names = {name for _, name, _ in linears}
    if not targets or not set(targets) <= names:
        raise ValueError(f"no linear layer is named {', '.join(sorted(set(targets) - names))}\n"
                         f"targets={tuple(targets)}\nthis model's linear layers are {', '.join(sorted(names))}")
    for parent, name, linear in linears:
        if name in targets:
            layer = LoRALinear(linear, rank, alpha, dropout)
            layer.reset(generator)
            setattr(parent, name, layer)


def rewrap(model: nn.Module, adapter: type[LoRALinear]) -> None:
    """Makes every adapted layer one of class `adapter` that continues from the same A and B."""
    for name, old in [(name, layer) for name, layer in adapters(model) if type(layer) is not adapter]:
        new = adapter(old, len(old.A), old.scale * len(old.A), old.dropout.p)
        new.load_state_dict(new.state_dict() | {"A": old.A, "B": old.B})
        new.anchor()
        model.set_submodule(name, new)


def advance(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """v_{t-1} <- v_t: the anchor moves up, in every adapted layer."""
    for _, layer in adapters(model):
        layer.advance(generator)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of every adapted layer, in the model's order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))


@contextmanager
def watching(model: nn.Module, see: Callable[[str, LoRALinear, Tensor], None]) -> Iterator[None]:
    """Every forward pass inside calls see(name, layer, x) with the input x (..., d_in) of each adapted layer."""
    with ExitStack() as hooks:
        for name, layer in adapters(model):
            told = layer.register_forward_pre_hook(lambda layer, args, name=name: see(name, layer, args[0]))
            hooks.enter_context(told)
        yield


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapted layer: the paper's v, before flattening."""
    return [p for _, layer in adapters(model) for p in (layer.A, layer.B)]
