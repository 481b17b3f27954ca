"""Training: pre-training, mid-training, instruction tuning (SFT) and INT4 quantisation-aware training (QAT).

    python train.py                              all four stages of `tiny` on two CPU cores, then the export
    python train.py --resume                     go on with a run that was stopped
    python train.py sft --run runs/x             one stage, from the checkpoint of the stage before it
    python train.py sft --from MobileMoE-S-SFT --data chats --run runs/mine     ... or from a released model
    python train.py --preset S --data TEXT --tokenizer tokenizer.model --run runs/S
    torchrun --nproc_per_node=8 -- train.py ...  the same on eight GPUs (--: or torchrun takes --run itself)

Two tables below hold the recipes: the paper's (section 4), and one that two CPU cores can afford. Each stage
ends in a checkpoint (runs/NAME/pretrain.pt, midtrain.pt, sft.pt, qat.pt). log.jsonl has every logged
step; report.md and report.png sum up.

Top to bottom: the table, batches, optimizers, one step, the loop, a stage from checkpoint to checkpoint, the
report, the command line, and last what many processes need to train one model.
What it is not: the model is mobilemoe.py, the INT4 lattice quantize.py, corpus and tokenizer data.py.
"""
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint as recompute

import data
from common import (Parser, Progress, UserError, ask_llama_cpp, atomic_write, encode, encode_prompt,
                    keep_memory, load_checkpoint, load_dict, markdown_table, new_figure, number, read_json,
                    run_main, save_figure, stop_tokens, tokenizer_from_dict)
from export_mobile import export_checkpoint
from kernels import matmul_dtype
from mobilemoe import (PRESETS, Config, MobileMoE, bits_per_byte, config_from_dict, generate,
                       model_from_checkpoint)
from muon import Muon, whole
from quantize import attach, heldout_bits_per_byte, master_state_dict
from skills import is_right

# ----------------------------------------------------------------------------------------------------------
# The table: what each stage does


@dataclasses.dataclass(frozen=True)
class Stage:
    tokens: float                   # trained on, in all
    context: int                    # T
    batch: int                      # tokens per optimizer step, over all accumulation steps
    peak_lr: float
    decay: str                      # "cosine" or "linear", after the warm-up ...
    final_lr: float                 # ... to this fraction of the peak
    capacity: float | None          # drop-and-pad with this capacity factor; None is dropless
    bias_rate: float                # step of the loss-free balancing, in units of the router's score; 0: none
    mixture: dict                   # weights of data.DOMAINS, and of "chat" for packed conversations
    int4: bool = False              # fake-quantised forward (QAT)


# The paper's domains: web is prose here, knowledge includes science.
BROAD = dict(prose=62, maths=11.6, code=10, knowledge=16.4)
FOCUS = dict(prose=9, maths=21, code=22, knowledge=48)
# The embedded corpus is mostly docstrings, and its language reference would come round too often at the
# paper's weight. Conversations are mixed with text: a few hundred steps on questions alone make so small a
# model forget how documentation reads. They begin in mid-training, at a high rate, where skills are learned
# fastest.
DOCS = dict(prose=72, maths=14, code=7, knowledge=7)
DOCS_FOCUS = dict(prose=58, maths=6, code=7, knowledge=9, chat=20)
CHAT = dict(chat=76, prose=18, code=3, knowledge=3)
REPLAY = dict(chat=52, prose=38, code=5, knowledge=5)
PAPER = {   #        tokens  context  batch    peak  decay     final  capacity  bias   mixture          int4
    "pretrain": Stage( 6e12,    2048, 2**22,   4e-4, "cosine",   0.1,     1.5,  1e-3, BROAD),
    "midtrain": Stage(500e9,    8192, 2**22,   4e-5, "linear",   0.0,     1.5,  1e-3, FOCUS),
    "sft":      Stage(126e9,    8192, 2**20,   4e-6, "cosine",   0.0,    None,     0, dict(chat=1)),
    "qat":      Stage( 21e9,    8192, 2**20,   4e-6, "cosine",   0.0,    None,     0, dict(chat=1), True)}
