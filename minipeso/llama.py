"""Llama 3.2, forward only: RMSNorm, scaled rotary positions, grouped-query attention, SwiGLU, and a key/value cache.

Commodity, not the paper's idea: skip it if you know Llama. Parameter names are the checkpoint's own
(`model.layers.0.self_attn.q_proj.weight`), so that loading is a loop over names (hub.py).

    n batch   l positions   d hidden_size   h heads   g key/value heads   e head_dim   V vocabulary
"""
from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeso.cache import Beginning, KVCache


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of the Hub's config.json that change the forward; nothing has a default, because
    wrong defaults (transformers' own are not Llama-3.2's) build a wrong model in silence."""

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
    def from_dict(cls, config: dict) -> LlamaConfig:
        """Reads config.json in its old form (rope_theta, rope_scaling) or transformers 5's
        (rope_parameters). ValueError names a missing field or an unsupported value."""
        config = dict(config)
        if config.get("rope_parameters") is None and "rope_theta" in config:
            scaling = config.get("rope_scaling") or {}
            config["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"]}
        missing = [f.name for f in fields(cls) if config.get(f.name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        for name, allowed in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
            if config.get(name, allowed) != allowed:
                raise ValueError(f"config.json has {name} = {config[name]!r}; only {allowed!r} is supported")
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        if heads % groups:
            raise ValueError(f"config.json has {heads} heads, no multiple of {groups} key/value heads")
        rope_frequencies(config["rope_parameters"], config["head_dim"])  # fails here if it is unknown
        return cls(**{f.name: config[f.name] for f in fields(cls)})


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type for what bfloat16 is too coarse for: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def rope_frequencies(rope: dict, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rotation speed of every pair of head dimensions, (head_dim / 2,) `dtype`.

    theta^(-2i/e); with rope_type llama3, wavelengths above the original context are slowed down by
    `factor`, short ones are kept, and those between are blended linearly in 1/wavelength.
    Source: the Hub's config (factor 32 for 3.2; Meta's reference code hard-codes 8, which is 3.1's).
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    need = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                      "original_max_position_embeddings")}
    if kind not in need:
        raise ValueError(f"config.json has rope_type {kind!r}; known are {', '.join(need)}")
    missing = [name for name in ("rope_theta", *need[kind]) if rope.get(name) is None]
    if missing:
        raise ValueError(f"config.json's rope parameters lack {', '.join(missing)}")
    # on the CPU even where a model is built without weights: the first arange on "meta" imports hundreds of modules
    speed = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=dtype, device="cpu") / head_dim)  # (e/2,)
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


class Rotary(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.register_buffer("speed", self.frequencies(torch.float32), persistent=False)  # (e/2,)

    def frequencies(self, dtype: torch.dtype) -> Tensor:
        return rope_frequencies(self.config.rope_parameters, self.config.head_dim, wide(dtype))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # .to(bfloat16) would have rounded the angles
        self.speed = self.frequencies(self.speed.dtype).to(self.speed.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angle = positions[..., None].to(self.speed.dtype) * self.speed  # (1 or n, l, e/2)
        angle = torch.cat([angle, angle], -1)[:, None]  # (1 or n, 1, l, e)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The Hub's layout pairs dimension i with i + e/2 (Meta's own files pair 2i with 2i + 1)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def rows_of(mask: Tensor | None, at: Tensor, l: int) -> Tensor:
    """The rows at (n, m) of a mask (l, all) or (n, 1, l, all), or of the causal one: (n, 1, m, all)."""
    if mask is None:
        mask = torch.ones(l, l, dtype=torch.bool, device=at.device).tril()
    mask = mask.expand(len(at), 1, *mask.shape[-2:])
    return mask[torch.arange(len(at), device=at.device)[:, None], 0, at][:, None]


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

    def forward(self, asking, x, ropes, mask, cache, layer) -> Tensor:
        n, m, l = len(x), asking.shape[1], x.shape[1]
        q = self.q_proj(asking).view(n, m, -1, self.e).transpose(1, 2)  # (n, h, m, e)
        k = self.k_proj(x).view(n, l, -1, self.e).transpose(1, 2)  # (n, g, l, e)
        v = self.v_proj(x).view(n, l, -1, self.e).transpose(1, 2)  # (n, g, l, e)
        q, k = rotate(q, *ropes[0]), rotate(k, *ropes[1])
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (n, g, length + l, e)
        if self.repeat > 1:
            k, v = (t.repeat_interleave(self.repeat, 1) for t in (k, v))  # (n, h, length + l, e)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).reshape(n, m, -1))  # (n, m, d)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        d, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, wide, bias=False)
        self.up_proj = nn.Linear(d, wide, bias=False)
        self.down_proj = nn.Linear(wide, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, ropes, mask, cache, layer, at=None) -> Tensor:
        y = asking = self.input_layernorm(x)
        if at is not None:
            x, asking = (t.gather(1, at[..., None].expand(-1, -1, t.shape[-1])) for t in (x, y))  # (n, m, d)
        x = x + self.self_attn(asking, y, ropes, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class TokenTable(nn.Module):
    """The vocabulary's vectors: `weight` (V_text, d) from the checkpoint and, once the semantic-ID
    tokens are added, `rows` (V_new, d) behind them. They are two parameters so that the new rows
    can be trained without gradients, optimiser state or weight decay touching the old ones; and so
    that they can stay float32 beside a bfloat16 checkpoint, as what is trained must."""

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
        return y if self.rows is None else torch.cat([y, F.linear(x, self.rows.to(x.dtype))], -1)  # (..., V)

    def log_p(self, x: Tensor, first: int, count: int, at_once: int = 16384) -> Tensor:
        """log softmax(logits)[first : first + count], (..., count): the softmax is over the whole vocabulary, of
        which no more than `at_once` logits exist at a time."""
        old, rows = len(self.weight), self.weight[:0] if self.rows is None else self.rows.to(x.dtype)
        parts = [*self.weight.split(at_once), *rows.split(at_once)]
        total = torch.stack([F.linear(x, part).to(wide(x.dtype)).logsumexp(-1) for part in parts if len(part)])
        some = torch.cat([self.weight[first:first + count], rows[max(first - old, 0):max(first + count - old, 0)]])
        return F.linear(x, some).to(wide(x.dtype)) - total.logsumexp(0)[..., None]


class LlamaModel(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = TokenTable(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)

    def forward(self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None,
                cache: KVCache | Beginning | None = None, at: Tensor | None = None) -> Tensor:
        """Last hidden states (n, l, d) of ids (n, l); with at (n, m), of these m positions alone, (n, m, d): then
        the last layer computes keys and values for all, everything else for them.

        positions (n, l): of each token; counted on from the cache if not given. mask (n, 1, l, all):
        which of the cached and new positions each token may see; causal if not given. The two
        together let l tokens be the branches of a tree: several answers of one user in training
        (tokens.py), the beams of one user in decoding (beam.py).
        """
        past = cache.length if cache is not None else 0
        l = ids.shape[1]
        if positions is None:
            positions = torch.arange(past, past + l, device=ids.device)[None]  # (1, l)
        if mask is None and past:
            mask = torch.ones(l, past + l, dtype=torch.bool, device=ids.device).tril(past)  # (l, past + l)
        x = self.embed_tokens(ids).to(self.norm.weight.dtype)  # (n, l, d)
        ropes = 2 * [self.rotary(positions, x.dtype)]  # of queries and keys
        *most, last = self.layers
        for i, layer in enumerate(most):
            x = layer(x, ropes, mask, cache, i)
        if at is not None:
            ropes[0] = self.rotary(positions.expand(ids.shape).gather(1, at), x.dtype)
            mask = rows_of(mask, at, l)
        x = last(x, ropes, mask, cache, len(most), at)
        if cache is not None:
            cache.advance(l)
        return self.norm(x)


class Llama(nn.Module):
    """model(ids (n, l), cache=None) -> logits (n, l, V) float32 (float64 of a float64 model)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        tied = config.tie_word_embeddings  # one module under two names: one storage, one gradient
        self.lm_head = self.model.embed_tokens if tied else TokenTable(config.vocab_size, config.hidden_size)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.head(self.model(ids, cache=cache))

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head.logits(hidden).to(wide(hidden.dtype))

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

    def initialise(self, generator: torch.Generator, std: float = 0.02) -> Llama:
        """Random weights N(0, std^2) for a model trained from scratch (norms start at one)."""
        for name, p in self.named_parameters():
            if "norm" not in name:
                p.data.normal_(0, std, generator=generator)
        return self
