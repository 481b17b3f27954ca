"""How fast training is, against everything else one could have written.

    python -m lab.bench                          d 256, 6 layers, 60 experts top-4 + shared, 8 x 512 tokens
    python -m lab.bench --preset S --batch 1 --device cuda

A step is train.train_step: forward, loss, backward, clipping, optimizer, in BF16 where the hardware likes it.
Everybody gets the same weights, the same batches, a new one in every step, and the same fused AdamW. All
models are in memory at once, with gradients and optimizers.

    drop-and-pad, dropless     this model in its two dispatch modes (mobilemoe.Experts)
    QAT                        dropless with INT4 attached, as the last stage trains
    dense                      the dense model of equal active size: what the mixture's bookkeeping costs
    naive loop                 this model by the definition of its expert layer, mobilemoe.loop_over_experts
    transformers               its Glm4Moe with these weights, by each of its implementations of experts
    train.py's optimizers      drop-and-pad with Muon, as the default run trains

Below them, three functions of kernels.py beside those of PyTorch that they stand for, there and back.
What this is not: a measure of quality, which is train.py's report.

The contenders take turns, one step each, and every ratio is the median over rounds of the ratio *within* a
round: a computer that grows warm or busy slows all of them alike. Three things decide who looks fast:

- Routing is as uneven as in training, where train.py prints loads of 1.3:1 to 2.2:1 after fifty steps. So
  tokens are as frequent as those of text (Zipf's law as Mandelbrot corrected it), embeddings are large, so
  that what a token is outweighs what its batch has in common, and the expert bias is moved first.
- Experts get another number of tokens in every step: a CPU builds a kernel for each new number (oneDNN), and
  those it has built already must not be all that it needs.
- Memory stays with the process, as in train.py. By default glibc hands large buffers back, and who writes
  larger ones suffers more from that.
"""
import copy
import functools
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Parser, Progress, keep_memory, number, run_main
from kernels import causal_attention, linear_cross_entropy, matmul_dtype, rms_norm
from mobilemoe import DENSE, PRESETS, Config, MobileMoE, Routing, loop_over_experts
from quantize import attach
from train import TINY, optimizers, train_step

# Matrices of zeros, with which `tiny` starts, could flatter somebody: these are random.
SHAPE = Config(d_model=256, n_layers=6, n_heads=4, n_kv_heads=2, d_ff=1024, vocab_size=4096, max_context=512)
CAPACITY = 1.5          # pre-training's, in the paper and in train.py
AIMS = {"drop-and-pad / dense": ("at least", 0.77), "time of a QAT step / plain": ("at most", 1.2),
        "drop-and-pad / transformers' best": ("at least", 1.6)}

# ----------------------------------------------------------------------------------------------------------
# Contenders


def naive_twin(model: MobileMoE) -> MobileMoE:
    """A copy with the same weights whose expert layers are loops."""
    twin = copy.deepcopy(model)
    for block in twin.model.layers:
        block.feed_forward.experts.forward = functools.partial(loop_over_experts, block.feed_forward.experts)
    return twin


