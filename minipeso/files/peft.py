"""The PEFT format: what transformers, peft and vLLM call an adapter."""
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minipeso.lora import adapters, inject

PREFIX = "base_model.model."


def save_peft(model: nn.Module, folder: str | Path, base: str = "", tables: bool = False) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as peft does: A (r, d_in), B (d_out, r), r and alpha.
    The rows of new tokens go as peft's trainable tokens (the rows themselves, not differences), a table that is trained
    whole (recipe `release`) as one of peft's modules_to_save; with `tables`, every table does."""
    layers, folder = dict(adapters(model)), Path(folder)
    layer = next(iter(layers.values()))
    rank = len(layer.factors()[0])  # of a sum of products: one product of stacked factors
    named = [(name.rpartition(".")[2], table) for name, table in _tables(model)]
    whole = sorted(name for name, t in named if tables or t.weight.requires_grad)
    tokens = {name: list(range(len(t.weight), len(t.weight) + len(t.rows))) for name, t in named
              if t.rows is not None and name not in whole}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": rank, "lora_alpha": layer.scale * rank, "lora_dropout": layer.dropout.p, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "modules_to_save": whole or None,
        # a list means the embedding, and a head tied to it; a head of its own has to be named
        "trainable_token_indices": tokens if len(tokens) > 1 else next(iter(tokens.values()), None)}
    places = sorted(_places(model, tables).items())
    tensors = {name: torch.cat([p.detach() for p in parts]).cpu().contiguous() for name, parts in places}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def load_peft(model: nn.Module, folder: str | Path) -> None:
    """Reads a PEFT adapter into the model, wrapping its layers if they are bare, and anchors it there.
    ValueError unless keys, shapes and scale are the model's and all numbers finite: peft would only warn."""
    config, tensors = _read(Path(folder))
    if not any(True for _ in adapters(model)):
        inject(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), config["target_modules"])
        whole = config.get("modules_to_save") or ()
        if "lm_head" in whole:
            model.untie()
        for name, table in _tables(model):  # what is trained whole is stored whole
            table.weight.requires_grad_(name.rpartition(".")[2] in whole)
    places = _places(model, own=True)
    wrong = _differences(model, places, config, tensors)
    if wrong:
        raise ValueError(f"{folder} is not an adapter of this model\n{wrong[0]}\n"
                         "use the adapter's own base model, rank, alpha and targets; known is plain LoRA")
    for name, parts in places.items():
        for part, values in zip(parts, tensors[name].split([len(p) for p in parts]), strict=True):
            part.copy_(values)
    for _, layer in adapters(model):
        layer.anchor()


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        needed = ("r", "lora_alpha", "target_modules")
        wrong = [f"adapter_config.json lacks {name}" for name in needed if config.get(name) is None]
        wrong += [f"{name} is not finite" for name, t in sorted(tensors.items()) if not t.isfinite().all()]
        if wrong:
            raise ValueError(wrong[0])
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no intact adapter\n{error}\nsave or download it again") from error
    return config, tensors


def _differences(model: nn.Module, places: dict, config: dict, tensors: dict[str, Tensor]) -> list[str]:
    """Where shape or scale is not the model's. No tensor's shape shows the scale: a wrong one would go unseen."""
    ours = {name: (sum(map(len, parts)), *parts[0].shape[1:]) for name, parts in places.items()}
    theirs = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    wrong = [f"{len(wrong)} tensors differ; {n}: file {theirs.get(n, '-')}, model {ours.get(n, '-')}" for n in wrong]
    wrong += [f"{name} = {config[name]!r}" for name in ("use_rslora", "alpha_pattern") if config.get(name)]
    scale = config["lora_alpha"] / config["r"]
    return wrong + [f"alpha / r is {scale:g} in the file, {layer.scale:g} in {name}"
                    for name, layer in adapters(model) if not math.isclose(layer.scale, scale)]


def _tables(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, table) of the token tables (llama.TokenTable); a tied head is the embedding's."""
    return ((name, m) for name, m in model.named_modules() if hasattr(m, "rows"))


def _places(model: nn.Module, tables: bool = False, own: bool = False) -> dict[str, list[Tensor]]:
    """{key of an adapter file: the parameters stacked there}; `own`: A and B, to write to, in place of the factors."""
    places = {}
    for name, layer in adapters(model):
        A, B = (layer.A, layer.B) if own else layer.factors()
        places |= {f"{PREFIX}{name}.lora_A.weight": [A], f"{PREFIX}{name}.lora_B.weight": [B]}
    for name, table in _tables(model):
        rows = [] if table.rows is None else [table.rows]
        if tables or table.weight.requires_grad:
            places[f"{PREFIX}{name}.weight"] = [table.weight, *rows]
        elif rows:
            places[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = rows
    return places
