"""Slow, obvious versions of what the package computes fast: loops, textbook formulas."""
import math

import numpy as np
import pytest
import torch

from minipeso.llama import Llama, LlamaConfig


def log_softmax(v: list[float]) -> list[float]:
    """log softmax of plain numbers, summed without rounding."""
    top = max(v)
    log_z = top + math.log(math.fsum(math.exp(x - top) for x in v))
    return [x - log_z for x in v]


def textbook_softmax_kl(v: list[float], v_prev: list[float]) -> tuple[float, list[float]]:
    """sum_i r_i log(r_i / p_i), gradient r_i (l_i - sum_j r_j l_j), l = log(r / p); good for steps above 1e-6."""
    log_r, log_p = log_softmax(v), log_softmax(v_prev)
    r, log_ratio = [math.exp(x) for x in log_r], [a - b for a, b in zip(log_r, log_p)]
    kl = math.fsum(a * b for a, b in zip(r, log_ratio))
    return kl, [a * (b - kl) for a, b in zip(r, log_ratio)]


def exact_softmax_kl(v: torch.Tensor, v_prev: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL, its gradient) of one group (n,), to the last digits of the dtype however small the step v - v_prev is.

    With x = log(p / r) = log E_p[e^d] - d, no term of KL = sum_i r_i (e^x_i - 1 - x_i) is negative, for
    sum_i r_i e^x_i = 1; and dKL/dv_i = r_i (d_i - E_r[d]). Good as long as e^d does not overflow."""
    r, p, d = v.softmax(-1), v_prev.softmax(-1), v - v_prev
    d = d - (p * d).sum()
    x = (p * torch.expm1(d)).sum().log1p() - d
    series = torch.ones_like(x)  # e^x - 1 - x = x^2/2 (1 + x/3 (1 + x/4 (1 + ...))) where it would cancel
    for k in range(11, 2, -1):
        series = 1 + x / k * series
    kl = torch.where(x.abs() < 0.1, r * x * x / 2 * series, p - r - r * x).sum()
    return kl, r * (d - (r * d).sum())


def full_matrix_sinkhorn(distances, eps: float, iterations: int):
    """The Release's iteration, on the whole (n, K) matrix in float64: rows to 1/n, columns to 1/K, in turn."""
    D = distances.double()
    middle = (D.max() + D.min()) / 2
    Q = (-(D - middle) / (D.max() - middle + 1e-5) / eps).exp()
    Q = Q / Q.sum()
    n, K = Q.shape
    for _ in range(iterations):
        Q = Q / Q.sum(1, keepdim=True) / n
        Q = Q / Q.sum(0, keepdim=True) / K
    return Q * n


def release_repair(codes, residual, codebook, rounds: int):
    """The Release's collision repair, one group and one row at a time; of equal shares the nearest code."""
    codes = codes.clone()
    for _ in range(rounds):
        groups = {}
        for item, code in enumerate(codes.tolist()):
            groups.setdefault(tuple(code), []).append(item)
        for items in (items for items in groups.values() if len(items) > 1):
            distances = ((residual[items][:, None] - codebook[None]) ** 2).sum(2)
            plan = full_matrix_sinkhorn(distances, 0.003, 50).tolist()
            for item, share, distance in zip(items, plan, distances.tolist()):
                best = [k for k in range(len(share)) if share[k] > max(share) * (1 - 1e-6)]
                codes[item, -1] = min(best, key=distance.__getitem__)
    return codes


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """Seeded N(0, 1), the same numbers in every dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# a toy of every part: grouped heads, all three ranges of llama3's rotary scaling, a free head_dim
TOY = {"vocab_size": 96, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
       "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
       "tie_word_embeddings": True}


def toy_llama(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> Llama:
    """A random Llama whose logits and attention are far from uniform, norms included."""
    model = Llama(LlamaConfig.from_dict({**TOY, **changes}))
    randomise(model, seed)
    return model.to(dtype)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights of N(0, 0.3^2), norms around one, in the order of the names."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + ("norm" in name))


def transformers_llama(seed: int = 0, **changes):
    """The peer's model of the same kind; its own weights, to be saved and read back."""
    transformers = pytest.importorskip("transformers")
    shape = TOY | {"bos_token_id": None, "eos_token_id": None} | changes
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    randomise(model, seed)
    return model.eval()


