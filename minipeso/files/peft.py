"""The PEFT format: what transformers, peft and vLLM call an adapter."""
from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minipeso.lora import adapters, inject
from minipeso.runs.disk import write_file

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
