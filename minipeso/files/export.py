"""A stage's model in the formats of others: a PEFT adapter folder, or a plain Hugging Face folder with merged weights.

`run` is a finished run, opened again: .cfg .model .template .tokenizer .ids .data.keys .known .stage."""
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from minipeso.config import BASES, Config, UsageError
from minipeso.files.download import PINNED
from minipeso.files.hub import checkpoint_folder, read_config
from minipeso.llama import Llama
from minipeso.lora import adapters

TEXTS = Path(__file__).with_name("texts")  # with {fields}


def export_peft(run, adapter: Path, target: Path) -> None:
    """The files of the stage's adapter folder, byte for byte, with a README; the base beside it if the run made it."""
    base = run.cfg.base
    pinned = f', revision="{PINNED[base]}"' if base in PINNED else ""
    where = 'f"{folder}/base"' if base in BASES else f'"{base}"{pinned}'
    with whole(target) as folder:
        for path in sorted(adapter.iterdir()):
            shutil.copyfile(path, folder / path.name)
        _describe(folder, run, "adapter.md", where=where)
        if base in BASES:
            (folder / "base").mkdir()
            _write_model(folder / "base", run, merged=False)


def export_merged(run, target: Path) -> None:
    """A checkpoint with weights W + s B A, as vLLM and others load it; minipeso.json: prompt and items' tokens."""
    with whole(target) as folder:
        _write_model(folder, run, merged=True)
        if run.tokenizer:
            _write_tokenizer(folder, run)
        _describe(folder, run, "merged.md")
        about = {part: getattr(run.template, part) for part in ("preamble", "separator", "tail")}
        about |= {part: getattr(run.cfg, part) for part in ("window", "beams", "seen")}
        about["items"] = {run.data.keys[item]: run.template.items[item].tolist() for item in run.known}
        (folder / "minipeso.json").write_text(json.dumps(about) + "\n")


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A folder to fill beside its name, which it gets whole or not at all; one that holds something stays as it is."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is in the way\nit is no empty folder\nname a new one")
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        yield part
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _describe(folder: Path, run, text: str, **more: str) -> None:
    """README.md, and for a Llama the notice that its licence asks for."""
    version, readme = llama_version(run.cfg), (TEXTS / text).read_text().format(**_facts(run), **more)
    if version:
        (folder / "NOTICE").write_text((TEXTS / "NOTICE").read_text(encoding="utf-8").format(version), encoding="utf-8")
        readme += (TEXTS / "llama.md").read_text()
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _facts(run) -> dict:
    first, codes, levels = run.template.first_token, run.ids.n_codes, run.ids.codes.shape[1]
    dtype = str(run.model.model.norm.weight.dtype).removeprefix("torch.")
    return {"method": run.cfg.method, "stage": run.stage, "base": run.cfg.base, "dtype": dtype, "first": first,
            "codes": codes, "levels": levels, "vocabulary": first + levels * codes}


def llama_version(cfg: Config) -> str | None:
    """Of a checkpoint by its name, else by its rotary factor, 32 or 8. None: no Llama of Meta's."""
    named = re.search(r"llama-?(3(?:\.\d)?)", cfg.base.lower())
    if named or cfg.base in BASES:
        return named and named[1]
    factor = read_config(checkpoint_folder(cfg.base, weights=False)).rope_parameters.get("factor")
    return {32.0: "3.2", 8.0: "3.1"}.get(factor)


def _write_model(folder: Path, run, merged: bool) -> None:
    """config.json, generation_config.json and model.safetensors, with the adapters merged or left out."""
    model, facts, bos, eos = run.model, _facts(run), run.template.preamble[0], None
    if run.cfg.base in BASES:
        config = {**asdict(model.config), "rope_theta": model.config.rope_parameters["rope_theta"],
                  "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 8192}
    else:
        config = json.loads((checkpoint_folder(run.cfg.base, weights=False) / "config.json").read_text())
        eos = run.tokenizer.token_to_id("<|end_of_text|>")
    config.pop("dtype", None)  # the newer name of torch_dtype
    tied = model.lm_head is model.model.embed_tokens if merged else model.config.tie_word_embeddings
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": bos if eos is None else eos}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": tied,
               "vocab_size": facts["vocabulary"], "torch_dtype": facts["dtype"], **ids}
    ids |= {"do_sample": False, "max_new_tokens": facts["levels"]}
    for name, content in (("config.json", config), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    save_file(plain_tensors(model, merged), folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # safetensors lets nobody else read


@torch.no_grad()
def plain_tensors(model: Llama, merged: bool) -> dict[str, Tensor]:
    """{checkpoint name: tensor}: adapters merged into their layers or left out, new rows behind the old."""
    layers, tensors = dict(adapters(model)), {}
    for name, p in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight":
            continue  # A, B, rows: below
        if module in layers and merged:
            p = layers[module].merged_weight()  # (d_out, d_in)
        elif hasattr(owner := model.get_submodule(module), "rows"):
            p = torch.cat([p, owner.rows.to(p.dtype)])  # (V + L K, d)
        tensors[name] = p.detach().cpu().contiguous()
    return tensors


def _write_tokenizer(folder: Path, run) -> None:
    """The base's tokenizer with <a_0> ... behind its words, at the ids that the model was trained with."""
    tokenizer, names, first = Tokenizer.from_str(run.tokenizer.to_str()), run.ids.tokens, run.template.first_token
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    ids = [tokenizer.token_to_id(name) for name in names]
    if ids != list(range(first, first + len(names))):
        raise UsageError(f"the tokenizer of {run.cfg.base} knows some of the codes' names\nfor example {names[0]} is "
                         f"token {ids[0]}, expected {first}\nuse the tokenizer.json of the official checkpoint")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token":
              "<|end_of_text|>", "pad_token": "<|end_of_text|>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
