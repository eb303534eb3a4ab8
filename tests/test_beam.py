"""Beam search against scoring every item, a slow search that keeps no cache, and transformers' generate()."""
import pytest
import torch
from hypothesis import given, strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from minipeso.beam import beam_search
from minipeso.files.hub import load_llama
from minipeso.llama import Llama
from minipeso.lora import adapter_parameters, inject
from minipeso.trie import Trie
from tests.conftest import draws
from tests.reference import answer_log_p, dict_trie, slow_beam, toy_llama, transformers_llama

N_CODES = 8


def catalogue(items: int, levels: int = 4, seed: int = 0) -> torch.Tensor:
    """(items, levels) codes, all different, in no order."""
    order = torch.randperm(N_CODES**levels, generator=torch.Generator().manual_seed(seed))[:items]
    return torch.stack([order // N_CODES**level % N_CODES for level in range(levels)], 1)


def model_for(levels: int = 4, dtype=torch.float64, seed: int = 0, text: int = 1) -> Llama:
    """A toy Llama whose vocabulary is `text` other tokens and the codes behind them."""
    return toy_llama(seed, dtype, vocab_size=text + levels * N_CODES)


def prompts(lengths, seed: int = 0, vocab: int = 1 + N_CODES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator) for length in lengths]


def ranked(model: Llama, prompt: torch.Tensor, codes: torch.Tensor, first_token: int) -> list[tuple]:
    """(log p, codes) of every different item, best first: the exhaustive answer."""
    scored = [(answer_log_p(model, prompt.tolist(), [first_token + i * N_CODES + c for i, c in enumerate(item)]), item)
              for item in set(map(tuple, codes.tolist()))]
    return sorted(scored, reverse=True)


def assert_best(codes: torch.Tensor, scores: torch.Tensor, want: list[tuple]) -> None:
    """One user's codes (beams, L) and scores (beams,) are `want`, to 1e-10, and behind it nothing: -1 and -inf."""
    n = len(want)
    assert list(map(tuple, codes[:n].tolist())) == [item for _, item in want]
    error = (scores[:n] - torch.tensor([p for p, _ in want], dtype=torch.float64)).abs().max()
    assert error <= 1e-10, f"scores off by {error:.1e}"
    assert (codes[n:] == -1).all() and (scores[n:] == -torch.inf).all()


@pytest.mark.parametrize("levels, items, first_token", [(4, 40, 1), (1, 5, 1), (2, 30, 11), (3, 1, 4)])
@pytest.mark.parametrize("spare", [0, 7])
def test_a_wide_beam_ranks_every_item(levels, items, first_token, spare):
    """With as many beams as items, or more: all items, in the order and with the log-probabilities of a
    teacher-forced forward each, and then code -1 with score -inf."""
    model, codes = model_for(levels, text=first_token), catalogue(items, levels)
    batch = prompts([9, 1, 4])
    best, scores = beam_search(model, batch, Trie(codes, N_CODES), first_token, beams=items + spare)
    assert best.shape == (3, items + spare, levels) and scores.shape == (3, items + spare)
    for i, prompt in enumerate(batch):
        assert_best(best[i], scores[i], ranked(model, prompt, codes, first_token))


@draws(25)
@given(items=st.integers(1, 60), levels=st.integers(1, 5), beams=st.integers(1, 12), seed=st.integers(0, 99),
       length=st.integers(1, 6))
def test_a_narrow_beam_equals_a_slow_one(items, levels, beams, seed, length):
    """Any width, any catalogue, items that share an ID among them: what running every prefix from its start gives."""
    model, codes = model_for(levels, seed=seed % 3), catalogue(min(items, N_CODES**levels), levels, seed)
    prompt, = prompts([length], seed, 1 + levels * N_CODES)
    best, scores = beam_search(model, [prompt], Trie(torch.cat([codes, codes[:5]]), N_CODES), 1, beams)
    assert best.shape == (1, beams, levels)
    assert_best(best[0], scores[0], slow_beam(model, prompt.tolist(), dict_trie(codes), 1, N_CODES, beams))


@pytest.mark.parametrize("items, text", [(300, 1), (25, 40)])
def test_equal_to_transformers_generate(tmp_path, items, text):
    """The same ten items in the same order as generate() with a prefix function, scores within 1e-4."""
    peer = transformers_llama(vocab_size=text + 4 * N_CODES)
    peer.save_pretrained(tmp_path)
    codes, batch = catalogue(items), prompts([30] * 6, vocab=text + 4 * N_CODES)
    token = codes + text + N_CODES * torch.arange(4)
    nested = dict_trie(token)

    def allowed(_, ids):
        node = nested
        for t in ids[30:].tolist():
            node = node[t]
        return list(node)

    out = peer.generate(torch.stack(batch), attention_mask=torch.ones(6, 30).long(), prefix_allowed_tokens_fn=allowed,
                        num_beams=10, num_return_sequences=10, max_new_tokens=4, do_sample=False, length_penalty=0.0,
                        early_stopping=False, pad_token_id=0, return_dict_in_generate=True, output_scores=True)
    want = out.sequences[:, 30:].view(6, 10, 4) - text - N_CODES * torch.arange(4)
    best, scores = beam_search(load_llama(tmp_path), batch, Trie(codes, N_CODES), text)
    error = (scores - out.sequences_scores.view(6, 10)).abs().max()
    assert torch.equal(best, want), f"{(best != want).any(-1).sum()} of 60 items differ"
    assert error <= 1e-4, f"scores off by {error:.1e}"


def test_prompts_of_any_lengths_are_as_each_alone():
    """Padding, neighbours and their order have no influence; a prompt of <bos> alone works."""
    model, trie = model_for(), Trie(catalogue(150), N_CODES)
    batch = [torch.tensor([0]), *prompts([1, 12, 3, 33, 7, 2, 20])]
    best, scores = beam_search(model, batch, trie, 1)
    for size in (1, 3):
        for start in range(0, 8, size):
            some = beam_search(model, batch[start:start + size], trie, 1)
            assert torch.equal(some[0], best[start:start + size])
            assert (some[1] - scores[start:start + size]).abs().max() <= 1e-12
    back = beam_search(model, batch[::-1], trie, 1)
    assert torch.equal(back[0].flip(0), best) and (back[1].flip(0) - scores).abs().max() <= 1e-12


def test_adapters_and_new_tokens_take_part():
    """On a grown, adapted model the codes are the tokens behind the text, and scores follow the adapter."""
    model = toy_llama(vocab_size=50)
    model.grow(4 * N_CODES, torch.Generator().manual_seed(0), std=0.3)
    inject(model, 2, 4.0, generator=torch.Generator().manual_seed(0))
    codes, batch = catalogue(20), prompts([11, 6], vocab=50)
    before = beam_search(model, batch, Trie(codes, N_CODES), 50, beams=20)[1]
    with torch.no_grad():
        for i, p in enumerate(adapter_parameters(model)):
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    model.double()  # one dtype for the cached and the plain forward
    best, scores = beam_search(model, batch, Trie(codes, N_CODES), 50, beams=20)
    assert (scores - before).abs().max() > 0.1
    for i, prompt in enumerate(batch):
        assert_best(best[i], scores[i], ranked(model, prompt, codes, 50))


def test_bfloat16_models_score_in_float32():
    """Scores add up in float32 whatever the weights, finer than bfloat16's digits, near the float32 model's own."""
    batch, trie = prompts([8, 3]), Trie(catalogue(100), N_CODES)
    scores = [beam_search(model_for(dtype=dtype), batch, trie, 1)[1] for dtype in (torch.bfloat16, torch.float32)]
    assert all(s.dtype == torch.float32 and not s.requires_grad for s in scores)
    assert ((1024 * scores[0]) % 1 != 0).float().mean() > 0.9, "multiples of 2^-10: log p of 8 significant bits"
    assert (scores[0] - scores[1]).abs().max() < 0.1, f"{(scores[0] - scores[1]).abs().max():.3f} apart"


@pytest.mark.parametrize("length", [2, 5, 99])
def test_a_common_preamble_is_computed_once(length):
    """Prompts that begin with the same tokens: the same items and scores to 1e-10, and the model sees these tokens
    once, every other token of a prompt once per user, of which the last begins the search. At most all but the
    last token of the shortest prompt are common."""
    model, trie = model_for(), Trie(catalogue(200), N_CODES)
    batch = [torch.cat([torch.arange(min(length, 9)), rest]) for rest in prompts([7, 1, 12])]
    codes, scores = beam_search(model, batch, trie, 1)
    shapes, shared = [], min(length, 9)
    model.model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    again, same = beam_search(model, batch, trie, 1, preamble=length)
    assert torch.equal(codes, again) and (scores - same).abs().max() <= 1e-10
    assert shapes == [(1, shared), (3, 11), (3, 1), (3, 8), (3, 10), (3, 10)], "a first level of 8 codes"


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6's FakeTensor cannot split an empty tensor")
@pytest.mark.parametrize("preamble", [0, 3])
def test_no_value_is_waited_for(preamble):
    """Decoding runs to its end on tensors without values: nothing is read back, so a GPU is never waited for."""
    model, trie = model_for(dtype=torch.float32), Trie(catalogue(200), N_CODES)
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = [torch.zeros(length, dtype=torch.long) for length in (7, 4, 12)]
        codes, scores = beam_search(model, batch, trie, 1, preamble=preamble)
        assert codes.shape == (3, 10, 4) and scores.shape == (3, 10) and isinstance(codes, FakeTensor)
        with pytest.raises(DataDependentOutputException):
            scores.sum().item()