def glm_twin(model: MobileMoE, implementation: str = "eager") -> nn.Module:
    """transformers' Glm4MoeForCausalLM with the same weights, which computes the same logits."""
    import transformers
    c = model.config
    glm = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, rms_norm_eps=c.norm_eps,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        head_dim=c.d_head, attention_bias=False, use_qk_norm=True, rope_theta=c.rope_theta,
        partial_rotary_factor=1.0, n_routed_experts=c.n_routed, moe_intermediate_size=c.expert_width,
        n_shared_experts=c.shared_width // c.expert_width, num_experts_per_tok=c.active_routed, n_group=1,
        topk_group=1, norm_topk_prob=True, routed_scaling_factor=c.routed_scale, first_k_dense_replace=0,
        num_mtp_layers=0, tie_word_embeddings=True, experts_implementation=implementation))
    # Its QK-norm has weights, all of them 1. Everything else is ours under another name.
    weights = {name: ones for name, ones in glm.state_dict().items() if "q_norm" in name or "k_norm" in name}
    weights["lm_head.weight"] = model.model.embed_tokens.weight
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:        # it rotates (i, i + d_head/2), we rotate (2i, 2i + 1)
            weight = weight.unflatten(0, (-1, c.d_head // 2, 2)).transpose(1, 2).flatten(0, 2)
        if ".experts." in name:
            weight = weight.transpose(1, 2)                                # [E, in, out] -> [E, out, in]
        for ours, theirs in (("feed_forward.router", "mlp.gate"), ("shared_expert", "shared_experts"),
                             ("feed_forward.expert_bias", "mlp.gate.e_score_correction_bias"),
                             ("feed_forward", "mlp")):
            name = name.replace(ours, theirs)
        weights[name] = weight
    glm.load_state_dict(weights)                        # strict: neither side has a tensor the other lacks
    return glm.to(model.model.embed_tokens.weight.device)


class Glm(nn.Module):
    """A glm_twin that can be called as train_step calls a model. BF16 is transformers' own way, autocast."""

    def __init__(self, model: MobileMoE, implementation: str, weights: torch.dtype = torch.float32):
        super().__init__()
        self.glm = glm_twin(model, implementation).to(weights)
        self.dtype = model.compute_dtype

    def forward(self, x: Tensor, y: Tensor, capacity_factor=None) -> tuple[Tensor, None]:      # [B, T] each
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self.glm(x, use_cache=False).logits.float()           # [B, T, V]
        # transformers' own loss; its `labels=` would shift y a second time.
        return F.cross_entropy(logits.flatten(0, 1), y.flatten()), None


def glm_contenders(model: MobileMoE) -> dict[str, nn.Module]:
    """transformers' model, by each of its implementations; {} if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed (`pip install transformers`): left out", flush=True)
        return {}
    # Left out: batched_mm copies an expert's matrices for every route, 39 GB here. grouped_mm does not obey
    # autocast and multiplies FP32 weights in FP32. So it may hold everything in BF16, too: no way to train
    # well, as updates below 0.4 % of a weight round to nothing, but here only time counts.
    return {"transformers eager": Glm(model, "eager"), "transformers grouped_mm": Glm(model, "grouped_mm"),
            "transformers grouped_mm, BF16 weights": Glm(model, "grouped_mm", torch.bfloat16)}


def training(model: nn.Module, batches: list[Tensor], capacity: float | None = None, muon=False) -> Callable:
    """-> a function that trains `model` for one step, each time on the next of the batches [2, B, T].

    `muon` takes train.py's optimizers instead of AdamW alone.
    """
    B, T = batches[0][0].shape
    # At a rate so small that routing stays as it is.
    stage = replace(TINY["pretrain"], context=T, batch=B * T, capacity=capacity, peak_lr=1e-6, bias_rate=0)
    group = dict(params=list(model.parameters()), share=1.0)
    opts = optimizers(model, TINY) if muon else [torch.optim.AdamW([group], betas=(0.9, 0.95), fused=True)]
    source = itertools.cycle(batches)
    data = SimpleNamespace(batch=lambda step, rows: next(source))
    return lambda: train_step(model, opts, stage, data, step=1, steps=100, micro_rows=B)


@torch.no_grad()
def balance(model: MobileMoE, batches: list[Tensor]) -> Routing:
    """Move the expert bias, without training, until tokens spread -> the routing after that."""
    for i, (x, y) in zip(range(40), itertools.cycle(batches)):
        # by 0.02 at first, 0.0003 at last: a fresh router's scores are 0.5 and a little
        model.update_expert_bias(model(x, y)[1].load, 0.02 * 0.9 ** i)
    return model(*batches[0], capacity_factor=CAPACITY)[1]


def there_and_back(function: Callable[..., Tensor], *inputs: Tensor) -> Callable:
    return lambda: torch.autograd.grad(function(*inputs).sum(), inputs)


def functions(c: Config, B: int, T: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """Ours and PyTorch's in turns, with the shapes and types that training has."""
    random = functools.partial(torch.randn, device=device, requires_grad=True)
    q = random(B, c.n_heads, T, c.d_head, dtype=dtype)
    k, v = (random(B, c.n_kv_heads, T, c.d_head, dtype=dtype) for _ in "kv")
    stream = random(B, T, c.d_model)                                       # FP32, as the residual stream is
    x = random(B * T, c.d_model, dtype=dtype)
    weight = random(c.vocab_size, c.d_model)
    y = torch.randint(c.vocab_size, (B * T,), device=device)
    sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)

    def all_logits(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w.to(dtype)).float(), y)
    return {"causal_attention": there_and_back(causal_attention, q, k, v),
            "F.scaled_dot_product_attention": there_and_back(sdpa, q, k, v),
            "rms_norm": there_and_back(lambda x: rms_norm(x, c.norm_eps), stream),
            "F.rms_norm": there_and_back(lambda x: F.rms_norm(x, (c.d_model,), eps=c.norm_eps), stream),
            "linear_cross_entropy": there_and_back(lambda x, w: linear_cross_entropy(x, w, y), x, weight),
            "F.cross_entropy": there_and_back(all_logits, x, weight)}

