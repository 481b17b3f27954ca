"""MobileMoE: the model.

A decoder-only transformer in which every layer is attention followed by a fine-grained mixture of experts, after
"MobileMoE: Scaling On-Device Mixture of Experts" (arXiv 2605.27358). A phone holds the whole model in memory but reads only
the *active* part of it for each token; decoding speed is bytes read per token, so a mixture answers with the quality of a
larger model at the speed of a small one.

In the order of the data's way: the config and what it costs, RMS norm and rotary positions, attention, router, experts, block,
model, generation, and at the end the little plumbing (errors, files, chat format) that every script shares.

What it is not: it knows nothing of quantisation (quantize.py attaches that from outside), of corpora (data.py) or of training
(train.py). Run it to talk to a checkpoint:

    python mobilemoe.py runs/tiny/sft.pt "What does textwrap.dedent do?"

Shapes use one alphabet everywhere:
    B batch   T tokens   D d_model   H query heads   K key/value heads   V vocabulary
    N = B*T tokens of a batch laid flat   E routed experts   A experts per token (top-k)   F width of one routed expert
    S tokens attended to: T and those before them   R = H/K query heads of a key/value head   rows of the experts' buffer
"""
import argparse
import base64
import contextlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# Config: what the paper varies, and what each choice costs


class UserError(Exception):
    """Something the person at the keyboard can cure: `run_main` prints it as one line and exits with code 2."""


