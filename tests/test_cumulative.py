"""Eq. 5 against an explicit dense W; InfLoRA's subspaces against the published loop over singular values."""
from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

from minipeso import continual
from minipeso.rivals import cumulative
from minipeso.runs.checkpoint import restore, snapshot
from minipeso.continual import METHODS
from minipeso.rivals.cumulative import InfLoRALinear, SDLoRALinear, SumLoRALinear, covariances, update_memory, variants
from minipeso.lora import LoRALinear, adapters, inject, rewrap
from minipeso.files.peft import load_peft, save_peft
from minipeso.runs.run import Run
from minipeso.stages import examples
from minipeso.tokens import collate, sequences
from tests.conftest import draws
from tests.micro import micro, set_up
from tests.reference import transformers_llama, toy_llama

FAMILIES = {"sumlora": SumLoRALinear, "sdlora": SDLoRALinear, "inflora": InfLoRALinear}
ALL = [f"{family}-{variant}" for family in FAMILIES for variant in cumulative.VARIANTS]
SILENT = lambda record: None  # noqa: E731


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Run:
    """After D_1."""
    made = set_up(micro(tmp_path_factory.mktemp("micro"), stages=5, world_users=90))
    continual.learn_first(made.model, made.data.stages[:1], made.template, made.cfg, SILENT)
    return made


def at_stage(ready: Run, name: str, t: int) -> Run:
    """A copy of the model, gone through stages 2 .. t by method `name`."""
    now = ready._replace(model=copy.deepcopy(ready.model))
    for stage in range(2, t + 1):
        continual.learn_stage(now.model, METHODS[name], now.data.stages[:stage], now.template, now.cfg, None, SILENT)
    return now


def trained(layer: LoRALinear, draw: torch.Generator, size: float = 0.3) -> None:
    """As after some training: every trained parameter moves."""
    with torch.no_grad():
        for p in layer.trained():
            p.add_(size * torch.randn(p.shape, generator=draw, dtype=torch.float64))


def direction(M: Tensor) -> Tensor:
    return M / math.sqrt(sum(x * x for x in M.flatten().tolist()))


# -- Eq. 5 ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ALL)
def test_every_stage_is_eq_5_written_out_as_a_dense_matrix(name):
    """W_t = W_0 + s (sum alpha_i B^_i A^_i + alpha_t B_t A_t), the terms added one by one: merged weight, output and
    the list of past adapters agree at four stages; `latest` has one term of the past, `all` has t - 1."""
    family, _, variant = name.partition("-")
    draw = torch.Generator().manual_seed(3)
    W = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    linear = nn.Linear(7, 5, bias=False)
    linear.weight = nn.Parameter(W.clone())
    layer = METHODS[name].adapter(linear, 2, 6.0).double()
    layer.reset(draw)  # not torch's own generator, which other tests leave anywhere
    trained(layer, draw)
    x, past = torch.randn(3, 7, generator=draw, dtype=torch.float64), []
    for t in range(2, 6):
        past = [] if "latest" in variant else past
        past.append((layer.A.detach().clone(), layer.B.detach().clone()))
        layer.design = torch.randn(2, 7, generator=draw, dtype=torch.float64)
        layer.advance(draw)
        trained(layer, draw)
        alpha = layer.magnitude.tolist() if family == "sdlora" else [1.0] * (len(past) + 1)
        dense = W.clone()
        for a, (A, B) in zip(alpha, past):
            dense += 3.0 * a * direction(B) @ direction(A)
        dense += 3.0 * alpha[-1] * layer.B.detach() @ layer.A.detach()
        assert layer.past == len(past) == (1 if "latest" in variant else t - 1) and len(alpha) == len(past) + 1
        assert torch.allclose(layer.merged_weight(), dense, rtol=0, atol=1e-7)  # 1e-8 in the norms
        assert torch.allclose(layer(x), x @ dense.T, rtol=0, atol=1e-6)
        assert torch.equal(layer.weight, W)


