"""The forward against an independent numpy version and against transformers; cache, masks, new tokens."""
from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minipeso.files.hub import load_llama
from minipeso.cache import KVCache
from minipeso.llama import Llama, LlamaConfig, rope_frequencies
from tests.conftest import draws
from tests.reference import TOY, llama_logits, rotary_speeds, toy_llama, transformers_llama

ONE_B = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
         "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0,
         "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
         "tie_word_embeddings": True}  # config.json of Llama-3.2-1B, in its old form
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GOLDEN = {0: 1.0, 1: 0.663601279, 14: 0.00321144611, 15: 0.00129054801, 16: 0.000429556705,
          17: 9.70828623e-05, 18: 1.94616387e-05, 31: 9.41830649e-08}  # transformers' inv_freq, float32


def tokens(n: int, l: int, seed: int = 0, vocab: int = TOY["vocab_size"]) -> Tensor:
    return torch.randint(vocab, (n, l), generator=torch.Generator().manual_seed(seed))


def peers(folder, seed: int = 0, shard: str = "1GB", **changes):
    """transformers' model, and what hub.load_llama makes of the files it wrote."""
    peer = transformers_llama(seed, **changes)
    peer.save_pretrained(folder, max_shard_size=shard)
    return peer, load_llama(folder).eval()


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# ---- the whole forward


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": False}, {"rope_parameters": DEFAULT_ROPE},
    {"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"head_dim": 6, "rms_norm_eps": 0.1}])
def test_forward_equals_numpy_in_float64(changes):
    """Complex-number rotation and attention by loops give the same logits to 1e-10."""
    model, ids = toy_llama(**changes), tokens(2, 40)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    logits = model(ids).detach()
    assert logits.dtype == torch.float64 and logits.shape == (2, 40, 96)
    for row, got in zip(ids, logits.numpy()):
        want = llama_logits({**TOY, **changes}, weights, row.tolist())
        assert np.abs(got - want).max() <= 1e-10, f"differ by {np.abs(got - want).max():.1e}"
        assert want.std() > 0.3, f"logits of spread {want.std():.2f} prove little"


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": False}, {"rope_parameters": DEFAULT_ROPE}, {"num_key_value_heads": 1},
    {"num_key_value_heads": 4}, {"tie_word_embeddings": False, "rope_parameters": DEFAULT_ROPE}])
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


def test_old_and_new_config_give_the_same_model(tmp_path):
    """rope_theta + rope_scaling (with `type` or `rope_type`) and transformers 5's rope_parameters
    are one config, and files with either load to equal logits."""
    peer, model = peers(tmp_path)
    path, ids = tmp_path / "config.json", tokens(1, 30)
    new = json.loads(path.read_text())
    assert "rope_parameters" in new and "rope_theta" not in new
    for kind in ("rope_type", "type"):
        rope = dict(TOY["rope_parameters"])
        old = {k: v for k, v in new.items() if k != "rope_parameters"} | {"rope_theta": rope.pop("rope_theta")}
        rope[kind] = rope.pop("rope_type")
        path.write_text(json.dumps(old | {"rope_scaling": rope}))
        assert torch.equal(load_llama(tmp_path)(ids), model(ids))
    plain = {k: v for k, v in ONE_B.items() if k != "rope_scaling"}
    for scaling in ({}, {"rope_scaling": None}):
        assert LlamaConfig.from_dict(plain | scaling).rope_parameters == {"rope_theta": 500000.0}


def test_the_1b_shape_has_its_parameters():
    """1,235,814,400 with a tied head, counted without storage; the 3B shape has 3,212,749,824."""
    three_b = ONE_B | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128}
    for config, want in ((ONE_B, 1_235_814_400), (three_b, 3_212_749_824)):
        with torch.device("meta"):
            model = Llama(LlamaConfig.from_dict(config))
        count = sum(p.numel() for p in model.parameters())
        assert count == want, f"{count:,}"


def test_config_faults_are_named():
    """No field has a default: a missing one is named, and so is a value that is not supported."""
    for name in TOY:
        with pytest.raises(ValueError, match=name):
            LlamaConfig.from_dict({k: v for k, v in TOY.items() if k != name})
    rope = TOY["rope_parameters"]
    for name in rope.keys() - {"rope_type"}:
        with pytest.raises(ValueError, match=name):
            LlamaConfig.from_dict(TOY | {"rope_parameters": {k: v for k, v in rope.items() if k != name}})
    for field, value, found in (("attention_bias", True, "True"), ("mlp_bias", True, "True"),
                                ("hidden_act", "gelu", "gelu"), ("num_key_value_heads", 3, "4 heads"),
                                ("rope_parameters", rope | {"rope_type": "yarn"}, "yarn")):
        with pytest.raises(ValueError, match=found):
            LlamaConfig.from_dict(TOY | {field: value})


# ---- rotary positions


