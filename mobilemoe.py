"""MobileMoE: the model, as the paper states it.

A decoder-only transformer in which every layer is attention followed by a fine-grained mixture of experts,
after "MobileMoE: Scaling On-Device Mixture of Experts" (arXiv 2605.27358). A phone holds the whole model in
memory but reads only the *active* part of it for each token. Decoding speed is bytes read per token, so a
mixture answers with the quality of a larger model at the speed of a small one.

An expert is a small feed-forward network. Each layer has E of them; a router picks A for each token, and the
layer adds up their outputs, weighted, beside that of one shared expert that every token uses.

Top to bottom: the config and what it costs, norm and rotation, attention, router, the expert layer as a loop
(its definition) and for all experts at once, block, model, generation.

What it is not: it knows nothing of quantisation (quantize.py attaches that from outside), of text (data.py)
or of training (train.py). kernels.py has three functions of PyTorch, written again to be faster, and
through_experts, which computes what loop_over_experts below defines. Run this file to talk to a checkpoint:

    python mobilemoe.py runs/tiny/sft.pt "What does textwrap.dedent do?"    (no question: a chat)

Shapes use one alphabet everywhere:
    B batch   T tokens   N = B*T tokens laid flat   D d_model   V vocabulary   H query heads
    K key/value heads   E routed experts   A active ones per token (top-k)   F width of one routed expert
"""
import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (Parser, UserError, encode_chat, encode_prompt, load_checkpoint, number, run_main,
                    stop_tokens, tokenizer_from_dict)
from kernels import causal_attention, linear_cross_entropy, rms_norm, through_experts

# ----------------------------------------------------------------------------------------------------------
# Config: what the paper varies, and what each choice costs


