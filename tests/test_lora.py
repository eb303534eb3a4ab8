"""Eq. 3 and its anchor in float64, and the PEFT format against peft itself."""
from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minipeso.files.hub import load_llama
from minipeso.lora import TARGETS, LoRALinear, adapter_parameters, adapters, inject, rewrap
from minipeso.files.peft import load_peft, save_peft
from tests.reference import toy_llama, transformers_llama

IDS = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))
WITH_NEW = torch.cat([IDS, torch.tensor([[96, 100, 98], [99, 97, 96]])], 1)


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@torch.no_grad()
def shake(model: nn.Module, seed: int = 0) -> None:
    """Adapters as after some training: neither B nor the difference to the anchor is zero."""
    for i, p in enumerate(adapter_parameters(model)):
        p += 0.1 * normal(*p.shape, seed=seed * 1000 + i).to(p.dtype)


def layer(dtype=torch.float64, dropout: float = 0.0, seed: int = 0) -> LoRALinear:
    linear = nn.Linear(6, 4, bias=False)
    linear.weight.data = normal(4, 6, seed=seed)
    lora = LoRALinear(linear.to(dtype), rank=3, alpha=5.0, dropout=dropout)
    lora.reset(torch.Generator().manual_seed(seed))
    return lora


def adapted(seed: int = 0, dtype=torch.float64, n_new: int = 0, dropout: float = 0.0, **changes):
    """A toy Llama, with n_new tokens behind its vocabulary, and a shaken adapter of rank 3."""
    model = toy_llama(seed, dtype, **changes)
    if n_new:
        model.grow(n_new, torch.Generator().manual_seed(seed), std=0.3)
    inject(model, 3, 5.0, dropout, generator=torch.Generator().manual_seed(seed))
    shake(model, seed)
    return model.eval()


# ---- one layer


def test_forward_is_eq_3():
    """y = W_0 x + (alpha / r) B A x, written out by index, and equal to x merged_weight()^T."""
    lora, x = layer(), normal(7, 6, seed=1)
    shake(lora)
    A, B, W = lora.A.detach(), lora.B.detach(), lora.weight
    for n in range(7):
        for o in range(4):
            want = sum(W[o, i] * x[n, i] for i in range(6))
            want += 5.0 / 3 * sum(B[o, k] * A[k, i] * x[n, i] for k in range(3) for i in range(6))
            assert lora(x)[n, o].item() == pytest.approx(want.item(), abs=1e-6)
    lora.double()
    assert torch.allclose(lora(x), x @ lora.merged_weight().T, rtol=0, atol=1e-12)
    assert lora.merged_weight().dtype == torch.float64 and not lora.merged_weight().requires_grad


def test_shapes_are_the_papers():
    """A (r, d_in), B (d_out, r), their anchors alike; rank 0 is an error that says so."""
    lora = layer()
    assert lora.A.shape == lora.A_prev.shape == (3, 6) and lora.B.shape == lora.B_prev.shape == (4, 3)
    assert {n for n, _ in lora.named_parameters()} == {"A", "B", "weight"}
    for rank in (0, -2):
        with pytest.raises(ValueError, match=f"rank >= 1, got {rank}"):
            LoRALinear(nn.Linear(6, 4, bias=False), rank, 8.0)