@dataclass(frozen=True)
class Config:
    """One architecture, in the paper's terms (section 3). Raises UserError if no such model can exist.

    The expert axes start from a dense feed-forward of width `d_ff`:
      n_experts (E)     expansion: as many experts as would hold E times the dense weights ...
      granularity (g)   ... each cut into g thin ones, so E*g experts of width d_ff/g, of which g are active: a token picks
                        a *combination* of thin experts, and there are vastly more combinations than experts.
      shared_expert     half of the g active ones become one expert that every token uses; it learns what all tokens need,
                        so the routed ones need not each learn it again.
    Neither g nor the shared expert changes the active or the total size. E = g = 1 without a shared expert is a dense model.
    """
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int                       # width of the dense feed-forward with the same active size
    d_head: int = 64
    n_experts: int = 8
    granularity: int = 8
    shared_expert: bool = True
    top_k: int = 0                  # routed experts per token; 0 takes the paper's rule: g, or g/2 beside a shared expert
    vocab_size: int = 128_256
    max_context: int = 2048         # longest context trained so far; positions are rotary, nothing in the weights depends on it
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: bool = False      # the released checkpoints' llama3 scaling; models trained here need none
    routed_scale: float = 2.5       # routed_scaling_factor: sigmoid weights sum to 1, this sets them against the shared expert
    z_loss: float = 1e-4            # keeps router logits small (ST-MoE): without it they grow until FP32 sigmoids saturate
    balance_loss: float = 0.0       # the classic Switch loss, off: expert_bias balances without disturbing the gradient
    init_std: float = 0.02
    zero_init_outputs: bool = False  # start every block as the identity

    def __post_init__(self):
        def require(ok: bool, message: str):
            if not ok:
                raise UserError(f"impossible config: {message}")
        sizes = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "d_head", "n_experts", "granularity", "vocab_size")
        for name in sizes:
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, f"{name} = {value!r} must be a whole number above 0")
        require(self.n_heads % self.n_kv_heads == 0,
                f"{self.n_heads} query heads do not share {self.n_kv_heads} key/value heads evenly")
        require(self.d_head % 2 == 0, f"d_head = {self.d_head} is odd: rotary positions turn pairs of channels")
        require(self.d_ff % self.granularity == 0,
                f"granularity {self.granularity} does not divide the width d_ff = {self.d_ff}")
        require(not self.shared_expert or self.granularity % 2 == 0,
                f"a shared expert replaces half of the {self.granularity} active experts: granularity must be even")
        require(self.top_k >= 0, f"top_k = {self.top_k} is negative")
        require(self.active_routed <= self.n_routed,
                f"{self.active_routed} active experts, but only {self.n_routed} routed ones to choose from")
        # INT4 groups are 32 weights along a matrix's input dimension, so every input dimension must hold whole groups.
        for name, width in (("d_model", self.d_model), ("expert width d_ff/granularity", self.expert_width),
                            ("n_heads * d_head", self.n_heads * self.d_head)):
            require(width % 32 == 0, f"{name} = {width} is not a multiple of 32, the size of an INT4 group")

    @property
    def dense(self) -> bool:
        return self.n_experts == 1 and self.granularity == 1 and not self.shared_expert

    @property
    def expert_width(self) -> int:          # F
        return self.d_ff // self.granularity

    @property
    def shared_width(self) -> int:          # half of the active width, in one piece
        return self.d_ff // 2 if self.shared_expert else 0

    @property
    def n_routed(self) -> int:              # E of the shapes below: 8 * 8 - 4 = 60 for S, M and L
        return self.n_experts * self.granularity - (self.granularity // 2 if self.shared_expert else 0)

    @property
    def active_routed(self) -> int:         # A of the shapes below
        return self.top_k or (self.granularity // 2 if self.shared_expert else self.granularity)

    def _params(self, routed_experts: int) -> int:
        """Weights of a model in which each layer has (or, for one token, uses) that many routed experts."""
        attention = 2 * self.d_model * self.d_head * (self.n_heads + self.n_kv_heads)
        feed_forward = 3 * self.d_model * (routed_experts * self.expert_width + self.shared_width)
        router = 0 if self.dense else (self.d_model + 1) * self.n_routed
        norms = 2 * self.d_model
        return self.vocab_size * self.d_model + self.d_model + self.n_layers * (attention + feed_forward + router + norms)

    def total_params(self) -> int:
        """Everything the phone must hold. The embedding counts once: input and output share it."""
        return self._params(self.n_routed)

    def active_params(self) -> int:
        """What one token multiplies with (the output projection is the embedding, so it is active too)."""
        return self._params(self.active_routed)

    def train_flops_per_token(self) -> int:
        """6 N_act: a multiply and an add per weight forward, twice that backward (equation 5's approximation)."""
        return 6 * self.active_params()

    def inference_flops_per_token(self) -> int:
        return 2 * self.active_params()

    def int4_bytes(self) -> int:
        """Bytes of the weights in INT4: half a byte each plus an FP16 scale per 32; router, norms and bias stay FP32."""
        routing = 0 if self.dense else (self.d_model + 1) * self.n_routed
        fp32 = self.n_layers * (2 * self.d_model + routing) + self.d_model
        return (self.total_params() - fp32) * 18 // 32 + 4 * fp32

    def kv_bytes(self, tokens: int, bits: int = 8) -> int:
        """Bytes of keys and values for `tokens` of context (equation 5's second term)."""
        return 2 * tokens * self.n_layers * self.n_kv_heads * self.d_head * bits // 8


PRESETS = {
    # The released models (paper, table 1): 272M active of 1.26B, 528M of 2.82B, 922M of 5.33B.
    "S": Config(d_model=768, n_layers=20, n_heads=12, n_kv_heads=4, d_ff=3072),
    "M": Config(d_model=1024, n_layers=26, n_heads=16, n_kv_heads=4, d_ff=4096),
    "L": Config(d_model=1280, n_layers=32, n_heads=20, n_kv_heads=4, d_ff=5120),
    # The paper's dense opponent on the phone, 1.08B.
    "mobilellm-pro": Config(d_model=1280, n_layers=30, n_heads=20, n_kv_heads=4, d_ff=6144, vocab_size=202_048,
                            n_experts=1, granularity=1, shared_expert=False),
    # What two CPU cores train in a quarter of an hour: 3M active of 15M, the same 60 experts top-4 beside a shared one,
    # and its dense twin of equal active size.
    "tiny": Config(d_model=192, n_layers=4, n_heads=3, n_kv_heads=1, d_ff=768, vocab_size=4096, max_context=256,
                   routed_scale=1.0, zero_init_outputs=True),
    "tiny-dense": Config(d_model=192, n_layers=4, n_heads=3, n_kv_heads=1, d_ff=768, vocab_size=4096, max_context=256,
                         n_experts=1, granularity=1, shared_expert=False, zero_init_outputs=True),
    # For tests: every part is there, nothing takes time.
    "test": Config(d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_head=32, d_ff=256, n_experts=4, granularity=4,
                   vocab_size=512, max_context=64),
}

# ----------------------------------------------------------------------------------------------------------------------
# Norm and positions


class Normalise(torch.autograd.Function):
    """x / rms(x) over the last dimension. Autograd's way back through F.rms_norm writes a dozen tensors of x's size; by hand it
    is (grad - x * mean(grad * x) / rms(x)^2) / rms(x): what points along x is taken out, the rest is scaled.
    """

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:                     # [..., D] -> [..., D]
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)       # [..., 1] 1 / rms(x)
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale = ctx.saved_tensors
        along = (grad * x).mean(-1, keepdim=True) * scale.square()         # [..., 1]
        return torch.addcmul(grad, x, along, value=-1).mul_(scale), None


class RMSNorm(nn.Module):
    """x / rms(x) * weight. The residual stream stays FP32 under autocast, so the mean of squares is taken in FP32."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:             # [..., D] -> [..., D]
        return Normalise.apply(x, self.eps) * self.weight


def rope_rotations(config: Config, positions: Tensor) -> Tensor:
    """Rotation of each pair of channels at each position, as complex numbers of length 1: [T] -> [T, d_head/2]."""
    # Pair i turns by theta^(-2i/d_head) per token: the first pairs tell neighbours apart, the last ones distant paragraphs.
    exponent = torch.arange(0, config.d_head, 2, device=positions.device, dtype=torch.float32) / config.d_head
    frequency = config.rope_theta ** -exponent           # [d_head/2], radians per token
    if config.rope_scaling:
        # As released: pairs that do not complete a turn within the 8192 tokens first trained on are slowed 16 times, the
        # rest kept. (low_freq_factor = high_freq_factor makes the usual llama3 ramp a step.)
        wavelength = 2 * torch.pi / frequency
        frequency = torch.where(wavelength > 8192, frequency / 16, frequency)
    angle = positions.float()[:, None] * frequency       # [T, d_head/2]
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn *interleaved* pairs (x[0], x[1]), (x[2], x[3]), ...: [B, T, heads, d_head] -> the same, FP32.

    Half of all code pairs x[i] with x[i + d_head/2] instead. Both are rotary embeddings, but weights trained with one are
    noise under the other; export_mobile.py permutes rows to convert.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))       # [B, T, heads, d_head/2]
    return torch.view_as_real(pairs * rotations[:, None, :]).flatten(-2)

# ----------------------------------------------------------------------------------------------------------------------
# Attention


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type autocast would give a matmul with `x`. We ask because its list knows neither grouped_mm nor our own Functions,
    and because what several matmuls read is better rounded once."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class KVCache:
    """Keys and values of the tokens seen so far, for every layer, allocated once at full length."""

    def __init__(self, config: Config, batch: int, max_tokens: int, device="cpu"):
        shape = (config.n_layers, 2, batch, config.n_kv_heads, max_tokens, config.d_head)
        self.data = torch.zeros(shape, device=device)    # [layers, 2, B, K, T max, d_head]
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, K, T, d_head] behind `length` and return all keys and values. The model moves `length` on, once a pass."""
        end = self.length + k.shape[2]
        self.data[layer, 0, :, :, self.length:end] = k
        self.data[layer, 1, :, :, self.length:end] = v
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]


