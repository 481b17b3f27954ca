"""Four functions of PyTorch, written again to be faster: same result, same gradients, nothing else.

    rms_norm               equals F.rms_norm
    causal_attention       equals F.scaled_dot_product_attention with a causal mask
    through_experts        equals mobilemoe.loop_over_experts, the definition of the expert layer
    linear_cross_entropy   equals F.cross_entropy of x W^T

Read mobilemoe.py first, which says what is computed. This file says only how, and each function why it
exists, with the figure that decided it (`python -m lab.bench`, two CPU cores). What it is not: anything one
must know to understand the model. Nothing to run; tests/test_model.py holds each function against the PyTorch
it replaces.

The idea that three of them share: PyTorch derives a gradient operation by operation, and each one writes a
tensor as large as its input to memory. Where the gradient has a short formula, one pass over the data does.

Shapes: the alphabet of mobilemoe.py, and S tokens attended to, R = H/K query heads of a key/value head,
`rows` of a buffer.
"""
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def matmul_dtype(device: torch.device) -> torch.dtype:
    """BF16 where the hardware multiplies it faster than FP32: AMX, AVX512-BF16, CUDA from compute capability
    8.0 (Ampere). FP32 elsewhere: an older GPU only imitates BF16."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32

# ----------------------------------------------------------------------------------------------------------
# RMS norm


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)       # [..., 1] 1 / rms(x)
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        # What points along x is taken out, the rest is scaled: (grad - x mean(grad x) / rms^2) / rms.
        x, scale = ctx.saved_tensors
        along = (grad * x).mean(-1, keepdim=True) * scale.square()         # [..., 1]
        return torch.addcmul(grad, x, along, value=-1).mul_(scale), None


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, [..., D] -> [..., D]: equals F.rms_norm(x, x.shape[-1:], eps=eps).

    PyTorch's way back on a CPU writes a dozen tensors of x's size, this one three: there and back takes
    2.4 ms, not 3.5 (`python -m lab.bench` with AMX).
    """
    return RMSNormFunction.apply(x, eps)

# ----------------------------------------------------------------------------------------------------------
# Attention

BLOCK = 64              # queries at a time