@pytest.mark.parametrize("name", ALL)
def test_inherit_continues_and_the_others_start_anew(name):
    """With `inherit`, B_t starts at B_{t-1} (and A_t at A_{t-1}, but for InfLoRA); without it B_t = 0 and A_t is a new
    draw of LoRA's uniform, whatever was learnt; either way the anchor is where the stage starts."""
    draw = torch.Generator().manual_seed(5)
    layer = METHODS[name].adapter(nn.Linear(40, 5, bias=False), 2, 6.0)
    trained(layer, draw)
    A, B = layer.A.detach().clone(), layer.B.detach().clone()
    layer.advance(torch.Generator().manual_seed(1))
    if name.endswith("inherit"):
        assert torch.equal(layer.B, B) and torch.equal(layer.A, A)
    else:
        assert not layer.B.any() and not torch.isclose(layer.A, A).any() and layer.A.abs().max() <= 40**-0.5
        again = METHODS[name].adapter(nn.Linear(40, 5, bias=False), 2, 6.0)
        again.advance(torch.Generator().manual_seed(1))
        assert torch.equal(again.A, layer.A), "the draw depends on the generator alone"
    assert torch.equal(layer.A, layer.A_prev) and torch.equal(layer.B, layer.B_prev)


@pytest.mark.parametrize("name", ALL)
def test_what_a_stage_moves(ready, name):
    """SumLoRA moves A and B, SD-LoRA the magnitudes too, InfLoRA B alone; the past and W_0 keep their bits."""
    now = at_stage(ready, name, 3)
    before = copy.deepcopy(now.model.state_dict())
    train, valid = (examples(now.data.stages[2], part, now.cfg.window) for part in ("train", "valid"))
    continual.train_stage(now.model, train, valid, now.template, continual.Plan(3, 1, 1e-2, 8), now.cfg)
    moved = {key.rpartition(".")[2] for key, value in now.model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"sumlora": {"A", "B"}, "sdlora": {"A", "B", "magnitude"}, "inflora": {"B"}}[name.partition("-")[0]]


def test_sd_lora_with_magnitudes_at_one_is_sum_lora():
    """As a stage begins, every magnitude is 1.0: SD-LoRA computes what SumLoRA computes; s counts once."""
    layers = []
    for kind in (variants(SumLoRALinear)["all"], variants(SDLoRALinear)["all"]):
        torch.manual_seed(0)
        layer, draw = kind(nn.Linear(6, 4, bias=False), 2, 10.0), torch.Generator().manual_seed(2)
        for _ in range(3):
            with torch.no_grad():
                layer.A.normal_(generator=draw), layer.B.normal_(generator=draw)
            layer.advance(draw)
        layers.append(layer)
    x = torch.randn(5, 6)
    assert torch.equal(layers[0](x), layers[1](x)) and layers[1].magnitude.tolist() == [1.0] * 4


@pytest.mark.parametrize("name", ALL)
def test_state_dict_round_trips_strictly(name):
    """Into a new layer, whose past is shorter: every tensor, and so every output; a missing key is an error."""
    draw = torch.Generator().manual_seed(4)
    make = lambda: METHODS[name].adapter(nn.Linear(6, 4, bias=False), 2, 10.0)  # noqa: E731
    layer, other = make(), make()
    for _ in range(3):
        trained(layer, draw)
        layer.advance(draw)
    if name.startswith("inflora"):
        layer.memory = torch.randn(6, 2, generator=draw)
    state = layer.state_dict()
    other.load_state_dict(state)
    assert other.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    x = torch.randn(3, 6)
    assert torch.equal(other(x), layer(x))
    for key in state:
        with pytest.raises(RuntimeError, match=key):
            make().load_state_dict({k: v for k, v in state.items() if k != key})


@pytest.mark.parametrize("name", ALL)
def test_going_back_and_forth_between_methods(ready, name):
    """A snapshot in the middle of a method, restored after another method has been there: bit for bit, class included."""
    now = at_stage(ready, name, 3)
    saved, wanted = snapshot(now.model), copy.deepcopy(now.model.state_dict())
    rewrap(now.model, LoRALinear)
    rewrap(now.model, variants(SDLoRALinear)["all"])
    restore(now.model, saved)
    state = now.model.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in state)
    assert all(type(layer) is METHODS[name].adapter for _, layer in adapters(now.model))