class BlockAttention(torch.autograd.Function):
    """Causal attention by plain matmuls, BLOCK queries at a time, so that little of what the mask hides is computed.

    q [B*K, T*R, d_head] (scaled), k, v [B*K, S, d_head] -> [B*K, T*R, d_head]. The R heads that share keys stand as if they
    were one head with R queries per token. By hand, because autograd copies every slice's gradient into zeros as large as
    the whole, and because the sum over keys of p * grad_p that the softmax's derivative needs is, much cheaper, y * grad_y.
    """
    BLOCK = 64

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, R: int) -> Tensor:
        y, probs, step = torch.empty_like(q), [], BlockAttention.BLOCK
        before = k.shape[1] - q.shape[1] // R                              # S - T: tokens before the first query
        mask = torch.full((step, step), -torch.inf, dtype=q.dtype).triu(1).repeat_interleave(R, 0)     # [BLOCK*R, BLOCK]
        for start in range(0, q.shape[1], step * R):
            rows = slice(start, start + step * R)
            part = q[:, rows]                                              # [B*K, n*R, d_head] n = BLOCK, or what is left
            n = part.shape[1] // R
            last = before + start // R + n                                 # what the last query of the block may look at
            scores = part @ k[:, :last].mT                                 # [B*K, n*R, last]
            scores[:, :, -n:] += mask[:n * R, :n]
            p = scores.softmax(-1)
            y[:, rows] = p @ v[:, :last]
            if any(ctx.needs_input_grad):
                probs.append(p)
        ctx.save_for_backward(q, k, v, y, *probs)
        ctx.rows = step * R
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):                                       # [B*K, T*R, d_head]
        q, k, v, y, *probs = ctx.saved_tensors
        mean_grad = (grad * y).sum(-1, keepdim=True)                       # [B*K, T*R, 1] sum over keys of p * grad_p
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, p in enumerate(probs):                                      # [B*K, n*R, last]
            rows, last = slice(ctx.rows * i, ctx.rows * (i + 1)), p.shape[2]
            grad_scores = (grad[:, rows] @ v[:, :last].mT).sub_(mean_grad[:, rows]).mul_(p)        # [B*K, n*R, last]
            grad_q[:, rows] = grad_scores @ k[:, :last]
            grad_k[:, :last] += grad_scores.mT @ q[:, rows]
            grad_v[:, :last] += p.mT @ grad[:, rows]
        return grad_q, grad_k, grad_v, None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T positions of S: q [B, H, T, d_head], k, v [B, K, S, d_head] -> [B, T, H, d_head].

    A GPU has a kernel that never writes the scores to memory. The CPU's version of that kernel is slow, above all going back;
    BlockAttention takes 25 ms there and back against its 58 (`python bench.py`). The price: scores, and the sums over blocks in
    the gradients of k and v, are rounded to q's type, and the softmax is kept for backward.
    """
    (B, H, T, d_head), (_, K, S, _) = q.shape, k.shape
    if q.device.type != "cpu":      # is_causal would align the mask to the top left, as if nothing had been seen
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S > 1, enable_gqa=H != K)
        return y.transpose(1, 2)
    q = (q * d_head ** -0.5).unflatten(1, (K, H // K)).transpose(2, 3)     # [B, K, T, R, d_head]
    flat = (x.reshape(B * K, -1, d_head) for x in (q, k, v))
    y = BlockAttention.apply(*flat, H // K)                                # [B*K, T*R, d_head]
    return y.view(B, K, T, -1).transpose(1, 2).reshape(B, T, H, d_head)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads, which divides the phone's KV cache by H/K."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        d, q_width, kv_width = config.d_model, config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.q_proj = nn.Linear(d, q_width, bias=False)
        self.k_proj = nn.Linear(d, kv_width, bias=False)
        self.v_proj = nn.Linear(d, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, d, bias=False)

    def forward(self, x: Tensor, rotations: Tensor, cache: KVCache | None = None) -> Tensor:     # [B, T, D] -> [B, T, D]
        c, x = self.config, x.to(compute_dtype(x))      # once: autocast would round it for q, for k and for v
        q = self.q_proj(x).unflatten(-1, (c.n_heads, c.d_head))           # [B, T, H, d_head]
        k = self.k_proj(x).unflatten(-1, (c.n_kv_heads, c.d_head))        # [B, T, K, d_head]
        v = self.v_proj(x).unflatten(-1, (c.n_kv_heads, c.d_head))        # [B, T, K, d_head]
        # QK-norm without weights bounds the attention logits, so nothing blows up in BF16. A rotation keeps the norm:
        # normalising before or after it is the same number.
        q, k = (Normalise.apply(rotate(x, rotations), c.norm_eps).to(v.dtype) for x in (q, k))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H or K, T, d_head]
        if cache is not None:
            k, v = (x.to(q.dtype) for x in cache.extend(self.layer, k, v))           # [B, K, seen + T, d_head]
        return self.o_proj(attend(q, k, v).flatten(2))

# ----------------------------------------------------------------------------------------------------------------------
# Router and experts


class Routing(NamedTuple):
    """What the routers of one forward pass report to the trainer."""
    load: Tensor            # [layers, E] tokens sent to each expert (before any are dropped)
    z_loss: Tensor          # mean over layers of mean(logsumexp(logits)^2)
    balance_loss: Tensor    # mean over layers of Switch's E * sum(f * P)
    dropped: Tensor         # fraction of (token, expert) routes that found their expert full


class Router(nn.Module):
    """Which A of the E experts a token goes to, and with which weights. FP32 whatever the autocast.

    BF16 has 8 bits of mantissa: two experts whose scores differ by less than 0.4 % would tie, and training and phone would
    break the tie differently. The router holds 0.3 % of S's active weights; it is no place to save.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed, config.d_model))
        self.config = config

    def forward(self, x: Tensor, expert_bias: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """x [N, D], expert_bias [E] -> weights [N, A] summing to routed_scale, experts [N, A], Routing of this layer."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())              # [N, E]
        scores = logits.sigmoid()       # sigmoid, not softmax: an expert's score does not fall because another's rises
        # The bias decides *who* is chosen, never *how much* they count. A bias inside the weights would be a gradient-free
        # disturbance of the output; outside, it only moves tokens from full experts to empty ones.
        experts = (scores.detach() + expert_bias).topk(c.active_routed).indices          # [N, A]
        weights = scores.gather(1, experts)                                # [N, A] unbiased
        weights = c.routed_scale * weights / (weights.sum(-1, keepdim=True) + 1e-20)
        load = torch.zeros_like(expert_bias).scatter_add_(0, experts.flatten(), torch.ones_like(weights).flatten())
        probability = (scores / scores.sum(-1, keepdim=True)).mean(0)      # [E] P of Switch's loss
        balance_loss = c.n_routed * torch.dot(load / load.sum(), probability)
        z_loss = logits.logsumexp(-1).square().mean()
        return weights, experts, Routing(load.detach(), z_loss, balance_loss, torch.zeros_like(z_loss))


class SwiGLU(nn.Module):
    """silu(gate) * up. A module without weights, so that quantize.py can round what it puts out: that, times a weight per row
    (which INT8's scales take up), goes into the down projection."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class MLP(nn.Module):
    """A plain gated feed-forward: the shared expert, and the whole feed-forward of a dense model."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, width, bias=False)
        self.up_proj = nn.Linear(d_model, width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:              # [..., D] -> [..., D]
        x = x.to(compute_dtype(x))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def add_rows(y: Tensor, row: Tensor, kept: Tensor) -> Tensor:
    """Sum of each token's rows: y [rows, D], row [N, A], kept [N, A] (0 for a dropped route) -> [N, D], no copy of the rows."""
    return F.embedding_bag(row, y, mode="sum", per_sample_weights=kept)


class ToRows(torch.autograd.Function):
    """Copy tokens to the rows of the experts' buffer. Its opposite, FromRows, adds each token's rows up again.

    Autograd would scatter gradients into zeroed buffers. But each row belongs to one route, so ToRows goes back as FromRows
    goes there, and the reverse. Idle rows hold token 0's numbers and get token 0's gradient: both meet the weight 0 in
    Experts.multiply and end there.
    """

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, row: Tensor, kept: Tensor) -> Tensor:
        """x [N, D], token [rows] (the token of each row), row [N, A] (the row of each route), kept [N, A] -> [rows, D]."""
        ctx.save_for_backward(row, kept)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return add_rows(grad, *ctx.saved_tensors), None, None, None


class FromRows(torch.autograd.Function):
    """Each token's sum over its rows, the opposite of ToRows. Right only if idle rows weigh nothing (see there)."""

    @staticmethod
    def forward(ctx, y: Tensor, token: Tensor, row: Tensor, kept: Tensor) -> Tensor:
        """y [rows, D], the rest as in ToRows -> [N, D]."""
        ctx.save_for_backward(token)
        return add_rows(y, row, kept)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, *ctx.saved_tensors), None, None, None


