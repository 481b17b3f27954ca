"""The on-device scaling law: which mixture of experts is worth its memory, its training and its work per token.

MobileMoE (arXiv 2605.27358, section 3) predicts the loss from active parameters N, training tokens D and experts E,

    L(N, D, E) = A E^delta N^(alpha + gamma ln E) + B E^omega D^(beta + zeta ln E) + c            (equation 1)

and minimises it under a phone's memory (equation 5) and budgets of FLOPs. Three parts, each of which works alone:

    python scaling_law.py plan --memory 5GB --context 8192 --tokens 500B --inference-gflops 0.6 --out phone.json
    python scaling_law.py sweep                         train a grid of small models, 55 minutes on two cores
    python scaling_law.py fit runs/sweep/runs.jsonl     fit the nine coefficients, hold the paper's findings against the runs

`plan` believes the published coefficients; its JSON is a config for `python train.py --config phone.json`. `sweep` and `fit`
ask whether the findings also hold in models a hundred times smaller. What they are not: a way to predict a phone's model from
runs of a minute. A law fitted to those describes those.

The law is from Ludziejewski et al. 2025 (arXiv 2502.05172), which extends Hoffmann et al. 2022 (Chinchilla) by E.
"""
import argparse
import collections
import contextlib
import dataclasses
import io
import itertools
import json
import math
import multiprocessing.connection
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mobilemoe import PRESETS, Config, MobileMoE, UserError, atomic_write, bits_per_byte, run_main
from train import TINY, Batches, Stage, prepare_data, train_stage

# ----------------------------------------------------------------------------------------------------------------------
# The law. N and D are in billions, losses in nats per token

PUBLISHED = dict(A=0.2388, delta=0.0906, alpha=-0.2833, gamma=0.0387,
                 B=0.6019, omega=1.0593, beta=-0.3210, zeta=-0.3684, c=1.9730)
NAMES = tuple(PUBLISHED)
E_START, E_MAX = 1, 32
# Where those were fitted. 0.3 and 0.9 are rounded: the released models have 272M and 922M active parameters.
FITTED_ACTIVE, FITTED_TOKENS, FITTED_EXPERTS = (0.25, 0.95), (100, 500), (1, 2, 4, 8, 16, 32)


def saturated(E):
    """Effective number of experts: 1 for a dense model, close to E for few, never above E_MAX. Array in, array out.

    Without it the powers of E would promise gains without end; the tenth expert helps less than the second.
    """
    return 1 / (1 / (E - 1 + 1 / (1 / E_START - 1 / E_MAX)) + 1 / E_MAX)


def law(N, D, E, k: dict = PUBLISHED):
    """Equation 1: nats per token of a model with N billion active parameters after D billion tokens. Arrays broadcast."""
    x = np.log(saturated(E))
    return (k["A"] * np.exp(k["delta"] * x) * N ** (k["alpha"] + k["gamma"] * x)
            + k["B"] * np.exp(k["omega"] * x) * D ** (k["beta"] + k["zeta"] * x) + k["c"])


def chinchilla(E: float, k: dict = PUBLISHED) -> dict:
    """With E fixed, equation 1 is Chinchilla's law: L = A N^alpha + B D^beta + c with the coefficients returned."""
    x = float(np.log(saturated(E)))
    return dict(A=k["A"] * math.exp(k["delta"] * x), alpha=k["alpha"] + k["gamma"] * x,
                B=k["B"] * math.exp(k["omega"] * x), beta=k["beta"] + k["zeta"] * x, c=k["c"])

# ----------------------------------------------------------------------------------------------------------------------
# plan: the best shape for a budget


def parse_amount(text: str, units: dict[str, float], what: str) -> float:
    """'5GB' -> 5e9 by {"GB": 1e9, ...}; {"": 1} is for numbers without a unit. Where one belongs, "5" is refused: 5 what?"""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([A-Za-z]*)", text)
    value = float(found[1]) * units.get(found[2], 0) if found else 0
    if not 0 < value < math.inf:
        unit = f"and then {' or '.join(units)}, such as 5{[*units][0]}" if all(units) else "without a unit"
        raise UserError(f"{text!r} is not {what}: write a number above 0 {unit}")
    return value


@dataclasses.dataclass(frozen=True)
class Budget:
    memory: float                       # bytes, for weights and KV cache together
    context: int                        # tokens in that cache
    tokens: float                       # trained on
    inference_flops: float = math.inf   # per token
    train_flops: float = math.inf       # in all

    def bytes(self, config: Config) -> float:
        """Equation 5: INT4 weights and 8-bit KV cache. A .gguf is larger by its scales, half a bit per weight."""
        return 4 / 8 * config.total_params() + config.kv_bytes(self.context)

    def admits(self, config: Config) -> bool:
        return (self.bytes(config) <= self.memory and config.inference_flops_per_token() <= self.inference_flops
                and config.train_flops_per_token() * self.tokens <= self.train_flops)

    def loss(self, config: Config) -> float:
        return float(law(config.active_params() / 1e9, self.tokens / 1e9, config.n_experts))


