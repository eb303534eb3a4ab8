"""A stage's model in the formats of others: a PEFT adapter folder, or a plain Hugging Face folder with merged weights.

Both are written beside their name and renamed: a folder is there whole or not at all.
"""
from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from minipeso.runs import prepare
from minipeso.config import Config, UsageError
from minipeso.files.download import PINNED
from minipeso.files.hub import checkpoint_folder
from minipeso.llama import Llama
from minipeso.lora import adapters
from minipeso.runs.reopen import Reopened, adapter_folder

NOTICE = "Llama {} is licensed under the Llama {} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
BUILT = """
Built with Llama. The weights stay under the licence named in NOTICE; who passes them on adds a copy of it, and begins
the model's name with "Llama".
"""
GENERATE = """# {method} of minipeso after D{stage}, {base}

`minipeso.json` holds the prompt's parts and every item's tokens. The search below is the one that was evaluated:
ten beams over the trie of real items, scores under the whole vocabulary.
```python
import json
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder).eval()
about = json.loads(Path(folder, "minipeso.json").read_text())
trie, item_of = {{}}, {{}}
for item, tokens in about["items"].items():
    item_of.setdefault(tuple(tokens), []).append(item)
    for level in range(len(tokens)):
        trie.setdefault(tuple(tokens[:level]), set()).add(tokens[level])

def recommend(history, beams=10):
    prompt = list(about["head"])
    for i, item in enumerate(history[-about["window"]:]):
        prompt += (about["separator"] if i else []) + about["items"][item]
    prompt += about["tail"]
    found = model.generate(torch.tensor([prompt]), num_beams=beams, num_return_sequences=beams, length_penalty=0.0,
                           prefix_allowed_tokens_fn=lambda _, ids: sorted(trie.get(tuple(ids[len(prompt):].tolist()), {{0}})),
                           attention_mask=torch.ones(1, len(prompt), dtype=torch.long), output_scores=True,
                           return_dict_in_generate=True)
    ends = [tuple(ids[len(prompt):].tolist()) for ids in found.sequences]
    return [(item_of[end], score) for end, score in zip(ends, found.sequences_scores.tolist()) if end in item_of]
```
{words}"""
ADAPT = """# Adapter of {method} of minipeso after D{stage}, on {base}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({where})
model.resize_token_embeddings({vocabulary}, mean_resizing=False)  # the semantic IDs' tokens, behind the words
model = PeftModel.from_pretrained(model, folder)
```
Code c of level l is token {first} + {codes} l + c.
"""


def export_peft(run: Reopened, source: Path, target: Path) -> None:
    """The stage's adapter folder byte for byte, with a README; the base beside it if the run has made it."""
    scratch = prepare.from_scratch(run.cfg)

    def write(folder: Path) -> None:
        for path in sorted(adapter_folder(source, run.stage)[0].iterdir()):
            shutil.copyfile(path, folder / path.name)
        pinned = f', revision="{PINNED[run.cfg.base]}"' if run.cfg.base in PINNED else ""
        dtype = str(run.model.model.norm.weight.dtype).removeprefix("torch.")  # transformers would take the file's
        where = 'f"{folder}/base"' if scratch else f'"{run.cfg.base}"{pinned}, dtype="{dtype}"'
        text = ADAPT.format(**_facts(run), where=where, first=run.template.first_token, codes=run.template.n_codes)
        _say(folder, run.cfg, text)
        if scratch:
            (folder / "base").mkdir()
            _write_model(folder / "base", run, merged=False)
    _whole(target, write)


def export_merged(run: Reopened, target: Path) -> None:
    """config.json, model.safetensors (W + s B A), tokenizer.json with the codes' tokens, generation_config.json
    without sampling, and minipeso.json: what transformers, vLLM and others load without this package."""
    def write(folder: Path) -> None:
        _write_model(folder, run, merged=True)
        words = "The base has no text vocabulary: token ids are codes, and there is no tokenizer.\n"
        if run.tokenizer is not None:
            _write_tokenizer(folder, run)
            words = "`tokenizer.json` knows every code as one token, `<a_0>` to the last.\n"
        _say(folder, run.cfg, GENERATE.format(**_facts(run), words=words))
        template = run.template
        items = {run.data.keys[item]: template.items[item].tolist() for item in run.known}
        (folder / "minipeso.json").write_text(json.dumps(
            {"head": template.preamble, "separator": template.separator, "tail": template.tail, "window": run.cfg.window,
             "items": items}) + "\n")
    _whole(target, write)