def lay_out(held: Tensor, capacity: int, routes: int, unit: int, on_cpu: bool) -> tuple[Tensor, int, Tensor | tuple]:
    """Give the held [E] routes of every expert rows of a buffer, padded to whole units.

    -> first row of each expert [E], number of rows, and what Experts.multiply must know: on a GPU where each expert's rows end,
    [E]; on a CPU the experts of each group and the rows of each group.
    """
    if not on_cpu:          # the host must not wait for the counts: as many rows as there can ever be
        height = (held + unit - 1) // unit * unit                          # [E]
        ends, E = height.cumsum(0), len(held)                              # [E]
        return ends - height, min(routes + E * (unit - 1), E * math.ceil(capacity / unit) * unit), ends.int()
    # Six experts of similar load form a group in which all get as many rows as the fullest: one bmm, few idle rows, and what
    # it reads and writes stays in the cache. (One bmm for all, each `capacity` = 1.5 times the mean high, computes a third of
    # its rows for nobody; grouped_mm is a loop over experts on a CPU.) An expert without routes gets no rows: of 60, a single
    # token wants four.
    count = held.tolist()
    by_load = sorted((e for e, n in enumerate(count) if n), key=count.__getitem__, reverse=True)
    groups = [by_load[i:i + 6] for i in range(0, len(by_load), 6)]
    begin, sizes = [0] * len(count), []
    for group in groups:
        height = math.ceil(count[group[0]] / unit) * unit
        for place, e in enumerate(group):
            begin[e] = sum(sizes) + place * height
        sizes.append(len(group) * height)
    return torch.tensor(begin), sum(sizes), (groups, sizes)


