"""The loader: every fault of a checkpoint folder is an error that names what is wrong, and where."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipeso.files.hub import load_llama, read_config, weight_files
from tests.reference import TOY, toy_llama

IDS = torch.arange(20)[None]


def checkpoint(folder: Path, shards: int = 1, **changes) -> dict[str, torch.Tensor]:
    """A folder in the Hub's layout, written by hand; its tensors."""
    model = toy_llama(dtype=torch.float32, **changes)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    write(folder, tensors, shards, TOY | changes)
    return tensors


def write(folder: Path, tensors: dict, shards: int = 1, config: dict = TOY) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        return save_file(tensors, folder / "model.safetensors")
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def fails(folder: Path, kind: type[Exception], *words: str) -> None:
    """Loading raises `kind`, in three lines, with all of `words`."""
    with pytest.raises(kind) as error:
        load_llama(folder)
    text = str(error.value)
    assert len(text.splitlines()) == 3, text
    for word in words:
        assert word in text, f"no {word!r} in:\n{text}"


# ---- what must load


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_arrives(tmp_path, changes, shards):
    """The loaded parameters are the files' tensors, bit for bit, and the model is in working order."""
    tensors = checkpoint(tmp_path / "base", shards, **changes)
    model = load_llama(tmp_path / "base")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == (changes == {})
    assert torch.equal(model(IDS), toy_llama(dtype=torch.float32, **changes)(IDS))