def candidates() -> list[Config]:
    """The paper's family, deep and thin: d_model / n_layers 36 to 44 (S, M and L: 38 to 40), from 39M parameters up."""
    # Equation 1 knows neither g nor s: g = 8 and the shared expert are what the paper's sweeps found best.
    dense, mixture = dict(granularity=1, shared_expert=False), dict(granularity=8, shared_expert=True)
    return [Config(d, layers, d // 64, 4, 4 * d, n_experts=E, **(dense if E == 1 else mixture))
            for d in range(256, 8193, 256) for layers in range(math.ceil(d / 44), d // 36 + 1) for E in FITTED_EXPERTS]


def within(shapes: list[Config], budget: Budget) -> list[Config]:
    """The shapes that the budget admits. Raises UserError naming what even the smallest needs."""
    if admitted := [shape for shape in shapes if budget.admits(shape)]:
        return admitted
    least = min(shapes, key=budget.bytes)
    raise UserError(f"no model fits this budget: the smallest needs {budget.bytes(least) / 1e9:.3f} GB at context "
                    f"{budget.context:,}, {least.inference_flops_per_token() / 1e9:.3f} GFLOPs per token and "
                    f"{least.train_flops_per_token() * budget.tokens:.2e} training FLOPs")


def in_fitted_range(config: Config) -> bool:
    return FITTED_ACTIVE[0] <= config.active_params() / 1e9 <= FITTED_ACTIVE[1]


def describe(config: Config) -> str:
    return (f"E={config.n_experts}, {config.n_layers} x {config.d_model}, {config.active_params() / 1e9:.3f}B active"
            + ("" if in_fitted_range(config) else " (extrapolated)"))


def plan(budget: Budget) -> tuple[Config, str]:
    """The best config within the budget, and all that is to be said about it."""
    every = candidates()
    shapes = within(every, budget)
    known = [shape for shape in shapes if in_fitted_range(shape)]
    ranking = sorted(known or shapes, key=budget.loss)
    first, billions, (low, high) = ranking[0], budget.tokens / 1e9, FITTED_TOKENS
    lines = ["layers x d    E  g shared    N_act  N_total  INT4 GB  KV GB  GFLOPs/token  train FLOPs    loss   to the first"]
    for shape in ranking[:8]:
        lines.append(f"{f'{shape.n_layers} x {shape.d_model}':<11}{shape.n_experts:>4}{shape.granularity:>3}"
                     f"{'yes' if shape.shared_expert else 'no':>7}{shape.active_params() / 1e9:>8.3f}B"
                     f"{shape.total_params() / 1e9:>8.2f}B{shape.total_params() / 2e9:>9.2f}"
                     f"{shape.kv_bytes(budget.context) / 1e9:>7.2f}{shape.inference_flops_per_token() / 1e9:>14.2f}"
                     f"{shape.train_flops_per_token() * budget.tokens:>13.2e}{budget.loss(shape):>8.4f}   "
                     f"{budget.loss(shape) - budget.loss(first):+.4f} loss, "
                     f"{(budget.bytes(shape) - budget.bytes(first)) / 1e9:+.2f} GB")
    lines.append("g and shared come from the paper's sweeps, not from equation 1, which knows only E, N_act and D.")
    if not low <= billions <= high:
        lines.append(f"EXTRAPOLATED: the law was fitted to {low} to {high}B tokens, not to {billions:g}B.")
    if not known:
        lines.append("EXTRAPOLATED: within this budget no shape has the 0.3 to 0.9B active parameters the law was fitted to.")
    elif not in_fitted_range(boldest := min(shapes, key=budget.loss)):
        lines.append(f"Beyond the fitted 0.3 to 0.9B active the law would take {describe(boldest)}: "
                     f"{budget.loss(boldest):.4f}.")

    lines += ["", f"Loss over E at fixed active size, {billions:g}B tokens:",
              "   N_act" + "".join(f"{f'E={E}':>9}" for E in FITTED_EXPERTS)]
    for N in (0.3, 0.5, 0.9):
        lines.append(f"    {N:.1f}B" + "".join(f"{law(N, billions, E):>9.4f}" for E in FITTED_EXPERTS))
    least, pushed = (min(FITTED_EXPERTS, key=lambda E: law(0.3, tokens, E)) for tokens in (500, 6000))
    lines += [f"At 0.3B and 500B tokens E = {least} has the least, E = 8 {law(0.3, 500, 8) - law(0.3, 500, least):.4f} more: "
              f"a flat valley.\nPushed to 6T tokens, 12 times what was fitted, it is E = {pushed} (extrapolated).",
              "", "Loss over E at fixed memory, the best shape for each E within the budget:"]
    for E in FITTED_EXPERTS:
        if of_E := [shape for shape in shapes if shape.n_experts == E]:
            shape = min(of_E, key=budget.loss)
            lines.append(f"{budget.loss(shape):>9.4f}   {describe(shape)}")
    idle = within(every, Budget(budget.memory, budget.context, budget.tokens))      # nothing but memory is scarce
    idle = min([shape for shape in idle if in_fitted_range(shape)] or idle, key=budget.loss)
    lines += [f"Without limits on FLOPs the same memory would take {describe(idle)}: {budget.loss(idle):.4f}.",
              "", f"The released shapes at {billions:g}B tokens, against the best with no more memory and FLOPs per token:"]
    for name in "SML":
        shape = PRESETS[name]
        own = Budget(budget.bytes(shape), budget.context, budget.tokens, shape.inference_flops_per_token())
        rival = min(within(every, own), key=budget.loss)
        apart = budget.loss(shape) - budget.loss(rival)
        lines.append(f"  {name}{budget.loss(shape):>9.4f}   {apart:+.4f} from {describe(rival)}")
    return first, "\n".join(lines)

# ----------------------------------------------------------------------------------------------------------------------
# sweep: small models on the embedded corpus

# Two sizes in the paper's proportions (d_model / n_layers about 40, d_ff = 4 d_model). The thinnest expert that INT4 groups
# allow has width 32 = 512 / 16: the series over g runs at the small size.
VOCABULARY = 2048
SIZES = {"small": dict(d_model=128, n_layers=3, n_heads=4, n_kv_heads=1, d_head=32, d_ff=512),
         "large": dict(d_model=160, n_layers=4, n_heads=5, n_kv_heads=1, d_head=32, d_ff=640)}
EXPERTS, GRANULARITIES, SEEDS = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16), (0, 1, 2)
# Every E at the small size and the most tokens; four of them at a half and a quarter of the tokens, at both sizes, for the law.
# Tokens are what a mixture's lead needs (small, E = 8, one seed: 0.04 nats after 0.74M, 0.10 after 2.2M): few runs, but longer.
FEW_EXPERTS = (1, 2, 8, 32)
# The series over E has g = 4. With g = 1 a token has one expert, whose normalised weight is 1 whatever the router says: the
# loss sends the router no gradient, and E would be judged by experts chosen blindly.
BASE_G, SHARED_G, LIKELY_E = 4, 8, 8        # LIKELY_E: for estimates, until the runs say which E is best
PARTS = (1, 2, 4)           # token counts top/4, top/2, top (small only): separate runs, each with a schedule of its own
SHORTEST = 4                # least `top`, in batches of top/4
CLOSE = 0.02                # nats; shapes that differ by less get a second seed
STAGE = TINY["pretrain"]
START, YARDSTICK = 8, 13    # seconds: importing torch and measuring held-out text; see `decide_grid`


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of the grid. All sizes, E, g and seeds share data, batch, learning rates and schedule."""
    size: str
    E: int
    g: int
    shared: bool
    tokens: int
    seed: int = 0

    @property
    def id(self) -> str:
        return f"{self.size}-E{self.E}-g{self.g}{'-shared' if self.shared else ''}-{self.tokens}-seed{self.seed}"

    def config(self) -> Config:
        config = dataclasses.replace(PRESETS["tiny"], vocab_size=VOCABULARY, n_experts=self.E, granularity=self.g,
                                     shared_expert=self.shared, **SIZES[self.size])
        # The slices of a dense feed-forward are added up, each with weight 1. So must the active experts be, or a sweep over g
        # compares strengths of the feed-forward (bits per byte after 0.13M tokens, E = 8, g = 4, one seed, for a scale of
        # 1, 2, 4: 2.655, 2.607, 2.575; dense 2.601).
        return dataclasses.replace(config, routed_scale=float(config.active_routed))

    def stage(self) -> Stage:
        return dataclasses.replace(STAGE, tokens=self.tokens)


def base(size: str, E: int, tokens: int) -> Run:
    """A run of the series over E."""
    return Run(size, E, BASE_G if E > 1 else 1, False, tokens)


def wanted(losses: dict[str, float], top: int) -> list[Run]:
    """All runs of the sweep, most important first, as far as the losses so far (by id) decide it: the best E decides the rest.

    A pure function of what is on the disk, so a sweep that was killed goes on as if nothing had happened.
    """
    over_E = [base("small", E, top) for E in EXPERTS]
    fewer = [top * part // PARTS[-1] for part in reversed(PARTS[:-1])]
    for_the_law = [base(size, E, tokens) for size in SIZES for tokens in fewer for E in FEW_EXPERTS]
    if any(run.id not in losses for run in over_E):
        return over_E + for_the_law

    def close(series):
        least = min(losses[run.id] for run in series)
        return [run for run in series if losses[run.id] < least + CLOSE]
    winner = min((run for run in over_E if run.E > 1), key=lambda run: losses[run.id])
    over_g = [dataclasses.replace(winner, g=g) for g in GRANULARITIES]
    pair = [dataclasses.replace(winner, g=SHARED_G, shared=shared) for shared in (False, True)]
    # What every claim rests on has three seeds, and the first two before the law's runs, should time be short.
    headline = [dataclasses.replace(run, seed=seed) for seed in SEEDS[1:] for run in (over_E[0], winner)]
    runs = over_E + over_g + pair + headline[:2] + for_the_law + headline[2:]
    if all(run.id in losses for run in over_g + pair):
        repeated = [*pair, *close(over_E), *close(over_g)]
        runs += [dataclasses.replace(run, seed=seed) for seed in SEEDS[1:2] for run in repeated]
    return list(dict.fromkeys(runs))                                        # in order, each once


def expected(top: int) -> list[Run]:
    """The whole grid if LIKELY_E wins, with the next E and three granularities close behind."""
    losses = {}
    while new := [run for run in wanted(losses, top) if run.id not in losses]:
        losses |= {run.id: 3.0 + (run.E not in (LIKELY_E, 2 * LIKELY_E)) + (run.g < 4) + 0.01 * run.E / LIKELY_E for run in new}
    return wanted(losses, top)


def estimate(run: Run, pace: float) -> float:
    """Seconds on one core, `pace` times those of the machine on which the three rates below were measured."""
    c = run.config()
    # Matmuls of the active part; Muon, once a batch, on all experts whether used or not; a copy of the token for each expert.
    experts, copies = c.total_params() - c.active_params(), 0 if c.dense else c.n_layers * c.active_routed * c.d_model
    return pace * (START + (1.15e-10 * c.active_params() + 1.0e-11 * experts + 0.5e-8 * copies) * run.tokens)


def train_one(run: Run, config: Config, stage: Stage, folder: Path):
    """A worker process: train one model, measure it on all held-out docstrings, append one line to runs.jsonl."""
    log = open(folder / "sweep.log", "a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    # A sweep that is killed must not leave workers behind: whoever starts it again would share the cores with them.
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)        # two processes of one thread do more than one of two: matrices this small mostly wait
    torch.manual_seed(run.seed)
    prepared = prepare_data(folder, None, None, config.vocab_size)
    model = MobileMoE(config)
    summary = train_stage(model, run.id, stage, Batches(prepared, stage, run.seed), prepared, folder)
    held = next(iter(prepared["heldout"].values()))
    bits = bits_per_byte(model, held["ids"], held["bytes"], stage.context)
    record = {"id": run.id, **dataclasses.asdict(run), "active": config.active_params(), "total": config.total_params(),
              "nats": round(bits * math.log(2) * held["bytes"] / (len(held["ids"]) - 1), 5), "bits_per_byte": round(bits, 5),
              "seconds": round(summary["seconds"], 2), "load": 1.0, "dropped": 0.0}
    if "load" in summary:
        load = torch.tensor(summary["load"])                               # [layers, E]
        record |= {"load": round((load.amax(1) / load.mean(1)).max().item(), 2), "dropped": round(summary["dropped"], 4)}
    with open(folder / "runs.jsonl", "ab") as file:
        file.write(json.dumps(record).encode() + b"\n")     # one write of one short line: two workers do not interleave
        file.flush()
        os.fsync(file.fileno())


def read_runs(path: Path) -> list[dict]:
    """The finished runs, one JSON object a line. Raises UserError naming the first line that is none."""
    needed = dict(id=str, size=str, E=int, g=int, shared=bool, tokens=int, seed=int, active=int, total=int, nats=float,
                  bits_per_byte=float, seconds=float, load=float)
    records = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            good = all(type(record[name]) is kind for name, kind in needed.items()) and record["size"] in SIZES
            good = good and record["seed"] >= 0
            good = good and all(0 < record[name] < math.inf for name in ("E", "g", "tokens", "active", "nats", "seconds"))
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise UserError(f"{path}, line {number} is not a finished run: delete the line, and `sweep` trains that run again")
        records[record["id"]] = record
    return list(records.values())


def drop_torn_line(path: Path):
    """A sweep killed while it wrote leaves half a line at the end: forget it, so that the next run starts its own line."""
    text = path.read_bytes() if path.is_file() else b""
    if text and not text.endswith(b"\n"):
        with atomic_write(path) as file:
            file.write(text[:text.rfind(b"\n") + 1])


def decide_grid(folder: Path, minutes: float, workers: int, prepared: dict) -> tuple[int, float]:
    """(tokens of the longest runs, pace of this machine). Decided once and kept: runs of other lengths do not compare."""
    path = folder / "grid.json"
    if path.is_file():
        grid = json.loads(path.read_text())
        return grid["top"], grid["pace"]
    # A yardstick: eight steps tell how this machine compares with the one the rates in `estimate` were measured on.
    run = base("small", EXPERTS[-1], 8 * STAGE.batch)
    batches = Batches(prepared, run.stage(), 0)
    with contextlib.redirect_stdout(io.StringIO()):
        summary = train_stage(MobileMoE(run.config()), "yardstick", run.stage(), batches, prepared, folder)
    pace, unit = summary["seconds"] / YARDSTICK, STAGE.batch * PARTS[-1]    # whole steps for every part of `top`

    def minutes_for(units: int) -> float:       # with a tenth to spare
        return sum(estimate(run, pace) for run in expected(units * unit)) / 0.9 / workers / 60
    if minutes_for(SHORTEST) > minutes:
        raise UserError(f"--minutes {minutes:g} is too short for the grid, here at least {minutes_for(SHORTEST):.1f}")
    units = next(units for units in itertools.count(SHORTEST) if minutes_for(units + 1) > minutes)
    with atomic_write(path) as file:
        file.write(json.dumps({"top": units * unit, "pace": pace, "minutes": minutes}).encode())
    return units * unit, pace


def sweep(folder: Path, minutes: float, workers: int):
    """Train what is wanted and not yet there, `workers` runs at a time. Starts nothing that would not end in time."""
    os.environ["OMP_NUM_THREADS"] = "1"     # inherited by the workers, where it must be set before torch is imported
    torch.set_num_threads(1)
    prepared = prepare_data(folder, None, None, VOCABULARY)
    began, path = time.time(), folder / "runs.jsonl"
    drop_torn_line(path)
    top, pace = decide_grid(folder, minutes, workers, prepared)
    losses = {record["id"]: record["nats"] for record in (read_runs(path) if path.exists() else [])}
    grid = [run for run in expected(top) if run.id not in losses]
    print(f"{'run':<34}{'tokens':>10}{'about':>8}")
    for run in grid:
        print(f"{run.id:<34}{run.tokens:>10,}{estimate(run, pace):>6.0f} s")
    print(f"{len(grid)} runs, {len(losses)} more are there; {workers} at a time, one thread each: about "
          f"{sum(estimate(run, pace) for run in grid) / workers / 60:.0f} of {minutes:g} minutes. Shown as if E = {LIKELY_E} "
          "were best;\ngranularity and shared expert follow the best E, more seeds follow small differences", flush=True)

    spawn, running, spent, foreseen = multiprocessing.get_context("spawn"), {}, 0.0, 0.0
    while True:
        left = began + 60 * minutes - time.time()
        todo = [run for run in wanted(losses, top) if run.id not in losses and run not in running.values()]
        slower = max(1.0, spent / max(foreseen, 1e-9))                      # than estimated, so far
        in_time = [run for run in todo if estimate(run, pace) * slower < left]
        for run in in_time[:workers - len(running)]:
            worker = spawn.Process(target=train_one, args=(run, run.config(), run.stage(), folder), daemon=True)
            worker.start()
            running[worker] = run
        if not running:
            break
        multiprocessing.connection.wait([worker.sentinel for worker in running])
        for worker in [worker for worker in running if not worker.is_alive()]:
            run, records = running.pop(worker), {record["id"]: record for record in (read_runs(path) if path.exists() else [])}
            if run.id not in records:
                raise UserError(f"{run.id} ended without a result: its last words are in {folder / 'sweep.log'}")
            losses, record = {id: record["nats"] for id, record in records.items()}, records[run.id]
            spent, foreseen = spent + record["seconds"] + START * pace, foreseen + estimate(run, pace)
            rest = sum(estimate(run, pace) for run in expected(top) if run.id not in losses) * spent / foreseen / workers
            print(f"{run.id:<34}{record['nats']:>8.4f} nats/token {record['bits_per_byte']:.4f} bits/byte "
                  f"{run.tokens / record['seconds']:>7,.0f} tok/s | {len(losses)} done, {rest / 60:.0f} min left", flush=True)
    if todo:
        print(f"{len(todo)} runs no longer fit into {minutes:g} minutes; the same command trains them:",
              ", ".join(run.id for run in todo))
    print(f"{(time.time() - began) / 60:.1f} minutes -> {path}; `python scaling_law.py fit {path}` reads it")

# ----------------------------------------------------------------------------------------------------------------------
# fit: what the runs say

HUBER = 1e-3        # residuals of ln L beyond this count linearly: a run gone wrong must not bend the law (Hoffmann et al.)


def from_raw(raw: list[float], mean_n: float, mean_d: float) -> dict:
    """What L-BFGS moves -> coefficients. Raw A, B and c are logarithms, so none turns negative; ln N and ln D are centred."""
    a, delta, alpha, gamma, b, omega, beta, zeta, c = raw
    return dict(A=math.exp(a - alpha * mean_n), delta=delta - gamma * mean_n, alpha=alpha, gamma=gamma,
                B=math.exp(b - beta * mean_d), omega=omega - zeta * mean_d, beta=beta, zeta=zeta, c=math.exp(c))


def to_raw(k: dict, mean_n: float, mean_d: float) -> list[float]:
    return [math.log(k["A"]) + k["alpha"] * mean_n, k["delta"] + k["gamma"] * mean_n, k["alpha"], k["gamma"],
            math.log(k["B"]) + k["beta"] * mean_d, k["omega"] + k["zeta"] * mean_d, k["beta"], k["zeta"], math.log(k["c"])]


def fit_law(N, D, E, loss, *, without: tuple[str, ...] = (), starts: int = 24, first: dict | None = None) -> dict:
    """Coefficients that minimise the Huber loss of ln(predicted) - ln(measured). N, D (billions), E, loss: arrays [n].

    The surface has many valleys, hence L-BFGS from many `starts`; or from a fit known already, `first`. Coefficients named in
    `without` are left out of the law: how much worse it then predicts is what they explain.
    """
    n, d, x, y = (torch.from_numpy(np.log(values)) for values in (N, D, saturated(E), loss))           # [n]
    # Far from ln N = 0 a prefactor and its exponent can trade against each other, and L-BFGS would crawl along that valley.
    mean_n, mean_d, level = n.mean().item(), d.mean().item(), y.mean().item()
    n, d = n - mean_n, d - mean_d
    kept = torch.tensor([float(name not in without) for name in NAMES], dtype=torch.float64)
    absent = torch.tensor([-20.0 if name in "ABc" else 0.0 for name in NAMES], dtype=torch.float64) * (1 - kept)

    def objective(raw):                                                    # [9] -> []
        a, delta, alpha, gamma, b, omega, beta, zeta, c = raw * kept + absent
        terms = (a + delta * x + (alpha + gamma * x) * n, b + omega * x + (beta + zeta * x) * d, c.expand_as(x))
        return F.huber_loss((torch.stack(terms).logsumexp(0) - y) / HUBER, torch.zeros_like(y))

    def descend(raw, iterations):                                          # -> value, [9]
        raw = torch.tensor(raw, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([raw], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe",
                                   tolerance_grad=1e-6, tolerance_change=1e-10)

        def closure():
            solver.zero_grad()
            value = objective(raw)
            value.backward()
            return value
        solver.step(closure)
        value = objective(raw).item()
        return value if math.isfinite(value) else math.inf, (raw * kept + absent).tolist()

    if first:
        return from_raw(descend(to_raw(first, mean_n, mean_d), 100)[1], mean_n, mean_d)
    rng, found = np.random.default_rng(0), []
    size, spread = [level - 1.5, 0.0, -0.3, 0.0], [0.7, 0.2, 0.2, 0.1]     # of the terms of published laws, and how far around
    for _ in range(starts):
        found.append(descend([*rng.normal(size, spread), *rng.normal(size, spread), level - 0.5], 100))
    return from_raw(descend(min(found)[1], 1000)[1], mean_n, mean_d)       # the best one to the bottom of its valley


def rmse(N, D, E, loss, k: dict) -> float:
    return float(np.sqrt(np.mean((law(N, D, E, k) - loss) ** 2)))


def bootstrap(points: np.ndarray, k: dict, times: int = 100) -> dict[str, np.ndarray]:
    """90 % intervals [2] of the coefficients: refits to `times` samples of the points [4, n], drawn with replacement."""
    rng, n = np.random.default_rng(0), points.shape[1]
    fits = [fit_law(*points[:, rng.integers(n, size=n)], first=k) for _ in range(times)]
    return {name: np.quantile([fitted[name] for fitted in fits], (0.05, 0.95)) for name in NAMES}


def shape_of(record: dict) -> Run:
    """The run with seed 0: what records of several seeds have in common."""
    return Run(*(record[name] for name in ("size", "E", "g", "shared", "tokens")))


class Results:
    """Finished runs by shape, the seeds of each together. Asking for a shape that is not there raises UserError."""

    def __init__(self, records: list[dict], source: Path):
        self.source, self.by_shape = source, collections.defaultdict(list)
        for record in records:
            self.by_shape[shape_of(record)].append(record)
        self.top = max(shape.tokens for shape in self.by_shape)
        repeated = [[record["nats"] for record in same] for same in self.by_shape.values() if len(same) > 1]
        if not repeated:
            raise UserError(f"{source} has no shape with two seeds, and without noise no difference means anything: "
                            "let the sweep finish")
        # Two or three seeds say little about the noise of one shape; all shapes together say something about everyone's.
        self.noise = math.sqrt(sum(np.var(nats) * len(nats) for nats in repeated) / sum(len(nats) - 1 for nats in repeated))
        # Granularity and shared expert were tried at the E that was best then.
        if not (shared := [shape for shape in self.by_shape if shape.shared]):
            raise UserError(f"{source} has no run with a shared expert: let the sweep finish")
        self.shared, self.over_g = shared[0], {g: dataclasses.replace(shared[0], shared=False, g=g) for g in GRANULARITIES}

    def mean(self, shape: Run, what: str = "nats") -> float:
        if shape not in self.by_shape:
            raise UserError(f"{self.source} has no {shape.id}: let the sweep finish")
        return float(np.mean([record[what] for record in self.by_shape[shape]]))

    def gain(self, worse: Run, better: Run) -> tuple[float, float]:
        """Nats by which `better` is better, and twice the standard error that seeds alone give such a difference."""
        gain = self.mean(worse) - self.mean(better)
        return gain, 2 * self.noise * math.sqrt(1 / len(self.by_shape[worse]) + 1 / len(self.by_shape[better]))


def law_points(records: list[dict]) -> np.ndarray:
    """N, D (billions), E, loss [4, n] of the runs that the law describes, the series over E. Raises UserError for too few."""
    series = [record for record in records if shape_of(record) == base(record["size"], record["E"], record["tokens"])]
    n = len({shape_of(record) for record in series})
    # Sizes are told apart by name: the router makes the active parameters of one series differ a little.
    sizes, tokens, E = (len({record[axis] for record in series}) for axis in ("size", "tokens", "E"))
    if n < 12 or sizes < 2 or tokens < 3 or E < 4:
        raise UserError(f"too few points for nine coefficients: {n} over {sizes} sizes, {tokens} token counts and {E} of E "
                        "(12 over 2, 3 and 4 are the least): let the sweep finish")
    return np.array([(record["active"] / 1e9, record["tokens"] / 1e9, record["E"], record["nats"]) for record in series]).T


def tables(results: Results) -> list[str]:
    """Markdown: the loss over E at equal active parameters and tokens; then every small shape at the largest token count."""
    lines = ["| active, tokens | " + " | ".join("dense" if E == 1 else f"E = {E}" for E in EXPERTS) + " |",
             "|---|" + "---:|" * len(EXPERTS)]
    for size in SIZES:
        for tokens in sorted({shape.tokens for shape in results.by_shape if shape.size == size}):
            cells = [f"{results.mean(run):.3f}" if (run := base(size, E, tokens)) in results.by_shape else "" for E in EXPERTS]
            active = base(size, 1, tokens).config().active_params()
            lines.append(f"| {active / 1e6:.2f}M, {tokens / 1e6:.2f}M | " + " | ".join(cells) + " |")
    lines += ["", "(empty: not trained, see FEW_EXPERTS)", "",
              f"| small, {results.top / 1e6:.2f}M tokens | nats/token | bits/byte | seeds | tokens/s | load max:mean |",
              "|---|---:|---:|---:|---:|---:|"]
    rows = [shape for shape in results.by_shape if (shape.size, shape.tokens) == ("small", results.top)]
    for shape in sorted(rows, key=lambda shape: (shape.E, shape.shared, shape.g)):
        lines.append(f"| E = {shape.E}, g = {shape.g}{', shared' if shape.shared else ''} | {results.mean(shape):.3f} | "
                     f"{results.mean(shape, 'bits_per_byte'):.3f} | {len(results.by_shape[shape])} | "
                     f"{shape.tokens / results.mean(shape, 'seconds'):,.0f} | {results.mean(shape, 'load'):.1f} |")
    return lines


def findings(results: Results) -> list[str]:
    """The paper's three findings, each beside what these runs show and the difference that noise alone can make."""
    lines = [f"Seed noise {results.noise:.4f} nats per token (standard deviation, all shapes with several seeds together); "
             "+- is twice the noise of a difference.",
             "", "1. Paper: E = 8 is best; beyond it the curve is flat, and E = 32 loses."]
    for size, series in zip(SIZES, (EXPERTS, FEW_EXPERTS)):
        complete = [tokens for tokens in {shape.tokens for shape in results.by_shape if shape.size == size}
                    if all(base(size, E, tokens) in results.by_shape for E in series)]
        tokens = max(complete or [shape.tokens for shape in results.by_shape if shape.size == size])
        run = {E: base(size, E, tokens) for E in series}
        best = min(series[1:], key=lambda E: results.mean(run[E]))
        ahead, noise = results.gain(run[1], run[best])
        beyond, noise_beyond = results.gain(run[8], run[best])
        loses, noise_loses = results.gain(run[32], run[8])
        verdict = (f"Does not hold: E = {best} is better than 8 by more than noise" if beyond > noise_beyond else
                   "Holds" if loses > noise_loses else "Holds in part: E = 8 is as good as any, but E = 32 does not lose")
        lines.append(f"   {size}, {tokens / 1e6:.2f}M tokens, of E = {', '.join(map(str, series[1:]))}: best is E = {best}, "
                     f"ahead of dense by {ahead:.3f} +- {noise:.3f}"
                     + (f", of E = 8 by {beyond:.3f} +- {noise_beyond:.3f}" if best != 8 else "")
                     + f";\n   E = 8 is ahead of 32 by {loses:.3f} +- {noise_loses:.3f}. {verdict}.")
    run, shared = results.over_g, results.shared
    best = min(GRANULARITIES, key=lambda g: results.mean(run[g]))
    behind, noise = results.gain(run[8], run[best])
    finer, noise_finer = results.gain(run[8], run[16])
    slower = results.mean(run[16], "seconds") / results.mean(run[8], "seconds") - 1
    verdict = (f"Does not hold: g = {best} is better than 8 by more than noise" if behind > noise else
               "Holds" if finer < 0.01 else "Holds in part: g = 8 is as good as any, but g = 16 gains 0.01 or more")
    lines += ["2. Paper: g = 8 is best; g = 16 takes half as long again for less than 0.01.",
              f"   E = {shared.E}: best is g = {best}, ahead of g = 8 by {behind:.3f} +- {noise:.3f}; g = 16 is ahead of 8 by "
              f"{finer:.3f} +- {noise_finer:.3f} and takes {slower:+.0%} time. {verdict}."]
    helps, noise = results.gain(run[SHARED_G], shared)
    verdict = "Holds" if helps > noise else "Does not hold" if helps < -noise else "Undecided: less than noise"
    return lines + ["3. Paper: a shared expert helps.",
                    f"   E = {shared.E}, g = {SHARED_G}: it lowers the loss by {helps:.3f} +- {noise:.3f}. {verdict}."]


def fit(path: Path) -> str:
    """Everything there is to say about a runs file; the picture, law.png, is drawn beside it."""
    records = read_runs(path)
    points = law_points(records)
    results = Results(records, path)
    lines = [*tables(results), "", *findings(results), ""]
    k = fit_law(*points)
    intervals = bootstrap(points, k)
    lines += [f"Equation 1 fitted to {points.shape[1]} runs: RMSE {rmse(*points, k):.4f} nats (the paper's fit: 0.0076)", "",
              "| | fitted | 90 % interval (bootstrap) | published |", "|---|---:|---:|---:|"]
    for name in NAMES:
        low, high = intervals[name]
        lines.append(f"| {name} | {k[name]:.4g} | {low:.4g} to {high:.4g} | {PUBLISHED[name]:.4f} |")
    lines += ["", "A wide interval: these runs leave a coefficient open (two active sizes cannot tell A and alpha from c).",
              "With E fixed the same law is Chinchilla's, L = A N^alpha + B D^beta + c:", "",
              "| E | A | alpha | B | beta |", "|---:|---:|---:|---:|---:|"]
    for E in EXPERTS:
        reduced = chinchilla(E, k)
        lines.append(f"| {E} | " + " | ".join(f"{reduced[name]:.4g}" for name in ("A", "alpha", "B", "beta")) + " |")
    try:
        draw(results, path.with_name("law.png"))
        lines += ["", f"-> {path.with_name('law.png')}"]
    except ImportError:
        lines += ["", "no picture: `pip install matplotlib` draws it"]
    return "\n".join(lines)


def draw(results: Results, path: Path):
    """Loss at equal active parameters and tokens against E, g and the shared expert; loss against memory with its frontier."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (over_E, over_g, over_shared, over_memory) = plt.subplots(1, 4, figsize=(17, 4.3), layout="constrained")
    colors = dict(zip(SIZES, ("tab:blue", "tab:orange")))

    def plot(axes, xs, runs, **style):
        axes.errorbar(xs, [results.mean(run) for run in runs], 2 * results.noise, marker="o", capsize=3, **style)
    for size, tokens in sorted({(shape.size, shape.tokens) for shape in results.by_shape}):
        runs = [run for E in EXPERTS if (run := base(size, E, tokens)) in results.by_shape]
        plot(over_E, [run.E for run in runs], runs, color=colors[size], alpha=0.3 + 0.7 * tokens / results.top,
             label=f"{size}, {tokens / 1e6:.2f}M tokens")
    over_E.set(xscale="log", xlabel="E (1 is dense)", ylabel="held-out nats per token, +- twice the seed noise",
               title="equal active parameters and tokens")
    over_E.set_xticks(EXPERTS, EXPERTS)
    plot(over_g, GRANULARITIES, results.over_g.values())
    over_g.set(xscale="log", xlabel="g", title=f"granularity, small, E = {results.shared.E}")
    over_g.set_xticks(GRANULARITIES, GRANULARITIES)
    plot(over_shared, [0, 1], [results.over_g[SHARED_G], results.shared], ls="none")
    over_shared.set(xlim=(-0.5, 1.5), title=f"shared expert, small, E = {results.shared.E}, g = {SHARED_G}")
    over_shared.set_xticks([0, 1], ["without", "with"])
    both = max(shape.tokens for shape in results.by_shape if shape.size == "large")             # tokens that both sizes had
    budget, frontier = Budget(math.inf, STAGE.context, both), []
    equal = [shape for shape in results.by_shape if shape.tokens == both]
    for shape in sorted(equal, key=lambda shape: budget.bytes(shape.config())):
        point = budget.bytes(shape.config()) / 1e6, results.mean(shape)
        over_memory.plot(*point, "o", color=colors[shape.size])
        if not frontier or point[1] < frontier[-1][1]:
            frontier.append(point)
            over_memory.annotate(f"E = {shape.E}", point, xytext=(4, 4),
                                 textcoords="offset points", fontsize=7)
    over_memory.step(*zip(*frontier), where="post", color="black", lw=1, label="frontier: least loss for the memory")
    over_memory.set(xscale="log", xlabel="MB of INT4 weights and KV cache (eq. 5)",
                    title=f"both sizes, dense and g = {BASE_G}, {both / 1e6:.2f}M tokens")
    for axes in (over_E, over_g, over_shared, over_memory):
        axes.grid(alpha=0.3)
    figure.legend(*over_E.get_legend_handles_labels(), loc="outside lower left", ncols=5, fontsize=7)
    over_memory.legend(fontsize=7)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)

# ----------------------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("plan", help="the best shape for a budget, by the published coefficients")
    sub.add_argument("--memory", default="5GB", help="of the phone, for weights and KV cache (%(default)s)")
    sub.add_argument("--context", default="8192", help="tokens the KV cache holds (%(default)s)")
    sub.add_argument("--tokens", default="500B", help="tokens to train on (%(default)s)")
    sub.add_argument("--inference-gflops", metavar="X", help="limit of 2 N_act, the work for a token, such as 0.6")
    sub.add_argument("--train-flops", metavar="Y", help="limit of 6 N_act D, such as 1e21")
    sub.add_argument("--out", type=Path, metavar="FILE", help="write the best config as JSON, for `train.py --config FILE`")
    sub = commands.add_parser("sweep", help="train a grid of small models on the embedded corpus")
    sub.add_argument("--minutes", type=float, default=55, help="at most 60; decides the grid the first time (%(default)s)")
    sub.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each (%(default)s)")
    sub.add_argument("--run", type=Path, default=Path("runs/sweep"), metavar="FOLDER", help="for runs.jsonl (%(default)s)")
    sub = commands.add_parser("fit", help="fit the law to finished runs, and hold the paper's findings against them")
    sub.add_argument("runs", type=Path, help="the runs.jsonl of a sweep")
    args = parser.parse_args()
    if args.command == "plan":
        inference, train = (math.inf if text is None else parse_amount(text, {"": unit}, what) for text, unit, what in (
            (args.inference_gflops, 1e9, "GFLOPs per token"), (args.train_flops, 1, "training FLOPs")))
        if not re.fullmatch(r"[1-9]\d{0,8}", args.context):
            raise UserError(f"{args.context!r} is not a context: write a whole number of tokens, such as 8192")
        budget = Budget(parse_amount(args.memory, {"GB": 1e9, "MB": 1e6}, "a memory"), int(args.context),
                        parse_amount(args.tokens, {"B": 1e9, "T": 1e12, "M": 1e6}, "a number of tokens"), inference, train)
        config, text = plan(budget)
        print(text)
        if args.out:
            with atomic_write(args.out) as file:
                file.write(json.dumps(dataclasses.asdict(config), indent=2).encode() + b"\n")
            print(f"\n-> {args.out}: the first line's config; `python train.py --config {args.out}` trains it")
    elif args.command == "sweep":
        if not (0 < args.minutes <= 60 and args.workers > 0):
            raise UserError("--minutes lies between 0 and 60, and --workers is at least 1")
        sweep(args.run, args.minutes, args.workers)
    else:
        if not args.runs.is_file():
            raise UserError(f"no runs at {args.runs}: `python scaling_law.py sweep` makes them")
        print(fit(args.runs))


if __name__ == "__main__":
    run_main(main)
