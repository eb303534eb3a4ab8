"""LoRA (Eq. 3) with the anchor that PESO needs: one adapter, and a frozen copy of its previous state.

    W = W_0 + s B A        A (r, d_in)   B (d_out, r)   s = alpha / r

A method of the cumulative family is a subclass (cumulative.py) with its own `factors`, what the
adapter adds to W_0, `advance`, what happens when a stage begins, and `trained`, what may move in it.
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minipeso.disk import write_file

# Release: all seven projections of every layer. Paper: "e.g. attention layers".
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """y = W_0 x + s B A dropout(x), with W_0 frozen (Eq. 3).

    A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)) and B = 0, so that a new adapter changes nothing. A_prev and
    B_prev are v_{t-1}, the state at the end of the previous stage. A and B stay float32 whatever
    the layer's dtype: a step of 1e-5 is lost in bfloat16.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA needs rank >= 1, got {rank}")
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
        """A new adapter, anchored at itself."""
        bound = 1 / math.sqrt(self.A.shape[1])  # = kaiming_uniform(a = sqrt(5)), as in loralib and peft
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
        self.B.zero_()
        self.anchor()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with W = W_0 + s B A: what the layer computes, merges and exports."""
        return self.A, self.B

    def trained(self) -> list[nn.Parameter]:
        """What a stage may move."""
        return [self.A, self.B]

    def delta(self, x: Tensor) -> Tensor:
        """s B A dropout(x): (..., d_in) -> (..., d_out)."""
        A, B = self.factors()
        z = F.linear(self.dropout(x), A.to(x.dtype))  # (..., r)
        # s on the narrow side; B^T laid out by rows, so that its gradient is z^T dy: MKL is far slower at dy^T z
        return (z * self.scale) @ B.to(x.dtype).t().contiguous()  # (..., d_out)

    @torch.no_grad()
    def anchor(self) -> None:
        self.A_prev.copy_(self.A)
        self.B_prev.copy_(self.B)

    def advance(self, generator: torch.Generator | None = None) -> None:
        """A new stage begins: the adapter that the last one left becomes its anchor (v_{t-1} <- v_t).
        `generator` is for subclasses that draw a new adapter."""
        self.anchor()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).add_(self.delta(x))  # in place: no third array of this size

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W_0 + s B A, (d_out, d_in) in the layer's dtype."""
        A, B = self.factors()
        return (self.weight + self.scale * B @ A).to(self.weight.dtype)


def inject(model: nn.Module, rank: int, alpha: float, dropout: float = 0.0, targets=TARGETS,
           adapter: type[LoRALinear] = LoRALinear, generator: torch.Generator | None = None) -> None:
    """Puts an adapter around every nn.Linear whose last name is in `targets`, and freezes all else."""
    model.requires_grad_(False)
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if name in targets and isinstance(child, nn.Linear)]
    unknown = sorted(set(targets) - {name for _, name, _ in found})
    if unknown or not found:
        raise ValueError(f"no linear layer is named {', '.join(unknown)}")
    for parent, name, linear in found:
        layer = adapter(linear, rank, alpha, dropout)
        layer.reset(generator)
        setattr(parent, name, layer)


def rewrap(model: nn.Module, adapter: type[LoRALinear]) -> None:
    """Makes every adapted layer one of class `adapter` that continues from the same A and B."""
    for name, old in list(adapters(model)):
        if type(old) is adapter:
            continue
        new = adapter(old, len(old.A), old.scale * len(old.A), old.dropout.p)
        with torch.no_grad():
            new.A.copy_(old.A)
            new.B.copy_(old.B)
        new.anchor()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of every adapted layer, in the model's order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))