def test_name_may_be_a_string_and_dtype_is_kept(tmp_path):
    """Parameters come in the asked dtype from files of any, with the rotary speeds never coarser than float32."""
    tensors = checkpoint(tmp_path / "base")
    exact = load_llama(str(tmp_path / "base"))
    write(tmp_path / "half", {name: t.bfloat16() for name, t in tensors.items()})
    for dtype, speed in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32),
                         (torch.float64, torch.float64)):
        model = load_llama(tmp_path / "half", dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.model.rotary.speed.dtype == speed
        assert torch.allclose(model.model.rotary.speed.float(), exact.model.rotary.speed, rtol=3e-7, atol=0)
        noise = (model(IDS) - exact(IDS)).std() / exact(IDS).std()
        assert noise < 0.05, f"bfloat16 weights move the logits by {noise:.3f} of their spread"


def test_what_carries_no_information_is_passed_over(tmp_path):
    """inv_freq of old files, and a tied head's second copy, are not errors."""
    tensors = checkpoint(tmp_path / "base")
    want = load_llama(tmp_path / "base")(IDS)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    extra["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write(tmp_path / "old", tensors | extra)
    assert torch.equal(load_llama(tmp_path / "old")(IDS), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_every_float_is_read_as_safetensors_reads_it(tmp_path, dtype):
    """Other types than the model's, a scalar and an empty tensor before the weights: the same values."""
    tensors = {name: t.to(dtype) for name, t in checkpoint(tmp_path / "base").items()}
    odd = {f"a{i}.rotary_emb.inv_freq": torch.ones(shape) for i, shape in enumerate([(), (0,), (3,)])}
    write(tmp_path / "base", tensors | odd)
    loaded, stored = dict(load_llama(tmp_path / "base").named_parameters()), load_file(tmp_path / "base/model.safetensors")
    assert all(torch.equal(p, stored[name].float()) for name, p in loaded.items())


def test_training_writes_no_byte_of_the_checkpoint(tmp_path):
    """The weights are views of the mapped file, and their own as soon as they change."""
    checkpoint(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    before, model = file.read_bytes(), load_llama(tmp_path / "base")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert file.read_bytes() == before, "training wrote into the checkpoint"


# ---- config.json


@pytest.mark.parametrize("field", list(TOY))
def test_a_missing_field_is_named(tmp_path, field):
    """A config.json that lacks a field is refused, never completed by a default."""
    checkpoint(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({k: v for k, v in TOY.items() if k != field}))
    fails(tmp_path / "base", ValueError, "config.json", field)


@pytest.mark.parametrize("change, word", [
    ({"rope_parameters": {**TOY["rope_parameters"], "rope_type": "yarn"}}, "'yarn'"),
    ({"rope_parameters": {k: v for k, v in TOY["rope_parameters"].items() if k != "factor"}}, "factor"),
    ({"rope_parameters": [1]}, "config.json"), ({"attention_bias": True}, "attention_bias = True"),
    ({"mlp_bias": True}, "mlp_bias"), ({"hidden_act": "gelu"}, "'gelu'"),
    ({"num_attention_heads": 3}, "3 heads")])
def test_an_unsupported_value_is_named(tmp_path, change, word):
    """What this forward cannot compute is refused before any weight is read."""
    checkpoint(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps(TOY | change))
    fails(tmp_path / "base", ValueError, "config.json", word)


@pytest.mark.parametrize("text", ["", "<!DOCTYPE html>", "[1, 2]", "3", "null", '{"vocab_size": '])
def test_a_config_that_is_no_object_is_named(tmp_path, text):
    """Empty, HTML, another kind of JSON, cut off: the file is named."""
    checkpoint(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(text)
    fails(tmp_path / "base", ValueError, "config.json")


def test_no_folder_and_an_empty_folder_say_what_belongs_there(tmp_path):
    """What is neither a folder nor owner/name says so; a folder says which file it lacks."""
    fails(tmp_path / "meta-llama" / "Llama-3.2-1B", FileNotFoundError, "Llama-3.2-1B", "owner/name")
    (tmp_path / "base").mkdir()
    fails(tmp_path / "base", FileNotFoundError, "config.json")
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_config(tmp_path)
    (tmp_path / "base" / "config.json").write_text(json.dumps(TOY))
    fails(tmp_path / "base", FileNotFoundError, "model.safetensors", "the folder has config.json")


# ---- tensors


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight",
                                  "model.layers.1.self_attn.k_proj.weight"])
def test_a_missing_tensor_is_named(tmp_path, name, shards):
    """No parameter may be left as it was allocated."""
    tensors = checkpoint(tmp_path / "base")
    del tensors[name]
    write(tmp_path / "less", tensors, shards)
    fails(tmp_path / "less", ValueError, "less", name)


def test_an_untied_model_needs_its_head(tmp_path):
    """With tie_word_embeddings false, lm_head.weight is a tensor like any other."""
    tensors = checkpoint(tmp_path / "base")
    write(tmp_path / "base", tensors, 1, TOY | {"tie_word_embeddings": False})
    fails(tmp_path / "base", ValueError, "lm_head.weight")


@pytest.mark.parametrize("name", ["model.layers.2.input_layernorm.weight", "embed_tokens.weight",
                                  "model.layers.0.self_attn.q_proj.bias"])
def test_an_extra_tensor_is_named(tmp_path, name):
    """A tensor without a place means that config and weights do not belong together."""
    tensors = checkpoint(tmp_path / "base")
    write(tmp_path / "base", tensors | {name: torch.ones(24)})
    fails(tmp_path / "base", ValueError, "model.safetensors", name)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
    """Transposed, or of another vocabulary: found and expected are given."""
    tensors = checkpoint(tmp_path / "base")
    for name, wrong, shape, expected in (
            ("model.layers.0.mlp.up_proj.weight", tensors["model.layers.0.mlp.up_proj.weight"].T.contiguous(),
             "(24, 40)", "(40, 24)"),
            ("model.embed_tokens.weight", torch.ones(97, 24), "(97, 24)", "(96, 24)")):
        write(tmp_path / "wrong", tensors | {name: wrong})
        fails(tmp_path / "wrong", ValueError, name, shape, expected)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    """Which of the two would count? Neither."""
    checkpoint(tmp_path / "base", shards=2)
    first, second = weight_files(tmp_path / "base")
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    fails(tmp_path / "base", ValueError, name, second.name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_quantised_weights_are_named(tmp_path, dtype):
    """Weights whose scales stand elsewhere are refused, not read as if they were the weights themselves."""
    tensors = checkpoint(tmp_path / "base")
    name = "model.layers.1.mlp.up_proj.weight"
    write(tmp_path / "base", tensors | {name: torch.zeros(40, 24).to(dtype)})
    fails(tmp_path / "base", ValueError, "model.safetensors", name, "bfloat16")


# ---- files


@pytest.mark.parametrize("keep", [0, 7, 40, -1, -1000])
def test_a_truncated_file_is_named_with_its_size(tmp_path, keep):
    """Cut anywhere, from nothing left to one byte short."""
    checkpoint(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(tmp_path / "base", ValueError, "model.safetensors", f"{file.stat().st_size:,} bytes")


@pytest.mark.parametrize("text", ["<!DOCTYPE html><html><body>401</body></html>\n" * 20,
                                  "version https://git-lfs.github.com/spec/v1\noid sha256:68a2\nsize 2471645608\n"])
def test_a_page_instead_of_weights_is_named(tmp_path, text):
    """A login page or a large-file pointer saved under the weights' name."""
    checkpoint(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_text(text)
    fails(tmp_path / "base", ValueError, "model.safetensors", "download it again")


def test_a_missing_shard_is_named(tmp_path):
    """The index says which files there must be."""
    checkpoint(tmp_path / "base", shards=3)
    (tmp_path / "base" / "model-00002-of-00003.safetensors").unlink()
    fails(tmp_path / "base", FileNotFoundError, "model-00002-of-00003.safetensors")


@pytest.mark.parametrize("name", ["../../x", "../model-00001-of-00001.safetensors", "/etc/passwd", "x.safetensors",
                                  "sub/model-00001-of-00001.safetensors", "model-00001-of-00001.safetensors\n"])
def test_an_index_opens_nothing_outside_its_folder(tmp_path, name):
    """Only model-0000N-of-0000M.safetensors may be named, though the file named is there and intact."""
    tensors = checkpoint(tmp_path / "base")
    save_file(tensors, tmp_path / "model-00001-of-00001.safetensors")
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    fails(tmp_path / "base", ValueError, "index.json", repr(name))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": null}', '{"weight_map": {"a": 3}}', "<html>"])
def test_a_broken_index_is_named(tmp_path, text):
    """An index without a readable weight_map."""
    checkpoint(tmp_path / "base", shards=2)
    (tmp_path / "base" / "model.safetensors.index.json").write_text(text)
    fails(tmp_path / "base", ValueError, "index.json", "download")