# Minutes, not months, hence far higher rates; peak is Muon's (see `optimizers`). The first stage sees
# short rows because a token there costs less; later stages see longer ones and, as in the paper, focused
# text. The last two are dropless: no token of an answer may be lost.
TINY = {
    "pretrain": Stage(3.30e6,    256,  4096,   0.02, "cosine",   0.3,     1.5,  1e-2, DOCS),
    "midtrain": Stage(1.50e6,    512,  4096,  0.010, "linear",   0.0,     1.5,  1e-2, DOCS_FOCUS),
    "sft":      Stage(1.90e6,    512,  4096,  0.015, "cosine",   0.0,    None,     0, CHAT),
    "qat":      Stage(0.30e6,    512,  4096,  0.002, "cosine",   0.0,    None,     0, REPLAY, True)}
STAGES = tuple(TINY)        # in this order: each starts from the checkpoint of the one before. (A new stage
                            # needs a row in both tables.)
TEST = {name: dataclasses.replace(stage, tokens=8 * 256, context=64 if name == "pretrain" else 128, batch=256)
        for name, stage in TINY.items()}


def stages_for(config: Config) -> dict[str, Stage]:
    """The paper's numbers from 100M active parameters up, the scaled ones below, eight steps for tests.

    A vocabulary of at most 1,024 tokens says that this is a test.
    """
    if config.vocab_size <= 1024:
        return TEST
    return PAPER if config.active_params() >= 100e6 else TINY

# ----------------------------------------------------------------------------------------------------------
# Batches: what one step trains on


class Batches:
    """Rows for one stage, text and conversations mixed by weight.

    Batch n depends on (seed, n) alone. So a resumed run sees exactly the batches it would have seen, and
    ranks agree on a batch without talking to each other.
    """

    def __init__(self, prepared: dict, stage: Stage, seed: int):
        weights = dict(stage.mixture)
        lengths = prepared["chat"]["lengths"].tolist()
        texts = data.text_streams(prepared)
        # Where there are no conversations a stage does with text, and the other way round.
        chat_weight = weights.pop("chat", 0) * bool(lengths)
        text_weight = sum(weights.values()) * any(len(texts.get(domain, ())) > 1 for domain in weights)
        self.share = chat_weight / (chat_weight + text_weight) if chat_weight else 0
        if self.share < 1:
            self.text = data.Mixture(texts, weights, stage.context, seed)
        if self.share:
            ids, mask = (prepared["chat"][key].split(lengths) for key in ("ids", "mask"))
            examples = [(i.tolist(), m.tolist()) for i, m in zip(ids, mask)]
            self.chat = data.Packed(examples, stage.context, seed, pad_id=0)

    def batch(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """inputs and targets [rows, T] int64; in every batch the same number of rows holds conversations."""
        chats = round(rows * self.share)
        parts = [self.text.batch(step, rows - chats)] if chats < rows else []
        parts += [self.chat.batch(step, chats)] if chats else []
        inputs, targets = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts))
        return inputs, targets

# ----------------------------------------------------------------------------------------------------------
# Optimizers

# AdamW's rates as fractions of Muon's. Everything at 0.15 ended at 2.52 bits per byte; at 0.4 at 2.39, but
# with a load of 5:1; these at 2.37 and 1.5:1 (`tiny`, 0.4M tokens, one seed; docs/experiments.md).
SHARES = {"embedding": 0.4, "router": 0.1, "norms": 0.4}


def optimizers(model: MobileMoE, stages: dict[str, Stage]) -> list[torch.optim.Optimizer]:
    """AdamW for the paper's sizes; for short runs Muon on the blocks' matrices, AdamW on the rest.

    Under FSDP the parameters are new objects, so this is called last. No weight decay on norms: a decayed
    norm weight only shrinks what the next matrix reads. A group's "share" of the stage's rate survives the
    schedule, which sets "lr" at every step.
    """
    kinds = collections.defaultdict(list)
    for name, p in model.named_parameters():
        kind = ("norms" if p.dim() < 2 else "embedding" if "embed_tokens" in name else
                "router" if "router" in name else "matrices" if p.dim() == 2 else
                "gate_up" if "gate_up_proj" in name else "down")
        kinds[kind].append(p)
    paper = stages is PAPER
    muon = []
    if not paper:                   # gate and up are two matrices side by side in one tensor
        rows = (("matrices", 1, 1), ("gate_up", 2, 4), ("down", 1, 4))
        muon = [dict(params=kinds.pop(kind), side_by_side=n, every=every, share=float(every))
                for kind, n, every in rows if kind in kinds]
    decay = 0.1 if paper else 0.01
    rest = [dict(params=params, share=1.0 if paper else SHARES[kind], weight_decay=decay * (kind != "norms"))
            for kind, params in kinds.items()]
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), fused=True)
    return [Muon(muon, model.config.d_model), adam] if muon else [adam]