@contextmanager
def watching(model: nn.Module, see: Callable[[str, LoRALinear, Tensor], None]) -> Iterator[None]:
    """Every forward pass inside calls see(name, layer, x) with the input x (..., d_in) of each adapted layer."""
    hooks = [layer.register_forward_pre_hook(lambda layer, args, name=name: see(name, layer, args[0]))
             for name, layer in adapters(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapted layer: the paper's v, before flattening."""
    return [p for _, layer in adapters(model) for p in (layer.A, layer.B)]


# -- the PEFT format: what transformers, peft and vLLM call an adapter ------------------------------

PREFIX = "base_model.model."


def save_peft(model: nn.Module, folder: str | Path, base: str = "", tables: bool = False) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as peft does (r, alpha, A, B). Any
    adapter's sum of products is one product of stacked factors, so its `factors` are all there is to write.

    Rows of new tokens go with it as peft's trainable tokens: the rows themselves, not differences.
    A table that is trained whole (recipe `release`) goes as one of peft's modules_to_save; `tables`: all do.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = [layer for _, layer in adapters(model)]
    rank = len(layers[0].factors()[0])
    named = [(name.rpartition(".")[2], table) for name, table in _tables(model)]
    whole = sorted(name for name, t in named if tables or t.weight.requires_grad)
    tokens = {name: list(range(len(t.weight), len(t.weight) + len(t.rows))) for name, t in named
              if t.rows is not None and name not in whole}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": rank, "lora_alpha": layers[0].scale * rank,
        "lora_dropout": layers[0].dropout.p, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True,
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in adapters(model)}),
        "modules_to_save": whole or None,
        # a list means the embedding, and a head tied to it; a head of its own has to be named
        "trainable_token_indices": tokens if len(tokens) > 1 else next(iter(tokens.values()), None),
    }
    tensors = {name: torch.cat([p.detach() for p in parts]).cpu().contiguous() for name, parts in _places(model, tables).items()}
    write_file(folder / "adapter_model.safetensors", save(dict(sorted(tensors.items())), {"format": "pt"}))
    write_file(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def load_peft(model: nn.Module, folder: str | Path) -> None:
    """Reads a PEFT adapter into the model, wrapping its layers if they are bare, and anchors it there.
    Every key must find its place and every place its key, with equal shapes and the same scale, and
    finite numbers (ValueError): peft would only warn."""
    folder = Path(folder)
    config, tensors = _read(folder)
    if not any(True for _ in adapters(model)):
        inject(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), config["target_modules"])
        whole = config.get("modules_to_save") or ()
        if "lm_head" in whole:
            model.untie()
        for name, table in _tables(model):  # what is trained whole is stored whole
            table.weight.requires_grad_(name.rpartition(".")[2] in whole)
    places = _places(model, own=True)
    wrong = sorted(places.keys() ^ tensors.keys())
    wrong += [k for k in places if k in tensors and _shape(places[k]) != tuple(tensors[k].shape)]
    if wrong:
        found = [f"{side} {shape}" for side, shape in (
            ("file", tuple(tensors[wrong[0]].shape) if wrong[0] in tensors else "-"),
            ("model", _shape(places[wrong[0]]) if wrong[0] in places else "-"))]
        raise ValueError(f"{folder} is not an adapter of this model\n{len(wrong)} tensors differ; "
                         f"{wrong[0]}: {', '.join(found)}\nuse the adapter's own base model, rank and targets")
    _check_scale(model, config, folder)
    for name, parts in places.items():
        for part, values in zip(parts, tensors[name].split([len(p) for p in parts]), strict=True):
            part.copy_(values)
    for _, layer in adapters(model):
        layer.anchor()


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no intact adapter\n{error}\nsave or download it again") from error
    broken = sorted(name for name, t in tensors.items() if not t.isfinite().all())
    missing = [name for name in ("r", "lora_alpha", "target_modules") if config.get(name) is None]
    if broken or missing:
        raise ValueError(f"{folder} holds no usable adapter\n" + (
            f"{broken[0]} is not finite" if broken else f"adapter_config.json lacks {', '.join(missing)}")
            + "\nsave or download it again")
    return config, tensors


def _check_scale(model: nn.Module, config: dict, folder: Path) -> None:
    """No tensor's shape depends on the scale: a wrong one would go unseen."""
    strange = [f"{name} = {config[name]!r}" for name in ("use_rslora", "alpha_pattern") if config.get(name)]
    scale = config["lora_alpha"] / config["r"]
    strange += [f"alpha / r is {scale:g} in the file, {layer.scale:g} in {name}"
                for name, layer in adapters(model) if not math.isclose(layer.scale, scale)]
    if strange:
        raise ValueError(f"{folder} scales its adapter in another way\n{strange[0]}\n"
                         "use an adapter of plain LoRA, with its own alpha and rank")


def _tables(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, table) of the token tables (llama.TokenTable); a tied head is the embedding's."""
    return ((name, m) for name, m in model.named_modules() if hasattr(m, "rows"))


def _places(model: nn.Module, tables: bool = False, own: bool = False) -> dict[str, list[Tensor]]:
    """What an adapter file holds: its keys, each with the parameters that make it up, stacked. With
    own=True a layer's own A and B, which can be written to, in place of its factors."""
    places = {f"{PREFIX}{name}.lora_{letter}.weight": [M]
              for name, layer in adapters(model) for letter, M in zip("AB", (layer.A, layer.B) if own else layer.factors())}
    for name, table in _tables(model):
        new_rows = [] if table.rows is None else [table.rows]
        if tables or table.weight.requires_grad:
            places[f"{PREFIX}{name}.weight"] = [table.weight, *new_rows]
        elif new_rows:
            places[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = new_rows
    return places


def _shape(parts: list[nn.Parameter]) -> tuple[int, ...]:
    return (sum(len(p) for p in parts), *parts[0].shape[1:])
