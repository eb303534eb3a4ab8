"""Llama 3.2: RMSNorm, scaled rotary positions, grouped-query attention, SwiGLU, and a cache of keys and values.

Nothing here is the paper's idea: skip it if you know Llama. Parameter names are the checkpoint's own
(`model.layers.0.self_attn.q_proj.weight`), so loading is a loop over names (files/hub.py).

    n batch   l positions   d hidden_size   h heads   g key/value heads   e head_dim   V vocabulary"""
import copy
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """The Hub's config.json as far as it changes the forward. No defaults: a wrong one would build a wrong model."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: dict  # {"rope_type": "default" | "llama3", "rope_theta": ..., "factor": ..., ...}
    tie_word_embeddings: bool

    @classmethod
    def from_dict(cls, config: dict) -> "LlamaConfig":
        """From the old form (rope_theta, rope_scaling) or transformers 5's (rope_parameters). ValueError: a fault."""
        config = dict(config)
        if config.get("rope_parameters") is None and "rope_theta" in config:
            config["rope_parameters"] = {**(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if config.get(name) is None]:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        for name, allowed in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
            if config.get(name, allowed) != allowed:
                raise ValueError(f"config.json has {name} = {config[name]!r}; only {allowed!r} is supported")
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        if heads % groups:
            raise ValueError(f"config.json has {heads} heads, no multiple of {groups} key/value heads")
        rope_frequencies(config["rope_parameters"], config["head_dim"])  # fails here if it is unknown
        return cls(**{name: config[name] for name in names})


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type for what bfloat16 is too coarse for: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def rope_frequencies(rope: dict, head_dim: int, dtype: torch.dtype = torch.float32, device="cpu") -> Tensor:
    """The rotation speed theta^(-2i/e) of each pair of dimensions, (e/2,).

    rope_type llama3: wavelengths above the original context are slowed down by `factor`, short ones are kept, and those
    between are blended linearly in 1/wavelength. The Hub's Llama 3.2 has factor 32 (3.1: 8)."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    need = {"default": (), "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()}
    if kind not in need:
        raise ValueError(f"config.json has rope_type {kind!r}; known are {', '.join(need)}")
    if missing := [name for name in ("rope_theta", *need[kind]) if rope.get(name) is None]:
        raise ValueError(f"config.json's rope parameters lack {', '.join(missing)}")
    speed = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim)  # (e/2,)
    if kind == "default":
        return speed
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * speed / (2 * math.pi)  # in the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow down, 1: keep
    return (1 - keep) * speed / rope["factor"] + keep * speed


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(wide(x.dtype))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)  # cast first, then scale: transformers' order, matters in bf16


def rotary(config: LlamaConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions' angles, computed in float32 or better: bfloat16 would round them."""
    speed = rope_frequencies(config.rope_parameters, config.head_dim, wide(dtype), positions.device)  # (e/2,)
    angle = positions[..., None] * speed  # (1 or n, l, e/2)
    angle = torch.cat([angle, angle], -1)[:, None]  # (1 or n, 1, l, e)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The Hub's layout pairs dimension i with i + e/2 (Meta's own files pair 2i with 2i + 1)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class KVCache:
    """Keys and values of all positions so far. Those of one sequence serve all sequences that begin with it: a
    preamble is computed once per batch, in training and in decoding. Nothing is overwritten, so gradients pass."""
    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values (n, g, length, e) of each layer

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k and v (n, g, l, e); returns all of the layer's, (n, g, length + l, e) each."""
        if layer in self.layers:
            past = (t.expand(len(k), -1, -1, -1) for t in self.layers[layer])
            k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v)))
        self.layers[layer] = k, v
        return k, v


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        d, e = config.hidden_size, config.head_dim
        h, g = config.num_attention_heads, config.num_key_value_heads
        self.e, self.repeat = e, h // g
        self.q_proj = nn.Linear(d, h * e, bias=False)
        self.k_proj = nn.Linear(d, g * e, bias=False)
        self.v_proj = nn.Linear(d, g * e, bias=False)
        self.o_proj = nn.Linear(h * e, d, bias=False)

    def forward(self, x: Tensor, rope, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        q = rotate(self.split(self.q_proj(x)), *rope)  # (n, h, l, e)
        k, v = self.keys_values(x, rope, cache, layer)  # (n, g, length + l, e)
        if not x.is_cpu:  # GPUs' masked kernels know no groups: torch would fall back to a slow one
            k, v = (t.repeat_interleave(self.repeat, 1) for t in (k, v))  # (n, h, length + l, e)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=x.is_cpu)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (n, l, d)

    def keys_values(self, x: Tensor, rope, cache: KVCache | None, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of x (n, l, d), behind those in the cache."""
        k, v = rotate(self.split(self.k_proj(x)), *rope), self.split(self.v_proj(x))  # (n, g, l, e)
        return cache.extend(layer, k, v) if cache else (k, v)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.e)).transpose(1, 2)  # (n, l, h * e) -> (n, h, l, e)


class MLP(nn.Module):
    def __init__(self, d: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rope, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache, layer))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))  # (n, l, d)


class TokenTable(nn.Module):
    """The vocabulary's vectors: `weight` (V_text, d) of the checkpoint and, behind them, `rows` (V_new, d) of the
    semantic-ID tokens, which can be trained alone, and in float32 beside a bfloat16 checkpoint."""
    def __init__(self, vocab: int, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, d))
        self.rows = None

    def grow(self, n_new: int, std: float, generator: torch.Generator | None) -> None:
        rows = torch.randn(n_new, self.weight.shape[1], generator=generator) * std
        self.rows = nn.Parameter(rows.to(self.weight.device, wide(self.weight.dtype)))

    def forward(self, ids: Tensor) -> Tensor:
        if self.rows is None:
            return F.embedding(ids, self.weight)
        old = len(self.weight)
        text = F.embedding(ids.clamp(max=old - 1), self.weight)
        return torch.where((ids < old)[..., None], text, F.embedding((ids - old).clamp(min=0), self.rows))

    def logits(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        y = y if self.rows is None else torch.cat([y, F.linear(x, self.rows.to(x.dtype))], -1)  # (..., V)
        return y.to(wide(x.dtype))

    def log_p(self, x: Tensor, first: int, count: int) -> Tensor:
        """log softmax(logits)[first : first + count] -> (..., count), a block of the whole vocabulary at a time."""
        rows = self.weight[:0] if self.rows is None else self.rows.to(x.dtype)
        blocks = [*self.weight.split(16384), *rows.split(16384)]
        sums = torch.stack([F.linear(x, block).to(wide(x.dtype)).logsumexp(-1) for block in blocks if len(block)])
        old = max(first - len(self.weight), 0), max(first + count - len(self.weight), 0)
        some = torch.cat([self.weight[first:first + count], rows[slice(*old)]])  # (count, d)
        return F.linear(x, some).to(wide(x.dtype)) - sums.logsumexp(0)[..., None]


class LlamaModel(nn.Module):
    def __init__(self, config: LlamaConfig, dropout: float):
        super().__init__()
        self.embed_tokens, self.dropout = TokenTable(config.vocab_size, config.hidden_size), nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(config, dropout) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config

    def forward(self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None,
                cache: KVCache | None = None, states: bool = True) -> Tensor | None:
        """Last hidden states (n, l, d) of ids (n, l); with states=False none: then the cache is all that is wanted.

        positions (n, l): by default they go on from the cache. mask (n, 1, l, length + l): by default a token sees all
        before it. Together they let l tokens be branches of a tree: answers in training, beams in decoding."""
        past, l = cache.length if cache else 0, ids.shape[1]
        if positions is None:
            positions = torch.arange(past, past + l, device=ids.device)[None]  # (1, l)
        if mask is None and past:
            mask = torch.ones(l, past + l, dtype=torch.bool, device=ids.device).tril(past)  # (l, past + l)
        x = self.dropout(self.embed_tokens(ids).to(self.norm.weight.dtype))  # (n, l, d)
        rope = rotary(self.config, positions, x.dtype)
        *most, last = self.layers
        for i, block in enumerate(most):
            x = block(x, rope, mask, cache, i)
        if states:
            return self.norm(last(x, rope, mask, cache, len(most)))
        last.self_attn.keys_values(last.input_layernorm(x), rope, cache, len(most))  # the rest of it is not needed


class Llama(nn.Module):
    """model(ids (n, l), cache=None) -> logits (n, l, V) float32 (float64 of a float64 model).
    dropout: on the embedding and both branches of a layer, while training. A checkpoint's Llama has none."""
    def __init__(self, config: LlamaConfig, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, dropout)
        tied = config.tie_word_embeddings  # one module under two names: one storage, one gradient
        self.lm_head = self.model.embed_tokens if tied else TokenTable(config.vocab_size, config.hidden_size)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.lm_head.logits(self.model(ids, cache=cache))

    def grow(self, n_new: int, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Adds n_new tokens behind the vocabulary, N(0, std^2). Release: the same, mean_resizing off."""
        self.model.embed_tokens.grow(n_new, std, generator)
        if not self.config.tie_word_embeddings:
            self.lm_head.grow(n_new, std, generator)

    def untie(self) -> None:
        """Gives the head a table of its own, a copy of the embedding's (Release: both are trained)."""
        if self.lm_head is self.model.embed_tokens:
            self.lm_head = copy.deepcopy(self.model.embed_tokens)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def initialise(self, generator: torch.Generator, std: float = 0.02) -> "Llama":
        """Random weights N(0, std^2) for a model trained from scratch (norms start at one)."""
        for name, p in self.named_parameters():
            if "norm" not in name:
                p.data.normal_(0, std, generator=generator)
        return self
