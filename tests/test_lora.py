"""Eq. 3 and its anchor in float64, and the PEFT format against peft itself."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minipeso.files.hub import load_llama
from minipeso.files.peft import load_peft, save_peft
from minipeso.lora import TARGETS, LoRALinear, adapter_parameters, adapters, inject, rewrap
from minipeso.objective import stage_loss
from minipeso.tokens import Batch
from tests.reference import normal, toy_llama, transformers_llama

IDS = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WITH_NEW = torch.cat([IDS, torch.tensor([[96, 100, 98], [99, 97, 96]])], 1)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in load_file(folder / TENSORS).items()}  # they may be views of the file


@torch.no_grad()
def shake(model: nn.Module, seed: int = 0) -> None:
    """Adapters as after some training: neither B nor the difference to the anchor is zero."""
    for i, p in enumerate(adapter_parameters(model)):
        p += 0.1 * normal(*p.shape, seed=seed * 1000 + i).to(p.dtype)


def layer(dtype=torch.float64, dropout: float = 0.0) -> LoRALinear:
    linear = nn.Linear(6, 4, bias=False)
    linear.weight.data = normal(4, 6, dtype=dtype)
    lora = LoRALinear(linear, rank=3, alpha=5.0, dropout=dropout)
    lora.reset(torch.Generator().manual_seed(0))
    return lora


def adapted(seed: int = 0, dtype=torch.float64, n_new: int = 0, dropout: float = 0.0, **changes):
    """A toy Llama, with n_new tokens behind its vocabulary, and a shaken adapter of rank 3."""
    model = toy_llama(seed, dtype, **changes)
    if n_new:
        model.grow(n_new, torch.Generator().manual_seed(seed), std=0.3)
    inject(model, 3, 5.0, dropout, generator=torch.Generator().manual_seed(seed))
    shake(model, seed)
    return model.eval()


def test_forward_is_eq_3():
    """y = W_0 x + (alpha / r) B A x, written out by index, and equal to x merged_weight()^T."""
    lora, x = layer(), normal(7, 6, seed=1)
    assert lora.A.shape == lora.A_prev.shape == (3, 6) and lora.B.shape == lora.B_prev.shape == (4, 3)
    assert {n for n, _ in lora.named_parameters()} == {"A", "B", "weight"}
    shake(lora.double())
    A, B, W = lora.A.tolist(), lora.B.tolist(), lora.weight.tolist()
    want = [[sum((W[o][i] + 5.0 / 3 * sum(B[o][k] * A[k][i] for k in range(3))) * z[i] for i in range(6))
             for o in range(4)] for z in x.tolist()]  # (7, 4)
    assert torch.allclose(lora(x), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(lora(x), x @ lora.merged_weight().T, rtol=0, atol=1e-12)
    assert lora.merged_weight().dtype == torch.float64 and not lora.merged_weight().requires_grad
    with pytest.raises(ValueError, match="rank=0\n"):
        LoRALinear(nn.Linear(6, 4, bias=False), 0, 8.0)


def test_a_new_adapter_changes_nothing():
    """B = 0: a whole adapted Llama gives the base's logits bit for bit, in training and evaluation."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = toy_llama(dtype=dtype)
        before = model(IDS)
        inject(model, 4, 8.0, dropout=0.3)
        assert torch.equal(model.eval()(IDS), before) and torch.equal(model.train()(IDS), before)