# -- export -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if method.system == "llm" and not method.restart])
def test_the_saved_adapter_of_every_method_gives_the_same_logits(ready, name, tmp_path):
    """At stage 4: saved as a PEFT folder, read into the bare base; merged into plain matrices. Logits agree."""
    now = at_stage(ready, name, 4)
    now.model.eval()
    ids = torch.randint(1, 17, (3, 9), generator=torch.Generator().manual_seed(1))
    wanted = now.model(ids)
    save_peft(now.model, tmp_path)
    bare = copy.deepcopy(ready.model)
    strip(bare)
    load_peft(bare, tmp_path)
    assert torch.allclose(bare.eval()(ids), wanted, atol=2e-5, rtol=0)
    merged = copy.deepcopy(ready.model)
    strip(merged, {name: layer.merged_weight() for name, layer in adapters(now.model)})
    merged.model.embed_tokens.rows = now.model.model.embed_tokens.rows
    assert torch.allclose(merged.eval()(ids), wanted, atol=2e-5, rtol=0)


def strip(model: nn.Module, weights: dict[str, Tensor] | None = None) -> None:
    """Bare linear layers in place of adapted ones, with these weights or W_0."""
    for name, layer in list(adapters(model)):
        linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weights[name] if weights else layer.weight.detach())
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, from inside peft
@pytest.mark.parametrize("name", ["sumlora-all", "sdlora-all-inherit", "inflora-latest"])
def test_peft_reads_a_cumulative_adapter(name, tmp_path):
    """peft itself, on transformers' Llama with the same base weights: the stacked factors are an ordinary LoRA."""
    model, ids = toy_llama(), torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(2))
    draw = torch.Generator().manual_seed(6)
    inject(model, 3, 6.0, generator=draw)
    rewrap(model, METHODS[name].adapter)
    for _ in range(3):
        for _, layer in adapters(model):
            trained(layer.double(), draw, 0.05)
            layer.advance(draw)
    for _, layer in adapters(model):
        trained(layer, draw, 0.05)
    save_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(transformers_llama().double(), tmp_path, autocast_adapter_dtype=False)
    assert (theirs.double()(ids).logits - model(ids)).abs().max() < 1e-5, "rotary angles are float32 there"


# -- InfLoRA ----------------------------------------------------------------------------------------

def published_dualgpm(M: np.ndarray, retain: bool, C: np.ndarray, threshold: float) -> tuple[np.ndarray, bool]:
    """DualGPM as the paper's Algorithm states it: singular values of C one by one, by numpy's SVD."""
    total = (np.linalg.svd(C)[1] ** 2).sum()
    project = M @ M.T
    X = project @ C if retain else C - project @ C
    U, S, _ = np.linalg.svd(X)
    outside = (S**2).sum() / total  # the share that is not yet held
    joining = 0
    for s in S:
        if outside <= (1 - threshold):
            break
        outside, joining = outside - s**2 / total, joining + 1
    if retain:
        rest = M - U[:, :joining] @ U[:, :joining].T @ M
        return np.linalg.svd(rest)[0][:, :M.shape[1] - joining], True
    M = np.concatenate([M, U[:, :joining]], 1)
    if 2 * M.shape[1] <= len(M):
        return M, False
    return np.linalg.svd(M)[0][:, M.shape[1]:], True