# ----------------------------------------------------------------------------------------------------------
# Timing


def interleave(contenders: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender in each round, in turns, after a round that does not count."""
    seconds = {name: [] for name in contenders}
    # A GPU works behind Python's back: wait for it before and after. (Does nothing on a CPU.)
    wait = torch.get_device_module(device).synchronize
    progress = Progress("bench", rounds + 1, "rounds")
    for done in range(rounds + 1):
        for name, function in contenders.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            seconds[name].append(time.perf_counter() - start)
        progress.show(done + 1)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Speed of `ours` over the speed of `theirs`, median over rounds."""
    return statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs]))


def report(seconds: dict[str, list[float]], steps: dict[str, Callable], tokens: int):
    """Print the table and the ratios, each beside what is aimed at."""
    print(f"\n{'':42}{'tokens/s':>10}  {'slowest … fastest':>19}  drop-and-pad is")
    for name in steps:
        speed = [tokens / s for s in seconds[name]]
        spread = f"{min(speed):,.0f} … {max(speed):,.0f}"
        print(f"{name:42}{statistics.median(speed):10,.0f}  {spread:>19}  "
              f"{ratio(seconds, 'drop-and-pad', name):10.2f} x as fast")
    values = [ratio(seconds, "drop-and-pad", "dense, equal active size"),
              ratio(seconds, "dropless", "dropless, QAT")]
    rivals = [ratio(seconds, "drop-and-pad", name) for name in steps if name.startswith("transformers")]
    print()
    for (name, (side, aim)), value in zip(AIMS.items(), [*values, *sorted(rivals)[:1]]):
        met = value >= aim if side == "at least" else value <= aim
        print(f"{name:42}{value:10.2f}  aim: {side} {aim}{'' if met else '  MISSED'}")


def main():
    parser = Parser(description="Training speed of this model against other ways to write it.")
    parser.add_argument("--preset", choices=("test", "tiny", "S", "M", "L"), help="not d 256 and 6 layers")
    parser.add_argument("--batch", type=number(int, 1), default=8, help="rows of a batch (%(default)s)")
    parser.add_argument("--context", type=number(int, 1), default=512, help="tokens of a row (%(default)s)")
    parser.add_argument("--rounds", type=number(int, 1), default=7, help="timed steps of each (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda")[:1 + torch.cuda.is_available()])
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    config = replace(PRESETS.get(args.preset, SHAPE), zero_init_outputs=False)
    model = MobileMoE(config).to(device)
    dense = MobileMoE(replace(config, **DENSE, top_k=0)).to(device)
    model.compute_dtype = dense.compute_dtype = matmul_dtype(device)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    frequencies = 1 / (torch.arange(1, config.vocab_size + 1) + 2.7)       # Zipf-Mandelbrot
    shape = (args.rounds + 3, 2, args.batch, args.context)
    batches = list(torch.multinomial(frequencies, math.prod(shape), replacement=True).view(shape).to(device))
    print(f"{config.total_params() / 1e6:.1f}M parameters, {config.active_params() / 1e6:.1f}M active; "
          f"{device}, {torch.get_num_threads()} threads, {model.compute_dtype}; torch {torch.__version__}")
    load, _, dropped = balance(model, batches)           # [layers, E], ..., scalar
    print(f"load max:mean {(load.amax(1) / load.mean(1)).max():.2f}, {100 * dropped:.1f} % of routes dropped")

    steps = {"drop-and-pad": training(model, batches, CAPACITY),
             "dropless": training(model, batches),
             "dropless, QAT": training(attach(copy.deepcopy(model)), batches),
             "dense, equal active size": training(dense, batches),
             "naive loop over experts": training(naive_twin(model), batches),
             "drop-and-pad, train.py's optimizers": training(copy.deepcopy(model), batches, CAPACITY, True)}
    steps |= {name: training(glm, batches) for name, glm in glm_contenders(model).items()}
    kernels = functions(config, args.batch, args.context, device, model.compute_dtype)
    seconds = interleave(steps | kernels, args.rounds, device)
    report(seconds, steps, args.batch * args.context)
    for name in kernels:
        print(f"{name:42}{1e3 * statistics.median(seconds[name]):10.2f} ms there and back")


if __name__ == "__main__":
    keep_memory()
    run_main(main)