def test_a_starts_uniform_and_seeded():
    """A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), by the generator alone, anchored at itself."""
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(drawn))  # must not matter
        model = nn.ModuleDict({"q_proj": nn.Linear(400, 2, bias=False)})
        inject(model, 50, 1.0, targets=("q_proj",), generator=torch.Generator().manual_seed(seed))
        drawn.append(model["q_proj"])
    A = drawn[0].A.detach()
    assert torch.equal(A, drawn[1].A) and not torch.equal(A, drawn[2].A)
    assert torch.equal(A, drawn[0].A_prev) and torch.equal(drawn[0].B, drawn[0].B_prev)
    assert 0.0495 < A.abs().max() <= 0.05 and abs(A.std().item() - 0.05 / 3**0.5) < 5e-4, A.std()


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropout_acts_on_the_adapter_alone(p):
    """With everything dropped W_0 x is left, otherwise the adapter's part is right on average; eval() drops nothing."""
    x, lora = normal(5, 6, seed=3, dtype=torch.float32), layer(torch.float32, dropout=p)
    shake(lora)
    exact = lora.eval()(x).detach()
    assert torch.allclose(exact, x @ lora.merged_weight().T, atol=1e-5)
    torch.manual_seed(0)
    draws = lora.train()(x.expand(20_000, 5, 6)).detach()
    if p == 1.0:
        assert torch.equal(lora(x), nn.functional.linear(x, lora.weight))
    else:
        error = (draws.mean(0) - exact) / (draws.std(0) / 20_000**0.5)
        assert draws.std(0).min() > 0.01 and error.abs().max() < 5, f"{error.abs().max():.1f} standard errors off"


def test_the_adapter_stays_float32_beside_bfloat16():
    """In a bfloat16 model A, B and anchors are float32, a step of 1e-5 is not lost, the output is bfloat16."""
    model = toy_llama(dtype=torch.bfloat16)
    inject(model, 4, 8.0)
    for _, lora in adapters(model):
        assert lora.weight.dtype == torch.bfloat16
        assert {t.dtype for t in (lora.A, lora.B, lora.A_prev, lora.B_prev)} == {torch.float32}
        y = lora(normal(2, lora.A.shape[1], dtype=torch.bfloat16))
        assert y.dtype == lora.merged_weight().dtype == torch.bfloat16
        with torch.no_grad():
            lora.A += 1e-5
        moved = lora.A - lora.A_prev
        assert torch.allclose(moved, torch.full_like(moved, 1e-5), rtol=0.01), f"{moved.mean():.2e}"
    loss = stage_loss(model, Batch(IDS, IDS, None, None, IDS >= 0, 2), "output-kl", 1.0)  # of layers that run in bf16
    loss.total.backward()
    told = [loss.prox, *(p.grad for p in adapter_parameters(model))]
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in told)


def test_inject_adapts_all_seven_projections():
    """Every named projection of every layer, in the model's order; the frozen weights keep the checkpoint's names."""
    model = toy_llama()
    names = set(dict(model.named_parameters()))
    inject(model, 2, 4.0)
    want = [f"model.layers.{i}.{part}" for i in range(2) for part in
            (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))]
    assert [name for name, _ in adapters(model)] == want and len(adapter_parameters(model)) == 28
    assert names <= set(dict(model.named_parameters()))
    assert all(p.requires_grad == (name[-2:] in (".A", ".B")) for name, p in model.named_parameters())
    inject(model := toy_llama(), 2, 4.0, targets=("v_proj", "q_proj"))
    assert [n.rpartition(".")[2] for n, _ in adapters(model)] == ["q_proj", "v_proj"] * 2


@pytest.mark.parametrize("targets, word", [(("query",), "query"), ((*TARGETS, "qproj"), "qproj"),
                                           (("embed_tokens",), "embed_tokens"), ((), "")])
def test_unknown_targets_are_named(targets, word):
    """A name that no linear layer has is an error, also beside names that exist; nothing is wrapped."""
    model = toy_llama()
    with pytest.raises(ValueError, match=f"no linear layer is named {word}\n.*\n.*down_proj, gate_proj, k_proj"):
        inject(model, 2, 4.0, targets=targets)
    assert not list(adapters(model))


