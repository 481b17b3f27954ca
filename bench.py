"""How fast it trains, against everything else one could have written.

    python bench.py                                 d 256, 6 layers, 60 experts top-4 + shared, 8 x 512 tokens
    python bench.py --preset S --batch 1 --device cuda

A training step is forward, loss, backward, clipping and optimizer, in BF16 where the hardware multiplies that faster than FP32.
Everybody gets the same weights, the same batches, a new one in every step, and the same fused AdamW; one row more shows this
model with the optimizers that train.py really uses. All are in memory at once: seven models with gradients and optimizers.

    drop-and-pad, dropless          this model in its two dispatch modes (mobilemoe.Experts)
    naive loop                      this model with the loop over experts that everybody writes first
    dense                           the dense model of equal active size: what the mixture's bookkeeping costs
    transformers                    its Glm4Moe with these weights, the best two of its experts' implementations
    QAT                             dropless with INT4 attached, as the last stage trains

The contenders take turns, one step each, and every ratio is the median over rounds of the ratio *within* a round: a computer
that grows warm or busy slows all of them alike. What it is not: a measure of quality, which is train.py's report.

Three things decide who looks fast. Routing must be as uneven as training has it: `python train.py` prints loads of 4.8:1 at
its start, 1.3:1 to 2.2:1 after fifty steps. So tokens are as frequent as those of text (Zipf's law as Mandelbrot corrected
it), embeddings are larger than train.py's at the start, as what a token is must outweigh what its batch has in common, and the
expert bias is moved first. Experts must get other numbers of tokens in every step: a CPU builds a kernel for each new number
(oneDNN), and those it has built must not be all that it needs. And memory must stay with the process, as in train.py: glibc's
default is to hand it back, and who writes larger buffers suffers more from that.
"""
import argparse
import copy
import dataclasses
import functools
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemoe import PRESETS, Config, Experts, LinearCrossEntropy, MobileMoE, Routing, UserError, attend, generate, run_main
from quantize import attach
from train import TINY, keep_memory, matmul_dtype, mixed_precision, optimizers, train_step

SHAPE = Config(d_model=256, n_layers=6, n_heads=4, n_kv_heads=2, d_ff=1024, vocab_size=4096, max_context=512)
CAPACITY = 1.5          # pre-training's, in the paper and in train.py
LEARNING_RATE = 1e-6    # so small that routing stays as it is
NEW_TOKENS = 32         # of one generate()
# Rows of the table, since two places must spell them alike.
PADDED, DROPLESS, LOOP, DENSE = "drop-and-pad", "dropless", "naive loop over experts", "dense, equal active size"
OWN, QAT = "drop-and-pad, train.py's optimizers", "dropless, QAT"
AIMS = {"drop-and-pad / transformers' best": ("at least", 2.0), "drop-and-pad / dense": ("at least", 0.65),
        "time of a QAT step / plain": ("at most", 1.4)}

# ----------------------------------------------------------------------------------------------------------------------
# Contenders: each has a loss(x, y) to be minimised


def our_loss(model: MobileMoE, capacity: float | None, x: Tensor, y: Tensor) -> Tensor:
    """What train.py minimises. x, y [B, T] -> scalar."""
    loss, routing = model(x, y, capacity_factor=capacity)
    return loss if routing is None else loss + model.config.z_loss * routing.z_loss


def loop_over_experts(self: Experts, x: Tensor, weights: Tensor, experts: Tensor, capacity_factor) -> tuple[Tensor, Tensor]:
    """Experts.forward as one would first write it: x [N, D], weights [N, A], experts [N, A] -> [N, D], nothing dropped."""
    y = torch.zeros_like(x)                                                # [N, D]
    # unbind, because indexing a stack E times costs E gradients as large as the whole stack in backward
    for e, (gate_up, down) in enumerate(zip(self.gate_up_proj.unbind(), self.down_proj.unbind())):
        token, slot = torch.where(experts == e)                            # who sent what to this expert
        gate, up = (x[token] @ gate_up).chunk(2, dim=-1)                   # [n, F]
        out = (F.silu(gate) * up) @ down                                   # [n, D]
        y = y.index_add(0, token, (out * weights[token, slot, None]).to(y.dtype))
    return y, torch.zeros((), device=x.device)