@draws(30)
@given(d=st.integers(4, 14), seed=st.integers(0, 10**6), threshold=st.sampled_from([0.5, 0.8, 0.95, 0.98]))
def test_the_memory_is_dualgpm(d, seed, threshold):
    """Over four stages, through the change to the complement: the same space as the published loop spans, with
    orthonormal columns; it grows, and holds the threshold's share of every stage's energy."""
    draw = np.random.default_rng(seed)
    M, retain = torch.zeros(d, 0), False
    N, other, held = np.zeros((d, 0)), False, 0
    for _ in range(4):
        X = draw.normal(size=(d, d)) * 3.0 ** -np.arange(d)[:, None]
        C = (X @ X.T) / d
        M, retain = update_memory(M, retain, torch.tensor(C, dtype=torch.float32), threshold)
        N, other = published_dualgpm(N, other, C, threshold)
        assert (M.shape[1], retain) == (N.shape[1], other)
        assert np.allclose(M @ M.T, N @ N.T, atol=2e-3)
        assert torch.allclose(M.T @ M, torch.eye(M.shape[1]), atol=1e-5)
        taken = d - M.shape[1] if retain else M.shape[1]
        assert taken >= held
        held = taken


def test_covariances_are_the_mean_of_outer_products(ready):
    """Every layer's input, token by token without padding and without sharing; q, k, v share one, gate and up too."""
    now = ready._replace(model=copy.deepcopy(ready.model))
    rewrap(now.model, variants(InfLoRALinear)["all"])
    data = sequences(examples(now.data.stages[1], "train", now.cfg.window), now.template)
    found = covariances(now.model, [collate(data[:5]), collate(data[5:12])])
    names = {id(layer): name.rpartition(".")[2] for name, layer in adapters(now.model)}
    assert [[names[id(layer)] for layer in layers] for layers, _ in found] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    for layers, C in found:
        total, n = 0.0, 0
        for layer in layers[-1:]:
            seen = []
            hook = layer.register_forward_hook(lambda module, args, out, seen=seen: seen.append(args[0][0]))
            with torch.no_grad():
                for row in data[:12]:
                    now.model.eval().model(torch.tensor(row.ids)[None])
            hook.remove()
            for x in torch.cat(seen):
                total, n = total + torch.outer(x, x), n + 1
        assert torch.allclose(C, total / n, rtol=1e-4, atol=1e-5)


def test_inflora_moves_nothing_that_earlier_stages_used(ready):
    """A_t is orthogonal to the memory: for an input in the remembered space, the layer's new adapter gives 0, before
    and after training. The memory is of D_1's inputs at stage 2."""
    now = at_stage(ready, "inflora-all", 3)
    seen = 0
    for name, layer in adapters(now.model):
        first = now.model.get_submodule(leader(name))
        M, kept = first.memory, bool(first.retain)
        outside = layer.A @ M if not kept else layer.A - layer.A @ M @ M.T  # what A sees of the taken directions
        seen += M.shape[1]
        size = layer.A.norm(dim=1)
        assert outside.abs().max() < 1e-4, f"{name}: {outside.abs().max()}"
        assert torch.allclose(size, torch.full_like(size, 3**-0.5), atol=1e-4) and layer.B.any()
    assert seen > 0


def leader(name: str) -> str:
    """The first layer that reads the same input."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent}." + {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(leaf, leaf)


def test_inflora_designs_from_what_the_stage_shows(ready):
    """Stage 2: A = U[:, :r]^T / sqrt(3) of C(D_2) outside the space of C(D_1), both under the model of D_1."""
    now = ready._replace(model=copy.deepcopy(ready.model))
    rewrap(now.model, variants(InfLoRALinear)["all"])
    C1, C2 = (dict((id(layers[0]), C.double().numpy()) for layers, C in covariances(now.model, continual.training_batches(
        stage, now.template, now.cfg, "cpu"))) for stage in now.data.stages[:2])
    past, coming = (continual.training_batches(s, now.template, now.cfg, "cpu") for s in now.data.stages[:2])
    cumulative.design_inflora(now.model, 2, 5, past, coming)
    for _, layer in adapters(now.model):
        if id(layer) not in C1:
            continue
        M, retain = published_dualgpm(np.zeros((len(C1[id(layer)]), 0)), False, C1[id(layer)], 0.95)
        X = M @ M.T @ C2[id(layer)] if retain else C2[id(layer)] - M @ M.T @ C2[id(layer)]
        U = np.linalg.svd(X)[0][:, :len(layer.A)]
        A = math.sqrt(3) * layer.design.double().numpy()
        assert np.allclose(A.T @ A, U @ U.T, atol=1e-3)
