"""Eq. 5 against an explicit dense W; InfLoRA's subspaces against the published loop over singular values."""
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from minipeso.continual import choose_trainable
from minipeso.files.peft import load_peft, save_peft
from minipeso.llama import Llama
from minipeso.lora import LoRALinear, adapters, inject, rewrap
from minipeso.objective import answer_loss
from minipeso.rivals import cumulative
from minipeso.rivals.cumulative import InfLoRALinear, SDLoRALinear, SumLoRALinear, covariances, update_memory, variants
from minipeso.snapshot import restore, snapshot
from minipeso.stages import Stage, examples
from minipeso.tokens import Batch, Template, TokenSequence, collate, sequences
from tests.conftest import draws
from tests.reference import toy_llama

FAMILIES = {"sumlora": SumLoRALinear, "sdlora": SDLoRALinear, "inflora": InfLoRALinear}
KINDS = {f"{name}-{variant}": kind for name, family in FAMILIES.items() for variant, kind in variants(family).items()}
TEMPLATE = Template.short(torch.randint(8, (40, 2), generator=torch.Generator().manual_seed(0)), 8)


def data(t: int) -> list[TokenSequence]:
    """Ten users of D_t with five to nine items each, for training."""
    carts = {u: np.random.default_rng(100 * t + u).permutation(40)[:5 + u % 5].tolist() for u in range(10)}
    return sequences(examples(Stage(t, dict.fromkeys(carts, []), carts), "train"), TEMPLATE)


def batches(t: int) -> list[Batch]:
    return [collate(data(t)[:6]), collate(data(t)[6:])]


def trained(layer: LoRALinear, draw: torch.Generator, size: float = 0.3) -> None:
    """As after some training: every trained parameter moves."""
    with torch.no_grad():
        for p in layer.trained():
            p.add_(size * torch.randn(p.shape, generator=draw, dtype=torch.float64))


def after(t: int, kind: type[LoRALinear] = LoRALinear) -> Llama:
    """A toy after D_1 by plain LoRA and D_2 .. D_t by `kind`."""
    model, draw = toy_llama(dtype=torch.float32), torch.Generator().manual_seed(1)
    inject(model, 2, 4.0, generator=draw)
    for _, layer in adapters(model):
        trained(layer, draw, 0.05)
    for stage in range(2, t + 1):
        rewrap(model, kind)
        if issubclass(kind, InfLoRALinear):
            cumulative.design_inflora(model, stage, 5, batches(stage - 1), batches(stage))
        for _, layer in adapters(model):
            layer.advance(draw)
            trained(layer, draw, 0.05)
    return model


@pytest.mark.parametrize("name", KINDS)
def test_every_stage_is_eq_5_written_out_as_a_dense_matrix(name):
    """W_t = W_0 + s (sum alpha_i B^_i A^_i + alpha_t B_t A_t), term by term, four stages: merged weight and output."""
    family, _, variant = name.partition("-")
    direction = lambda M: M / math.sqrt(sum(x * x for x in M.flatten().tolist()))  # noqa: E731
    draw = torch.Generator().manual_seed(3)
    W = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    layer = KINDS[name](nn.Linear(7, 5, bias=False), 2, 6.0).double()
    layer.weight.copy_(W)
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
        assert len(layer.A_past) / 2 == len(past) == len(alpha) - 1 == (1 if "latest" in variant else t - 1)
        assert torch.allclose(layer.merged_weight(), dense, rtol=0, atol=1e-7)  # 1e-8 in the norms
        assert torch.allclose(layer(x), x @ dense.T, rtol=0, atol=1e-6) and torch.equal(layer.weight, W)


@pytest.mark.parametrize("name", KINDS)
def test_inherit_continues_and_the_others_start_anew(name):
    """With `inherit` A_t, B_t start where t - 1 ended, else B_t = 0, A_t is drawn; anchored there, magnitudes at 1."""
    layer = KINDS[name](nn.Linear(40, 5, bias=False), 2, 6.0)
    trained(layer, torch.Generator().manual_seed(5))
    A, B = (M.detach().clone() for M in (layer.A, layer.B))
    layer.advance(torch.Generator().manual_seed(1))
    if name.endswith("inherit"):
        assert torch.equal(layer.B, B) and torch.equal(layer.A, A)
    else:
        assert not layer.B.any() and not torch.isclose(layer.A, A).any() and layer.A.abs().max() <= 40**-0.5
        again = KINDS[name](nn.Linear(40, 5, bias=False), 2, 6.0)
        again.advance(torch.Generator().manual_seed(1))
        assert torch.equal(again.A, layer.A), "the draw depends on the generator alone"
    assert torch.equal(layer.A, layer.A_prev) and torch.equal(layer.B, layer.B_prev)
    assert not name.startswith("sdlora") or layer.magnitude.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", KINDS)
def test_what_a_stage_moves(name):
    """SumLoRA moves A and B, SD-LoRA the magnitudes too, InfLoRA B alone; the past and W_0 keep their bits."""
    model = after(3, KINDS[name])
    before = copy.deepcopy(model.state_dict())
    choose_trainable(model, "adapter")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches(3):
        answer_loss(model, batch).backward()
        optimiser.step()
    moved = {key.rpartition(".")[2] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"sumlora": {"A", "B"}, "sdlora": {"A", "B", "magnitude"}, "inflora": {"B"}}[name.partition("-")[0]]