def naive_twin(model: MobileMoE) -> MobileMoE:
    """A copy with the same weights that computes the same function with a loop."""
    twin = copy.deepcopy(model)
    for block in twin.model.layers:
        block.feed_forward.experts.forward = functools.partial(loop_over_experts, block.feed_forward.experts)
    return twin


def glm_twin(model: MobileMoE, implementation: str) -> nn.Module:
    """transformers' Glm4MoeForCausalLM with the same weights. Needs transformers."""
    import transformers
    c = model.config
    config = transformers.Glm4MoeConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.d_head, attention_bias=False,
        use_qk_norm=True, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, partial_rotary_factor=1.0,
        moe_intermediate_size=c.expert_width, n_routed_experts=c.n_routed, num_experts_per_tok=c.active_routed,
        n_shared_experts=c.shared_width // c.expert_width, routed_scaling_factor=c.routed_scale, norm_topk_prob=True,
        n_group=1, topk_group=1, first_k_dense_replace=0, num_mtp_layers=0, tie_word_embeddings=True,
        experts_implementation=implementation)
    weights = {"lm_head.weight": model.model.embed_tokens.weight}
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):   # it rotates (i, i + d_head/2) where we rotate (2i, 2i + 1)
            weight = weight.unflatten(0, (-1, c.d_head // 2, 2)).transpose(1, 2).flatten(0, 2)
        if ".experts." in name:
            weight = weight.transpose(1, 2)                                # [E, in, out] -> [E, out, in]
        for old, new in (("feed_forward.router", "mlp.gate"), ("feed_forward.shared_expert", "mlp.shared_experts"),
                         ("feed_forward.expert_bias", "mlp.gate.e_score_correction_bias"), ("feed_forward", "mlp")):
            name = name.replace(old, new)
        weights[name] = weight
    glm = transformers.Glm4MoeForCausalLM(config).to(model.model.embed_tokens.weight.device)
    glm.load_state_dict(weights, strict=False)                  # what is missing are QK-norm weights, which start as ones
    return glm


def glm_loss(glm: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """transformers' own loss: all logits, in FP32, and F.cross_entropy. (`labels=` would shift y a second time.)"""
    return F.cross_entropy(glm(x, use_cache=False).logits.float().flatten(0, 1), y.flatten())


def adamw_step(model: nn.Module, loss: Callable, batches: tuple[Tensor, ...]) -> Callable[[], None]:
    """-> a function that trains `model` for one step, on the next of the batches [2, B, T] (x and y) each time."""
    opt = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    source = itertools.cycle(batches)

    def step():
        with mixed_precision(batches[0].device):
            value = loss(*next(source))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
    return step


@torch.no_grad()
def balance(model: MobileMoE, batches: tuple[Tensor, ...]) -> Routing:
    """Move the expert bias, without training, until tokens spread over the experts; the routing of a batch after that."""
    with mixed_precision(batches[0].device):
        for i, (x, y) in zip(range(40), itertools.cycle(batches)):
            # by 0.02 at first, 0.0003 at last: a fresh router's scores are 0.5 and a little
            model.update_expert_bias(model(x, y)[1].load, 0.02 * 0.9 ** i)
        return model(*batches[0], capacity_factor=CAPACITY)[1]


def own_step(model: MobileMoE, batches: tuple[Tensor, ...]) -> Callable[[], None]:
    """One step exactly as train.py takes it."""
    B, T = batches[0][0].shape
    stage = dataclasses.replace(TINY["pretrain"], context=T, batch=B * T, peak_lr=LEARNING_RATE, capacity=CAPACITY)
    opts, source = optimizers(model, TINY), itertools.cycle(batches)
    return lambda: train_step(model, opts, stage, SimpleNamespace(batch=lambda step, rows: next(source)), 1, 100, B)


def glm_steps(model: MobileMoE, batches: tuple[Tensor, ...]) -> dict[str, Callable]:
    """Try every experts implementation of transformers for two steps; the two fastest by name. Empty if not installed."""
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed (`pip install transformers`): left out", flush=True)
        return {}
    trials, tokens, device = [], batches[0][0].numel(), batches[0].device
    batches = (*batches[-2:], *batches[:-2])        # two for the trial, then those with which the others begin
    for implementation, weights in (("eager", "FP32"), ("batched_mm", "FP32"), ("grouped_mm", "FP32"), ("grouped_mm", "BF16")):
        c, label = model.config, f"transformers {implementation}, {weights} weights"
        gathered = tokens * c.active_routed * 3 * c.d_model * c.expert_width * 4 * c.n_layers
        if implementation == "batched_mm" and gathered > 8e9:   # it copies an expert's matrices for every route
            print(f"{label}: would hold {gathered / 1e9:.0f} GB of copied weights, left out", flush=True)
            continue
        # grouped_mm does not obey autocast: FP32 weights are multiplied in FP32. So it may hold all its weights in BF16, too
        # (no way to train well, as updates below 0.4 % of a weight round to nothing, but here only time counts).
        glm = glm_twin(model, implementation).to(torch.bfloat16 if weights == "BF16" else torch.float32)
        step = adamw_step(glm, functools.partial(glm_loss, glm), batches)
        _, seconds = timed(step, device), timed(step, device)              # the first one builds most kernels
        print(f"{label}: {tokens / seconds:,.0f} tok/s", flush=True)
        trials = sorted([*trials, (seconds, label, step)])[:2]             # the memory of slower ones is free again
    return {label: step for _, label, step in trials}

# ----------------------------------------------------------------------------------------------------------------------
# Timing


def timed(function: Callable, device: torch.device) -> float:
    """Seconds one call takes. A GPU works behind Python's back: wait for it before and after."""
    wait = torch.get_device_module(device).synchronize      # does nothing on a CPU
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def interleave(contenders: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender in each round, in turns, after one call each that does not count."""
    seconds = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(rounds + 1):
        for name, function in contenders.items():
            seconds[name].append(timed(function, device))
        passed = time.perf_counter() - start
        print(f"round {done} of {rounds}, {passed / (done + 1) * (rounds - done):.0f} s left", flush=True)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Speed of `ours` over the speed of `theirs`, median over rounds."""
    return statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs]))


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """-> a function that computes `function` of the inputs there and back."""
    return lambda: torch.autograd.grad(function(*inputs).sum(), inputs) and None


def losses(config: Config, n: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """Three ways from the last hidden states [N, D] to the loss and its gradients: forward and backward."""
    dtype = matmul_dtype(device)
    x = torch.randn(n, config.d_model, device=device, dtype=dtype, requires_grad=True)
    weight = nn.Parameter(0.02 * torch.randn(config.vocab_size, config.d_model, device=device))
    targets = torch.randint(config.vocab_size, (n,), device=device)
    return {"LinearCrossEntropy": gradients(lambda x, w: LinearCrossEntropy.apply(x, w, targets, True), x, weight),
            "F.cross_entropy": gradients(lambda x, w: F.cross_entropy(F.linear(x, w.to(dtype)).float(), targets), x, weight),
            "F.linear_cross_entropy": gradients(lambda x, w: F.linear_cross_entropy(
                x, w.to(dtype), targets, options=nn.LinearCrossEntropyOptions()), x, weight)}      # in chunks, as ours


def attentions(config: Config, rows: int, context: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """Our attention and PyTorch's, of one layer, forward and backward."""
    q, k, v = (torch.randn(rows, heads, context, config.d_head, device=device, dtype=matmul_dtype(device), requires_grad=True)
               for heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads))                # [B, H or K, T, d_head]
    sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    return {"attend": gradients(attend, q, k, v), "F.scaled_dot_product_attention": gradients(sdpa, q, k, v)}


def report(seconds: dict[str, list[float]], tokens: dict[str, int], glm: list[str]):
    """Print the table and the targets."""
    speeds = {name: [tokens[name] / s for s in seconds[name]] for name in tokens}
    print(f"\n{'':42}{'tokens/s':>10}  {'slowest … fastest':>19}  drop-and-pad is")
    for name, speed in speeds.items():
        against = f"{ratio(seconds, PADDED, name):10.2f} x as fast" if name != "generate()" else ""
        print(f"{name:42}{statistics.median(speed):10,.0f}  {f'{min(speed):,.0f} … {max(speed):,.0f}':>19}  {against}")
    ratios = {"drop-and-pad / dense": ratio(seconds, PADDED, DENSE),
              "time of a QAT step / plain": ratio(seconds, DROPLESS, QAT)}
    if glm:
        ratios["drop-and-pad / transformers' best"] = min(ratio(seconds, PADDED, name) for name in glm)
    print()
    for name, value in ratios.items():
        side, aim = AIMS[name]
        met = value >= aim if side == "at least" else value <= aim
        print(f"{name:42}{value:10.2f}  aim: {side} {aim}{'' if met else '  MISSED'}")


def main():
    parser = argparse.ArgumentParser(description="Training speed of this model against other ways to write it.")
    parser.add_argument("--preset", choices=[name for name, config in PRESETS.items() if not config.dense],
                        help="a shape of mobilemoe.py instead of d 256, 6 layers")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch (%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a row (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(%(default)s)")
    args = parser.parse_args()
    if min(args.batch, args.rounds) < 1 or args.context < NEW_TOKENS:
        raise UserError(f"--batch and --rounds must be at least 1, --context {NEW_TOKENS}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here: leave --device out")
    device = torch.device(args.device)
    torch.manual_seed(0)
    # Matrices of zeros, with which `tiny` starts, could flatter somebody.
    config = dataclasses.replace(PRESETS.get(args.preset, SHAPE), zero_init_outputs=False)
    model = MobileMoE(config).to(device)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    dense = MobileMoE(dataclasses.replace(config, n_experts=1, granularity=1, shared_expert=False, top_k=0)).to(device)
    tokens, shape = args.batch * args.context, (args.rounds + 3, 2, args.batch, args.context)
    frequencies = 1 / (torch.arange(1, config.vocab_size + 1) + 2.7)       # Zipf-Mandelbrot
    batches = torch.multinomial(frequencies, math.prod(shape), replacement=True).view(shape).to(device).unbind()   # [2, B, T]
    print(f"{config.total_params() / 1e6:.1f}M parameters, {config.active_params() / 1e6:.1f}M active; {args.batch} x "
          f"{args.context} tokens; {device}, {torch.get_num_threads()} threads, {str(matmul_dtype(device))[6:]}; "
          f"torch {torch.__version__}", flush=True)

    load, _, _, dropped = balance(model, batches)        # [layers, E], ..., scalar
    print(f"load max:mean {(load.amax(1) / load.mean(1)).max():.2f}, {100 * dropped:.1f} % of the routes dropped", flush=True)
    glm = glm_steps(model, batches)
    naive, quantised = naive_twin(model), attach(copy.deepcopy(model))
    steps = {PADDED: adamw_step(model, functools.partial(our_loss, model, CAPACITY), batches),
             DROPLESS: adamw_step(model, functools.partial(our_loss, model, None), batches),
             QAT: adamw_step(quantised, functools.partial(our_loss, quantised, None), batches),
             DENSE: adamw_step(dense, functools.partial(our_loss, dense, None), batches),
             LOOP: adamw_step(naive, functools.partial(our_loss, naive, None), batches)} | glm
    steps[OWN] = own_step(copy.deepcopy(model), batches)
    prompt = batches[0][0][0, :NEW_TOKENS].tolist()
    parts = {f"loss and its gradients, N {tokens}, V {config.vocab_size}": losses(config, tokens, device),
             "attention of a layer and its gradients": attentions(config, args.batch, args.context, device)}
    speech = {"generate()": lambda: generate(model, prompt, NEW_TOKENS, temperature=0)}
    seconds = interleave(functools.reduce(dict.__or__, parts.values(), steps | speech), args.rounds, device)

    report(seconds, dict.fromkeys(steps, tokens) | {"generate()": NEW_TOKENS}, list(glm))
    print()
    for title, ways in parts.items():
        print(f"{title}: " + ", ".join(f"{name} {1e3 * statistics.median(seconds[name]):.0f} ms" for name in ways))


if __name__ == "__main__":
    keep_memory()
    run_main(main)