def test_a_new_adapter_changes_nothing():
    """B = 0: a whole adapted Llama gives the base's logits bit for bit, in training and evaluation."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = toy_llama(dtype=dtype)
        before = model(IDS)
        inject(model, 4, 8.0, dropout=0.3)
        assert torch.equal(model.eval()(IDS), before) and torch.equal(model.train()(IDS), before)


def test_a_starts_uniform_and_seeded():
    """A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), by the generator alone, anchored at itself."""
    linear = nn.Linear(400, 2, bias=False)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(drawn))  # must not matter
        model = nn.ModuleDict({"q_proj": copy.deepcopy(linear)})
        inject(model, 50, 1.0, targets=("q_proj",), generator=torch.Generator().manual_seed(seed))
        drawn.append(model["q_proj"])
    A = drawn[0].A.detach()
    assert torch.equal(A, drawn[1].A) and not torch.equal(A, drawn[2].A)
    assert torch.equal(A, drawn[0].A_prev) and torch.equal(drawn[0].B, drawn[0].B_prev)
    assert 0.0495 < A.abs().max() <= 0.05 and abs(A.std().item() - 0.05 / 3**0.5) < 5e-4, A.std()


def test_a_step_leaves_the_base_untouched():
    """One optimiser step over everything that requires a gradient moves every B and no W_0; A moves
    at the second step (its gradient is 0 while B = 0)."""
    model = toy_llama(dtype=torch.float32)
    inject(model, 2, 4.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in adapter_parameters(model)}
    optimiser = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(IDS).logsumexp(-1).sum().backward()
        optimiser.step()
    for name, p in model.named_parameters():
        adapter = name.rpartition(".")[2] in "AB"
        assert torch.equal(p, before[name]) != adapter, name
        assert (p.grad is not None) == adapter, name


def test_advance_copies_and_detaches():
    """The anchor takes the adapter's values, not its storage or graph, and is not trained."""
    lora = layer()
    shake(lora)
    assert not torch.equal(lora.A, lora.A_prev)
    lora.advance()
    assert torch.equal(lora.A, lora.A_prev) and torch.equal(lora.B, lora.B_prev)
    kept = lora.A_prev.clone()
    shake(lora, 1)
    assert torch.equal(lora.A_prev, kept) and not torch.equal(lora.A, kept)
    for anchor, p in ((lora.A_prev, lora.A), (lora.B_prev, lora.B)):
        assert not anchor.requires_grad and anchor.grad_fn is None and anchor.data_ptr() != p.data_ptr()
    before = lora(normal(2, 6))
    lora.A_prev.zero_()
    assert torch.equal(lora(normal(2, 6)), before), "the anchor takes part in the forward"


def test_dropout_acts_on_the_adapter_alone():
    """With everything dropped, W_0 x is left; otherwise the adapter's part is right on average, and
    evaluation drops nothing."""
    x = normal(5, 6, seed=3, dtype=torch.float32)
    base = nn.functional.linear(x, layer(torch.float32).weight)
    for p in (0.0, 0.5, 1.0):
        lora = layer(torch.float32, dropout=p)
        shake(lora)
        exact = lora.eval()(x).detach()
        assert torch.allclose(exact, x @ lora.merged_weight().T, atol=1e-5)
        lora.train()
        if p == 1.0:
            assert torch.equal(lora(x), base)
        if p == 0.5:
            torch.manual_seed(0)
            draws = lora(x.expand(20_000, 5, 6)).detach()
            assert draws.std(0).min() > 0.01, "nothing is dropped"
            error = (draws.mean(0) - exact) / (draws.std(0) / 20_000**0.5)
            assert error.abs().max() < 5, f"{error.abs().max():.1f} standard errors off"


def test_the_adapter_stays_float32_beside_bfloat16():
    """In a bfloat16 model A, B and anchors are float32, a step of 1e-5 is not lost, the output is bfloat16."""
    model = toy_llama(dtype=torch.bfloat16)
    inject(model, 4, 8.0)
    for _, lora in adapters(model):
        assert lora.weight.dtype == torch.bfloat16
        assert {t.dtype for t in (lora.A, lora.B, lora.A_prev, lora.B_prev)} == {torch.float32}
        assert lora(normal(2, lora.A.shape[1], dtype=torch.bfloat16)).dtype == torch.bfloat16
        with torch.no_grad():
            lora.A += 1e-5
        moved = lora.A - lora.A_prev
        assert torch.allclose(moved, torch.full_like(moved, 1e-5), rtol=0.01), f"{moved.mean():.2e}"
        assert lora.merged_weight().dtype == torch.bfloat16
    model(IDS).sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter_parameters(model))


# ---- a whole model


