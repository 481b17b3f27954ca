"""The on-device scaling law: which mixture of experts is worth its memory, training and work per token.

MobileMoE (arXiv 2605.27358, section 3) predicts the loss from active parameters N, tokens D and experts E,

    L(N, D, E) = A E^delta N^(alpha + gamma ln E) + B E^omega D^(beta + zeta ln E) + c       (equation 1)

and minimises it under a phone's memory (equation 5) and budgets of FLOPs. Three parts; each works alone:

    python -m lab.scaling_law plan --memory 0.9GB --tokens 500B --inference-gflops 0.6 --out phone.json
    python -m lab.scaling_law sweep     train 31 small models, an hour on two cores; what is there is kept
    python -m lab.scaling_law fit       fit the law to them, hold the paper's findings against them, draw
                                        what a mixture costs in training and saves in reading

`plan` believes the published coefficients. Its JSON is a config for `python train.py --config phone.json`.
`sweep` and `fit` ask whether the paper's findings hold in models a hundred times smaller, too. What they are
not: a way to predict a phone's model from runs of a minute. A law fitted to small models describes those.

The law is from Ludziejewski et al. 2025 (arXiv 2502.05172), who extended that of Hoffmann et al. 2022
(Chinchilla) by E.
"""
import dataclasses
import json
import math
import os
import re
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import common
from common import UserError, markdown_table, number
from mobilemoe import DENSE, PRESETS, Config, MobileMoE, bits_per_byte
from train import TINY, Batches, prepare_data, train_stage

# ----------------------------------------------------------------------------------------------------------
# The law. N and D are in billions, losses in nats per token

PUBLISHED = dict(A=0.2388, delta=0.0906, alpha=-0.2833, gamma=0.0387,
                 B=0.6019, omega=1.0593, beta=-0.3210, zeta=-0.3684, c=1.9730)
EXPERTS = (1, 2, 4, 8, 16, 32)
E_START, E_MAX = 1, 32


def saturated(E):
    """Effective number of experts, of a number or an array: 1 for E = 1, close to E for few, at most E_MAX.

    Without it the powers of E would promise gains without end; the tenth expert helps less than the second.
    """
    return 1 / (1 / (E - 1 + 1 / (1 / E_START - 1 / E_MAX)) + 1 / E_MAX)


def law(N, D, E, k: dict = PUBLISHED):
    """Equation 1: nats per token of a model with N billion active parameters after D billion tokens.

    With E fixed it is Chinchilla's law, A N^alpha + B D^beta + c with other coefficients.
    """
    x = np.log(saturated(E))
    of_size = k["A"] * np.exp(k["delta"] * x) * N ** (k["alpha"] + k["gamma"] * x)
    of_tokens = k["B"] * np.exp(k["omega"] * x) * D ** (k["beta"] + k["zeta"] * x)
    return of_size + of_tokens + k["c"]

# ----------------------------------------------------------------------------------------------------------
# plan: the best shape for a budget


@dataclasses.dataclass(frozen=True)
class Budget:
    memory: float                       # bytes, for weights and KV cache together
    context: int                        # tokens in that cache
    tokens: float                       # trained on
    inference_flops: float = math.inf   # per token: 2 N_act, a multiply and an add per weight
    train_flops: float = math.inf       # in all: 6 N_act D, since the way back takes twice as much again

    def bytes(self, config: Config) -> int:
        """Equation 5, and the scales of INT4 groups, half a bit per weight, which the paper leaves out."""
        return config.int4_bytes() + config.kv_bytes(self.context)

    def admits(self, config: Config) -> bool:
        N = config.active_params()
        return (self.bytes(config) <= self.memory and 2 * N <= self.inference_flops
                and 6 * N * self.tokens <= self.train_flops)

    def loss(self, config: Config) -> float:
        return float(law(config.active_params() / 1e9, self.tokens / 1e9, config.n_experts))