@dataclasses.dataclass(frozen=True)
class Config:
    """One architecture, in the paper's terms (section 3).

    The expert axes start from a dense feed-forward of width `d_ff`:
      n_experts         expansion, the paper's E: together the experts hold that many times the dense weights
      granularity       the paper's g: each is cut into g thin ones of width d_ff/g, and g are active. A token
                        picks a *combination* of thin experts, and there are far more combinations.
      shared_expert     half of the g active ones become one expert that every token uses. It learns what all
                        tokens need, so the routed ones need not each learn it again.
    Neither g nor the shared expert changes the active or the total size. E = g = 1 without a shared expert is
    a dense model.
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
    top_k: int = 0                  # routed experts per token; 0: g of them, or g/2 beside a shared expert
    vocab_size: int = 128_256
    max_context: int = 2048         # longest context trained so far; no weight depends on it
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: bool = False      # the released checkpoints' llama3 scaling; models trained here need none
    routed_scale: float = 2.5       # routed weights sum to this, the shared expert counts 1
    z_loss: float = 1e-4            # keeps router logits small (ST-MoE), or FP32 sigmoids saturate in time
    balance_loss: float = 0.0       # the classic Switch loss; off, as expert_bias balances without a gradient
    init_std: float = 0.02
    zero_init_outputs: bool = False  # start every block as the identity

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
    def n_routed(self) -> int:              # E of the shapes: 8 * 8 - 4 = 60 for S, M and L
        return self.n_experts * self.granularity - (self.granularity // 2 if self.shared_expert else 0)

    @property
    def active_routed(self) -> int:         # A of the shapes
        return self.top_k or (self.granularity // 2 if self.shared_expert else self.granularity)

    def int4_params(self, routed_experts: int) -> int:
        """Weights of matrices and embedding in a model whose layers have (or use) so many routed experts."""
        attention = 2 * self.d_model * self.d_head * (self.n_heads + self.n_kv_heads)
        feed_forward = 3 * self.d_model * (routed_experts * self.expert_width + self.shared_width)
        return self.vocab_size * self.d_model + self.n_layers * (attention + feed_forward)

    def fp32_params(self) -> int:
        """Norms, router and its bias, which are never quantised."""
        router = 0 if self.dense else (self.d_model + 1) * self.n_routed
        return self.d_model + self.n_layers * (2 * self.d_model + router)

    def total_params(self) -> int:
        """Everything the phone must hold. The embedding counts once: input and output share it."""
        return self.int4_params(self.n_routed) + self.fp32_params()

    def active_params(self) -> int:
        """What one token multiplies with. The output projection is the embedding, so that is active too."""
        return self.int4_params(self.active_routed) + self.fp32_params()

    def int4_bytes(self) -> int:
        """Half a byte and a 32nd of an FP16 scale for each INT4 weight, four bytes for the others."""
        return self.int4_params(self.n_routed) * 18 // 32 + 4 * self.fp32_params()

    def kv_bytes(self, tokens: int, bits: int = 8) -> int:
        """Bytes of keys and values for `tokens` of context (equation 5's second term)."""
        return 2 * tokens * self.n_layers * self.n_kv_heads * self.d_head * bits // 8


DENSE = dict(n_experts=1, granularity=1, shared_expert=False)
TINY = dict(d_model=192, n_layers=4, n_heads=3, n_kv_heads=1, d_ff=768, vocab_size=4096, max_context=256,
            zero_init_outputs=True)
PRESETS = {
    # The released models (table 1): 272M active of 1.26B, 528M of 2.82B, 922M of 5.33B.
    "S": Config(d_model=768, n_layers=20, n_heads=12, n_kv_heads=4, d_ff=3072),
    "M": Config(d_model=1024, n_layers=26, n_heads=16, n_kv_heads=4, d_ff=4096),
    "L": Config(d_model=1280, n_layers=32, n_heads=20, n_kv_heads=4, d_ff=5120),
    # The paper's dense opponent on the phone, 1.08B.
    "mobilellm-pro": Config(d_model=1280, n_layers=30, n_heads=20, n_kv_heads=4, d_ff=6144,
                            vocab_size=202_048, **DENSE),
    # What two CPU cores train in minutes: 3M active of 15M, 60 experts top-4 beside a shared one as in S, and
    # its dense twin of equal active size.
    "tiny": Config(**TINY, routed_scale=1.0),
    "tiny-dense": Config(**TINY, **DENSE),
    # For tests: every part is there, nothing takes time.
    "test": Config(d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_head=32, d_ff=256, n_experts=4,
                   granularity=4, vocab_size=512, max_context=64),
}

# ----------------------------------------------------------------------------------------------------------
# Norm and rotation. Matmuls run in the type of their input; norms, router and residual stream stay FP32


class Linear(nn.Linear):
    """x W^T without a bias. The optimizer's weight is FP32; it is multiplied in the type of x."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:             # [..., in] -> [..., out]
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:             # [..., D] -> [..., D]
        return rms_norm(x, self.eps) * self.weight


def rope_rotations(config: Config, positions: Tensor) -> Tensor:
    """How each pair of channels turns at each position: [T] -> complex numbers of length 1, [T, d_head/2]."""
    # Pair i turns by theta^(-2i/d_head) per token: the first tell neighbours apart, the last paragraphs.
    exponent = torch.arange(0, config.d_head, 2, device=positions.device, dtype=torch.float32) / config.d_head
    frequency = config.rope_theta ** -exponent           # [d_head/2], radians per token
    if config.rope_scaling:
        # As released: pairs that do not complete a turn within the 8192 tokens first trained on are slowed 16
        # times, the rest kept. (low_freq_factor = high_freq_factor makes the usual llama3 ramp a step.)
        wavelength = 2 * torch.pi / frequency
        frequency = torch.where(wavelength > 8192, frequency / 16, frequency)
    angle = positions.float()[:, None] * frequency       # [T, d_head/2]
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn *interleaved* pairs (x[0], x[1]), (x[2], x[3]), ...: [B, heads, T, d_head] -> the same, FP32.

    Half of all code pairs x[i] with x[i + d_head/2] instead. Both are rotary embeddings, but weights trained
    with one are noise under the other; export_mobile.py permutes rows to convert.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))        # [B, heads, T, d_head/2]
    return torch.view_as_real(pairs * rotations).flatten(-2)

# ----------------------------------------------------------------------------------------------------------
# Attention


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads, which divides the KV cache by H/K."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        self.q_proj = Linear(config.d_model, config.n_heads * config.d_head)
        self.k_proj = Linear(config.d_model, config.n_kv_heads * config.d_head)
        self.v_proj = Linear(config.d_model, config.n_kv_heads * config.d_head)
        self.o_proj = Linear(config.n_heads * config.d_head, config.d_model)

    def forward(self, x: Tensor, rotations: Tensor, cache: dict | None = None) -> Tensor:      # [B, T, D]
        c = self.config
        q = self.q_proj(x).unflatten(-1, (c.n_heads, c.d_head)).transpose(1, 2)            # [B, H, T, d_head]
        k = self.k_proj(x).unflatten(-1, (c.n_kv_heads, c.d_head)).transpose(1, 2)         # [B, K, T, d_head]
        v = self.v_proj(x).unflatten(-1, (c.n_kv_heads, c.d_head)).transpose(1, 2)         # [B, K, T, d_head]
        # A norm of q and k without weights bounds the attention logits, so nothing blows up in BF16. A
        # rotation keeps the norm: normalising before or after it is the same.
        q = rms_norm(rotate(q, rotations), c.norm_eps).to(x.dtype)
        k = rms_norm(rotate(k, rotations), c.norm_eps).to(x.dtype)
        if cache is not None:               # {layer: keys and values so far, each [B, K, seen, d_head]}
            if self.layer in cache:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[self.layer], (k, v)))
            cache[self.layer] = k, v
        y = causal_attention(q, k, v)                                      # [B, H, T, d_head]
        return self.o_proj(y.transpose(1, 2).flatten(2))                   # [B, T, D]

# ----------------------------------------------------------------------------------------------------------
# Router


class Routing(NamedTuple):
    """What the routers of one forward pass report to the trainer."""
    load: Tensor            # [layers, E] tokens sent to each expert, before any are dropped
    loss: Tensor            # z-loss and balance loss times their coefficients, mean over layers
    dropped: Tensor         # fraction of (token, expert) routes that found their expert full


class Router(nn.Module):
    """Which A of the E experts a token goes to, and with which weights; always in FP32.

    BF16 has 8 bits of mantissa: two experts whose scores differ by less than 0.4 % would tie, and training
    and phone would break the tie differently. The router holds 0.3 % of S's active weights; it is no place
    to save.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed, config.d_model))
        self.config = config

    def forward(self, x: Tensor, expert_bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [N, D], expert_bias [E] -> weights and experts [N, A], load [E], loss (see Routing)."""
        c = self.config
        logits = F.linear(x, self.weight)                                  # [N, E]
        # sigmoid, not softmax: an expert's score does not fall because another's rises.
        scores = logits.sigmoid()
        # The bias decides *who* is chosen, never *how much* they count. Inside the weights it would disturb
        # the output without a gradient to correct it; here it only moves tokens from full experts to empty
        # ones.
        experts = (scores.detach() + expert_bias).topk(c.active_routed).indices            # [N, A]
        weights = scores.gather(1, experts)                                # [N, A] without the bias
        weights = c.routed_scale * weights / (weights.sum(-1, keepdim=True) + 1e-20)
        route = experts.flatten()                                          # [N*A]
        load = torch.zeros_like(expert_bias).scatter_add_(0, route, torch.ones_like(route, dtype=x.dtype))
        loss = c.z_loss * logits.logsumexp(-1).square().mean()
        if c.balance_loss:                  # Switch's E * sum(f P): f the share of routes, P the mean score
            P = (scores / scores.sum(-1, keepdim=True)).mean(0)            # [E]
            loss = loss + c.balance_loss * c.n_routed * torch.dot(load / load.sum(), P)
        return weights, experts, load, loss

# ----------------------------------------------------------------------------------------------------------
# Experts


def loop_over_experts(self: "Experts", x: Tensor, weights: Tensor, experts: Tensor, capacity: int) -> Tensor:
    """The definition of the expert layer. x [N, D], weights [N, A], experts [N, A] -> [N, D]. The model does
    not call it: tests and lab/bench.py compare Experts.forward with it.

    Each expert takes the first `capacity` tokens of the batch that want it and drops the rest. Those lose
    this expert only: their other experts, with the same weights, and the residual stay.
    """
    y = torch.zeros_like(x)                                                # [N, D]
    for e, (gate_up, down) in enumerate(zip(self.gate_up_proj.unbind(), self.down_proj.unbind())):
        token, slot = torch.where(experts == e)                            # [n] who wants this expert
        token, slot = token[:capacity], slot[:capacity]
        gate, up = (x[token] @ gate_up.to(x.dtype)).chunk(2, dim=-1)       # [n, F] each
        out = self.swiglu(gate, up) @ down.to(x.dtype)                     # [n, D]
        y = y.index_add(0, token, out * weights[token, slot, None].to(x.dtype))
    return y


class SwiGLU(nn.Module):
    """silu(gate) * up. A module of its own, so that quantize.py can round what enters the down projection."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class Experts(nn.Module):
    """All routed experts of a layer as two stacks of matrices. Computes what loop_over_experts defines.

    The paper's two modes are one argument: drop-and-pad (pre- and mid-training) limits the capacity, so that
    one overloaded expert cannot hold up the rest; dropless (SFT, QAT, inference) has a capacity of N, which
    is enough, as a token picks an expert at most once.
    """
    def __init__(self, config: Config):
        super().__init__()
        E, D, width = config.n_routed, config.d_model, config.expert_width
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * width))     # gate, then up
        self.down_proj = nn.Parameter(torch.empty(E, width, D))
        self.swiglu = SwiGLU()

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, capacity: int) -> Tensor:
        # through_experts sorts tokens by expert into rows [..., D], calls this with a matmul that gives each
        # row its expert's matrix, and adds the results up for each token again. weight is [..., 1].
        def formula(matmul, rows, weight, gate_up, down):
            gate, up = matmul(rows, gate_up).chunk(2, dim=-1)              # [..., F] each
            # The routing weight multiplies F numbers, not the D of the output: the projection is linear.
            return matmul(self.swiglu(gate, up) * weight, down)            # [..., D]
        return through_experts(formula, x, weights, experts, capacity, self.gate_up_proj, self.down_proj)