class BlockAttention(torch.autograd.Function):
    """Causal attention by plain matmuls, BLOCK queries at a time: little of what the mask hides is computed.

    q [B*K, T*R, d_head] (scaled), k, v [B*K, S, d_head] -> [B*K, T*R, d_head]. The R heads that share keys
    stand as if they were one head with R queries per token.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, R: int) -> Tensor:
        before = k.shape[1] - q.shape[1] // R                              # S - T: tokens before the queries
        hidden = q.new_full((BLOCK, BLOCK), -torch.inf).triu(1).repeat_interleave(R, 0)    # [BLOCK*R, BLOCK]
        y = torch.empty_like(q)
        probs = []
        for start in range(0, q.shape[1], BLOCK * R):
            rows = slice(start, start + BLOCK * R)
            block = q[:, rows]                                             # [B*K, n*R, d_head], n <= BLOCK
            n = block.shape[1] // R
            last = before + start // R + n                                 # keys the last query may see
            scores = block @ k[:, :last].mT                                # [B*K, n*R, last]
            scores[:, :, -n:] += hidden[:n * R, :n]
            p = scores.softmax(-1)
            y[:, rows] = p @ v[:, :last]
            if any(ctx.needs_input_grad):
                probs.append(p)
        ctx.save_for_backward(q, k, v, y, *probs)
        ctx.rows = BLOCK * R
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):                                       # [B*K, T*R, d_head]
        q, k, v, y, *probs = ctx.saved_tensors
        # The softmax's derivative needs the sum over keys of p * grad_p. That is y * grad_y, and much
        # cheaper.
        mean_grad = (grad * y).sum(-1, keepdim=True)                       # [B*K, T*R, 1]
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros_like(k)
        grad_v = torch.zeros_like(v)
        for i, p in enumerate(probs):                                      # [B*K, n*R, last]
            rows = slice(ctx.rows * i, ctx.rows * (i + 1))
            last = p.shape[2]
            grad_p = grad[:, rows] @ v[:, :last].mT                        # [B*K, n*R, last]
            grad_scores = grad_p.sub_(mean_grad[:, rows]).mul_(p)
            grad_q[:, rows] = grad_scores @ k[:, :last]
            grad_k[:, :last] += grad_scores.mT @ q[:, rows]
            grad_v[:, :last] += p.mT @ grad[:, rows]
        return grad_q, grad_k, grad_v, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, T, d_head], k, v [B, K, S, d_head] -> [B, H, T, d_head]; the T queries are the last of S
    tokens.

    Equals F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) where T = S. A GPU has a
    kernel that never writes the scores to memory. The CPU's is slow, above all going back: 58 ms there and
    back, this one 25 (`python -m lab.bench` on Zen 4; 24 each with AMX). The price: scores, and sums over
    blocks, have q's precision.
    """
    (B, H, T, d_head), (K, S) = q.shape, k.shape[1:3]
    if q.device.type != "cpu":
        # is_causal would align the mask to the first keys, as if nothing had been seen before.
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        # FlashAttention lets heads share keys, but takes neither FP32 nor a mask. The kernel that takes them
        # wants keys for every head. Without them PyTorch would write all scores to memory after all: for a
        # row of S at its longest context, 12 * 8192^2 of 4 bytes are 3.2 GB.
        if q.dtype == torch.float32 or mask is not None:
            k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))        # [B, H, S, d_head]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S > 1, enable_gqa=k.shape[1] < H)
    q = (q * d_head ** -0.5).unflatten(1, (K, H // K)).transpose(2, 3)     # [B, K, T, R, d_head]
    flat = (x.reshape(B * K, -1, d_head) for x in (q, k, v))
    y = BlockAttention.apply(*flat, H // K)                                # [B*K, T*R, d_head]
    return y.view(B, K, T, H // K, d_head).transpose(2, 3).flatten(1, 2)

# ----------------------------------------------------------------------------------------------------------
# Experts


def place(experts: Tensor, capacity: int, E: int, grouped: bool) -> tuple[tuple, Tensor, Tensor | list]:
    """Give each route (a token's wish for one expert) of experts [N, A] a row in a buffer sorted by expert.

    An expert takes `capacity` routes and drops the rest. -> (token, row, kept), slot, layout:
      token   [rows] the token in each row; idle rows say 0
      row     [N, A] the row of each route; 0 for a dropped one
      kept    [N, A] False for a route that found its expert full, else True
      slot    [N*A] the row of each route once more, but one past the last for a dropped one
      layout  `grouped`: [E] where each expert's rows end; else the groups of group_by_load
    """
    N, A = experts.shape
    expert = experts.flatten()                                             # [N*A] of each route
    route = torch.arange(N * A, device=experts.device)                     # [N*A]
    count = expert.new_zeros(E).scatter_add_(0, expert, torch.ones_like(expert))           # [E]
    # A counting sort ranks each route among the routes of its expert, in the order of the tokens.
    order = expert.argsort(stable=True)                                    # [N*A] routes grouped by expert
    first = count.cumsum(0) - count                                        # [E] where each group starts
    rank = torch.empty_like(expert).index_copy_(0, order, route - first[expert[order]])            # [N*A]
    # Whole units of 16 rows, since a CPU builds a kernel for each new number of rows (oneDNN), and since a
    # GPU sums the weights' gradients over rows in pieces of 16 bytes. But one token must not become 16.
    unit = min(16, N)
    held = count.clamp(max=capacity)                                       # [E]
    if grouped:             # the host must not wait for the counts: as many rows as there can ever be
        height = (held + unit - 1) // unit * unit                          # [E]
        rows = min(N * A + E * (unit - 1), E * math.ceil(capacity / unit) * unit)
        layout = height.cumsum(0).int()                                    # [E]
        begin = layout - height                                            # [E]
    else:
        begin, layout, rows = group_by_load(held.tolist(), unit)
        begin = begin.to(experts.device)                                   # [E]
    fits = rank < capacity                                                 # [N*A]
    slot = torch.where(fits, begin[expert] + rank, rows)                   # [N*A]
    owner = expert.new_zeros(rows + 1).index_copy_(0, slot, route)[:rows]  # [rows] its route
    # A dropped route reads row 0, always somebody's, and counts it 0 times: grouped_mm leaves the rows past
    # the last expert's unwritten, and 0 * NaN is NaN.
    return (owner // A, slot.where(fits, 0).view(N, A), fits.view(N, A)), slot, layout


def group_by_load(count: list[int], unit: int) -> tuple[Tensor, list[tuple[list[int], int]], int]:
    """-> the first row of each expert [E], (experts, rows) of each group of up to six, the number of all
    rows.

    In a group all experts get as many rows as the fullest, so one bmm multiplies them. One bmm for all 60,
    each as high as the capacity, would spend a third of its time on idle rows. An expert without routes gets
    no rows: a single token wants 4 of 60.
    """
    by_load = sorted((e for e, n in enumerate(count) if n), key=count.__getitem__, reverse=True)
    begin = [0] * len(count)
    groups = []
    rows = 0
    for start in range(0, len(by_load), 6):
        group = by_load[start:start + 6]
        height = math.ceil(count[group[0]] / unit) * unit
        for number, e in enumerate(group):
            begin[e] = rows + number * height
        groups.append((group, len(group) * height))
        rows += len(group) * height
    return torch.tensor(begin), groups, rows


class Carry(torch.autograd.Function):
    """x [N, D] -> [rows, D]: each row gets its token. `back`, [rows, D] -> [N, D]: each token gets the sum of
    its rows, and no row is copied for that.

    A row belongs to one route, so each way is the gradient of the other; PyTorch would scatter into zeros.
    Idle rows hold token 0, weigh nothing and change nothing.
    """

    @staticmethod
    def forward(ctx, x: Tensor, back: bool, token: Tensor, row: Tensor, kept: Tensor) -> Tensor:
        ctx.back = back
        ctx.save_for_backward(token, row, kept)
        if back:
            return F.embedding_bag(row, x, mode="sum", per_sample_weights=kept.to(x.dtype))
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return Carry.apply(grad, not ctx.back, *ctx.saved_tensors), None, None, None, None


def through_experts(formula: Callable, x: Tensor, weights: Tensor, experts: Tensor, capacity: int,
                    gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """x [N, D], weights and experts [N, A], gate_up_proj [E, D, 2F], down_proj [E, F, D] -> [N, D].

    Equals mobilemoe.loop_over_experts. A loop launches E small matmuls and mostly waits for them to start:
    a training step takes twice as long. `formula(matmul, rows, weight, gate_up, down)` is the computation of
    some experts' rows, written for any matmul that multiplies each expert's rows by that expert's matrix.
    """
    # A GPU has a kernel for this, in BF16 alone. FP32 there, as on a CPU, takes what follows it.
    grouped = x.device.type != "cpu" and x.dtype == torch.bfloat16
    maps, slot, layout = place(experts, capacity, len(gate_up_proj), grouped)
    buffer = Carry.apply(x, False, *maps)                                  # [rows, D]
    weight = x.new_zeros(len(buffer) + 1)                                  # an idle row weighs nothing
    weight = weight.index_copy(0, slot, weights.flatten().to(x.dtype))[:-1, None]                  # [rows, 1]
    gate_up = gate_up_proj.to(x.dtype)
    down = down_proj.to(x.dtype)
    if grouped:
        y = formula(functools.partial(F.grouped_mm, offs=layout), buffer, weight, gate_up, down)
        return Carry.apply(y, True, *maps)                                 # [rows, D] -> [N, D]
    # unbind and stack: an index would have a gradient as large as all experts, once for each group.
    gate_ups = gate_up.unbind()
    downs = down.unbind()
    sizes = [size for _, size in layout]
    y = []
    for (group, _), rows, row_weight in zip(layout, buffer.split(sizes), weight.split(sizes)):
        shape = (len(group), -1)                                           # [group, height, ...]
        out = formula(torch.bmm, rows.unflatten(0, shape), row_weight.unflatten(0, shape),
                      torch.stack([gate_ups[e] for e in group]), torch.stack([downs[e] for e in group]))
        y.append(out.flatten(0, 1))
    return Carry.apply(torch.cat(y), True, *maps)                          # [rows, D] -> [N, D]

# ----------------------------------------------------------------------------------------------------------
# Loss

CHUNK = 512             # rows of logits in memory at a time


class LinearCrossEntropy(torch.autograd.Function):
    """d loss / d logits = softmax - onehot is known as soon as a row's logits are. So each chunk of rows
    becomes its loss *and* its gradients and is forgotten, while it is still in the processor's cache."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        w = weight.to(x.dtype)
        count = (targets != -100).sum().clamp(min=1)
        loss = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x)                                       # [N, D]
        grad_w = torch.zeros_like(weight) if any(ctx.needs_input_grad) else None           # [V, D]
        for rows, target, grad_rows in zip(x.split(CHUNK), targets.split(CHUNK), grad_x.split(CHUNK)):
            wanted = (target != -100).unsqueeze(1)                         # [chunk, 1]
            target = target.clamp(min=0).unsqueeze(1)
            p = F.softmax(rows @ w.T, -1, dtype=torch.float32)             # [chunk, V]
            # Not log_softmax, which needs exp() again for the gradient. A probability below 1e-38 counts as
            # 87.5 nats; its gradient stays exact.
            loss -= (p.gather(1, target).clamp(min=1e-38).log() * wanted).sum()
            if any(ctx.needs_input_grad):
                p.scatter_add_(1, target, -torch.ones_like(target, dtype=p.dtype))
                grad = p.to(x.dtype)                                       # [chunk, V]
                grad_rows.copy_((grad @ w) * wanted)                       # masked where it is narrow
                grad_w += grad.T @ (rows * wanted)
        ctx.save_for_backward(grad_x, grad_w, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_w, count = ctx.saved_tensors
        return grad_x * (grad / count), grad_w * (grad / count), None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of F.cross_entropy(x W^T, targets) over the targets that are not -100, in nats.

    x [N, D], weight [V, D], targets [N] -> scalar. At the end of the network N*V logits outweigh everything
    else: 8 GB in FP32 for 16k tokens of a 128k vocabulary, several times over going back. Here they never
    exist all at once, and there and back takes 56 ms, not 75 (`python -m lab.bench` with AMX).
    """
    return LinearCrossEntropy.apply(x, weight if torch.is_grad_enabled() else weight.detach(), targets)