def test_rewrap_continues_from_the_same_adapter():
    """Another class around the same A, B, scale and dropout, anchored there; W_0 is not copied."""
    Doubled = type("Doubled", (LoRALinear,), {"delta": lambda layer, x: 2 * LoRALinear.delta(layer, x)})
    model = adapted(dtype=torch.float32, dropout=0.25)
    before, old = model(IDS), dict(adapters(model))
    rewrap(model, Doubled)
    for name, lora in adapters(model):
        A, B, W = old[name].A, old[name].B, old[name].weight
        assert type(lora) is Doubled and lora.dropout.p == 0.25 and lora.weight.data_ptr() == W.data_ptr()
        assert all(map(torch.equal, (lora.A, lora.A_prev, lora.B, lora.B_prev), (A, A, B, B)))
    assert not torch.equal(model.eval()(IDS), before)
    rewrap(model, LoRALinear)
    assert torch.equal(model.eval()(IDS), before)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
def test_save_and_load_round_trip(tmp_path, changes):
    """A bare model and one with another adapter both become the saved one, anchored there, and save the same bytes."""
    model, other = (adapted(0, torch.float32, 5, **changes) for _ in range(2))
    bare = toy_llama(0, torch.float32, **changes)
    save_peft(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"] == sorted(TARGETS)
    assert {t.dtype for t in tensors_in(tmp_path / "adapter").values()} == {torch.float32}
    bare.grow(5)
    shake(other, 3)
    for target in (bare, other):
        load_peft(target, tmp_path / "adapter")
        assert torch.equal(target.eval()(WITH_NEW), model(WITH_NEW))
        for _, lora in adapters(target):
            assert torch.equal(lora.A, lora.A_prev) and torch.equal(lora.B, lora.B_prev)
        save_peft(target, tmp_path / "again")
        for file in (TENSORS, CONFIG):
            assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def based_on(tmp_path: Path, n_new: int, **changes):
    """The peer's model, and ours of the same weights with a new adapter."""
    peer = transformers_llama(**changes)
    peer.save_pretrained(tmp_path / "base")
    model = load_llama(tmp_path / "base")
    if n_new:
        model.grow(n_new, torch.Generator().manual_seed(1), std=0.3)
    inject(model, 3, 5.0, generator=torch.Generator().manual_seed(2))
    return peer, model


def is_pefts(model, folder: Path, peer) -> None:
    """peft, given the folder and transformers' model of the same base, has this model's logits to float32's digits."""
    peft, ids = pytest.importorskip("peft"), IDS
    if model.model.embed_tokens.rows is not None:
        peer.resize_token_embeddings(101, mean_resizing=False)
        ids = WITH_NEW
    with torch.no_grad():
        got, want = peft.PeftModel.from_pretrained(peer, folder).eval()(ids).logits, model.eval()(ids)
    assert got.shape == want.shape == (*ids.shape, 101 if ids is WITH_NEW else 96)
    assert (got - want).abs().max() <= 2e-6 * want.abs().max(), f"differ by {(got - want).abs().max():.1e}"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, from inside peft
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("n_new", [0, 5])
def test_peft_loads_what_we_save(tmp_path, changes, n_new):
    """New tokens included: in a tied model by the embedding's rows, in an untied one by the head's own too."""
    peer, model = based_on(tmp_path, n_new, **changes)
    shake(model)
    save_peft(model, tmp_path / "adapter")
    is_pefts(model, tmp_path / "adapter", peer)
    away = model(IDS)[..., :96] - load_llama(tmp_path / "base")(IDS)
    assert away.abs().max() > 0.1, "the adapter does nothing"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("tied", [True, False])
def test_peft_loads_tables_that_were_trained_whole(tmp_path, tied):
    """As peft's modules_to_save (recipe release, untied); read back into a model prepared alike, and into no other."""
    (peer, whole), (_, again) = (based_on(tmp_path, 5, tie_word_embeddings=tied) for _ in range(2))
    for model in (whole, again):
        model.untie()
        for table in (model.model.embed_tokens, model.lm_head):
            table.weight.requires_grad_(True)
    shake(whole)
    for i, table in enumerate((whole.model.embed_tokens, whole.lm_head)):
        for p in (table.weight, table.rows):
            p.data += 0.1 * normal(*p.shape, seed=i).float()
    save_peft(whole, tmp_path / "adapter")
    is_pefts(whole, tmp_path / "adapter", peer)
    load_peft(again, tmp_path / "adapter")
    assert torch.equal(again.eval()(WITH_NEW), whole(WITH_NEW))
    refused(tmp_path / "adapter", "lm_head", model=adapted(1, torch.float32, 5, tie_word_embeddings=tied))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_we_load_what_peft_saves(tmp_path):
    """An adapter made by peft, with new token rows, gives peft's logits through load_peft."""
    peft = pytest.importorskip("peft")
    peer = transformers_llama()
    peer.save_pretrained(tmp_path / "base")
    peer.resize_token_embeddings(101, mean_resizing=False)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
                             trainable_token_indices=list(range(96, 101)))
    theirs = peft.get_peft_model(peer, config).eval()
    with torch.no_grad():
        for i, p in enumerate(p for p in theirs.parameters() if p.requires_grad):
            p.copy_(0.3 * normal(*p.shape, seed=i))
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_llama(tmp_path / "base")
    model.grow(5)
    load_peft(model, tmp_path / "adapter")
    with torch.no_grad():
        difference = (model.eval()(WITH_NEW) - theirs(WITH_NEW).logits).abs().max()
    assert difference <= 1e-5 and len(list(adapters(model))) == 4, f"differ by {difference:.1e}"