class MLP(nn.Module):
    """A plain gated feed-forward: the shared expert, and the whole feed-forward of a dense model."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.gate_proj = Linear(d_model, width)
        self.up_proj = Linear(d_model, width)
        self.down_proj = Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:              # [..., D] -> [..., D]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """shared(x) + the weighted sum of the A routed experts that the router picks for each token."""

    def __init__(self, config: Config):
        super().__init__()
        self.router = Router(config)
        self.register_buffer("expert_bias", torch.zeros(config.n_routed))  # the trainer moves it
        self.experts = Experts(config)
        self.shared_expert = MLP(config.d_model, config.shared_width) if config.shared_expert else None

    def forward(self, x: Tensor, dtype: torch.dtype, capacity_factor: float | None) -> tuple[Tensor, Routing]:
        """x [B, T, D] FP32, for the router; experts get it in `dtype`. capacity_factor None is dropless."""
        flat = x.flatten(0, 1)                                             # [N, D]
        weights, experts, load, loss = self.router(flat, self.expert_bias)
        (N, A), E = experts.shape, len(load)
        # Factor 1 allows exactly the even load, N A / E tokens for each expert.
        capacity = N if capacity_factor is None else math.ceil(min(capacity_factor * A / E, 1) * N)
        flat = flat.to(dtype)
        y = self.experts(flat, weights, experts, capacity)                 # [N, D]
        if self.shared_expert is not None:
            y = y + self.shared_expert(flat)
        dropped = 1 - load.clamp(max=capacity).sum() / (N * A)
        return y.view_as(x), Routing(load, loss, dropped)

# ----------------------------------------------------------------------------------------------------------
# Block and model


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = MLP(config.d_model, config.d_ff) if config.dense else MoE(config)

    def forward(self, x: Tensor, rotations: Tensor, cache: dict | None, dtype: torch.dtype,
                capacity_factor: float | None) -> tuple[Tensor, Routing | None]:           # [B, T, D]
        x = x + self.self_attn(self.input_layernorm(x).to(dtype), rotations, cache)
        h = self.post_attention_layernorm(x)
        if isinstance(self.feed_forward, MLP):
            return x + self.feed_forward(h.to(dtype)), None
        y, routing = self.feed_forward(h, dtype, capacity_factor)
        return x + y, routing


class MobileMoE(nn.Module):
    """model(tokens [B, T]) -> logits [B, T, V]; model(tokens, targets) -> (loss in nats, Routing or None)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32      # of matmuls; train.py sets BF16 where hardware likes it
        self.model = nn.Module()                # the released weights' names begin with "model."
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.model.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.model.norm = RMSNorm(config.d_model, config.norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter)        # norms
            elif config.zero_init_outputs and ("o_proj" in name or "down_proj" in name):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=config.init_std)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, cache: dict | None = None,
                capacity_factor: float | None = None):
        """targets [B, T] with -100 where no loss is wanted; capacity_factor None is dropless (see MoE).

        `cache` is a dict, empty at first, in which the layers keep the keys and values of tokens seen so far.
        """
        seen = cache[0][0].shape[2] if cache else 0
        positions = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)
        rotations = rope_rotations(self.config, positions)                 # [T, d_head/2]
        embedding = self.model.embed_tokens.weight                         # [V, D] input and output share it
        x = F.embedding(tokens, embedding)                                 # [B, T, D]
        routings = []
        for block in self.model.layers:
            x, routing = block(x, rotations, cache, self.compute_dtype, capacity_factor)
            routings.append(routing)
        x = self.model.norm(x).to(self.compute_dtype)
        if targets is None:
            return F.linear(x, embedding.to(x.dtype)).float()              # [B, T, V]
        loss = linear_cross_entropy(x.flatten(0, 1), embedding, targets.flatten())
        if self.config.dense:
            return loss, None
        load, routing_loss, dropped = map(torch.stack, zip(*routings))
        return loss, Routing(load, routing_loss.mean(), dropped.mean())

    @torch.no_grad()
    def update_expert_bias(self, load: Tensor, rate: float):
        """Loss-free balancing (section 3): a fixed step up for experts below the mean load, down for the
        others.

        load [layers, E] must be summed over the *global* batch, all accumulation steps and all ranks: two
        ranks that see different loads would move the same bias differently and no longer hold one model.
        """
        for block, layer_load in zip(self.model.layers, load):
            block.feed_forward.expert_bias += rate * (layer_load.mean() - layer_load).sign()

