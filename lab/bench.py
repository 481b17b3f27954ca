"""How fast training is, against everything else one could have written.

    python -m lab.bench                          d 256, 6 layers, 60 experts top-4 + shared, 8 x 512 tokens
    python -m lab.bench --preset S --batch 1 --device cuda
    python -m lab.bench race --minutes 8         is a mixture worth its time? `tiny` against its dense twin

A step is train.train_step: forward, loss, backward, clipping, optimizer, in BF16 where the hardware likes it.
Everybody gets the same weights, the same batches, a new one in every step, and the same fused AdamW. All
models are in memory at once, with gradients and optimizers.

    drop-and-pad, dropless     this model in its two dispatch modes (mobilemoe.Experts)
    QAT                        dropless with INT4 attached, as the last stage trains
    dense                      the dense model of equal active size: what the mixture's bookkeeping costs
    naive loop                 this model by the definition of its expert layer, mobilemoe.loop_over_experts
    transformers               its Glm4Moe with these weights, by each of its implementations of experts

Below them, three functions of kernels.py beside those of PyTorch that they stand for, there and back.
What these figures are not: a measure of quality, which is train.py's report, or of both together. That is
`race`, at the end of this file: held-out bits per byte after equal seconds of training, not equal tokens.

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
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Parser, Progress, atomic_write, keep_memory, new_figure, number, run_main, save_figure
from kernels import causal_attention, linear_cross_entropy, matmul_dtype, rms_norm
from mobilemoe import DENSE, PRESETS, Config, MobileMoE, Routing, loop_over_experts
from quantize import attach, comparison_table, heldout_bits_per_byte
from train import TINY, Batches, optimizers, prepare_data, stages_for, train_step

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


def training(model: nn.Module, batches: list[Tensor], capacity: float | None = None) -> Callable:
    """-> a function that trains `model` for one step, each time on the next of the batches [2, B, T]."""
    B, T = batches[0][0].shape
    # At a rate so small that routing stays as it is.
    stage = replace(TINY["pretrain"], context=T, batch=B * T, capacity=capacity, peak_lr=1e-6, bias_rate=0)
    group = dict(params=list(model.parameters()), share=1.0)
    opts = [torch.optim.AdamW([group], betas=(0.9, 0.95), fused=True)]
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
    q, k, v = (random(B, n, T, c.d_head, dtype=dtype) for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads))
    stream = random(B, T, c.d_model)                                       # FP32, as the residual stream is
    x = random(B * T, c.d_model, dtype=dtype)
    weight = random(c.vocab_size, c.d_model)
    y = torch.randint(c.vocab_size, (B * T,), device=device)
    sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    return {"causal_attention": there_and_back(causal_attention, q, k, v),
            "F.scaled_dot_product_attention": there_and_back(sdpa, q, k, v),
            "rms_norm": there_and_back(lambda x: rms_norm(x, c.norm_eps), stream),
            "F.rms_norm": there_and_back(lambda x: F.rms_norm(x, (c.d_model,), eps=c.norm_eps), stream),
            "linear_cross_entropy": there_and_back(lambda x, w: linear_cross_entropy(x, w, y), x, weight),
            "F.cross_entropy": there_and_back(
                lambda x, w: F.cross_entropy(F.linear(x, w.to(dtype)).float(), y), x, weight)}

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


# ----------------------------------------------------------------------------------------------------------
# The race: equal seconds, not equal tokens

TURNS, GLANCES = 8, 3       # of each model: a turn lasts a minute at --minutes 8; glances within a turn


def train_by_clock(name: str, config: Config, prepared: dict, seed: int, seconds: float, peak: float,
                   speed: float, glances: int) -> Iterator[dict]:
    """Train a new model for so many seconds. At even distances, `glances` times, print and yield what it has
    reached: {"tokens", "seconds", "tokens/s", "bits_per_byte": held-out, by domain}.

    Only training is on the clock. `speed`, tokens/s in a warm-up, says how many steps the schedule can plan.
    It counts as much as ten steps of the training itself, so that the learning rate ends with the last second
    even if the computer has changed its speed.
    """
    torch.manual_seed(seed)
    stages = stages_for(config)
    # Down to zero, as no stage follows: a rate that is still high at the end hides what was learned.
    stage = replace(stages["pretrain"], peak_lr=peak, final_lr=0.0)
    model = MobileMoE(config)
    model.compute_dtype = matmul_dtype(torch.device("cpu"))
    opts = optimizers(model, stages)
    batches = Batches(prepared, stage, seed)
    step, used = 0, 0.0
    for glance in range(1, glances + 1):
        while used < seconds * glance / glances:
            pace = (10 * stage.batch / speed + used) / (10 + step)         # seconds per step
            steps = step + max(1, round((seconds - used) / pace))
            start = time.perf_counter()
            train_step(model, opts, stage, batches, step, steps, micro_rows=stage.batch // stage.context)
            used += time.perf_counter() - start
            step += 1
        tokens = step * stage.batch
        bits = heldout_bits_per_byte(model, {"context": stage.context, "heldout": prepared["heldout"]})
        print(f"{name}, peak rate {peak:g}, {used:.0f} s, {tokens:,} tokens: {bits['prose']:.3f}", flush=True)
        yield {"tokens": tokens, "seconds": used, "tokens/s": tokens / used, "bits_per_byte": bits}


def race(configs: dict[str, Config], minutes: float, seed: int, out: Path):
    """Train a mixture and its dense twin, {name: config} in this order, in turns, for `minutes` each, on the
    same batches.

    Prints bits per byte by domain, in brackets minus the twin's, writes every glance to out/race.json and
    draws out/race.png. Glances take time of their own, the twin's three trials three turns.
    """
    figure, [axes] = new_figure(1, 2, (12, 4.5))        # first: without matplotlib nothing is trained
    mixture, twin = configs
    prepared = prepare_data(out, None, None, configs[mixture].vocab_size)
    turn = 60 * minutes / TURNS
    peak = stages_for(configs[mixture])["pretrain"].peak_lr

    def start(name: str, seconds: float, peak: float, speed: float, glances: int = 1) -> Iterator[dict]:
        return train_by_clock(name, configs[name], prepared, seed, seconds, peak, speed, glances)
    print("Held-out bits per byte of docstrings: two warm-ups, three peak rates for the twin, the race")
    # Of a warm-up only the speed is kept. Before it, any guess will do.
    speeds = {name: next(start(name, turn / 4, peak, speed=1e4))["tokens/s"] for name in configs}
    # The table's rate was chosen for the mixture. The twin takes the best of three, or it were a straw man.
    trials = {rate: next(start(twin, turn, rate, speeds[twin])) for rate in (peak / 2, peak, 2 * peak)}
    peaks = {mixture: peak, twin: min(trials, key=lambda rate: trials[rate]["bits_per_byte"]["prose"])}
    racers = {name: start(name, 60 * minutes, peaks[name], speeds[name], TURNS * GLANCES) for name in configs}
    curves = {name: [] for name in configs}
    for name in TURNS * list(configs):
        curves[name] += itertools.islice(racers[name], GLANCES)
    print(comparison_table({f"{name}, {curves[name][-1]['tokens/s']:,.0f} tokens/s":
                            curves[name][-1]["bits_per_byte"] for name in (twin, mixture)}))
    crossings = {unit: draw(axis, unit, curves) for axis, unit in zip(axes, ("tokens", "seconds"))}
    record = {"seed": seed, "trials": trials, "peaks": peaks, "crossings": crossings, "curves": curves}
    with atomic_write(out / "race.json") as file:
        file.write(json.dumps(record).encode())
    save_figure(figure, out / "race.png")


def draw(axis, unit: str, curves: dict[str, list[dict]]) -> list[float]:
    """Docstrings over "tokens" or "seconds" -> [where the two curves cross for the last time], or [].

    Seconds are the fair view: there both are equally far in their schedules. At equal tokens the slower model
    has lowered its rate further than the other.
    """
    ours, theirs = (np.array([(glance[unit], glance["bits_per_byte"]["prose"]) for glance in curve])
                    for curve in curves.values())                          # [glances, 2] each
    x = np.linspace(max(ours[0, 0], theirs[0, 0]), min(ours[-1, 0], theirs[-1, 0]), 2000)
    bits = np.interp(x, *ours.T)                                           # [2000], where both were measured
    last = np.flatnonzero(np.diff(bits < np.interp(x, *theirs.T)))[-1:]    # [1] or [0]
    title = f"crossing at {x[last].item():,.0f} {unit}" if len(last) else "no crossing"
    print(f"docstrings against {unit}: {title}")
    axis.plot(*ours.T, *theirs.T, x[last], bits[last], "ko")
    axis.set(title=title, xlabel=f"{unit} of training", ylabel="held-out bits per byte, docstrings")
    axis.legend(list(curves))
    return x[last].tolist()


def main():
    parser = Parser(description="Training speed of this model against other ways to write it.")
    parser.add_argument("--preset", choices=("test", "tiny", "S", "M", "L"), help="not d 256 and 6 layers")
    parser.add_argument("--batch", type=number(int, 1), default=8, help="rows of a batch (%(default)s)")
    parser.add_argument("--context", type=number(int, 1), default=512, help="tokens of a row (%(default)s)")
    parser.add_argument("--rounds", type=number(int, 1), default=7, help="timed steps of each (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda")[:1 + torch.cuda.is_available()])
    sub = parser.add_subparsers(dest="command").add_parser("race", help="`tiny` against its dense twin")
    sub.add_argument("--minutes", type=number(float, 0.01), default=8, help="for each (%(default)s)")
    sub.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    sub.add_argument("--out", type=Path, default="runs/race", metavar="FOLDER", help="(%(default)s)")
    args = parser.parse_args()
    if args.command == "race":
        return race({n: PRESETS[n] for n in ("tiny", "tiny-dense")}, args.minutes, args.seed, args.out)
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
             "naive loop over experts": training(naive_twin(model), batches)}
    steps |= {name: training(glm, batches) for name, glm in glm_contenders(model).items()}
    kernels = functions(config, args.batch, args.context, device, model.compute_dtype)
    seconds = interleave(steps | kernels, args.rounds, device)
    report(seconds, steps, args.batch * args.context)
    for name in kernels:
        print(f"{name:42}{1e3 * statistics.median(seconds[name]):10.2f} ms there and back")


if __name__ == "__main__":
    keep_memory()
    run_main(main)