def _facts(run: Reopened) -> dict:
    return {"method": run.cfg.method, "stage": run.stage, "base": run.cfg.base,
            "vocabulary": run.template.first_token + run.ids.codes.shape[1] * run.ids.n_codes}


def _whole(target: Path, write: Callable[[Path], None]) -> None:
    """write(folder), then the folder gets its name; one that holds something is left alone."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is in the way\nit is no empty folder\nname a new one")
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        write(part)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _say(folder: Path, cfg: Config, text: str) -> None:
    """README.md, and for a Llama the notice that its licence asks for."""
    version = llama_version(cfg)
    if version:
        (folder / "NOTICE").write_text(NOTICE.format(version, version), encoding="utf-8")
    (folder / "README.md").write_text(text + BUILT * bool(version), encoding="utf-8")


def llama_version(cfg: Config) -> str | None:
    """Of a checkpoint by its name, or where a folder is called otherwise by its rotary factor: only Llama 3.2's is 32,
    only 3.1's is 8 (llama.rope_frequencies). None: no Llama of Meta's."""
    found = re.search(r"llama-?(3(?:\.\d)?)", cfg.base.lower())
    if found or prepare.from_scratch(cfg):
        return found and found[1]
    return {32.0: "3.2", 8.0: "3.1"}.get(prepare.llama_config(cfg).rope_parameters.get("factor"))


def _write_model(folder: Path, run: Reopened, merged: bool) -> None:
    model, cfg = run.model, run.cfg
    bos, eos = run.template.preamble[0], None
    if prepare.from_scratch(cfg):
        config = asdict(model.config) | {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
                                         "rope_theta": model.config.rope_parameters["rope_theta"],
                                         "max_position_embeddings": 8192}
    else:
        config = json.loads((checkpoint_folder(cfg.base, weights=False) / "config.json").read_text())
        eos = run.tokenizer.token_to_id("<|end_of_text|>")
    tied = merged and model.lm_head is model.model.embed_tokens or not merged and model.config.tie_word_embeddings
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": bos if eos is None else eos}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": tied,
               "vocab_size": _facts(run)["vocabulary"], **ids}
    name = str(model.model.norm.weight.dtype).removeprefix("torch.")
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")} | {"torch_dtype": name}
    generation = {"do_sample": False, "max_new_tokens": run.ids.codes.shape[1], **ids}
    for file, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    save_file(plain_tensors(model, merged), folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # safetensors lets nobody else read


@torch.no_grad()
def plain_tensors(model: Llama, merged: bool = True) -> dict[str, Tensor]:
    """{checkpoint name: tensor}: adapters merged into their layers (or left out), new rows behind the old."""
    layers, tensors = dict(adapters(model)), {}
    for name, p in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight":
            continue  # A, B, rows: below
        if module in layers and merged:
            p = layers[module].merged_weight()
        elif hasattr(owner := model.get_submodule(module), "rows"):
            p = torch.cat([p, owner.rows.to(p.dtype)])
        tensors[name] = p.detach().cpu().contiguous()
    return dict(sorted(tensors.items()))


def _write_tokenizer(folder: Path, run: Reopened) -> None:
    """The base's tokenizer with <a_0> ... behind its words, at the ids that the model was trained with."""
    tokenizer = Tokenizer.from_str(run.tokenizer.to_str())
    names = run.ids.tokens
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    ids = [tokenizer.token_to_id(name) for name in names]
    if ids != list(range(run.template.first_token, run.template.first_token + len(names))):
        raise UsageError(f"the tokenizer of {run.cfg.base} knows some of the codes' names\nfor example {names[0]} is token "
                         f"{ids[0]}, expected {run.template.first_token}\nuse the tokenizer.json of the official checkpoint")
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
             "pad_token": "<|end_of_text|>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