# ----------------------------------------------------------------------------------------------------------
# One step


def lr_factor(stage: Stage, step: int, steps: int) -> float:
    """Fraction of the peak at a step: 2 % of the stage's steps are a linear warm-up, then cosine or linear
    down to stage.final_lr.

    The warm-up lets the optimizers' averages fill before a step is large.
    """
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    curve = 0.5 * (1 + math.cos(math.pi * progress)) if stage.decay == "cosine" else 1 - progress
    return stage.final_lr + (1 - stage.final_lr) * curve


def train_step(model, opts, stage: Stage, batches: Batches, step: int, steps: int, micro_rows: int) -> dict:
    """One optimizer step -> {"loss", "load" [layers, E] or None, "dropped"}. A loss of NaN means it was
    skipped.

    Gradients of `micro_rows` rows at a time are accumulated to the stage's batch. Every rank makes the whole
    batch and takes every WORLD-th part of it. A part is the same whoever computes it, so the number of ranks
    changes nothing but the order of sums.
    """
    device = next(model.parameters()).device
    factor = lr_factor(stage, step, steps)
    inputs, targets = batches.batch(step, stage.batch // stage.context)    # [B, T]
    wanted = (targets != -100).sum()
    sums = torch.zeros(2, device=device)                                   # loss and dropped fraction
    load = None
    for x, y in list(zip(inputs.split(micro_rows), targets.split(micro_rows)))[RANK::WORLD]:
        # Rows hold different numbers of answer tokens: weight each part by its own.
        share = ((y != -100).sum() / wanted).to(device)
        loss, routing = model(x.to(device), y.to(device), capacity_factor=stage.capacity)
        sums[0] += loss.detach() * share
        if routing is not None:
            loss = loss + routing.loss
            sums[1] += routing.dropped * share
            load = routing.load if load is None else load + routing.load
        (loss * share).backward()
    total, dropped = sum_over_ranks(sums).tolist()
    load = load if load is None else sum_over_ranks(load)
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))  # over all ranks
    total = total if norm.isfinite() else math.nan      # a finite loss can have an infinite gradient
    if math.isfinite(total):                            # one bad batch must not poison the weights for ever
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = stage.peak_lr * factor * group["share"]
            opt.step()
        if load is not None and stage.bias_rate:
            # The balancing step falls with the rate, or tokens keep hopping between experts to the end.
            model.update_expert_bias(load, stage.bias_rate * factor)
    for opt in opts:
        opt.zero_grad()
    return {"loss": total, "load": load, "dropped": dropped}

# ----------------------------------------------------------------------------------------------------------
# The loop


def summarise(results: list[dict], bits: float) -> dict:
    """What the steps since the last record did, as the screen, log.jsonl and the report show it.

    Raises UserError if no loss of five steps was finite: skipping bad steps has then stopped helping.
    """
    if len(results) == 5 and not any(math.isfinite(result["loss"]) for result in results):
        raise UserError("the loss is not a number any more: lower peak_lr in the table of train.py, or look "
                        "for damaged text in the data")
    record = {"loss": round(results[-1]["loss"], 3), "bits_per_byte": round(bits, 3)}
    if results[-1]["load"] is not None:
        load = sum(result["load"] for result in results)                   # [layers, E]
        busiest = (load.amax(1) / load.mean(1)).max().item()               # of the worst layer
        dropped = sum(result["dropped"] for result in results) / len(results)
        record |= {"load": round(busiest, 2), "dropped": round(dropped, 4)}
    return record