def refused(folder: Path, *words: str, model=None) -> None:
    """load_peft raises a ValueError with all of `words` and leaves every parameter as it was."""
    model = model or adapted(1, torch.float32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_peft(model, folder)
    assert all(word in str(error.value) for word in words), f"not all of {words} in:\n{error.value}"
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name in before)


KEY = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
OTHERS = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"  # the model has two layers
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"  # the model has no new tokens


@pytest.fixture
def saved(tmp_path) -> Path:
    save_peft(adapted(dtype=torch.float32), tmp_path)
    return tmp_path


@pytest.mark.parametrize("damage, words", [
    (lambda tensors: tensors.pop(KEY), (KEY, "1 tensors differ", "file -")),
    *((lambda tensors, name=name: tensors.update({name: torch.zeros(3, 24)}), (name, "(3, 24)", "model -"))
      for name in (OTHERS, "lora_A.weight", ROWS)),
    (lambda tensors: tensors.update({KEY: tensors[KEY].T.contiguous()}), (KEY, "file (24, 3)", "model (3, 24)")),
    *((lambda tensors, value=value: tensors[KEY][2].fill_(value), (KEY, "not finite"))
      for value in (float("nan"), float("inf"))),
])
def test_a_damaged_tensor_is_named(damage, words, saved):
    """A missing key (peft would only warn), an extra one, A transposed, a number that is none."""
    tensors = tensors_in(saved)
    damage(tensors)
    save_file(tensors, saved / TENSORS)
    refused(saved, str(saved), *words)
    refused(saved, words[0], model=toy_llama(dtype=torch.float32))


def test_another_rank_or_scale_is_an_error(saved):
    """A rank is named with both shapes; alpha / r does not show in any: it would change the function in silence."""
    inject(model := toy_llama(dtype=torch.float32), 4, 5.0 / 3 * 4)
    refused(saved, "lora_", "file (3, ", "model (4, ", model=model)
    config = json.loads((saved / CONFIG).read_text())
    for word, change in {"3.33333": {"lora_alpha": 10.0}, "use_rslora": {"use_rslora": True}, CONFIG: {"r": None},
                         "q_proj": {"alpha_pattern": {"q_proj": 9}}}.items():
        (saved / CONFIG).write_text(json.dumps(config | change))
        refused(saved, str(saved), word)