class Experts(nn.Module):
    """All routed experts of a layer as two stacked matrices, many multiplied by one call.

    A loop would launch E small matmuls, most of the time waiting to start. Instead every (token, expert) route is given a
    row of one buffer in which each expert's rows lie together; then one call multiplies many experts' rows, each by that
    expert's matrix. The two modes of the paper:

      drop-and-pad (pre-/mid-training)   an expert takes at most `capacity` routes and drops the others (the residual carries
                                         those tokens on), so that one overloaded expert cannot hold up all the rest
      dropless (SFT, QAT, inference)     every expert takes all its routes; nothing is lost
    """

    def __init__(self, config: Config):
        super().__init__()
        E, D, width = config.n_routed, config.d_model, config.expert_width
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * width))     # gate in the first F columns, up in the last
        self.down_proj = nn.Parameter(torch.empty(E, width, D))
        self.swiglu = SwiGLU()
        self.n_routed = E       # not read off a weight: under QAT each reading rounds the whole weight anew

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, capacity_factor: float | None) -> tuple[Tensor, Tensor]:
        """x [N, D], weights [N, A], experts [N, A] -> weighted sum of the experts' outputs [N, D], fraction dropped."""
        x = x.to(compute_dtype(x))
        (N, A), E = experts.shape, self.n_routed
        expert, route = experts.flatten(), torch.arange(N * A, device=x.device)                    # [N*A] each route's expert
        count = torch.zeros(E, dtype=torch.int64, device=x.device).scatter_add_(0, expert, torch.ones_like(expert))    # [E]
        # A counting sort gives each route its rank among the routes of its expert, in the order of the tokens.
        order = expert.argsort(stable=True)                                # [N*A] routes grouped by expert
        first = count.cumsum(0) - count                                    # [E] where each group starts in that order
        rank = torch.empty_like(expert).index_copy_(0, order, route - first[expert[order]])        # [N*A]

        capacity = N if capacity_factor is None else math.ceil(min(capacity_factor * A / E, 1) * N)
        # Units of 16 rows, since a CPU builds a kernel for each new number of rows (oneDNN), and since a GPU sums the weights'
        # gradients over rows in pieces of 16 bytes. But one token must not become 16.
        begin, rows, layout = lay_out(count.clamp(max=capacity), capacity, N * A, min(16, N), x.device.type == "cpu")
        fits = rank < capacity                                             # [N*A]
        row = torch.where(fits, begin[expert] + rank, rows)                # [N*A] the row of each route; `rows` for the dropped
        owner = torch.zeros(rows + 1, dtype=torch.int64, device=x.device).index_copy_(0, row, route)[:rows]    # idle rows say 0
        # The weights go in before the down projection, where rows are narrow. An idle row weighs nothing.
        row_weight = x.new_zeros(rows + 1).index_copy(0, row, weights.flatten().to(x.dtype))[:rows]            # [rows]
        # A dropped route reads row 0, always somebody's, and counts it 0 times: grouped_mm leaves the rows past the last
        # expert's unwritten, and 0 * NaN is NaN.
        kept = fits.view(N, A).to(x.dtype)                                 # [N, A] 1 or 0
        maps = owner // A, row.where(fits, 0).view(N, A), kept             # token of each row [rows], row of each route [N, A]
        y = self.multiply(ToRows.apply(x, *maps), row_weight.unsqueeze(1), layout)                 # [rows, D]
        return FromRows.apply(y, *maps), 1 - kept.float().mean()

    def multiply(self, buffer: Tensor, row_weight: Tensor, layout: Tensor | tuple) -> Tensor:
        """Each row through its expert, times its weight: [rows, D], [rows, 1], layout from lay_out -> [rows, D]."""
        gate_up, down = self.gate_up_proj.to(buffer.dtype), self.down_proj.to(buffer.dtype)
        if isinstance(layout, Tensor):                  # a GPU
            h = F.grouped_mm(buffer, gate_up, offs=layout)                 # [rows, 2F]
            return F.grouped_mm(self.swiglu(*h.chunk(2, dim=-1)) * row_weight, down, offs=layout)
        groups, sizes = layout
        # unbind and stack: an index would have a gradient as large as all experts, once for each group.
        gate_up, down, y = gate_up.unbind(), down.unbind(), []
        for group, x, weight in zip(groups, buffer.split(sizes), row_weight.split(sizes)):
            x = x.view(len(group), -1, x.shape[1])                         # [group, height, D]
            h = torch.bmm(x, torch.stack([gate_up[e] for e in group]))     # [group, height, 2F]
            h = self.swiglu(*h.chunk(2, dim=-1)) * weight.view(len(group), -1, 1)                  # [group, height, F]
            y.append(torch.bmm(h, torch.stack([down[e] for e in group])).flatten(0, 1))
        return torch.cat(y)


