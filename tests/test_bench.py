"""The benchmark compares like with like: the same loss, gradients, items and scores on both sides."""
import re
import sys
from dataclasses import replace

import pytest
import torch

from minipeso.llama import LlamaConfig
from minipeso.lora import adapters
from minipeso.runs.guard import guard
from minipeso.trie import Trie
from tests.bench import __main__ as bench
from tests.bench import files, growth, llama, race, small, trie
from tests.reference import TOY

MICRO = LlamaConfig.from_dict({**TOY, "vocab_size": 1})
REFUSED = "the contenders do not .* the same\n.*\n.*mean nothing"


@pytest.fixture
def run(monkeypatch, capsys):
    """`python -m tests.bench` in this process, the children's work too -> the lines it prints."""
    def run(*argv: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["bench", *argv])
        bench.main()
        return capsys.readouterr().out.splitlines()
    monkeypatch.setattr(race, "child", lambda job: race.measured(*job)._replace(above=2**20))
    monkeypatch.setitem(llama.SHAPES, "tiny", MICRO)
    return run


def names(lines: list[str], note: str = "") -> list[str]:
    """The contenders of a table, each with its time, rate, ratios and a note."""
    for line in lines:
        assert re.search(r"^.{29} *[\d.,]+ ms +[\d.,]+ \w+/s +[\d.]+ x .+ \[[\d.]+, [\d.]+\]" + note, line), line
    return [line[:29].strip() for line in lines]


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 40, "num_key_value_heads": 4}])
@pytest.mark.parametrize("one_pair", [False, True])
def test_training_is_compared_on_equal_losses_and_gradients(changes, one_pair):
    """Ours, peft and peft with a cut head agree, and after two AdamW steps A and B of both sides are still the same."""
    case = llama.make_case(replace(MICRO, **changes), n_items=200, n_codes=16)
    before = [p.detach().clone() for p in race.trainable(case.ours)]
    runs, count, _, check = llama.train_contest(case, users=3, steps=2, one_pair=one_pair)
    loss, gradient = map(float, re.findall(r"\de[+-]\d\d", check()))
    assert loss <= 1e-5 and gradient <= 1e-4 and (count == 6 if one_pair else count >= 2 * 3 * 3)
    runs["ours"]()
    runs["peft"]()
    both = list(zip(race.trainable(case.ours), race.trainable(case.peer), strict=True))
    assert min((p - b).abs().max() for (p, _), b in zip(both, before)) >= 1e-4
    # AdamW's first steps are lr * sign(gradient): where a gradient is rounding, so is its sign
    assert torch.stack([(p - q).abs().max() for p, q in both]).median() <= 1e-6


def test_contenders_take_turns_and_ratios_are_of_rounds():
    """One round to warm up, then the order reversed each time; a peer at 2, 4, 3 times ours is 3 x ours [2, 4]."""
    calls = []
    race.compare({name: lambda name=name: calls.append(name) for name in "abc"}, 3)
    assert "".join(calls) == "abc" "cba" "abc" "cba"
    made = {"ours": map(race.Took, (1.0, 10.0, 0.1)), "peer": map(race.Took, (2.0, 40.0, 0.3))}
    ours, peer = race.table({name: list(rounds) for name, rounds in made.items()}, 10, "examples").splitlines()
    assert ours.split()[1:] == "1,000.000 ms 10.0 examples/s 1.00 x ours [1.00, 1.00]".split()
    assert peer.split()[1:] == "2,000.000 ms 5.0 examples/s 3.00 x ours [2.00, 4.00]".split()


@pytest.mark.parametrize("line, message", [("train --rounds 0", "--rounds is out of range\nfound 0"), ("fly", "choose"),
                                           ("generate --one-pair", "are of training"), ("train", "pip install -e")])
def test_a_wrong_command_line_and_missing_peers_are_exit_2(line, message, run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)  # as without the test extras
    with pytest.raises(SystemExit) as caught:
        guard(lambda: run(*line.split()))
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("task, peers", [("train", ["peft", "peft, head on answers only"]),
                                         ("generate", ["generate", "generate, one prompt per user"])])