def test_inject_adapts_all_seven_projections():
    """Every named projection of every layer, in the model's order, and nothing else; the checkpoint's
    names of the frozen weights stay what they were."""
    model = toy_llama()
    names = set(dict(model.named_parameters()))
    inject(model, 2, 4.0)
    found = [name for name, _ in adapters(model)]
    want = [f"model.layers.{i}.{part}" for i in range(2) for part in
            (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))]
    assert found == want and len(adapter_parameters(model)) == 28
    assert names <= set(dict(model.named_parameters()))
    model = toy_llama()
    inject(model, 2, 4.0, targets=("v_proj", "q_proj"))
    assert [n.rpartition(".")[2] for n, _ in adapters(model)] == ["q_proj", "v_proj"] * 2


@pytest.mark.parametrize("targets, word", [(("query",), "query"), ((*TARGETS, "qproj"), "qproj"),
                                           (("embed_tokens",), "embed_tokens")])
def test_unknown_targets_are_named(targets, word):
    """A name that no linear layer has is an error, also beside names that exist; nothing is wrapped."""
    model = toy_llama()
    with pytest.raises(ValueError, match=word) as error:
        inject(model, 2, 4.0, targets=targets)
    assert "q_proj" not in str(error.value) and not list(adapters(model))


def test_merging_every_layer_gives_the_same_model():
    """A plain Llama whose weights are the merged_weight()s has the adapted model's logits."""
    model, plain = adapted(), toy_llama()
    model.double()
    for name, lora in adapters(model):
        plain.get_submodule(name).weight.data = lora.merged_weight()
    difference = (model(IDS) - plain(IDS)).abs().max()
    assert difference <= 1e-11 and (plain(IDS) - toy_llama()(IDS)).abs().max() > 0.1, f"{difference:.1e}"


def test_state_dict_round_trip_is_strict():
    """Adapter, anchor and new rows come back from a state dict, bit for bit."""
    a, b = adapted(0, n_new=5), adapted(1, n_new=5)
    shake(a, 7)  # away from its anchor
    missing = b.load_state_dict(a.state_dict(), strict=True)
    assert not missing.missing_keys and torch.equal(a(WITH_NEW), b(WITH_NEW))
    for (_, x), (_, y) in zip(adapters(a), adapters(b)):
        assert torch.equal(x.A_prev, y.A_prev) and torch.equal(x.B_prev, y.B_prev)
        assert not torch.equal(x.A, x.A_prev)


def test_rewrap_continues_from_the_same_adapter():
    """Another class around the same A, B, scale and dropout, anchored there; W_0 is not copied."""
    class Doubled(LoRALinear):
        def delta(self, x):
            return 2 * super().delta(x)

    model = adapted(dtype=torch.float32, dropout=0.25)
    before, old = model(IDS), dict(adapters(model))
    rewrap(model, Doubled)
    for name, lora in adapters(model):
        assert type(lora) is Doubled and lora.dropout.p == 0.25
        assert lora.weight.data_ptr() == old[name].weight.data_ptr()
        for part in "AB":
            values = getattr(old[name], part)
            assert torch.equal(getattr(lora, part), values) and torch.equal(getattr(lora, f"{part}_prev"), values)
    assert not torch.equal(model.eval()(IDS), before)
    rewrap(model, LoRALinear)
    assert torch.equal(model.eval()(IDS), before)


# ---- the PEFT format


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
def test_save_and_load_round_trip(tmp_path, changes):
    """A bare model and one with another adapter both become the saved one, anchored there."""
    model = adapted(dtype=torch.float32, n_new=5, **changes)
    save_peft(model, tmp_path / "adapter")
    bare = toy_llama(dtype=torch.float32, **changes)
    bare.grow(5)
    other = adapted(0, torch.float32, 5, **changes)
    shake(other, 3)
    for target in (bare, other):
        load_peft(target, tmp_path / "adapter")
        assert torch.equal(target.eval()(WITH_NEW), model(WITH_NEW))
        for _, lora in adapters(target):
            assert torch.equal(lora.A, lora.A_prev) and torch.equal(lora.B, lora.B_prev)


def test_files_are_byte_identical(tmp_path):
    """The same adapter saved twice is the same bytes; the config is readable and its targets sorted."""
    for name in ("a", "b"):
        save_peft(adapted(dtype=torch.float32, n_new=3), tmp_path / name, "meta-llama/Llama-3.2-1B")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(TARGETS) and config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"]) == (3, pytest.approx(5.0))
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.2-1B"
    assert config["trainable_token_indices"] == [96, 97, 98] and config["modules_to_save"] is None
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 14 + 1 and {t.dtype for t in tensors.values()} == {torch.float32}


