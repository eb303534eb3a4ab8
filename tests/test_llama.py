"""The forward against an independent numpy version and against transformers; cache, masks, new tokens."""
import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from minipeso.files.hub import load_llama
from minipeso.llama import KVCache, Llama, LlamaConfig, TokenTable, rope_frequencies, rotary
from tests.conftest import draws
from tests.reference import TOY, llama_logits, rotary_speeds, toy_llama, transformers_llama

ONE_B = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
         "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu",
         "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "rope_theta": 500000.0,
         "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192}}  # config.json of Llama-3.2-1B, in its old form
GOLDEN = {0: 1.0, 1: 0.663601279, 14: 0.00321144611, 15: 0.00129054801, 16: 0.000429556705,
          17: 9.70828623e-05, 18: 1.94616387e-05, 31: 9.41830649e-08}  # transformers' inv_freq, float32

SHAPES = [{}, {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
          {"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"head_dim": 6, "rms_norm_eps": 0.1}]


def tokens(n: int, l: int, seed: int = 0, vocab: int = TOY["vocab_size"]) -> Tensor:
    return torch.randint(vocab, (n, l), generator=torch.Generator().manual_seed(seed))


def peers(folder, seed: int = 0, shard: str = "1GB", **changes):
    """transformers' model, and what hub.load_llama makes of the files it wrote."""
    peer = transformers_llama(seed, **changes)
    peer.save_pretrained(folder, max_shard_size=shard)
    return peer, load_llama(folder).eval()


@pytest.mark.parametrize("changes", SHAPES)
def test_forward_equals_numpy_in_float64(changes):
    """Complex-number rotation and attention by loops give the same logits to 1e-10."""
    model, ids = toy_llama(**changes), tokens(2, 40)
    weights, logits = {name: p.detach().numpy() for name, p in model.named_parameters()}, model(ids).detach()
    assert logits.dtype == torch.float64 and logits.shape == (2, 40, 96)
    for sequence, got in zip(ids.tolist(), logits.numpy()):
        want = llama_logits({**TOY, **changes}, weights, sequence)
        assert np.abs(got - want).max() <= 1e-10, f"differ by {np.abs(got - want).max():.1e}"
        assert want.std() > 0.3, f"logits of spread {want.std():.2f} prove little"


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("shard", ["1GB", "8KB"])
def test_logits_equal_transformers(tmp_path, changes, shard):
    """Weights that transformers saved, in one file or in shards, give transformers' logits in float32."""
    peer, model = peers(tmp_path, shard=shard, **changes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "8KB")
    ids = tokens(3, 50)
    with torch.no_grad():
        got, want = model(ids), peer(ids).logits
    assert (got - want).abs().max() <= 1e-5, f"differ by {(got - want).abs().max():.1e}"


def test_bfloat16_is_no_noisier_than_transformers(tmp_path):
    """The yardstick is transformers' own rounding: its bfloat16 logits against its float32 logits.
    Ours, from the same files, are as near to the truth (x 1.05), and to theirs within a tenth of it."""
    rms = lambda x: x.double().square().mean().sqrt().item()  # noqa: E731
    for seed in range(3):
        peer, _ = peers(tmp_path, seed)
        half, ids = type(peer).from_pretrained(tmp_path, dtype=torch.bfloat16), tokens(4, 60, seed)
        with torch.no_grad():
            truth, theirs = peer(ids).logits, half(ids).logits.float()
            ours = load_llama(tmp_path, torch.bfloat16)(ids)
        noise = rms(theirs - truth)
        assert ours.dtype == torch.float32 and noise > 1e-3
        assert rms(ours - truth) <= 1.05 * noise, f"{rms(ours - truth):.4f}, transformers {noise:.4f}"
        if not torch.__version__.startswith("2.6."):  # which rounds their attention at another place than ours
            assert rms(ours - theirs) <= 0.1 * noise, f"{rms(ours - theirs):.4f} apart, noise {noise:.4f}"


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_old_and_new_config_give_the_same_model(tmp_path, kind):
    """rope_theta and rope_scaling (its kind under either name) or transformers 5's rope_parameters: equal logits."""
    _, model = peers(tmp_path)
    path, ids, rope = tmp_path / "config.json", tokens(1, 30), dict(TOY["rope_parameters"])
    old = json.loads(path.read_text())
    assert old.pop("rope_parameters") and "rope_theta" not in old
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {kind: rope.pop("rope_type"), **rope}}
    path.write_text(json.dumps(old))
    assert torch.equal(load_llama(tmp_path)(ids), model(ids))
    assert LlamaConfig.from_dict(ONE_B | {"rope_scaling": None}).rope_parameters == {"rope_theta": 500000.0}


def test_llama3_scaling_has_the_golden_speeds():
    """The 1B config's speeds are transformers' inv_freq; with factor 8, as Meta's code has it, they are not."""
    rope = LlamaConfig.from_dict(ONE_B).rope_parameters
    speeds, wrong = rope_frequencies(rope, 64), rope_frequencies(rope | {"factor": 8.0}, 64)
    assert speeds.shape == (32,) and speeds.dtype == torch.float32
    assert {i: speeds[i].item() for i in GOLDEN} == pytest.approx(GOLDEN, rel=2e-7)
    assert [i for i, want in GOLDEN.items() if wrong[i].item() != pytest.approx(want, rel=1e-3)] == [15, 16, 17, 18, 31]


@draws(40)
@given(theta=st.floats(100, 1e6), factor=st.floats(1, 64), low=st.floats(0.5, 2), wider=st.floats(1, 4),
       context=st.integers(16, 10000), pairs=st.integers(1, 40))
def test_speeds_equal_the_piecewise_formula(theta, factor, low, wider, context, pairs):
    """In float64 the clamped blend is the three cases of the wavelength, for any parameters."""
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
            "high_freq_factor": low + wider, "original_max_position_embeddings": context}
    got, want = rope_frequencies(rope, 2 * pairs, torch.float64).numpy(), rotary_speeds(rope, 2 * pairs)
    assert np.allclose(got, want, rtol=1e-9, atol=0), f"{got} against {want}"


@pytest.mark.parametrize("weights, atol", [(torch.float32, 2e-5), (torch.bfloat16, 4e-3), (torch.float64, 1e-12)])
def test_angles_are_never_rounded(weights, atol):
    """Cosines and sines are those of float64 angles, rounded once to the model's type, wherever the model has been."""
    config = LlamaConfig.from_dict(TOY)
    angle = np.arange(90)[:, None] * np.tile(rotary_speeds(TOY["rope_parameters"], 16), 2)  # (l, e)
    for got, want in zip(rotary(config, torch.arange(90)[None], weights), (np.cos(angle), np.sin(angle))):
        torch.testing.assert_close(got[0, 0], torch.from_numpy(want).to(weights), rtol=0, atol=atol)  # dtypes, too


@pytest.mark.parametrize("chunks", [[1] * 14, [5, 1, 8], [14], [9, 5]])
def test_cached_equals_uncached(chunks):
    """Token by token or in chunks of any size, the cache gives the logits of the whole sequence."""
    model, ids, cache = toy_llama(), tokens(3, 14), KVCache()
    parts = [model(part, cache=cache) for part in ids.split(chunks, 1)]
    difference = (torch.cat(parts, 1) - model(ids)).abs().max()
    assert difference <= 1e-12 and cache.length == 14, f"differ by {difference:.1e}"


def test_one_preamble_begins_many_sequences():
    """A cache filled by one sequence, its last layer's states not asked for: three sequences go on from it, with the
    states and the gradients of the whole sequences."""
    ends, ids = [], torch.cat([tokens(1, 6, 1).expand(3, 6), tokens(3, 8, 2)], 1)
    for cache in (None, KVCache()):
        model = toy_llama()
        if cache:
            assert model.model(ids[:1, :6], cache=cache, states=False) is None and cache.length == 6
        hidden = model.model(ids[:, 6:] if cache else ids, cache=cache)[:, -8:]
        hidden.square().sum().backward()
        ends.append((hidden.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (states, gradient), (others, other) = ends
    assert (states - others).abs().max() <= 1e-12 and (gradient - other).abs().max() <= 1e-10 * gradient.abs().max()


def test_a_tied_head_is_the_embedding_and_its_gradient_the_sum_of_both_uses():
    """One storage, one parameter, in a model and in a deep copy; untied there are two, and stay the same two. d loss /
    d table, old rows and new, = the embedding's plus the head's in an untied copy."""
    for model in (toy_llama(), copy.deepcopy(toy_llama())):
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert "lm_head.weight" not in dict(model.named_parameters())
    two = toy_llama(tie_word_embeddings=False)
    table = two.lm_head
    two.untie()
    assert two.lm_head is table and table.weight.data_ptr() != two.model.embed_tokens.weight.data_ptr()
    tied = toy_llama()
    tied.grow(6, torch.Generator().manual_seed(2))
    untied = copy.deepcopy(tied)
    untied.untie()
    assert untied.lm_head.weight.data_ptr() != untied.model.embed_tokens.weight.data_ptr()
    ids = torch.cat([tokens(2, 10, 5), torch.tensor([[96, 101], [99, 96]])], 1)
    assert torch.equal(tied(ids), untied(ids))
    for model in (tied, untied):
        logits = model(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name in ("weight", "rows"):
        parts = [getattr(t, name).grad for t in (untied.model.embed_tokens, untied.lm_head)]
        assert all(p.abs().max() > 1e-4 for p in parts)
        assert (getattr(tied.model.embed_tokens, name).grad - sum(parts)).abs().max() <= 1e-12, name


@pytest.mark.parametrize("tied", [True, False])
def test_growing_changes_nothing_old(tied):
    """The old vectors and the old tokens' logits stay bit-identical; ids behind the vocabulary have the rows as
    vectors, and as logits the head's rows times the hidden state."""
    model = toy_llama(tie_word_embeddings=tied)
    ids, table = tokens(2, 9), model.model.embed_tokens
    before, old = model(ids), table.weight.detach().clone()
    model.grow(5, torch.Generator().manual_seed(1))
    after = model(ids)
    assert after.shape == (2, 9, 101) and torch.equal(after[..., :96], before) and torch.equal(table.weight, old)
    ids[0, 3], ids[1, 8] = 96, 100
    every = torch.cat([model.lm_head.weight, model.lm_head.rows])  # (V, d)
    assert torch.allclose(model(ids), model.model(ids) @ every.T, rtol=0, atol=1e-12)
    vectors = table(ids)
    assert torch.equal(vectors[0, 3], table.rows[0]) and torch.equal(vectors[1, 8], table.rows[4])
    with pytest.raises(IndexError):
        model(torch.tensor([[101]]))


@pytest.mark.parametrize("vocab, first, count", [
    (40, 40, 5), (40, 38, 4), (40, 3, 8), (17000, 17001, 3), (17000, 16000, 900)])
def test_log_p_is_a_slice_of_the_whole_softmax(vocab, first, count):
    """A block of logits at a time: the same as log_softmax of all of them, in old tokens, new ones and across."""
    table = TokenTable(vocab, 8).double()
    torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(0))
    table.grow(6, 1.0, torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = table.logits(x).log_softmax(-1)[..., first:first + count]
    assert want.shape == (2, 3, count) and torch.allclose(table.log_p(x, first, count), want, rtol=1e-12)


def test_new_weights_are_seeded_and_of_the_stated_size():
    """N(0, 0.02^2), equal for equal generators only; embedding and an untied head differ. Beside a bfloat16 checkpoint
    they are float32: a step of 1e-5 is not lost."""
    drawn = []
    for seed in (3, 3, 4):
        model = toy_llama(dtype=torch.bfloat16, tie_word_embeddings=False)
        model.grow(2000, torch.Generator().manual_seed(seed))
        drawn.append((model.model.embed_tokens.rows, model.lm_head.rows))
    (a, a_head), (b, b_head), (c, _) = drawn
    assert torch.equal(a, b) and torch.equal(a_head, b_head) and not torch.equal(a, c) and not torch.equal(a, a_head)
    assert abs(a.std() - 0.02) < 5e-4 and abs(a.mean()) < 5e-4, f"mean {a.mean()}, std {a.std()}"
    assert a.dtype == torch.float32 and torch.allclose((a.detach() + 1e-5) - a, torch.tensor(1e-5), rtol=0.01)
    assert model(torch.tensor([[1, 97, 99]])).isfinite().all()
    # from scratch: N(0, std^2) everywhere but in the norms, by the generator only
    shape, seeds = LlamaConfig.from_dict(TOY), [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    a, b, c = (dict(Llama(shape).initialise(generator, 0.05).named_parameters()) for generator in seeds)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    assert all((p == 1).all() for name, p in a.items() if "norm" in name)
    spread = torch.cat([p.detach().flatten() for name, p in a.items() if "norm" not in name]).std().item()
    assert abs(spread - 0.05) < 2e-3, spread
