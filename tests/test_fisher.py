"""Eq. 6 with the Fisher information of the stage before: measured as a slow loop does, and how it holds."""
import json

import pytest
import torch
from safetensors.torch import load_file

from minipeso.lora import adapter_parameters, adapters, rewrap
from minipeso.methods import FISHERS
from minipeso.objective import stage_loss
from minipeso.rivals.fisher import measure
from minipeso.runs import checkpoints
from minipeso.runs.run import Run
from minipeso.stages import examples
from minipeso.tokens import collate, sequences
from tests.micro import checkpoint, learn_first, micro, run, set_up
from tests.test_faults import kill_after_saving, until_done

kinds = pytest.mark.parametrize("kind", FISHERS)


@pytest.fixture(params=["short", "paper"])
def learnt(request, tmp_path) -> tuple[Run, list]:
    """After D_1, in float64, and 40 of its pairs: histories that go on, or branches behind a preamble."""
    base = {"base": str(checkpoint(tmp_path / "llama"))} if request.param == "paper" else {}
    learn_first(now := set_up(micro(tmp_path, dropout=0.3, prompt=request.param, **base)))
    return now, examples(now.stages[0], "train", now.cfg.window)[:40]


@kinds
def test_the_fisher_is_that_of_a_slow_loop(learnt, kind):
    """One pair at a time, unpadded: autograd on A, B and W summed over a sequence's answers, squared, averaged. So is
    one pass over padded batches of any size; what it measures replaces what it measured before."""
    now, pairs = learnt
    data, rest = sequences(pairs, now.template), iter(pairs)
    assert not collate(data).real.all() and max(one.pairs for one in data) > 1 and len(data) > 5
    rewrap(now.model, FISHERS[kind])
    layers, want = [layer for _, layer in adapters(now.model.double().eval())], 0
    v = [M.requires_grad_() for layer in layers for M in ([layer.A, layer.B] if kind == "fisher" else [layer.weight])]
    for one in data:
        log_p = 0
        for pair in (next(rest) for _ in range(one.pairs)):
            prompt, answer = now.template.prompt(pair.history), torch.tensor(now.template.answer(pair.target))
            logits = now.model(torch.cat([prompt, answer])[None])[0, len(prompt) - 1:-1] / 0.8
            log_p += logits.log_softmax(-1).gather(1, answer[:, None]).sum()
        want += torch.cat([g.flatten() for g in torch.autograd.grad(log_p, v)]).square() / len(data)
    for size in (1, 16, 1000):
        measure(now.model, data, size, 0.8)
        got = torch.cat([layer.fisher.flatten() for layer in layers])
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9 * want.max().item())
        assert not got.requires_grad and not any(layer._forward_hooks or layer.A.grad is not None for layer in layers)


@kinds
@pytest.mark.parametrize("learnt", ["short"], indirect=True)
def test_the_penalty_is_eq_6_and_does_not_pull_where_the_stage_starts(learnt, kind):
    """1/2 sum F d^2 and its gradient, layer by layer, sum or mean; both exactly 0.0 at the anchor."""
    now, data = learnt[0], sequences(learnt[1], learnt[0].template)
    rewrap(now.model, FISHERS[kind])
    measure(now.model.double(), data, 16)
    layers, v = [layer for _, layer in adapters(now.model)], adapter_parameters(now.model)
    for size in (0.0, 0.1):  # where it was measured, rewrap has anchored it
        for p in v:
            p.data += size * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        want = 0
        for layer in layers:
            A, B, A_prev, B_prev, s = layer.A, layer.B, layer.A_prev, layer.B_prev, layer.scale
            d = (A - A_prev, B - B_prev) if kind == "fisher" else (s * B @ A - s * B_prev @ A_prev,)
            want += (layer.fisher.flatten() * torch.cat([x.flatten() for x in d])**2).sum() / 2
        pull = torch.autograd.grad(want, v)
        for reduction, n in (("sum", 1), ("mean", len(layers))):
            prox = stage_loss(now.model, collate(data), kind, 1.0, 1.0, ("module", reduction)).prox
            got = torch.autograd.grad(prox, v)
            torch.testing.assert_close((prox * n, *(g * n for g in got)), (want, *pull))
            assert prox > 0 if size else not prox.any() and not any(g.any() for g in got)


def test_it_holds_and_goes_on_after_a_kill_in_the_same_bytes(tmp_path, monkeypatch):
    """A run moves less than single, by its records; killed after every epoch, it ends in every byte of the whole."""
    names = [f"peso@proximal={kind}@lambda=100" for kind in FISHERS]
    settings = dict(compare=f"single,{names[0]}", method=names[1], epochs=3)
    run(micro(tmp_path / "whole", **settings))
    lines = map(json.loads, (tmp_path / "whole/metrics.jsonl").read_text().splitlines())
    moved = {(line["name"], line["stage"]): line["moved"] for line in lines if "moved" in line}
    assert all(0 < moved[name, t] < 0.9 * moved["single", t] for name in names for t in (2, 3)), moved
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))
    killed = kill_after_saving(monkeypatch, "peso@proximal")
    until_done(tmp_path / "run", tmp_path / "whole", **settings)
    assert any(".fisher" in t for t in load_file(tmp_path / f"run/checkpoints/{names[1]}-stage-3/state.safetensors"))
    assert killed == [(f"{name}-stage-{t}", epoch) for name in names for t in (2, 3) for epoch in (1, 2, 3)]