def peft_logits(folder: Path, peer, n_new: int) -> Tensor:
    peft = pytest.importorskip("peft")
    if n_new:
        peer.resize_token_embeddings(96 + n_new, mean_resizing=False)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(peer, folder).eval()(WITH_NEW if n_new else IDS).logits


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, from inside peft
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("n_new", [0, 5])
def test_peft_loads_what_we_save(tmp_path, changes, n_new):
    """peft on transformers' model of the same weights has our logits to 1e-5, new tokens included:
    in a tied model by the embedding's rows, in an untied one by the head's own too."""
    peer = transformers_llama(**changes)
    peer.save_pretrained(tmp_path / "base")
    model = load_llama(tmp_path / "base")
    if n_new:
        model.grow(n_new, torch.Generator().manual_seed(1), std=0.3)
    inject(model, 3, 5.0)
    shake(model)
    save_peft(model, tmp_path / "adapter")
    want = model.eval()(WITH_NEW if n_new else IDS)
    got = peft_logits(tmp_path / "adapter", peer, n_new)
    assert got.shape == want.shape == (2, 23 if n_new else 20, 96 + n_new)
    assert (got - want).abs().max() <= 1e-5, f"differ by {(got - want).abs().max():.1e}"
    plain = load_llama(tmp_path / "base")(IDS)
    assert (want[:, :20, :96] - plain).abs().max() > 0.1, "the adapter does nothing"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("tied", [True, False])
def test_peft_loads_tables_that_were_trained_whole(tmp_path, tied):
    """Recipe `release`: embedding and head, untied if need be and both trained, go as peft's
    modules_to_save; load_peft reads them back into a model prepared alike, and into no other."""
    peer = transformers_llama(tie_word_embeddings=tied)
    peer.save_pretrained(tmp_path / "base")
    whole, again = load_llama(tmp_path / "base"), load_llama(tmp_path / "base")
    for model in (whole, again):
        model.grow(5, torch.Generator().manual_seed(1), std=0.3)
        inject(model, 3, 5.0)
        model.untie()
        for table in (model.model.embed_tokens, model.lm_head):
            table.weight.requires_grad_(True)
    shake(whole)
    for i, table in enumerate((whole.model.embed_tokens, whole.lm_head)):
        for p in (table.weight, table.rows):
            p.data += 0.1 * normal(*p.shape, seed=i).float()
    save_peft(whole, tmp_path / "adapter")
    want, got = whole.eval()(WITH_NEW), peft_logits(tmp_path / "adapter", peer, 5)
    assert (got - want).abs().max() <= 1e-5, f"differ by {(got - want).abs().max():.1e}"
    load_peft(again, tmp_path / "adapter")
    assert torch.equal(again.eval()(WITH_NEW), want)
    refused(tmp_path / "adapter", "lm_head", model=adapted(1, torch.float32, 5, tie_word_embeddings=tied))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_we_load_what_peft_saves(tmp_path):
    """An adapter made by peft, with new token rows, gives peft's logits through load_peft."""
    peft = pytest.importorskip("peft")
    peer = transformers_llama()
    peer.save_pretrained(tmp_path / "base")
    peer.resize_token_embeddings(101, mean_resizing=False)
    theirs = peft.get_peft_model(peer, peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], trainable_token_indices=list(range(96, 101)),
        task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(theirs.named_parameters()):
            if p.requires_grad:
                p.copy_(0.3 * normal(*p.shape, seed=i))
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_llama(tmp_path / "base")
    model.grow(5)
    load_peft(model, tmp_path / "adapter")
    with torch.no_grad():
        difference = (model.eval()(WITH_NEW) - theirs(WITH_NEW).logits).abs().max()
    assert difference <= 1e-5 and len(list(adapters(model))) == 4, f"differ by {difference:.1e}"


# ---- faults


KEY = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"


