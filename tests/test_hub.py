"""The loader: every fault of a checkpoint folder is an error that names what is wrong, and where."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipeso.files.hub import load_llama, read_config, weight_files
from tests.reference import TOY, toy_llama

IDS = torch.arange(20)[None]
UP = "model.layers.1.mlp.up_proj.weight"


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


def checkpoint(folder: Path, shards: int = 1, **changes) -> dict[str, torch.Tensor]:
    """A folder in the Hub's layout, written by hand; its tensors."""
    tensors = {name: p.detach().clone() for name, p in toy_llama(dtype=torch.float32, **changes).named_parameters()}
    write(folder, tensors, shards, TOY | changes)
    return tensors


@pytest.fixture
def base(tmp_path) -> Path:
    checkpoint(tmp_path / "base")
    return tmp_path / "base"


def fails(folder: Path, kind: type[Exception], *words: str) -> None:
    """Loading raises `kind`, in three lines, with all of `words`."""
    with pytest.raises(kind) as error:
        load_llama(folder)
    text = str(error.value)
    assert len(text.splitlines()) == 3 and all(word in text for word in words), text


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("shards, stored, asked", [
    (1, torch.float32, torch.float32), (3, torch.float32, torch.float32), (1, torch.float16, torch.float32),
    (3, torch.float64, torch.float32), (3, torch.bfloat16, torch.float64), (1, torch.bfloat16, torch.bfloat16)])
def test_every_tensor_arrives(tmp_path, changes, shards, stored, asked):
    """The loaded parameters are the files' tensors, bit for bit, from one file or shards of any float, in the asked
    dtype, and the model is in working order; the folder's name may be a string. Old files' inv_freq, of any shape, and
    a tied head's second copy are no errors."""
    tensors = {name: t.to(stored) for name, t in checkpoint(tmp_path / "base", **changes).items()}
    odd = {f"a{i}.rotary_emb.inv_freq": torch.ones(shape) for i, shape in enumerate([(), (0,), (3,)])}
    odd["lm_head.weight"] = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).clone()
    write(tmp_path / "odd", tensors | odd, shards, TOY | changes)
    model = load_llama(str(tmp_path / "odd"), asked)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == tensors.keys() and {p.dtype for p in loaded.values()} == {asked}
    assert all(torch.equal(p, tensors[name].to(asked)) for name, p in loaded.items())
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == (changes == {})
    if stored == asked == torch.float32:
        assert torch.equal(model(IDS), toy_llama(dtype=torch.float32, **changes)(IDS))


def test_training_writes_no_byte_of_the_checkpoint(base):
    """The weights are views of the mapped file, and their own as soon as they change."""
    before, model = (base / "model.safetensors").read_bytes(), load_llama(base)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert (base / "model.safetensors").read_bytes() == before, "training wrote into the checkpoint"


ROPE = TOY["rope_parameters"]
CONFIGS = {f"without {field}": ({k: v for k, v in TOY.items() if k != field}, field) for field in TOY} | {
    f"{change}": (TOY | change, word) for change, word in [
        ({"rope_parameters": {**ROPE, "rope_type": "yarn"}}, "'yarn'"),
        *(({"rope_parameters": {k: v for k, v in ROPE.items() if k != name}}, name) for name in [*ROPE][1:]),
        ({"rope_parameters": [1]}, "config.json"), ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias"), ({"hidden_act": "gelu"}, "'gelu'"), ({"num_attention_heads": 3}, "3 heads")]}


@pytest.mark.parametrize("config, word", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_lacks_a_field_or_has_an_unsupported_value_is_named(base, config, word):
    """Nothing is completed by a default, and what this forward cannot compute is refused before any weight is read."""
    (base / "config.json").write_text(json.dumps(config))
    fails(base, ValueError, "config.json", word)


def test_no_folder_and_an_empty_folder_say_what_belongs_there(tmp_path):
    """What is neither a folder nor owner/name says so; a folder says which file it lacks."""
    fails(tmp_path / "meta-llama" / "Llama-3.2-1B", FileNotFoundError, "Llama-3.2-1B", "owner/name")
    (tmp_path / "base").mkdir()
    fails(tmp_path / "base", FileNotFoundError, "config.json")
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_config(tmp_path)
    (tmp_path / "base" / "config.json").write_text(json.dumps(TOY))
    fails(tmp_path / "base", FileNotFoundError, "model.safetensors", "the folder has config.json")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(tmp_path, name, shards):
    """No parameter may be left as it was allocated, an untied head neither."""
    tensors = checkpoint(tmp_path / "base", tie_word_embeddings=False)
    del tensors[name]
    write(tmp_path / "less", tensors, shards, TOY | {"tie_word_embeddings": False})
    fails(tmp_path / "less", ValueError, "less", name)


@pytest.mark.parametrize("name, tensor, words", [
    ("model.layers.2.input_layernorm.weight", torch.ones(24), ()), ("embed_tokens.weight", torch.ones(24), ()),
    ("model.layers.0.self_attn.q_proj.bias", torch.ones(24), ()),
    (UP, torch.ones(24, 40), ("(24, 40)", "(40, 24)")),
    ("model.embed_tokens.weight", torch.ones(97, 24), ("(97, 24)", "(96, 24)")),
    *((UP, torch.zeros(40, 24).to(dtype), ("bfloat16",)) for dtype in (torch.int8, torch.float8_e4m3fn, torch.bool))])
def test_a_tensor_that_does_not_fit_is_named(base, name, tensor, words):
    """Without a place, of another shape (both are told), or quantised, so that its scales stand elsewhere."""
    write(base, load_file(base / "model.safetensors") | {name: tensor})
    fails(base, ValueError, "model.safetensors", name, *words)


@pytest.mark.parametrize("change", [
    *(lambda data, keep=keep: data[:keep] for keep in (0, 7, 40, -1, -1000)), lambda data: b"<!DOCTYPE html>401\n" * 40,
    lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:68a2\nsize 2471645608\n"])
def test_weights_that_are_none_are_named_with_their_size(base, change):
    """Cut anywhere, from nothing left to one byte short; a login page or a large-file pointer under their name."""
    file = base / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    fails(base, ValueError, "model.safetensors", f"{file.stat().st_size:,} bytes", "download it again")


def test_a_tensor_in_two_shards_and_a_missing_shard_are_named(tmp_path):
    """Which of the two would count? Neither. The index says which files there must be."""
    checkpoint(tmp_path / "base", shards=2)
    first, second = weight_files(tmp_path / "base")
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    fails(tmp_path / "base", ValueError, name, second.name)
    first.unlink()
    fails(tmp_path / "base", FileNotFoundError, first.name)


@pytest.mark.parametrize("text, name", [
    ("", "../../x"), ("{}", "../model-00001-of-00001.safetensors"), ("[]", "/etc/passwd"),
    ('{"weight_map": null}', "x.safetensors"), ('{"weight_map": {"a": 3}}', "sub/model-00001-of-00001.safetensors"),
    ("<html>", "model-00001-of-00001.safetensors\n")])
def test_a_broken_index_is_named_and_none_opens_anything_outside_its_folder(base, text, name):
    """An index without a readable weight_map; or with another name than model-0000N-of-0000M.safetensors, though the
    file named is there and intact."""
    tensors, index = load_file(base / "model.safetensors"), base / "model.safetensors.index.json"
    save_file(tensors, base.parent / "model-00001-of-00001.safetensors")
    for broken, word in ((text, "download"), (json.dumps({"weight_map": dict.fromkeys(tensors, name)}), repr(name))):
        index.write_text(broken)
        fails(base, ValueError, "index.json", word)