# ----------------------------------------------------------------------------------------------------------
# What a model is worth, and what it says


@torch.no_grad()
def bits_per_byte(model: MobileMoE, ids, text_bytes: float, context: int) -> float:
    """Bits the model needs per byte of the text that `ids` [n] encodes, read in windows of `context` tokens.

    Loss per token depends on the tokenizer. Bits per byte does not, and a compressor's compares with it.
    """
    batch = min(16, max(1, 2**15 // context))       # windows at a time: as much as a part in training
    device = next(model.parameters()).device
    ids = torch.as_tensor(ids, dtype=torch.int64)
    starts = range(0, len(ids) - 1, context)        # windows overlap by one: each token is a target once
    nats = 0.0
    for first in range(0, len(starts), batch):
        windows = [ids[start:start + context + 1] for start in starts[first:first + batch]]
        rows = nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=-100).to(device)
        targets = rows[:, 1:]                                              # [B, T]
        loss, _ = model(rows[:, :-1].clamp(min=0), targets)
        nats += loss.item() * (targets != -100).sum().item()
    return nats / math.log(2) / text_bytes


@torch.no_grad()
def generate(model: MobileMoE, prompt: list[int], max_new_tokens: int, *, temperature: float = 0.7,
             seed: int = 0, stop: tuple[int, ...] = ()) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue `prompt` (at least one id); ends before one in `stop`.

    temperature 0 is greedy. Above, ids with less than a twentieth of the likeliest one's probability are
    never drawn (min-p): each is rare, but a vocabulary has thousands of them.
    """
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    cache = {}
    tokens = torch.tensor([prompt], device=device)                         # [1, T]
    for _ in range(max_new_tokens):
        logits = model(tokens, cache=cache)[0, -1].cpu()                   # [V] the prompt, then one by one
        if temperature < 1e-3:
            token = int(logits.argmax())
        else:
            probs = (logits / temperature).softmax(-1)
            probs[probs < probs.max() / 20] = 0
            token = int(torch.multinomial(probs, 1, generator=generator))
        if token in stop:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)                    # [1, 1]

# ----------------------------------------------------------------------------------------------------------
# From files and the command line


def config_from_dict(values: dict) -> Config:
    """Config from a checkpoint or a JSON file; raises UserError for unknown, missing or impossible fields."""
    def require(ok: bool, message: str):
        if not ok:
            raise UserError(f"impossible config: {message}")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    may_be_zero = ("top_k", "z_loss", "balance_loss", "shared_expert", "rope_scaling", "zero_init_outputs")
    require(isinstance(values, dict), "it is not a JSON object of fields")
    for name in values:
        require(name in fields, f"unknown field {name!r}; known are {', '.join(sorted(fields))}")
    for name, field in fields.items():
        value = values.get(name, field.default)
        require(value is not dataclasses.MISSING, f"{name} is missing")
        kinds = (int, float) if field.type is float else (field.type,)
        good = type(value) in kinds and (0 < value < math.inf or value == 0 and name in may_be_zero)
        require(good, f"{name} = {value!r} is not a sensible {field.type.__name__}")
    c = Config(**values)
    # INT4 groups are 32 weights along a matrix's input, so every input dimension must hold whole groups.
    for what, width, unit in (
            ("n_heads", c.n_heads, c.n_kv_heads), ("d_head", c.d_head, 2), ("d_ff", c.d_ff, c.granularity),
            ("granularity beside a shared expert", c.granularity, 2 if c.shared_expert else 1),
            ("d_model", c.d_model, 32), ("expert width d_ff/granularity", c.expert_width, 32),
            ("n_heads * d_head", c.n_heads * c.d_head, 32)):
        require(width % unit == 0, f"{what} = {width} is not a multiple of {unit}")
    require(c.active_routed <= c.n_routed, f"{c.active_routed} active experts of only {c.n_routed} routed")
    return c


def model_from_checkpoint(checkpoint: dict) -> MobileMoE:
    """The model in FP32 with a checkpoint's weights, in evaluation mode. Memory holds each weight once."""
    with torch.device("meta"):
        model = MobileMoE(config_from_dict(checkpoint["config"]))
    weights = {name: checkpoint["model"][name].to(torch.float32, copy=True) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def say(model: MobileMoE, encoding, prompt: list[int], args) -> str:
    """Print how the model goes on as it comes, and return it."""
    said = []
    for token in generate(model, prompt, args.tokens, temperature=args.temperature, seed=args.seed,
                          stop=(*args.eos, *stop_tokens(encoding, model.config.vocab_size))):
        # Raw bytes: a token may end in the middle of a character.
        sys.stdout.buffer.write(encoding.decode_single_token_bytes(token))
        sys.stdout.buffer.flush()
        said.append(token)
    print(flush=True)
    return encoding.decode(said)


def talk(model: MobileMoE, encoding, args) -> None:
    """A chat over several turns. What no longer fits into the context is forgotten, the oldest turn first."""
    print("An empty line or Ctrl-D ends the chat.", flush=True)
    messages = []
    while True:
        print("> ", end="", flush=True)
        if not (question := sys.stdin.readline().strip()):
            return
        messages.append({"role": "user", "content": question})
        while len(prompt := encode_chat(encoding, messages, reply=True)) > model.config.max_context - 64:
            if len(messages) == 1:
                break               # one long question is read all the same
            del messages[:2]
        messages.append({"role": "assistant", "content": say(model, encoding, prompt, args)})


def main():
    parser = Parser(description="Talk to a checkpoint.")
    parser.add_argument("checkpoint", help="a .pt file that train.py wrote, or a released model's folder")
    parser.add_argument("prompt", nargs="?", help="a question (sft, qat; without one, a chat over several "
                        "turns) or text to continue (earlier stages)")
    parser.add_argument("--tokens", type=number(int, 0), default=128, help="at most so many (%(default)s)")
    parser.add_argument("--temperature", type=number(float, 0), default=0.3, help="0 is greedy (%(default)s)")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.checkpoint)
    model = model_from_checkpoint(checkpoint)
    encoding = tokenizer_from_dict(checkpoint["tokenizer"])
    args.eos = checkpoint.get("eos", ())            # what else ends an answer of a released model
    chat = checkpoint["stage"] in ("sft", "qat")
    if args.prompt is None and not chat:
        raise UserError(f"{args.checkpoint} has not learned to chat: give it a text to continue")
    if args.prompt is None:
        return talk(model, encoding, args)
    print("" if chat else args.prompt, end="", flush=True)
    say(model, encoding, encode_prompt(encoding, args.prompt, chat), args)


if __name__ == "__main__":
    run_main(main)