def rows_at_a_time(stage: Stage, asked: int | None) -> int:
    """`asked`, or at most 32k tokens, which a GPU has memory for. Raises UserError if ranks cannot share."""
    rows = stage.batch // stage.context
    part = asked or max(1, min(math.ceil(rows / WORLD), 2**15 // stage.context))
    if WORLD > 1:
        print(f"{WORLD} processes, {part} rows at a time: an expert fills up, and drops, part by part. With "
              f"--micro-rows {part} another number of processes makes the same model", flush=True)
    if math.ceil(rows / part) % WORLD:  # a process with fewer parts would leave the others waiting for ever
        raise UserError(f"{rows} rows, {part} at a time, do not make as many parts for {WORLD} processes: "
                        "choose another --micro-rows or --nproc_per_node")
    return part


def train_stage(model: MobileMoE, stage: Stage, batches: Batches, prepared: dict, run: Path, begun: dict,
                resume: dict | None = None, less_memory: bool = False) -> dict:
    """Run one stage to its end -> its row of the report: the stage, tokens, seconds, speed, the last record.

    `begun` is what decides the result, among it the stage's name and "micro_rows", the rows in memory at a
    time. It stands in run/resume.pt beside weights, optimizer state and step, which `resume` takes; that is
    all of the state, since a batch depends on (seed, step) alone. `less_memory` keeps only what enters each
    block and computes the block again on the way back: a third more work. Raises UserError if the loss stays
    NaN.
    """
    device = next(model.parameters()).device
    model.compute_dtype = matmul_dtype(device)
    if stage.int4:                  # from here on every matrix that the forward pass reads is rounded
        attach(model)
    for block in model.model.layers if less_memory else ():
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
    shard(model)
    opts = optimizers(model, stages_for(model.config))      # last: sharding makes new parameters
    state = resume or {"step": 0, "seconds": 0.0}
    if resume:
        set_state_dict(model, opts, model_state_dict=resume["model"], optim_state_dict=resume["optimizer"],
                       options=WHOLE)
    steps = max(1, round(stage.tokens / stage.batch))
    progress = Progress(begun["stage"], steps * stage.batch, "tokens")
    began = time.time() - state["seconds"]
    bits = math.nan
    results = []
    saved = time.time()
    for step in range(state["step"], steps):
        results.append(train_step(model, opts, stage, batches, step, steps, begun["micro_rows"]))
        last = step + 1 == steps
        if prepared["glance"] and (last or step % max(1, steps // 10) == 0):
            bits = bits_per_byte(model, *prepared["glance"], stage.context)
        if last or step % 5 == 0:
            record = summarise(results, bits)
            if RANK == 0:
                progress.show((step + 1) * stage.batch, " | ".join(f"{k} {v}" for k, v in record.items()))
                with open(run / "log.jsonl", "a") as file:
                    file.write(json.dumps({"stage": begun["stage"], "step": step + 1, **record}) + "\n")
            results = []
        # Rank 0's clock decides for all: a rank that began to gather alone would wait for ever.
        due = RANK == 0 and not last and time.time() - saved > 60
        if sum_over_ranks(torch.tensor(float(due), device=device)):
            start = time.time()
            weights, optimizer = get_state_dict(model, opts, options=WHOLE)
            if RANK == 0:
                with atomic_write(run / "resume.pt") as file:
                    torch.save({"model": weights, "optimizer": optimizer, "step": step + 1,
                                "seconds": start - began, **begun}, file)
            # Where saving is slow it waits longer: it may cost at most a twentieth of the time.
            saved = time.time() + 20 * max(0, time.time() - start - 3)
    seconds = time.time() - began
    tokens = steps * stage.batch
    return {"stage": begun["stage"], "tokens": f"{tokens / 1e6:.2f}M", "seconds": round(seconds),
            "tokens/s": round(tokens / seconds), **record}

# ----------------------------------------------------------------------------------------------------------
# A stage, from checkpoint to checkpoint


def prepare_data(run: Path, folder: str | None, tokenizer_file: str | None, vocab_size: int) -> dict:
    """data.prepare's dict, made once per run and then read from runs/NAME/tokens.pt. Raises UserError.

    Tokens of shards stay in their folder, which may move together with the run. If it moved alone, `folder`
    says where to.
    """
    path = run / "tokens.pt"
    source = [os.path.relpath(given, run) if given else "" for given in (folder, tokenizer_file)]
    if not path.is_file():
        prepared = {"source": source, **data.prepare(folder, tokenizer_file, vocab_size)}
        run.mkdir(parents=True, exist_ok=True)      # not before the data has turned out to be good
        with atomic_write(path) as file:
            torch.save(prepared, file)
    prepared = load_dict(path)
    if prepared["shards"]:
        prepared["shards"] = str(folder or run / prepared["source"][0])
        ranks = data.load_tokenizer_file(Path(prepared["shards"], data.RANKS))
        same = data.tokenizer_to_dict(ranks) == prepared["tokenizer"]
    else:
        same = all(given in ("", made) for given, made in zip(source, prepared["source"]))
    if not same:
        raise UserError(f"{path} is of other --data or --tokenizer: leave them out, or start another --run")
    if (tokens := tokenizer_from_dict(prepared["tokenizer"]).n_vocab) > vocab_size:
        raise UserError(f"the tokenizer has {tokens:,} tokens, the model's vocabulary only {vocab_size:,}")
    return prepared


def read_resume_state(run: Path, begun: dict) -> dict | None:
    """The state that a stopped stage saved last; None if it never got as far as a save.

    `begun` holds what decides the bits and must not change: the stage's name, seed, config, tokens, rows at
    a time, and processes. Raises UserError if one of them has.
    """
    path = run / "resume.pt"
    state = load_dict(path) if path.exists() else {"stage": None}
    if state["stage"] != begun["stage"]:
        return None
    for key, value in begun.items():
        if state[key] != value:
            raise UserError(f"{run} was begun with another --{key.replace('_', '-')}: give the same again, "
                            "or undo what you changed in the table")
    print(f"{state['stage']}: resuming after step {state['step']}", flush=True)
    return state


def run_stage(name: str, args, prepared: dict, batches: Batches, device: torch.device) -> None:
    """Load what the stage starts from, train, measure, sample, save."""
    # Seeded even where a checkpoint brings the weights: nothing here may depend on what ran before.
    torch.manual_seed(args.seed)
    if name == STAGES[0]:
        model = MobileMoE(args.config)
        history = [{"stage": "`xz -9e`, same bytes",
                    "bits_per_byte": {domain: held["xz"] for domain, held in prepared["heldout"].items()}}]
    else:
        start = load_checkpoint(before(name, args))
        if start["tokenizer"] != prepared["tokenizer"]:
            raise UserError(f"{args.run} has tokens.pt and checkpoints of two tokenizers: start another run")
        model = model_from_checkpoint(start)
        history = start["history"]
    config = model.config
    stage = stages_for(config)[name]
    stage = dataclasses.replace(stage, tokens=args.tokens or stage.tokens, batch=args.batch or stage.batch,
                                peak_lr=args.lr or stage.peak_lr)
    if stage.batch % stage.context:
        raise UserError(f"--batch {stage.batch} is not a multiple of the context, {stage.context} tokens")
    begun = {"stage": name, "seed": args.seed, "config": dataclasses.asdict(config), "tokens": stage.tokens,
             "batch": stage.batch, "lr": stage.peak_lr, "nproc_per_node": WORLD,
             "micro_rows": rows_at_a_time(stage, args.micro_rows)}
    resume = read_resume_state(args.run, begun) if args.resume else None
    row = train_stage(model.to(device), stage, batches, prepared, args.run, begun, resume,
                      args.checkpoint_activations)
    # All ranks take part in this: each holds a piece of every weight.
    weights = {key: whole(tensor).cpu() for key, tensor in master_state_dict(model).items()}
    if RANK:
        return                      # rank 0 alone measures and writes
    model = MobileMoE(config).to(device)        # in one piece
    model.load_state_dict(weights)
    # Measured in the precision of training; INT4 in FP32 on its lattice, which is what the phone computes.
    model.compute_dtype = torch.float32 if stage.int4 else matmul_dtype(device)
    model = attach(model) if stage.int4 else model
    heldout = {"context": stage.context, "heldout": prepared["heldout"]}
    row["bits_per_byte"] = heldout_bits_per_byte(model, heldout)
    row["sample"] = sample(model, prepared, batches.share > 0.4, stage.context)
    history.append(row)
    if name == "sft":               # rounded without having been trained for it (PTQ): what QAT has to beat
        model.compute_dtype = torch.float32
        ptq = heldout_bits_per_byte(attach(model), heldout)
        history.append({"stage": "sft, rounded to INT4 (PTQ)", "bits_per_byte": ptq})
    config = dataclasses.replace(config, max_context=max(config.max_context, stage.context))
    # A plain dict of tensors, numbers and strings. Held-out text travels along: any script can measure.
    carried = {key: prepared[key] for key in ("tokenizer", "heldout", "questions", "sft_heldout")}
    if name != STAGES[0] and "chat_template" in start:      # a released model keeps its own way to chat
        carried |= {key: start[key] for key in ("chat_template", "eos")}
    with atomic_write(args.run / f"{name}.pt") as file:
        torch.save({"format": "mobilemoe/1", "config": dataclasses.asdict(config), "stage": name,
                    "quantized": stage.int4, "context": stage.context, "model": weights, "history": history,
                    **carried}, file)
    for leftover in (args.run / "resume.pt", *args.run.glob(".*.pt.*.part")):    # .part: a save was killed
        leftover.unlink(missing_ok=True)
    bits = ", ".join(f"{domain} {b:.3f}" for domain, b in row["bits_per_byte"].items())
    print(f"{name}: {row['seconds']} s; held-out bits per byte {bits} -> {args.run / name}.pt")
    print(row["sample"], flush=True)


def sample(model: MobileMoE, prepared: dict, chat: bool, context: int) -> str:
    """What the model says to held-out questions if it chats, after openings of held-out text if not."""
    encoding = tokenizer_from_dict(prepared["tokenizer"])
    lines = []
    with parametrize.cached():      # round INT4 weights once, not at every token
        texts = [text for text, *_ in prepared["questions"]] if chat else prepared["openings"]
        for text in texts:
            text = beginning(text, encoding, context)
            said = generate(model, encode_prompt(encoding, text, chat), 96, temperature=0.5,
                            stop=stop_tokens(encoding, model.config.vocab_size))
            lines.append((f"Q: {text}\nA: " if chat else text) + encoding.decode(list(said)))
    return "\n".join(lines)


def beginning(text: str, encoding, context: int) -> str:
    """As much of a text as leaves room in the context for an answer; where that is not all, it says so."""
    ids = encode(encoding, text).tolist()
    return text if len(ids) <= context // 3 else encoding.decode(ids[:context // 3]) + " [shortened]"

# ----------------------------------------------------------------------------------------------------------
# Report


def export_and_report(run: Path, minutes: float):
    """Write mobilemoe.gguf, ask llama.cpp what it says, sum the run up in report.md and report.png.

    Every stage has left its row in the last checkpoint's history; here they become one table. What llama.cpp
    answers comes from the file that a phone would get, not from PyTorch.
    """
    gguf = run / "mobilemoe.gguf"
    exported = export_checkpoint(run / f"{STAGES[-1]}.pt", gguf)
    checkpoint = load_checkpoint(run / f"{STAGES[-1]}.pt")
    history = checkpoint["history"]
    encoding = tokenizer_from_dict(checkpoint["tokenizer"])
    texts, kinds, expected = zip(*checkpoint["questions"])
    questions = [beginning(text, encoding, checkpoint["context"]) for text in texts]
    chats = [[dict(role="user", content=question)] for question in questions]
    try:
        answers = ask_llama_cpp(gguf, chats=chats)["answers"]
    except UserError as error:      # the report does not wait for a wheel
        answers = [f"({error})"] * len(questions)
    marks = ["" if kind == "chat" else "  [right]" if is_right(reply, answer) else f"  [wrong: {reply}]"
             for kind, reply, answer in zip(kinds, expected, answers)]
    heads = ["stage", "tokens", "seconds", "tokens/s", "load", "dropped"]
    rows = [[row.get(head, "") for head in heads] + [f"{bits:.3f}" for bits in row["bits_per_byte"].values()]
            for row in history]
    parts = [f"# Report of {run}: {minutes:.1f} minutes on {torch.get_num_threads()} threads",
             markdown_table(heads + list(checkpoint["heldout"]), rows),
             "Right: held-out bits per byte. Load: the busiest expert of the worst layer against the mean.",
             "The exported file, and what llama.cpp answers from it to held-out questions:",
             "\n".join(["```", exported, *map("Q: {}\nA: {}{}".format, questions, answers, marks), "```"])]
    for row in history:
        if "sample" in row:
            parts.append(f"A sample after {row['stage']}:\n\n```\n{row['sample']}\n```")
    text = "\n\n".join(parts) + "\n"
    with atomic_write(run / "report.md") as file:
        file.write(text.encode())
    print(f"\n{text}")
    draw_report(run, [row["stage"] for row in history if "sample" in row])


def draw_report(run: Path, stages: list[str]):
    """report.png: training loss, held-out bits per byte and expert load over the steps of all stages."""
    figure, [axes] = new_figure(1, 3, (15, 4.5))
    records = []
    for line in open(run / "log.jsonl"):
        with contextlib.suppress(ValueError):       # a killed run may have left half a line
            records.append(json.loads(line))
    start = 0
    for stage in stages:
        # By step, once each: a run that was resumed has logged some steps twice.
        mine = {record["step"]: record for record in records if record["stage"] == stage}
        for axis, what in zip(axes, ("loss", "bits_per_byte", "load")):
            steps = [start + step for step in mine]
            axis.plot(steps, [record.get(what) for record in mine.values()], label=stage)
        start += max(mine, default=0)
    for axis, title in zip(axes, ("training loss, nats per token", "held-out bits per byte, first domain",
                                  "load: busiest expert of the worst layer / mean")):
        axis.set(xlabel="steps", title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, run / "report.png")

# ----------------------------------------------------------------------------------------------------------
# Command line


def read_arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("stage", nargs="?", default="all", choices=("all", *STAGES), help="(%(default)s)")
    parser.add_argument("--preset", default="tiny", choices=PRESETS, help="(%(default)s)")
    parser.add_argument("--config", metavar="FILE", help="a JSON file of config fields, in place of a preset")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="for checkpoints and report (runs/PRESET)")
    parser.add_argument("--data", metavar="FOLDER", help="text (.txt, .jsonl, .jsonl.gz, .parquet) or shards"
                        " of `python data.py tokenize`, in place of the embedded corpus")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tiktoken rank file, such as Llama-3's")
    parser.add_argument("--from", type=Path, dest="start", metavar="FOLDER", help="start sft or qat from a "
                        "released model's folder, with its tokenizer, instead of the stage before")
    parser.add_argument("--tokens", type=number(float, 1), help="train one stage on so many")
    parser.add_argument("--batch", type=number(int, 1), help="tokens per step of one stage")
    parser.add_argument("--lr", type=number(float, 0), help="peak learning rate of one stage")
    parser.add_argument("--micro-rows", type=number(int, 1), help="rows in memory at a time")
    parser.add_argument("--checkpoint-activations", action="store_true", help="less memory, more time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    args = parser.parse_args()
    if args.stage == "all" and (args.tokens or args.batch or args.lr or args.start):
        raise UserError("--tokens, --batch, --lr and --from want a single stage: name it first")
    if args.start and args.stage not in ("sft", "qat"):
        raise UserError("--from starts sft or qat: earlier stages need more text than anybody has at hand")
    if not args.device.startswith(("cpu", "cuda")):
        raise UserError(f"--device {args.device}: the expert layer is written for cpu and cuda, choose one")
    missing = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)
    if WORLD > 1 and missing:
        raise UserError(f"WORLD_SIZE is set, {', '.join(sorted(missing))} not: start the script by torchrun")
    args.run = args.run or Path("runs") / (Path(args.config).stem if args.config else args.preset)
    args.config = config_from_dict(read_json(args.config)) if args.config else PRESETS[args.preset]
    return args


def before(name: str, args) -> Path:
    """The checkpoint that a stage starts from."""
    return args.start or args.run / f"{STAGES[STAGES.index(name) - 1]}.pt"


def finished_stages(run: Path) -> list[str]:
    """Stages whose checkpoint is there and grew out of the one before: each history continues the last one.

    Where an earlier stage was trained again, or a new one put between, those after it no longer count.
    """
    finished = []
    history = []
    for name in STAGES:
        path = run / f"{name}.pt"
        later = load_checkpoint(path)["history"] if path.exists() else []
        if len(later) <= len(history) or later[:len(history)] != history:
            break
        history = later
        finished.append(name)
    return finished


def main():
    start = time.time()
    args = read_arguments()
    # What is asked for is checked before anything is read or written.
    stages = STAGES if args.stage == "all" else (args.stage,)
    finished = finished_stages(args.run) if args.stage == "all" else []
    there = [name for name in STAGES if (args.run / f"{name}.pt").exists()]
    if args.stage == "all" and not args.resume and (there or (args.run / "resume.pt").exists()):
        raise UserError(f"{args.run} already holds a run: --resume continues it, --run FOLDER starts another")
    if args.stage in STAGES[1:]:    # its shape is that of the checkpoint it starts from, not --preset's
        args.config = config_from_dict(load_checkpoint(before(args.stage, args))["config"])
    args.tokenizer = args.tokenizer or args.start
    # Rank 0 makes tokens.pt, the others wait for it in join_ranks and read it.
    prepared = None if RANK else prepare_data(args.run, args.data, args.tokenizer, args.config.vocab_size)
    device = join_ranks(args.device)
    prepared = prepared or prepare_data(args.run, args.data, args.tokenizer, args.config.vocab_size)
    if {"sft", "qat"} & set(stages) and not len(prepared["chat"]["lengths"]):
        raise UserError(f"{args.run / 'tokens.pt'} holds no conversations, which sft and qat learn from: "
                        'delete it and add "messages" to --data, or run `pretrain` and `midtrain` only')
    # All of them now, so that what cannot work is refused before hours of training. Each stage has a seed of
    # its own, or mid-training would begin with the windows that pre-training began with.
    batches = {name: Batches(prepared, stages_for(args.config)[name], args.seed + STAGES.index(name))
               for name in stages if name not in finished}
    for name in batches:
        run_stage(name, args, prepared, batches[name], device)
        sum_over_ranks(torch.zeros(1, device=device))       # wait: the next stage reads the checkpoint
    if WORLD > 1:
        dist.destroy_process_group()
    # A single stage ends with its checkpoint. The whole recipe ends with the file for the phone.
    if args.stage == "all" and RANK == 0:
        export_and_report(args.run, (time.time() - start) / 60)
    elif stale := [name for name in there if STAGES.index(name) > STAGES.index(stages[-1])]:
        print(f"{args.run} still holds {', '.join(stale)} of before: --resume trains them anew", flush=True)

# ----------------------------------------------------------------------------------------------------------
# Many processes, one model. torchrun starts the same script WORLD times and tells each which one it is. On
# its own, the script is rank 0 of 1, and everything here does nothing.

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)        # files know nothing of ranks
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(device: str) -> torch.device:
    """Meet the other processes -> the device of this one. Raises UserError if there is no such device."""
    if WORLD > 1 and device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {device!r} on this computer: leave --device out, or say cpu") from None
    if WORLD > 1:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if RANK:
            sys.stdout = open(os.devnull, "w")      # one voice is enough; errors (stderr) all may tell
    return torch.device(device)


def sum_over_ranks(x: Tensor) -> Tensor:
    """In place, the same on every rank. As all must arrive before any goes on, it also serves to wait."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def shard(model: MobileMoE) -> None:
    """FSDP2: each rank keeps 1/WORLD of every parameter, its gradient and its optimizer state, cut along
    dimension 0.

    A block's weights are gathered just before it computes and given up after. The embedding, read by both
    ends of the model, belongs to the root, whose weights are whole while the forward pass runs. Every rank
    must have built the same model.
    """
    if WORLD > 1:
        mesh = dist.init_device_mesh(next(model.parameters()).device.type, (WORLD,))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
            # Gradients are to be summed (FSDP's default is the mean): each part is already weighted.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


if __name__ == "__main__":
    keep_memory()
    run_main(main)