def rotary_speeds(rope: dict, e: int) -> np.ndarray:
    """Pair by pair, by wavelength, as the Llama 3.1 report has it (not by turns, as shipped)."""
    speeds = np.array([rope["rope_theta"] ** (-i / e) for i in range(0, e, 2)])
    if rope.get("rope_type", "default") == "default":
        return speeds
    context = rope["original_max_position_embeddings"]
    for i, speed in enumerate(speeds):
        wavelength = 2 * math.pi / speed
        if wavelength > context / rope["low_freq_factor"]:
            speeds[i] = speed / rope["factor"]
        elif wavelength > context / rope["high_freq_factor"]:
            s = context / wavelength - rope["low_freq_factor"]
            s /= rope["high_freq_factor"] - rope["low_freq_factor"]
            speeds[i] = (1 - s) * speed / rope["factor"] + s * speed
    return speeds


def llama_logits(config: dict, weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """The whole forward in float64, (l, V): rotary positions as complex numbers, attention as loops."""
    h, g, e = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    speeds = rotary_speeds(config["rope_parameters"], e)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[name]

    def turned(vector, position):
        z = (vector[:e // 2] + 1j * vector[e // 2:]) * np.exp(1j * position * speeds)
        return np.concatenate([z.real, z.imag])

    x = weights["model.embed_tokens.weight"][ids]  # (l, d)
    for layer in range(config["num_hidden_layers"]):
        w = {k: weights[f"model.layers.{layer}.{k}.weight"] for k in (
            *(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))}
        y = norm(x, f"model.layers.{layer}.input_layernorm.weight")
        q, k, v = (y @ w[f"self_attn.{p}_proj"].T for p in "qkv")
        heads = np.zeros((len(ids), h * e))
        for head in range(h):
            mine, theirs = (slice(i * e, i * e + e) for i in (head, head // (h // g)))
            for i in range(len(ids)):
                score = np.array([turned(q[i, mine], i) @ turned(k[j, theirs], j) for j in range(i + 1)])
                p = np.exp(score / math.sqrt(e))
                heads[i, mine] = (p / p.sum()) @ v[:i + 1, theirs]
        x = x + heads @ w["self_attn.o_proj"].T
        y = norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
        gate = y @ w["mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    tied = config["tie_word_embeddings"]
    return norm(x, "model.norm.weight") @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T


@torch.no_grad()
def answer_log_p(model: Llama, prompt: list[int], answer: list[int], temperature: float = 1.0) -> float:
    """log p(answer | prompt), teacher-forced: one plain forward over both, no mask, no cache."""
    logits = model(torch.tensor([[*prompt, *answer]]))[0].double() / temperature
    return sum(logits[len(prompt) - 1 + i].log_softmax(-1)[token].item() for i, token in enumerate(answer))


def dict_trie(codes) -> dict:
    """Nested dictionaries: trie[c1][c2]... for every item's codes."""
    trie: dict = {}
    for item in codes:
        node = trie
        for code in item:
            node = node.setdefault(int(code), {})
    return trie


@torch.no_grad()
def slow_beam(model: Llama, prompt: list[int], trie: dict, first_token: int, n_codes: int, beams: int) -> list[tuple]:
    """(score, codes), best first: every prefix kept is run through the whole model, from its start."""
    kept, level = [(0.0, (), trie)], 0
    while any(node for _, _, node in kept):
        grown = []
        for score, codes, node in kept:
            ids = prompt + [first_token + i * n_codes + c for i, c in enumerate(codes)]
            log_p = model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
            grown += [(score + log_p[first_token + level * n_codes + c].item(), (*codes, c), child)
                      for c, child in node.items()]
        kept, level = sorted(grown, key=lambda entry: -entry[0])[:beams], level + 1
    return [(score, codes) for score, codes, _ in kept]