@pytest.fixture
def saved(tmp_path):
    """(folder, tensors, config) of an intact adapter, on disk."""
    save_peft(adapted(dtype=torch.float32), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")  # which may be views of the file, until it is written anew
    return (tmp_path, {name: t.clone() for name, t in tensors.items()},
            json.loads((tmp_path / "adapter_config.json").read_text()))


def refused(folder: Path, *words: str, model=None) -> None:
    """load_peft raises a ValueError with all of `words` and leaves every parameter as it was."""
    model = model or adapted(1, torch.float32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_peft(model, folder)
    for word in words:
        assert word in str(error.value), f"no {word!r} in:\n{error.value}"
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name in before)


def test_a_missing_key_is_named(saved):
    """peft would only warn and run without it."""
    folder, tensors, _ = saved
    del tensors[KEY]
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(folder, str(folder), KEY, "1 tensors differ", "file -")
    refused(folder, KEY, model=toy_llama(dtype=torch.float32))


@pytest.mark.parametrize("extra", ["base_model.model.model.layers.2.mlp.up_proj.lora_A.weight", "lora_A.weight",
                                   "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"])
def test_an_extra_key_is_named(saved, extra):
    """Another model's layer, a wrong prefix, token rows without new tokens."""
    folder, tensors, _ = saved
    save_file(tensors | {extra: torch.zeros(3, 24)}, folder / "adapter_model.safetensors")
    refused(folder, extra, "(3, 24)", "model -")


def test_another_rank_and_a_transposed_a_are_named_with_both_shapes(saved):
    """The file's shape and the model's."""
    folder, tensors, _ = saved
    model = toy_llama(dtype=torch.float32)
    inject(model, 4, 5.0 / 3 * 4)
    refused(folder, "lora_", "file (3, ", "model (4, ", model=model)
    save_file(tensors | {KEY: tensors[KEY].T.contiguous()}, folder / "adapter_model.safetensors")
    refused(folder, KEY, "file (24, 3)", "model (3, 24)")


@pytest.mark.parametrize("change, word", [
    ({"lora_alpha": 10.0}, "3.33333"), ({"use_rslora": True}, "use_rslora"), ({"alpha_pattern": {"q_proj": 9}}, "q_proj")])
def test_another_scale_is_an_error(saved, change, word):
    """alpha / r does not show in any shape: a file for another scale would change the function in silence."""
    folder, _, config = saved
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    refused(folder, str(folder), word)


def test_numbers_that_are_not_finite_are_named(saved):
    """One NaN or infinity anywhere."""
    folder, tensors, _ = saved
    for value in (float("nan"), float("inf")):
        tensors[KEY][2, 5] = value
        save_file(tensors, folder / "adapter_model.safetensors")
        refused(folder, KEY, "not finite")


def test_broken_or_missing_files_are_named(saved):
    """Cut off, HTML, a config without its rank, no file at all."""
    folder, _, config = saved
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    intact = weights.read_bytes()
    for data in (intact[:-1], intact[:100], b"", b"<!DOCTYPE html>" * 50):
        weights.write_bytes(data)
        refused(folder, str(folder))
    weights.write_bytes(intact)
    for text in (json.dumps({k: v for k, v in config.items() if k != "r"}), "<html>", ""):
        settings.write_text(text)
        refused(folder, str(folder))
    for file in (settings, weights):
        file.unlink()
        with pytest.raises(FileNotFoundError, match=file.name):
            load_peft(adapted(1, torch.float32), folder)
        settings.write_text(json.dumps(config))


def test_half_precision_and_a_minimal_config_load(saved):
    """An adapter in float16 is read into float32; the four fields that peft needs are enough."""
    folder, tensors, config = saved
    save_file({k: t.half() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    minimal = {k: config[k] for k in ("peft_type", "r", "lora_alpha", "target_modules")}
    (folder / "adapter_config.json").write_text(json.dumps(minimal))
    model = toy_llama(dtype=torch.float32)
    load_peft(model, folder)
    for part in "AB":
        values = {name: getattr(lora, part) for name, lora in adapters(model)}
        for name, value in values.items():
            want = tensors[f"base_model.model.{name}.lora_{part}.weight"]
            assert value.dtype == torch.float32 and torch.equal(value, want.half().float())