def test_llama3_scaling_has_the_golden_speeds():
    """The 1B config's speeds are transformers' inv_freq; with factor 8, as Meta's code has it, they are not."""
    rope = LlamaConfig.from_dict(ONE_B).rope_parameters
    speeds = rope_frequencies(rope, 64)
    assert speeds.shape == (32,) and speeds.dtype == torch.float32
    for i, want in GOLDEN.items():
        assert speeds[i].item() == pytest.approx(want, rel=2e-7), f"index {i}: {speeds[i].item():.9g}"
    wrong = rope_frequencies(rope | {"factor": 8.0}, 64)
    differ = [i for i, want in GOLDEN.items() if wrong[i].item() != pytest.approx(want, rel=1e-3)]
    assert differ == [15, 16, 17, 18, 31], differ


@draws(40)
@given(theta=st.floats(100, 1e6), factor=st.floats(1, 64), low=st.floats(0.5, 2), wider=st.floats(1, 4),
       context=st.integers(16, 10000), pairs=st.integers(1, 40))
def test_speeds_equal_the_piecewise_formula(theta, factor, low, wider, context, pairs):
    """In float64 the clamped blend is the three cases of the wavelength, for any parameters."""
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
            "high_freq_factor": low + wider, "original_max_position_embeddings": context}
    got, want = rope_frequencies(rope, 2 * pairs, torch.float64).numpy(), rotary_speeds(rope, 2 * pairs)
    assert np.allclose(got, want, rtol=1e-9, atol=0), f"{got} against {want}"


def test_only_relative_positions_count():
    """All positions moved by 1000: the same hidden states (a rotation of queries and keys alike)."""
    model, ids = toy_llama(), tokens(2, 12)
    positions = torch.arange(12).expand(2, 12)
    a, b = model.model(ids, positions), model.model(ids, positions + 1000)
    assert (a - b).abs().max() <= 1e-10, f"differ by {(a - b).abs().max():.1e}"
    far = model.model(ids, positions * 2)
    assert (a - far).abs().max() > 1e-2, "positions make no difference"


def test_rotary_speeds_survive_a_change_of_dtype():
    """.to(bfloat16) leaves the speeds in float32, exact; a float64 model has float64 speeds."""
    model = toy_llama(dtype=torch.float32)
    exact = model.model.rotary.speed.clone()
    assert torch.equal(model.to(torch.bfloat16).model.rotary.speed, exact)
    double = model.double().model.rotary.speed
    assert double.dtype == torch.float64 and (double - exact).abs().max() < 1e-7
    assert torch.equal(model.bfloat16().float().model.rotary.speed, exact)


# ---- cache, positions, mask


@pytest.mark.parametrize("chunks", [[1] * 14, [5, 1, 8], [14], [9, 5]])
def test_cached_equals_uncached(chunks):
    """Token by token or in chunks of any size, the cache gives the logits of the whole sequence."""
    model, ids = toy_llama(), tokens(3, 14)
    whole, cache, parts = model(ids), KVCache(model.config, 3, 20, model.model.norm.weight), []
    for part in ids.split(chunks, 1):
        parts.append(model(part, cache=cache))
    difference = (torch.cat(parts, 1) - whole).abs().max()
    assert difference <= 1e-12 and cache.length == 14, f"differ by {difference:.1e}"


def test_a_full_cache_is_an_error():
    """One token more than the cache has room for fails rather than being forgotten."""
    model, ids = toy_llama(), tokens(1, 5)
    for first, second in ((4, 1), (3, 2)):
        cache = KVCache(model.config, 1, 4, model.model.norm.weight)
        model(ids[:, :first], cache=cache)
        with pytest.raises(RuntimeError):
            model(ids[:, first:first + second], cache=cache)


def test_no_token_sees_a_later_one():
    """Changing the last token leaves all logits before it alone, bit for bit."""
    model, ids = toy_llama(), tokens(2, 10)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 96
    a, b = model(ids), model(other)
    assert torch.equal(a[:, :-1], b[:, :-1]) and not torch.equal(a[:, -1], b[:, -1])


@pytest.mark.parametrize("cached", [False, True])
def test_two_branches_equal_two_sequences(cached):
    """A trunk of 4 with branches of 3 and 2, by hand: positions go on from the trunk in both, and a
    mask keeps them apart; each branch has the hidden states of its own sequence."""
    model = toy_llama()
    trunk, left, right = tokens(1, 4, 1), tokens(1, 3, 2), tokens(1, 2, 3)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5]])
    mask = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 0],
                         [1, 1, 0, 0, 0, 0, 0, 0, 0],
                         [1, 1, 1, 0, 0, 0, 0, 0, 0],
                         [1, 1, 1, 1, 0, 0, 0, 0, 0],
                         [1, 1, 1, 1, 1, 0, 0, 0, 0],
                         [1, 1, 1, 1, 1, 1, 0, 0, 0],
                         [1, 1, 1, 1, 1, 1, 1, 0, 0],
                         [1, 1, 1, 1, 0, 0, 0, 1, 0],
                         [1, 1, 1, 1, 0, 0, 0, 1, 1]]).bool()[None, None]
    ids = torch.cat([trunk, left, right], 1)
    if cached:
        cache = KVCache(model.config, 1, 9, model.model.norm.weight)
        model.model(trunk, cache=cache)
        tree = model.model(ids[:, 4:], positions[:, 4:], mask[:, :, 4:], cache)
    else:
        tree = model.model(ids, positions, mask)[:, 4:]
    for branch, got in ((left, tree[:, :3]), (right, tree[:, 3:])):
        want = model.model(torch.cat([trunk, branch], 1))[:, 4:]
        assert (got - want).abs().max() <= 1e-12, f"differ by {(got - want).abs().max():.1e}"