def test_equal_work_is_timed_and_different_work_is_not(task, peers, run, monkeypatch):
    """With one matrix A moved by 0.01 in the peer's last layer: no timing, FloatingPointError in three lines."""
    machine, _, equal, *lines = run(task, "--users", "3", "--rounds", "1")
    assert re.match(r"\d+ cores, \d+ threads; Python 3.*, torch .*, transformers .*, peft ", machine)
    assert all(float(apart) <= 1e-4 for apart in re.findall(r"\de[+-]\d\d", equal)) and names(lines) == ["ours", *peers]
    assert [line[:29].strip() for line in run(task, "--users", "3", "--memory")[3:]] == ["ours", *peers]
    case = llama.make_case(MICRO, n_items=200, n_codes=16)
    race.trainable(case.peer)[-2].data.add_(0.01)
    monkeypatch.setattr(llama, "make_case", lambda *_, **how: case)
    monkeypatch.setattr(race, "compare", lambda *_: pytest.fail("timed"))
    with pytest.raises(FloatingPointError, match=REFUSED):
        run(task, "--users", "3")


def test_files_are_read_alike(run):
    """The same events by all three, all tensors byte for byte; what one made otherwise in any round is noticed."""
    lines = run("data", "--lines", "3000", "--rounds", "1")
    assert lines[2].startswith("equal: 1,") and names(lines[3:], r"   peak [\d,]+ MiB$") == ["ours", "pandas", "polars"]
    lines = run("load", "--rounds", "1")
    assert re.match(r"equal: \d\d tensors, byte", lines[-3]) and names(lines[-2:]) == ["ours", "transformers"]
    model = torch.nn.Linear(2, 2)
    same = race.Took(1, made=files.checksum(model))
    model.bias.data[1] += 1
    assert race.same("load", {"ours": [same, same], "peer": [same]})[0] == 2
    with pytest.raises(FloatingPointError, match=REFUSED):
        race.same("load", {"ours": [same, same], "peer": [same, race.Took(1, made=files.checksum(model))]})


def test_tries_hold_the_same_children(run):
    """A trie and nested dictionaries of 300 items agree on every prefix tried; one item less is noticed."""
    tree = trie.dictionary(codes := trie.catalogue(300))
    assert trie.same_children(Trie(codes), tree, codes) == 4 * 300
    with pytest.raises(FloatingPointError, match=REFUSED):
        trie.same_children(Trie(codes[1:]), tree, codes)
    assert names(run("trie", "--items", "2000", "--rounds", "1")[3:], ".* bytes per item")[:2] == ["ours", "dictionary"]


def test_rq_vaes_are_compared_on_equal_losses_gradients_and_ids(monkeypatch, run):
    """Then an epoch of the peer moves all its weights, which is noticed by gradients and by IDs."""
    for name, value in (("ITEMS", 700), ("WIDTH", 12), ("BATCH", 300), ("STEPS", 2), ("RELEASE_HIDDEN", (16,))):
        monkeypatch.setattr(small, name, value)
    lines = run("rqvae", "--rounds", "1")
    assert "100.00% of the IDs" in lines[1] and len(names(lines[3:5])) == 2 and len(names(lines[6:])) == 3
    ours, peer, x = small.make(700, 12, (16,))
    small.released_epoch(peer, x)
    assert all((p != q).any() for p, q in zip(ours.parameters(), peer.parameters()))
    sides = [(ours, lambda x: sum(ours.loss(x))), (peer, lambda x: small.released_loss(peer, x))]
    for check in (lambda: race.same_training(sides, [x]), lambda: small.same_ids(ours, peer, x)):
        with pytest.raises(FloatingPointError, match=REFUSED):
            check()


def test_epochs_are_real_ones(monkeypatch, run):
    """LightGCN's moves its vectors, and everybody asked is ranked; the model's moves every matrix, a search fills the
    beams; at stage 5 `sumlora-all` holds five adapters, PESO one."""
    moved, real = [], small.fit
    monkeypatch.setattr(small, "fit", lambda E, *rest: moved.append((real(E, *rest) - E).abs().max().item()))
    monkeypatch.setattr(small, "GRAPH", (40, 60, 300))
    assert names(run("towers", "--rounds", "1")[2:]) == ["ours", "sparse products and Adam", "full ranking"]
    assert min(moved) > 1e-3 and len(small.graph_work(40, 60, 300)[1]()) == 40
    one, five = (sum(t.nbytes for _, layer in adapters(growth.after(method, 5)) for t in layer.factors())
                 for method in ("peso", "sumlora-all"))
    model = growth.after("peso", 2)
    before = [p.detach().clone() for p in race.trainable(model)]
    growth.epoch(model, 3, "kl")()
    assert five == 5 * one and all((p != b).any() for p, b in zip(race.trainable(model), before))
    assert growth.search(model, items=500, history=5, beams=5)()[0].shape == (64, 5, 4)