class MoE(nn.Module):
    """shared(x) + the weighted sum of the A routed experts the router picks for each token."""

    def __init__(self, config: Config):
        super().__init__()
        self.router = Router(config)
        self.register_buffer("expert_bias", torch.zeros(config.n_routed))   # moved by train.py after each step, no gradient
        self.experts = Experts(config)
        self.shared_expert = MLP(config.d_model, config.shared_width) if config.shared_expert else None

    def forward(self, x: Tensor, capacity_factor: float | None) -> tuple[Tensor, Routing]:         # [B, T, D]
        flat = x.flatten(0, 1)                                             # [N, D]
        weights, experts, routing = self.router(flat, self.expert_bias)
        flat = flat.to(compute_dtype(flat))     # once, for both; training INT4 in BF16, it is BF16 numbers that INT8 rounds
        y, dropped = self.experts(flat, weights, experts, capacity_factor)  # [N, D]
        if self.shared_expert is not None:
            y = y + self.shared_expert(flat)
        return y.view_as(x), routing._replace(dropped=dropped)

# ----------------------------------------------------------------------------------------------------------------------
# Block and model


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x W^T against targets, without ever holding the [N, V] logits.

    At the end of the network N*V logits outweigh everything else (16k tokens of a 128k vocabulary: 8 GB in FP32, several
    times over in backward). But d loss / d logits = softmax - onehot is known as soon as a row's logits are, so each chunk of
    rows turns into its loss *and* its gradients and is forgotten, while it is still in the cache. On two CPU cores
    (`python bench.py`, N = V = 4096) that takes 94 ms, F.cross_entropy on all logits 91 ms, F.linear_cross_entropy 204 ms.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, want_grad: bool, chunk: int = 512) -> Tensor:
        """x [N, D], weight [V, D], targets [N] (-100: no loss here) -> scalar, nats."""
        w = weight.to(x.dtype)
        count = (targets != -100).sum().clamp(min=1)
        loss = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if want_grad else None
        grad_w = torch.zeros_like(weight) if want_grad else None
        for start in range(0, len(x), chunk):
            part = x[start:start + chunk]                                  # [chunk, D]
            wanted = (targets[start:start + chunk] != -100).unsqueeze(1)   # [chunk, 1]
            target = targets[start:start + chunk].clamp(min=0).unsqueeze(1)
            p = F.softmax(part @ w.T, -1, dtype=torch.float32)             # [chunk, V]
            # Not log_softmax, which needs exp() again for the gradient. A probability below 1e-38 counts as 87.5 nats; its
            # gradient stays exact.
            loss -= (p.gather(1, target).clamp(min=1e-38).log() * wanted).sum()
            if want_grad:
                grad = p.scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32))
                grad = grad.to(x.dtype)                                    # [chunk, V] softmax - onehot
                grad_x[start:start + chunk] = (grad @ w) * wanted          # masked where it is narrow: D, not V
                grad_w += grad.T @ (part * wanted)
        ctx.save_for_backward(grad_x, grad_w, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_w, count = ctx.saved_tensors
        return grad_x * (grad / count), grad_w * (grad / count), None, None, None


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = MLP(config.d_model, config.d_ff) if config.dense else MoE(config)

    def forward(self, x: Tensor, rotations: Tensor, cache: KVCache | None, capacity_factor: float | None):
        x = x + self.self_attn(self.input_layernorm(x), rotations, cache)  # [B, T, D]
        h = self.post_attention_layernorm(x)
        if isinstance(self.feed_forward, MLP):
            return x + self.feed_forward(h), None
        y, routing = self.feed_forward(h, capacity_factor)
        return x + y, routing


class MobileMoE(nn.Module):
    """model(tokens [B, T]) -> logits [B, T, V]; model(tokens, targets) -> (mean cross-entropy in nats, Routing)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = nn.Module()            # the released weights' names begin with "model."
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.model.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.model.norm = RMSNorm(config.d_model, config.norm_eps)
        self.init_weights()

    def init_weights(self):
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter)    # norms
            elif self.config.zero_init_outputs and name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.init_std)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, cache: KVCache | None = None,
                capacity_factor: float | None = None):
        """targets [B, T] with -100 where no loss is wanted; capacity_factor None is dropless (see Experts)."""
        seen = cache.length if cache is not None else 0
        positions = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)
        rotations = rope_rotations(self.config, positions)                 # [T, d_head/2]
        embedding = self.model.embed_tokens.weight                         # [V, D], read once: input and output share it
        x = F.embedding(tokens, embedding)                                 # [B, T, D]
        routings = []
        for block in self.model.layers:
            x, routing = block(x, rotations, cache, capacity_factor)
            routings.append(routing)
        if cache is not None:
            cache.length += tokens.shape[1]
        x = self.model.norm(x)
        if targets is None:
            return F.linear(x, embedding).float()                          # [B, T, V]
        x = x.flatten(0, 1).to(compute_dtype(x))                           # [N, D]
        loss = LinearCrossEntropy.apply(x, embedding, targets.flatten(), torch.is_grad_enabled())
        if self.config.dense:
            return loss, None
        load, z_loss, balance_loss, dropped = (torch.stack(field) for field in zip(*routings))
        return loss, Routing(load, z_loss.mean(), balance_loss.mean(), dropped.mean())

    @torch.no_grad()
    def update_expert_bias(self, load: Tensor, rate: float):
        """Loss-free balancing (paper, section 3): a fixed step up for experts below the mean load, down for those above.

        load [layers, E] must be summed over the *global* batch (all accumulation steps and all ranks): two ranks that see
        different loads would move the same bias differently and no longer hold the same model.
        """
        for block, layer_load in zip(self.model.layers, load):
            block.feed_forward.expert_bias += rate * (layer_load.mean() - layer_load).sign()

# ----------------------------------------------------------------------------------------------------------------------
# What a model is worth, and what it says


@torch.no_grad()
def bits_per_byte(model: MobileMoE, ids, text_bytes: int, context: int, batch: int = 16) -> float:
    """Bits the model needs per byte of the text that `ids` [n] (any integer array) encodes, read in windows of `context`.

    Loss per token depends on the tokenizer; bits per byte does not, and a general compressor's figure stands beside it.
    """
    device = next(model.parameters()).device
    ids = torch.as_tensor(ids, dtype=torch.int64)
    starts = range(0, len(ids) - 1, context)        # windows overlap by one token: each is a target exactly once
    nats = 0.0
    for first in range(0, len(starts), batch):
        windows = [ids[start:start + context + 1] for start in starts[first:first + batch]]
        rows = nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=-100).to(device)
        targets = rows[:, 1:]                                              # [B, T]
        loss, _ = model(rows[:, :-1].clamp(min=0), targets)
        nats += loss.item() * (targets != -100).sum().item()
    return nats / math.log(2) / text_bytes


@torch.no_grad()
def generate(model: MobileMoE, prompt: list[int], max_new_tokens: int, *, temperature: float = 0.8, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, stop: tuple[int, ...] = (),
             on_token: Callable[[int], None] | None = None) -> list[int]:
    """Continue `prompt` (at least one token id) by up to `max_new_tokens`; ends before a token in `stop`.

    temperature 0 is greedy. top_k = 0 and top_p = 1 keep the whole distribution. `on_token` is called with each new id as
    soon as it is known. Raises UserError for an empty prompt.
    """
    if not prompt:
        raise UserError("cannot continue an empty prompt: give at least one token")
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(model.config, 1, len(prompt) + max_new_tokens, device)
    tokens, new = torch.tensor([prompt], device=device), []
    for _ in range(max_new_tokens):
        logits = model(tokens, cache=cache)[0, -1].cpu()                   # [V]; prefill first, then one token at a time
        if temperature == 0:
            token = int(logits.argmax())
        else:
            probs, ids = (logits / temperature).softmax(-1).sort(descending=True)
            keep = probs.cumsum(-1) - probs < top_p     # mass *before* a token: the one that crosses top_p stays in
            keep[0] = True                                  # even for top_p = 0
            if top_k:
                keep[top_k:] = False
            token = int(ids[torch.multinomial(probs * keep, 1, generator=generator)])
        if token in stop:
            break
        new.append(token)
        if on_token:
            on_token(token)
        tokens = torch.tensor([[token]], device=device)
    return new

# ----------------------------------------------------------------------------------------------------------------------
# Plumbing that every script shares: errors, files, tokenizer, chat format


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main: what a user can cure becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:        # a full disk, a read-only folder: the system's words and the file's name
        print(f"error: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Yield a binary file that becomes `path` only when all of it is on the disk; on any failure nothing is left behind.

    Renaming within a folder is atomic, but only fsync makes the *content* arrive before the name does.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")         # not mkstemp: others may read what it names
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save turns a full disk into a RuntimeError about its zip file; what the system said is the error's context.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint that train.py wrote. Nothing is unpickled but tensors, numbers and strings (weights_only).

    Raises UserError if the file is missing, empty, truncated or not a MobileMoE checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: `python train.py` makes one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:               # torch raises half a dozen kinds, depending on where in the file the damage is
        raise UserError(f"{path} is not a readable checkpoint (empty, truncated or foreign)") from None
    needed = {"config", "stage", "quantized", "model", "tokenizer"}
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != "mobilemoe/1" or not needed <= checkpoint.keys():
        raise UserError(f"{path} is not a MobileMoE checkpoint: train.py writes those")
    return checkpoint


def config_from_dict(values: dict) -> Config:
    """Config from a checkpoint or a JSON file; raises UserError for unknown, missing or impossible fields."""
    known = {field.name for field in fields(Config)}
    if unknown := set(values) - known:
        raise UserError(f"unknown config field {min(unknown)!r}; known are {', '.join(sorted(known))}")
    try:
        return Config(**values)
    except TypeError as error:      # a required field is missing
        raise UserError(f"incomplete config: {str(error).removeprefix('Config.__init__() ')}") from None


def model_from_checkpoint(checkpoint: dict) -> MobileMoE:
    """The model in FP32 with a checkpoint's weights, in evaluation mode."""
    model = MobileMoE(config_from_dict(checkpoint["config"]))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:       # a heading, then a line for each kind of trouble: the first says enough
        raise UserError(f"the checkpoint's weights do not fit its config: {str(error).splitlines()[1].strip()}") from None
    return model.eval()


def tokenizer_from_dict(entry: dict):
    """The tiktoken.Encoding a checkpoint carries; `ranks` is the text of a tiktoken file: base64, space, rank."""
    import tiktoken
    pairs = (line.split() for line in entry["ranks"].splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return tiktoken.Encoding(name=entry["name"], pat_str=entry["pattern"], mergeable_ranks=ranks,
                             special_tokens=entry["special_tokens"])


def encode_chat(encoding, messages: list[dict], reply: bool) -> list[int]:
    """Llama-3's chat format as token ids; `reply` ends with the header that invites the assistant to answer.

    Header tokens are placed by id and the text is encoded as ordinary text, so a user who types "<|eot_id|>" has typed ten
    characters and ended nothing.
    """
    def header(role):
        special = encoding.encode_single_token
        return [special("<|start_header_id|>"), *encoding.encode_ordinary(role), special("<|end_header_id|>"),
                *encoding.encode_ordinary("\n\n")]
    ids = [encoding.encode_single_token("<|begin_of_text|>")]
    for message in messages:
        ids += header(message["role"]) + encoding.encode_ordinary(message["content"].strip())
        ids.append(encoding.encode_single_token("<|eot_id|>"))
    return ids + header("assistant") if reply else ids


def stop_tokens(encoding, vocab_size: int) -> tuple[int, ...]:
    """What ends an answer or a document, and the ids without a token: a vocabulary may have more room than tokens."""
    names = ("<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>")
    return (*map(encoding.encode_single_token, names), *range(encoding.n_vocab, vocab_size))


def main():
    parser = argparse.ArgumentParser(description="Talk to a checkpoint.")
    parser.add_argument("checkpoint", help="a .pt file that train.py wrote")
    parser.add_argument("prompt", help="a question for an instruction-tuned checkpoint, a beginning for any other")
    parser.add_argument("--tokens", type=int, default=128, help="at most this many new tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest only; 0 is all (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample from this much probability mass (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.temperature >= 0 and 0 <= args.top_p <= 1 and args.top_k >= 0 and args.tokens >= 0):
        raise UserError("--temperature, --top-k and --tokens cannot be negative, and --top-p lies between 0 and 1")

    checkpoint = load_checkpoint(args.checkpoint)
    model, encoding = model_from_checkpoint(checkpoint), tokenizer_from_dict(checkpoint["tokenizer"])
    if checkpoint["stage"] in ("sft", "qat"):
        prompt = encode_chat(encoding, [{"role": "user", "content": args.prompt}], reply=True)
    else:
        prompt = [encoding.encode_single_token("<|begin_of_text|>"), *encoding.encode_ordinary(args.prompt)]
        print(args.prompt, end="")

    def show(token: int):           # raw bytes: a token may end in the middle of a character
        sys.stdout.buffer.write(encoding.decode_single_token_bytes(token))
        sys.stdout.buffer.flush()
    sys.stdout.flush()
    generate(model, prompt, args.tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
             stop=stop_tokens(encoding, model.config.vocab_size), on_token=show)
    print()


if __name__ == "__main__":
    run_main(main)