@pytest.mark.parametrize("name", KINDS)
def test_a_snapshot_goes_into_any_model(name):
    """Where the past is shorter, longer or of another class: every bit, so the logits; a missing key is an error."""
    model, ids = after(3, KINDS[name]), torch.arange(1, 17)[None]
    saved, wanted = snapshot(model), model.state_dict()
    for other in (after(1), after(2, KINDS["sdlora-all"]), after(5, KINDS[name])):
        restore(other, saved)
        state = other.state_dict()
        assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in state)
        assert all(type(layer) is KINDS[name] for _, layer in adapters(other)) and torch.equal(other(ids), model(ids))
    layer = next(layer for _, layer in adapters(model))
    for key in layer.state_dict():
        with pytest.raises(RuntimeError, match=key):
            layer.load_state_dict({k: v for k, v in layer.state_dict().items() if k != key})


@pytest.mark.parametrize("kind", [LoRALinear, *KINDS.values()])
def test_the_saved_adapter_of_every_method_gives_the_same_logits(kind, tmp_path):
    """At stage 4: saved as a PEFT folder, read into the bare base; merged into plain matrices. Logits agree."""
    model, bare, merged = after(4, kind), toy_llama(dtype=torch.float32), toy_llama(dtype=torch.float32)
    ids = torch.randint(1, 17, (3, 9), generator=torch.Generator().manual_seed(1))
    wanted = model(ids)
    assert (bare(ids) - wanted).abs().max() > 0.1
    save_peft(model, tmp_path)
    load_peft(bare, tmp_path)
    assert torch.allclose(bare.eval()(ids), wanted, atol=2e-5, rtol=0)
    for name, layer in adapters(model):
        merged.get_submodule(name).weight.data = layer.merged_weight()
    assert torch.allclose(merged(ids), wanted, atol=2e-5, rtol=0)


def published_dualgpm(M: np.ndarray, retain: bool, C: np.ndarray, threshold: float) -> tuple[np.ndarray, bool]:
    """DualGPM as the paper's Algorithm states it: singular values of C one by one, by numpy's SVD."""
    total, held = (np.linalg.svd(C)[1] ** 2).sum(), M @ M.T @ C
    U, S, _ = np.linalg.svd(held if retain else C - held)
    outside, joining = (S**2).sum() / total, 0  # the share that is not yet held
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
    """Over four stages, through the change to the complement: the published loop's space, orthonormal, and it grows."""
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


def test_covariances_are_the_mean_of_outer_products():
    """Every layer's input, token by token without padding and without sharing; q, k, v share one, gate and up too."""
    model, rows = after(2, KINDS["inflora-all"]), data(3)
    names = {id(layer): name.rpartition(".")[2] for name, layer in adapters(model)}
    shared = covariances(model, [collate(rows[:3]), collate(rows[3:])])
    assert [[names[id(layer)] for layer in layers] for layers, _ in shared] == 2 * [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    for layers, C in shared:
        seen = []
        hook = layers[-1].register_forward_hook(lambda module, args, out, seen=seen: seen.append(args[0][0]))
        with torch.no_grad():
            for row in rows:
                model.model(torch.tensor(row.ids)[None])
        hook.remove()
        outer = [torch.outer(x, x) for x in torch.cat(seen)]
        assert torch.allclose(C, sum(outer) / len(outer), rtol=1e-4, atol=1e-5)


def test_inflora_designs_from_what_the_stages_show():
    """Stages 2 and 3: A = U[:, :r]^T / sqrt(3) of C(D_t) outside the space of all that came before, C(D_{t-1}) under
    the model of D_{t-1}; the threshold is 0.95, then 0.95 + 0.05 / T."""
    model, space, nothing = after(1), {}, lambda d: (np.zeros((d, 0)), False)
    rewrap(model, KINDS["inflora-all"])
    for t, threshold in ((2, 0.95), (3, 0.96)):
        C1, C2 = ([(layers[0], C.double().numpy()) for layers, C in covariances(model, batches(s))] for s in (t - 1, t))
        cumulative.design_inflora(model, t, 5, batches(t - 1), batches(t))
        for (layer, past), (_, now) in zip(C1, C2):
            M, retain = space[layer] = published_dualgpm(*space.get(layer, nothing(len(past))), past, threshold)
            U = np.linalg.svd(M @ M.T @ now if retain else now - M @ M.T @ now)[0][:, :len(layer.A)]
            A = math.sqrt(3) * layer.design.double().numpy()
            assert np.allclose(A.T @ A, U @ U.T, atol=1e-3), t
        for _, layer in adapters(model):
            layer.advance()
            assert torch.equal(layer.A, layer.design) and torch.equal(layer.A, layer.A_prev)
            trained(layer, torch.Generator().manual_seed(t), 0.05)


@pytest.mark.parametrize("d", [16, 256])
def test_inflora_takes_no_direction_of_rounding_noise(d, monkeypatch):
    """D_2 shows what D_1 has shown, and one direction more: A_2 is that direction, and 0 instead of two of noise."""
    Q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0)))[0]
    C1 = Q[:, :d // 16] @ Q[:, :d // 16].T
    shown = iter([C1, C1 + 1e-3 * torch.outer(Q[:, -1], Q[:, -1])])
    layer = KINDS["inflora-all"](nn.Linear(d, 4, bias=False), 3, 6.0)
    monkeypatch.setattr(cumulative, "covariances", lambda model, batches: [([layer], next(shown))])
    cumulative.design_inflora(None, 2, 5, [], [])
    assert layer.memory.shape == (d, d // 16) and (layer.design @ layer.memory).abs().max() < 1e-3
    assert torch.allclose(layer.design[0].abs(), Q[:, -1].abs() / 3**0.5, atol=1e-3) and not layer.design[1:].any()