def candidates() -> list[Config]:
    """The paper's family, smallest first, deep and thin: d_model / n_layers is 36 to 44 (S: 38, M, L: 40)."""
    sizes = [(d, layers) for d in range(256, 8193, 256) for layers in range(math.ceil(d / 44), d // 36 + 1)]
    # Equation 1 knows neither g nor the shared expert: Config's, g = 8 with one, won the paper's sweeps.
    experts = [DENSE, *(dict(n_experts=E) for E in EXPERTS[1:])]
    return [Config(d, layers, n_heads=d // 64, n_kv_heads=4, d_ff=4 * d, **E)
            for E in experts for d, layers in sizes]


def extrapolated(config: Config) -> bool:
    """The law was fitted to 0.3, 0.5 and 0.9B active parameters. (Rounded: S has 0.272 and L 0.922.)"""
    return not 0.25e9 <= config.active_params() <= 0.95e9


def best_shapes(budget: Budget) -> list[Config]:
    """The best shape within the budget for each E that has one, the best of all first.

    Sizes that the law was fitted to come before all others. Raises UserError if the budget admits nothing.
    """
    shapes = candidates()
    best = {}
    for shape in sorted(shapes, key=lambda shape: (extrapolated(shape), budget.loss(shape))):
        if budget.admits(shape):
            best.setdefault(shape.n_experts, shape)
    if not best:
        raise UserError("no model fits this budget: even the smallest takes "
                        f"{budget.bytes(shapes[0]) / 1e6:.0f} MB and "
                        f"{2 * shapes[0].active_params() / 1e9:.3f} GFLOPs per token")
    return list(best.values())


def shape_table(shapes: list[tuple[str, Config]], budget: Budget) -> str:
    heads = ["model", "layers x d", "E", "N_act", "N_total", "GB", "GFLOPs/token", "train FLOPs", "loss"]
    rows = []
    for name, shape in shapes:
        N = shape.active_params()
        rows.append([name, f"{shape.n_layers} x {shape.d_model}", shape.n_experts, f"{N / 1e9:.3f}B",
                     f"{shape.total_params() / 1e9:.2f}B", f"{budget.bytes(shape) / 1e9:.2f}",
                     f"{2 * N / 1e9:.2f}", f"{6 * N * budget.tokens:.2e}", f"{budget.loss(shape):.4f}"])
    return markdown_table(heads, rows)


def plan(budget: Budget) -> str:
    """Three tables: the best shapes, the law around them, the released shapes and the best of their size."""
    D = budget.tokens / 1e9
    warning = "" if 100 <= D <= 500 else " EXTRAPOLATED: the law was fitted to 100 to 500B."
    best = [("extrapolated" if extrapolated(shape) else "", shape) for shape in best_shapes(budget)]
    curve = [[f"{N}B", *(f"{law(N, D, E):.4f}" for E in EXPERTS)] for N in (0.3, 0.5, 0.9)]
    released = []
    for name in "SML":
        shape = PRESETS[name]
        own = Budget(budget.bytes(shape), budget.context, budget.tokens, 2 * shape.active_params())
        released += [(name, shape), ("best instead", best_shapes(own)[0])]
    return f"""\
The best shape for each E (1 is dense; g = 8 and the shared expert of the others come from the paper's sweeps,
not from equation 1). GB are INT4 weights and an 8-bit KV cache of {budget.context:,} tokens.

{shape_table(best, budget)}

Loss over E at equal active size after {D:g}B tokens.{warning}

{markdown_table(["N_act", *(f"E = {E}" for E in EXPERTS)], curve)}

The released shapes, each with the best that takes no more memory and FLOPs per token:

{shape_table(released, budget)}"""

# ----------------------------------------------------------------------------------------------------------
# sweep: small models on the embedded corpus

# Two sizes in the paper's proportions. The thinnest expert that INT4 groups allow has width 32 = 512 / 16.
VOCABULARY = 2048
SIZES = {"small": dict(d_model=128, n_layers=3, n_heads=4, n_kv_heads=1, d_head=32, d_ff=512),
         "large": dict(d_model=160, n_layers=4, n_heads=5, n_kv_heads=1, d_head=32, d_ff=640)}
STAGE = TINY["pretrain"]
TOKENS = 352 * STAGE.batch          # of the longest runs; a half and a quarter of it are whole batches, too


class Run(NamedTuple):
    """One trained model. All share data, batch size, learning rates and schedule."""
    size: str
    E: int
    g: int
    tokens: int
    shared: bool = False
    seed: int = 0

    @property
    def over_E(self) -> bool:
        """Is it of the series over E? That has g = 4: with g = 1 a token has one expert, whose normalised
        weight is 1 whatever the router says. The router would get no gradient and choose blindly."""
        return not self.shared and self.g == (1 if self.E == 1 else 4)

    def config(self) -> Config:
        # A dense feed-forward adds up its slices, each with weight 1. So must the active experts, or a sweep
        # over g would compare strengths: 2.655 bits per byte at a scale of 1, 2.575 at 4.
        active = self.g // 2 if self.shared else self.g
        return dataclasses.replace(PRESETS["tiny"], vocab_size=VOCABULARY, n_experts=self.E,
                                   granularity=self.g, shared_expert=self.shared,
                                   routed_scale=float(active), **SIZES[self.size])


def all_runs(top: int) -> list[Run]:
    """The sweep in the order of training; `top` is the tokens of the longest runs."""
    dense, eight, plain = (Run("small", E, g, top) for E, g in ((1, 1), (8, 4), (8, 8)))
    shared = plain._replace(shared=True)
    runs = [dense, *(eight._replace(E=E) for E in EXPERTS[1:])]
    # g and the shared expert are tried at E = 8, the paper's best.
    runs += [*(eight._replace(g=g) for g in (1, 2, 8, 16)), shared]
    # The law needs some E with fewer tokens, and with more parameters.
    for size, tokens in (("small", top // 2), ("small", top // 4), ("large", top // 2)):
        runs += [run._replace(size=size, tokens=tokens) for run in runs[:6] if run.E in (1, 2, 8, 32)]
    # What the findings rest on gets two seeds more.
    return runs + [run._replace(seed=seed) for seed in (1, 2) for run in (dense, eight, plain, shared)]


def train_one(order: dict) -> float:
    """One run, in a process of its own: train, append a line to runs.jsonl -> held-out nats per token."""
    run, folder = Run(*order["run"]), Path(order["folder"])
    stage = dataclasses.replace(STAGE, tokens=run.tokens)
    torch.manual_seed(run.seed)
    prepared = prepare_data(folder, None, None, VOCABULARY)
    model = MobileMoE(run.config())
    begun = {"stage": str(run), "micro_rows": stage.batch // stage.context}
    with tempfile.TemporaryDirectory() as log:          # that nobody reads
        summary = train_stage(model, stage, Batches(prepared, stage, run.seed), prepared, Path(log), begun)
    ids = next(iter(prepared["heldout"].values()))["ids"]
    nats = math.log(2) * bits_per_byte(model, ids, len(ids) - 1, stage.context)        # per token, not byte
    record = {**run._asdict(), "nats": nats, "tokens/s": summary["tokens/s"]}
    with open(folder / "runs.jsonl", "a") as file:      # one short write: two workers do not mix their lines
        file.write(json.dumps(record) + "\n")
    return nats


def read_runs(path: Path) -> dict[Run, tuple[float, float]]:
    """{finished run: (nats, tokens/s)}, one JSON object a line; none without a file.

    Raises UserError for a broken line.
    """
    records = {}
    for n, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            record = json.loads(line)
            run = Run(*(record[name] for name in Run._fields))
            records[run] = float(record["nats"]), float(record["tokens/s"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {n} is not a run: delete it, and `sweep` trains it anew") from None
    return records


def sweep(folder: Path, top: int) -> None:
    """Train the runs that runs.jsonl does not hold yet, two at a time."""
    # Two processes of one thread do more than one of two: matrices this small mostly wait.
    os.environ["OMP_NUM_THREADS"] = "1"
    prepare_data(folder, None, None, VOCABULARY)        # once, or both workers would
    path = folder / "runs.jsonl"
    finished = read_runs(path)
    todo = [run for run in all_runs(top) if run not in finished]
    print(f"sweep: {len(todo)} runs to train, {len(all_runs(top)) - len(todo)} are there", flush=True)
    progress = common.Progress("sweep", sum(run.tokens for run in todo), "tokens")
    progress.show(0)

    def train(run: Run) -> float:
        return common.in_fresh_process("lab.scaling_law.train_one", {"run": run, "folder": str(folder)})[0]
    with ThreadPoolExecutor(2) as pool:                 # two threads that wait for a process each
        for n, nats in enumerate(pool.map(train, todo)):
            progress.show(sum(run.tokens for run in todo[:n + 1]), f"{todo[n]}: {nats:.3f} nats")
    print(f"-> {path}; `python -m lab.scaling_law fit {path}` reads it")

# ----------------------------------------------------------------------------------------------------------
# fit: what the runs say

HUBER = 1e-3    # beyond it, residuals of ln L count linearly: one run gone wrong must not bend the law


def descend(raw, n, d, x, y, iterations: int) -> tuple[float, list[float]]:
    """L-BFGS from the coefficients `raw` [9] -> (Huber loss, raw). In raw, A, B and c are logarithms, so that
    none turns negative. n, d, x, y [points] are the logarithms of N, D, E and the loss.
    """
    raw = torch.tensor(raw, dtype=torch.float64, requires_grad=True)       # [9]
    solver = torch.optim.LBFGS([raw], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe",
                               tolerance_grad=1e-6, tolerance_change=1e-10)

    def closure():
        solver.zero_grad()
        a, delta, alpha, gamma, b, omega, beta, zeta, c = raw
        of_size = a + delta * x + (alpha + gamma * x) * n
        of_tokens = b + omega * x + (beta + zeta * x) * d
        predicted = torch.stack([of_size, of_tokens, c.expand_as(x)]).logsumexp(0)
        value = F.huber_loss((predicted - y) / HUBER, torch.zeros_like(y))
        value.backward()
        return value
    solver.step(closure)
    value = closure().item()
    return value if math.isfinite(value) else math.inf, raw.tolist()


def fit_law(points: np.ndarray, starts: int = 24, resamples: int = 0) -> list[dict]:
    """Equation 1's coefficients for points [4, n] (N and D in billions, E, loss), then for bootstrap samples.

    The surface has many valleys, hence many random starts (Hoffmann et al.). A bootstrap sample draws the
    points anew, with replacement: how far its coefficients move is how far the points leave them open.
    """
    N, D, E, loss = points
    logs = torch.from_numpy(np.log([N, D, saturated(E), loss]))            # [4, n]
    # Far from ln N = 0 a prefactor and its exponent can trade against each other, and L-BFGS would crawl
    # along that valley. So until the end N and D are in units of their geometric means.
    mean_n, mean_d, _, level = logs.mean(1).tolist()
    logs[:2] -= logs[:2].mean(1, keepdim=True)
    near = [level - 1.5, 0.0, -0.3, 0.0] * 2 + [level - 0.5]               # like published laws
    spread = [0.7, 0.2, 0.2, 0.1] * 2 + [0.0]
    rng = np.random.default_rng(0)
    found = [descend(rng.normal(near, spread), *logs, 100) for _ in range(starts)]
    raws = [descend(min(found)[1], *logs, 1000)[1]]                        # to the bottom of the best valley
    samples = rng.integers(len(N), size=(resamples, len(N)))
    raws += [descend(raws[0], *logs[:, sample], 100)[1] for sample in samples]
    return [dict(A=math.exp(a - alpha * mean_n), delta=delta - gamma * mean_n, alpha=alpha, gamma=gamma,
                 B=math.exp(b - beta * mean_d), omega=omega - zeta * mean_d, beta=beta, zeta=zeta,
                 c=math.exp(c)) for a, delta, alpha, gamma, b, omega, beta, zeta, c in raws]


def findings(nats: dict[Run, list[float]], noise: float, top: int) -> str:
    """The paper's findings, each beside the difference that these runs show and the one that seeds can make.

    nats: the losses of all seeds of each run; noise: the standard deviation of one.
    """
    dense, one, eight, best = (Run("small", *shape, top) for shape in ((1, 1), (8, 1), (8, 4), (8, 8)))
    rows = []
    for finding, worse, better in (
            ("a mixture beats dense: E = 8 over 1", dense, eight),
            ("E = 8 is best: over 4", eight._replace(E=4), eight),
            ("... over 16, by little", eight._replace(E=16), eight),
            ("... over 32", eight._replace(E=32), eight),
            ("g = 8 is best: over 1", one, best),
            ("... over 4", eight, best),
            ("g = 16 gains less than 0.01 over 8", best, best._replace(g=16)),
            ("a shared expert helps", best, best._replace(shared=True))):
        gain = np.mean(nats[worse]) - np.mean(nats[better])
        error = noise * math.sqrt(1 / len(nats[worse]) + 1 / len(nats[better]))
        rows.append([finding, f"{gain:+.3f}", f"{2 * error:.3f}"])
    return markdown_table(["the paper", "nats gained here", "twice the seed noise"], rows)


def bytes_read(config: Config) -> int:
    """The weights that a phone reads for each token, in bytes. (int4_bytes counts what it holds.)"""
    return config.int4_params(config.active_routed) * 18 // 32 + 4 * config.fp32_params()


def price(nats: dict[Run, float], seconds: dict[Run, float], top: int) -> str:
    """What the mixture of E = 8 costs in training and saves in reading once it is as good as a dense model.

    When that is, its three runs of one size tell: between two of them its loss is taken as a straight line
    over the logarithm of seconds. (inf: it never gets there.)
    """
    runs = [run for run in nats if run.over_E and (run.size, run.E) == ("small", 8)]
    line = sorted((nats[run], math.log(seconds[run])) for run in runs)
    tokens = ", ".join(f"{run.tokens:,}" for run in runs)
    said = f"The small mixture of E = 8, interpolated between its runs of {tokens} tokens, is"
    for dense in (Run("large", 1, 1, top // 2), Run("small", 1, 1, top)):
        time = math.exp(np.interp(nats[dense], *zip(*line), left=math.inf)) / seconds[dense]
        read = bytes_read(runs[0].config()) / bytes_read(dense.config())
        said += (f"\n- as good as dense {dense.size} after {dense.tokens:,} tokens ({nats[dense]:.3f} nats) "
                 f"in {time:.2f} times the training time, and reads {read:.2f} times the bytes per token")
    return said


def draw(path: Path, error: float, panels: dict[str, list[tuple[str, float, float]]]) -> None:
    """Loss over something in a panel each: {what: [(label of the line, x, loss), ...]}."""
    figure, [axes] = common.new_figure(1, len(panels), (6 * len(panels), 4.5))
    for axis, (what, points) in zip(axes, panels.items()):
        for label in dict.fromkeys(label for label, _, _ in points):
            line = sorted(point[1:] for point in points if point[0] == label)
            axis.errorbar(*zip(*line), error, marker="o", capsize=3, label=label)
        axis.set(xlabel=what, ylabel="held-out nats per token, ± twice the seed noise")
        axis.set_xscale("log", base=2, subs=[1.5])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.legend(title="E = 1 is dense")
    common.save_figure(figure, path)


def fit(path: Path) -> None:
    """Print all that a finished sweep says; draw law.png and cost.png beside it.

    A file may hold sweeps of several lengths: the longest counts. Raises UserError for a missing run.
    """
    records = read_runs(path)
    top = max((run.tokens for run in records), default=TOKENS)
    seeds = defaultdict(list)           # the losses of all seeds of each run
    for run in all_runs(top):
        if run not in records:
            raise UserError(f"{path} lacks {run}: let `python -m lab.scaling_law sweep` finish")
        seeds[run._replace(seed=0)].append(records[run][0])
    nats = {run: np.mean(losses) for run, losses in seeds.items()}
    seconds = {run: run.tokens / records[run][1] for run in nats}
    MB_read = {run: bytes_read(run.config()) / 1e6 for run in nats}
    rows = []
    for run, losses in seeds.items():
        config = run.config()
        rows.append([*run[:5], f"{config.active_params() / 1e6:.2f}M", f"{config.int4_bytes() / 1e6:.1f}",
                     f"{MB_read[run]:.2f}", f"{seconds[run]:.0f}", len(losses), f"{nats[run]:.3f}"])
    heads = ["active", "INT4 MB", "read per token", "seconds", "seeds", "nats/token"]
    print(markdown_table([*Run._fields[:5], *heads], rows))
    # Three seeds say little about the noise of one shape; four shapes together say something about all.
    noise = math.sqrt(np.mean([np.var(losses, ddof=1) for losses in seeds.values() if len(losses) > 1]))
    print(f"\n{findings(seeds, noise, top)}\n\n{price(nats, seconds, top)}\n")
    over_E = [run for run in nats if run.over_E]
    over_g = [run for run in nats if run.E == 8 and run.tokens == top]
    draw(path.with_name("law.png"), 2 * noise, {
        "E": [(f"{run.size}, {run.tokens:,} tokens", run.E, nats[run]) for run in over_E],
        "g (small, E = 8)": [(f"{'with' if run.shared else 'without'} a shared expert", run.g, nats[run])
                             for run in over_g]})
    draw(path.with_name("cost.png"), 2 * noise, {
        "seconds of training": [(f"{run.size}, E = {run.E}", seconds[run], nats[run]) for run in over_E],
        f"MB that a phone reads per token (small and large, {top // 2:,} tokens)": [
            (f"E = {run.E}", MB_read[run], nats[run]) for run in over_E if run.tokens == top // 2]})
    points = np.array([(run.config().active_params() / 1e9, run.tokens / 1e9, run.E, records[run][0])
                       for run in all_runs(top) if run.over_E]).T          # [4, n]
    k, *resampled = fit_law(points, resamples=100)
    rmse = np.sqrt(np.mean((law(*points[:3], k) - points[3]) ** 2))
    rows = []
    for name, value in k.items():
        low, high = np.quantile([other[name] for other in resampled], (0.05, 0.95))
        rows.append([name, f"{value:.4g}", f"{low:.4g} to {high:.4g}", f"{PUBLISHED[name]:.4f}"])
    print(f"\nEquation 1 fitted to {points.shape[1]} runs: RMSE {rmse:.4f} nats (paper: 0.0076).\n"
          "A wide interval: these runs leave it open. Two active sizes cannot tell A and alpha from c.\n")
    print(markdown_table(["", "fitted", "90 % interval (bootstrap)", "published"], rows))

# ----------------------------------------------------------------------------------------------------------
# Command line


def amount(text: str) -> float:
    """'0.9GB' -> 9e8, '500B' -> 5e11. Raises UserError without a unit: 5 what?"""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB|M|B|T)", text)
    if not found:
        raise UserError(f"{text!r} is not an amount: write a number and its unit, such as 5GB or 500B")
    return float(found[1]) * {"M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}[found[2][0]]


def main():
    parser = common.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("plan", help="the best shape for a budget, by the published coefficients")
    sub.add_argument("--memory", type=amount, default="5GB", help="for weights and KV cache (%(default)s)")
    sub.add_argument("--context", type=number(int, 1), default=8192, help="tokens in the cache (%(default)s)")
    sub.add_argument("--tokens", type=amount, default="500B", help="tokens to train on (%(default)s)")
    sub.add_argument("--inference-gflops", type=number(float, 0), default=math.inf, help="limit of 2 N_act")
    sub.add_argument("--train-flops", type=number(float, 0), default=math.inf, help="limit of 6 N_act D")
    sub.add_argument("--out", type=Path, metavar="FILE", help="write the best config for `train.py --config`")
    sub = commands.add_parser("sweep", help="train small models on the embedded corpus")
    sub.add_argument("--run", type=Path, default="runs/sweep", metavar="FOLDER", help="(%(default)s)")
    sub.add_argument("--tokens", type=number(int, STAGE.batch), default=TOKENS, help="of the longest runs")
    sub = commands.add_parser("fit", help="fit the law to a sweep, hold the paper's findings against it")
    sub.add_argument("runs", type=Path, nargs="?", default="runs/sweep/runs.jsonl", help="(%(default)s)")
    args = parser.parse_args()
    if args.command == "plan":
        budget = Budget(args.memory, args.context, args.tokens, 1e9 * args.inference_gflops, args.train_flops)
        print(plan(budget))
        if args.out:
            with common.atomic_write(args.out) as file:
                file.write(json.dumps(dataclasses.asdict(best_shapes(budget)[0]), indent=2).encode() + b"\n")
            print(f"\n-> {args.out}: the first line; `python train.py --config {args.out}` trains it")
    elif args.command == "sweep":
        sweep(args.run, args.tokens)
    else:
        fit(args.runs)


if __name__ == "__main__":
    common.run_main(main)