# ---- the head, and new tokens


def test_a_tied_head_is_the_embedding():
    """One storage, one parameter, in a loaded model and in a deep copy; untied there are two."""
    for model in (toy_llama(), copy.deepcopy(toy_llama())):
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert "lm_head.weight" not in dict(model.named_parameters())
    two = toy_llama(tie_word_embeddings=False)
    assert two.lm_head.weight.data_ptr() != two.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("tied", [True, False])
def test_growing_changes_nothing_old(tied):
    """Old rows stay bit-identical and so do the old tokens' logits; ids behind the vocabulary work,
    and their logits are the head's rows times the hidden state."""
    model = toy_llama(tie_word_embeddings=tied)
    ids, old = tokens(2, 9), model.model.embed_tokens.weight.detach().clone()
    before = model(ids)
    model.grow(5, torch.Generator().manual_seed(1))
    after = model(ids)
    assert after.shape == (2, 9, 101) and torch.equal(after[..., :96], before)
    assert torch.equal(model.model.embed_tokens.weight, old)
    ids[0, 3], ids[1, 8] = 96, 100
    hidden = model.model(ids)
    table = torch.cat([model.lm_head.weight, model.lm_head.rows])
    assert torch.allclose(model(ids), hidden @ table.T, rtol=0, atol=1e-12)
    vectors = model.model.embed_tokens(ids)
    assert torch.equal(vectors[0, 3], model.model.embed_tokens.rows[0])
    assert torch.equal(vectors[1, 8], model.model.embed_tokens.rows[4])
    with pytest.raises(IndexError):
        model(torch.tensor([[101]]))


def test_new_rows_are_seeded_and_of_the_stated_size():
    """N(0, 0.02^2), equal for equal generators and not for others; embedding and an untied head differ."""
    drawn = []
    for seed in (3, 3, 4):
        model = toy_llama(tie_word_embeddings=False)
        model.grow(2000, torch.Generator().manual_seed(seed))
        drawn.append((model.model.embed_tokens.rows, model.lm_head.rows))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[2][0]) and not torch.equal(*drawn[0])
    std, mean = drawn[0][0].std().item(), drawn[0][0].mean().item()
    assert abs(std - 0.02) < 5e-4 and abs(mean) < 5e-4, f"mean {mean}, std {std}"


def test_new_rows_stay_float32_beside_bfloat16():
    """A step of 1e-5 on a row of a bfloat16 model is not lost, and its logits still come out."""
    model = toy_llama(dtype=torch.bfloat16)
    model.grow(4)
    rows = model.model.embed_tokens.rows
    before = rows.detach().clone()
    with torch.no_grad():
        rows += 1e-5
    assert rows.dtype == torch.float32 and torch.allclose(rows - before, torch.tensor(1e-5), rtol=0.01)
    assert model(torch.tensor([[1, 97, 99]])).isfinite().all()


def test_a_tied_gradient_is_the_sum_of_both_uses():
    """d loss / d table, old rows and new, = the embedding's plus the head's in an untied copy."""
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
        want, got = sum(parts), getattr(tied.model.embed_tokens, name).grad
        assert all(p.abs().max() > 1e-4 for p in parts)
        assert (got - want).abs().max() <= 1e-12, f"{name}: differ by {(got - want).abs().max():.1e}"


def test_untying_an_untied_model_keeps_its_head():
    """untie() copies a tied table once; a head of its own is left as it is."""
    model = toy_llama(tie_word_embeddings=False)
    head = model.lm_head
    model.untie()
    assert model.lm_head is head


def test_initialise_is_seeded_and_leaves_norms_at_one():
    """From scratch: N(0, std^2) everywhere but in the norms, by the generator alone."""
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(models))  # must not matter
        models.append(Llama(LlamaConfig.from_dict(TOY)).initialise(torch.Generator().manual_seed(seed), 0.05))
    a, b, c = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    assert all((p == 1).all() for name, p in a.items() if "norm" in name)
    spread = math.sqrt(torch.cat([p.detach().flatten() for n, p in a.items() if "norm" not in n]).var())
    assert abs(spread - 0.05) < 2e-3, spread
