"""Training: pre-training, mid-training, instruction tuning (SFT) and INT4 quantisation-aware training (QAT).

    python train.py                              all four stages of the `tiny` model on two CPU cores, then the export
    python train.py --resume                     go on with a run that was stopped
    python train.py sft --run runs/x             one stage, from the checkpoint of the stage before it
    python train.py --preset S --data TEXT --tokenizer tokenizer.model --run runs/S
    torchrun --nproc_per_node=8 -- train.py ...     the same on eight GPUs (--: or torchrun takes --run for its own)

The paper's recipe (section 4) in one table below, beside the one that two CPU cores can afford. Each stage ends in a checkpoint
(runs/NAME/pretrain.pt, midtrain.pt, sft.pt, qat.pt); log.jsonl has every logged step; report.md and report.png sum up.

In the order of the data's way: the table, tokens, ranks, optimizers, one stage, checkpoints, report, command line.
What it is not: the model is mobilemoe.py, the INT4 lattice quantize.py, corpus and batches data.py.
"""
import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parametrize

import data
from mobilemoe import (
    PRESETS,
    Config,
    MobileMoE,
    UserError,
    atomic_write,
    bits_per_byte,
    config_from_dict,
    encode_chat,
    generate,
    load_checkpoint,
    model_from_checkpoint,
    run_main,
    stop_tokens,
    tokenizer_from_dict,
)
from quantize import attach, heldout_bits_per_byte, master_state_dict

# ----------------------------------------------------------------------------------------------------------------------
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
    bias_rate: float                # step of the loss-free balancing; 0 freezes expert_bias
    mixture: dict                   # weights of data.DOMAINS, and of "chat" for packed conversations
    int4: bool = False              # fake-quantised forward (QAT)


STAGES = ("pretrain", "midtrain", "sft", "qat")

# The paper's domains: web is prose here, knowledge includes science. SFT and QAT mix conversations as the data has them.
BROAD, FOCUS = dict(prose=62, maths=11.6, code=10, knowledge=16.4), dict(prose=9, maths=21, code=22, knowledge=48)
# The embedded corpus is two thirds docstrings, and its language reference would go round too often at the paper's weight.
DOCS, DOCS_FOCUS = dict(prose=78, maths=8, code=7, knowledge=7), dict(prose=68, maths=13, code=8, knowledge=11)
CHAT = dict(chat=75, prose=14.2, code=3.6, knowledge=3.6, maths=3.6)
REPLAY = dict(chat=45, prose=35, code=8, knowledge=6, maths=6)
PAPER = {   #           tokens  context   batch     peak  decay     final  capacity  bias   mixture
    "pretrain": Stage(    6e12,    2048, 2 ** 22,   4e-4, "cosine",   0.1,     1.5,  1e-3, BROAD),
    "midtrain": Stage(  500e9,     8192, 2 ** 22,   4e-5, "linear",   0.0,     1.5,  1e-3, FOCUS),
    "sft":      Stage(  126e9,     8192, 2 ** 20,   4e-6, "cosine",   0.0,    None,     0, dict(chat=1)),
    "qat":      Stage(   21e9,     8192, 2 ** 20,   4e-6, "cosine",   0.0,    None,     0, dict(chat=1), int4=True),
}
# Minutes instead of months: much higher rates (peak_lr is Muon's, see `optimizers`), and conversations mixed with text, for a
# few hundred steps on questions alone make so small a model forget how documentation reads. SFT, tried on one mid-trained
# model: 2048 tokens a batch (3 of 4 rows are conversations) at 0.0035 got 60 % of held-out sums right, 4096 (5 of 8) at 0.005
# 41 %, for 1.340 and 1.333 bits per byte of docstrings.
TINY = {
    "pretrain": Stage(  2.45e6,     256,    4096,   0.02, "cosine",   0.3,     1.5,  1e-2, DOCS),
    "midtrain": Stage(  0.95e6,     512,    4096,  0.006, "linear",   0.0,     1.5,  1e-2, DOCS_FOCUS),
    "sft":      Stage(  0.35e6,     512,    2048, 0.0035, "cosine",   0.0,    None,     0, CHAT),
    "qat":      Stage(  0.15e6,     512,    4096,  0.002, "cosine",   0.0,    None,     0, REPLAY, int4=True),
}
TEST = {name: dataclasses.replace(stage, tokens=8 * 256, context=64 if name == "pretrain" else 128, batch=256)
        for name, stage in TINY.items()}


def stages_for(config: Config) -> dict[str, Stage]:
    """The paper's numbers for models of its size, the scaled ones below 100M active, eight steps for a test's vocabulary."""
    if config.vocab_size <= 1024:
        return TEST
    return PAPER if config.active_params() >= 100e6 else TINY

# ----------------------------------------------------------------------------------------------------------------------
# Tokens: made once per run, then read from runs/NAME/tokens.pt


def prepare_data(run: Path, folder: str | None, tokenizer_file: str | None, vocab_size: int) -> dict:
    """Corpus -> tokenizer -> token streams, as a dict that torch.save can write.

    {"source", "shards": folder of the training text if it stays on the disk, "tokenizer", "train": {domain: ids},
    "heldout": {domain: {"ids", "bytes"}}, "xz": {domain: bits per byte}, "chat": {"ids", "mask", "lengths"},
    "sft_heldout" (JSON), "questions": one of each kind of those}
    """
    path = run / "tokens.pt"
    source = [str(folder or ""), str(tokenizer_file or "")]
    if path.is_file():
        try:
            prepared = torch.load(path, weights_only=True)
        except Exception:           # as in load_checkpoint: damage shows itself in many ways
            raise UserError(f"{path} is damaged: delete it, and the run's checkpoints, which know only its tokenizer") from None
        if any(given not in ("", made) for given, made in zip(source, prepared["source"])):
            raise UserError(f"{path} was made from other --data or --tokenizer: leave them out, or start another --run")
        return prepared
    start = time.time()
    print("data: " + (f"reading {folder}" if folder else "documentation and source of Python, NumPy and PyTorch"), flush=True)
    if folder and data.is_sharded(folder):
        if tokenizer_file:
            raise UserError(f"{folder} holds tokens already, made with its own tokenizer: leave --tokenizer out")
        prepared = {"source": source, "shards": str(folder), **prepare_shards(folder)}
    else:
        prepared = {"source": source, "shards": "", **prepare_text(folder, tokenizer_file, vocab_size)}
    require_room(prepared, vocab_size)
    unseen = {example["kind"]: example["messages"] for example in reversed(json.loads(prepared["sft_heldout"]))}
    prepared["questions"] = [messages[0]["content"] for messages in unseen.values() if messages[0]["role"] == "user"]
    run.mkdir(parents=True, exist_ok=True)      # not before the data has turned out to be good
    with atomic_write(path) as file:
        torch.save(prepared, file)
    tokens = {domain: len(stream) for domain, stream in text_streams(prepared).items()}
    print(f"data: {sum(tokens.values()):,} tokens ({', '.join(f'{d} {n:,}' for d, n in tokens.items())}), "
          f"{len(prepared['chat']['lengths']):,} conversations, {time.time() - start:.0f} s", flush=True)
    return prepared


def prepare_text(folder: str | None, tokenizer_file: str | None, vocab_size: int) -> dict:
    """From text that fits in memory: the embedded corpus, or a folder's."""
    corpus = data.folder_corpus(folder) if folder else data.embedded_corpus()
    if tokenizer_file:
        encoding = data.load_tokenizer_file(tokenizer_file)
    elif vocab_size > 65536:
        raise UserError(f"a vocabulary of {vocab_size:,} is not learned from a folder: give --tokenizer FILE "
                        "(a Llama-3 tokenizer.model or any tiktoken rank file)")
    else:
        print(f"data: learning {vocab_size:,} tokens by byte-pair encoding", flush=True)
        encoding = data.learn_tokenizer(corpus, vocab_size)
    prepared = {"tokenizer": data.tokenizer_to_dict(encoding), "train": {}, "heldout": {}, "xz": {}}
    for domain in data.DOMAINS:
        prepared["train"][domain] = torch.from_numpy(data.tokenize_documents(corpus.train[domain], encoding))
        if held := corpus.heldout[domain]:
            # Measured five times in a run: 100 kB a domain, from all over it, are plenty.
            held = held[::math.ceil(sum(map(len, held)) / 100_000)]
            prepared["heldout"][domain] = {"ids": torch.from_numpy(data.tokenize_documents(held, encoding).astype(np.int32)),
                                           "bytes": sum(len(text.encode()) for text in held)}
            prepared["xz"][domain] = data.xz_bits_per_byte(held)
    chats = [data.encode_example(encoding, example["messages"]) for example in corpus.sft_train]
    prepared["chat"] = {"ids": torch.tensor([i for ids, _ in chats for i in ids], dtype=torch.int32),
                        "mask": torch.tensor([m for _, mask in chats for m in mask], dtype=torch.bool),
                        "lengths": torch.tensor([len(ids) for ids, _ in chats], dtype=torch.int64)}
    # evaluate.py asks all of these questions, train.py one of each kind
    return prepared | {"sft_heldout": json.dumps(corpus.sft_heldout)}


def prepare_shards(folder: str) -> dict:
    """From `python data.py tokenize`: training text stays on the disk, all else is as small as from text."""
    found = data.open_shards(folder)
    heldout = {domain: held | {"ids": torch.from_numpy(held["ids"])} for domain, held in found["heldout"].items()}
    chat = {key: torch.from_numpy(array) for key, array in found["chat"].items()}
    return found | {"train": {}, "heldout": heldout, "chat": chat, "sft_heldout": json.dumps(found["sft_heldout"])}


def require_room(prepared: dict, vocab_size: int):
    if (tokens := tokenizer_from_dict(prepared["tokenizer"]).n_vocab) > vocab_size:
        raise UserError(f"the tokenizer has {tokens:,} tokens, the model's vocabulary only {vocab_size:,}")


def text_streams(prepared: dict) -> dict:
    """{domain: an array of tokens}, in memory or mapped from the shards."""
    if prepared["shards"]:
        return {domain: stream for domain, stream in data.shard_streams(prepared["shards"]).items() if domain != "chat"}
    return {domain: ids.numpy() for domain, ids in prepared["train"].items()}


class Batches:
    """Rows for one stage, text and conversations mixed by weight; batch n is a function of (seed, n), so resuming is exact."""

    def __init__(self, prepared: dict, stage: Stage, seed: int):
        self.share, self.text, self.chat = 0.0, None, None
        weights = dict(stage.mixture)
        chat_weight, lengths = weights.pop("chat", 0), prepared["chat"]["lengths"].tolist()
        if weights:
            self.text = data.Mixture(text_streams(prepared), weights, stage.context, seed)
        if chat_weight:
            ids, mask = (prepared["chat"][key].split(lengths) for key in ("ids", "mask"))
            examples = [(i.tolist(), m.tolist()) for i, m in zip(ids, mask)]
            self.chat = data.Packed(examples, stage.context, seed, pad_id=0)
            self.share = chat_weight / (chat_weight + sum(weights.values()))

    def batch(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """inputs and targets [rows, T] int64; in each batch the same number of rows holds conversations."""
        chats = round(rows * self.share)
        parts = [source.batch(step, n) for source, n in ((self.text, rows - chats), (self.chat, chats)) if n]
        inputs, targets = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts))
        return inputs, targets

# ----------------------------------------------------------------------------------------------------------------------
# Many processes, one model. torchrun starts the same script WORLD times and tells each which one it is. On its own, the
# script is rank 0 of 1, and everything here does nothing.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(device: str) -> torch.device:
    """Meet the other processes; -> the device of this one."""
    try:
        if WORLD > 1 and device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {device!r} on this computer: leave --device out, or say cpu") from None
    if WORLD == 1:
        return torch.device(device)
    # A long limit: the others wait while rank 0 makes the tokens. Should a rank die, torchrun ends the others at once.
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(hours=12))
    if RANK:
        sys.stdout = open(os.devnull, "w")      # one voice is enough; what goes wrong (stderr) all may say
    return torch.device(device)


def wait_for_ranks() -> None:
    if WORLD > 1:
        dist.barrier()


def sum_over_ranks(x: Tensor) -> Tensor:
    """In place, the same on every rank."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def shard(model: MobileMoE) -> None:
    """FSDP2: each rank keeps 1/WORLD of every parameter (and so of its gradient and optimizer state), cut along dimension 0.

    A block's weights are gathered just before it computes and given up after. The embedding, read by both ends of the model,
    belongs to the root, whose weights are whole while the forward pass runs. Every rank must have built the same model.
    """
    if WORLD > 1:
        mesh = dist.init_device_mesh(next(model.parameters()).device.type, (WORLD,))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
            # Gradients are to be summed (FSDP's default is the mean): each part's loss is already weighted by its share.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def whole(x: Tensor) -> Tensor:
    """The full tensor from its parts on all ranks, which must all ask for it; any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This rank's part, sharing memory; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def part_like(x: Tensor, p: Tensor) -> Tensor:
    """Inverse of `whole`: of an `x` that every rank has, the part that this rank keeps of `p`."""
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else x


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors on the CPU for rank 0 to save, nothing for the others: files do not know how many ranks wrote them."""
    full = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)                  # all ranks take part in this
        if RANK == 0:
            full[name] = tensor.cpu()
    return full


def gather_optimizer(opt: torch.optim.Optimizer) -> dict:
    state = opt.state_dict()
    return {**state, "state": {i: gather(entry) for i, entry in state["state"].items()}}


def load_optimizer(opt: torch.optim.Optimizer, state: dict) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]     # the order of the state's keys
    parts = {i: {name: part_like(x, params[i]) if x.shape == params[i].shape else x for name, x in entry.items()}
             for i, entry in state["state"].items()}                        # AdamW's step is a single number
    opt.load_state_dict({**state, "state": parts})

# ----------------------------------------------------------------------------------------------------------------------
# Optimizers


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose update is made orthogonal: every direction of a matrix moves equally far (Jordan et al. 2024).

    torch.optim.Muon takes single matrices only; an expert stack [E, in, out] is E matrices, orthogonalised in one batch.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @staticmethod
    def orthogonalise(g: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., rows, cols] -> nearest (semi-)orthogonal matrices, by five steps of a quintic Newton-Schulz iteration."""
        x = (g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype).reshape(-1, *g.shape[-2:])
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x                         # the small Gram matrix is the cheap one
        for _ in range(5):
            gram = x @ x.mT
            gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
            x = torch.baddbmm(x, gram, x, beta=3.4445)
        return (x.mT if tall else x).reshape(g.shape)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(momentum, group["momentum"])               # Nesterov
                # FSDP cuts along dimension 0. That leaves a stack of experts whole matrices: each rank does its own. A single
                # matrix loses rows, and all rows decide which directions are equally long: gather it, keep our part after.
                g = whole(g) if g.dim() == 2 else local(g)
                # gate and up lie side by side in one tensor but are two matrices: orthogonalise each for itself.
                parts = g.chunk(2, dim=-1) if group["paired"] else (g,)
                update = torch.cat([self.orthogonalise(part, matmul_dtype(p.device)) for part in parts], dim=-1)
                rows, cols = parts[0].shape[-2:]
                # An orthogonal matrix has smaller entries the longer it is: scale by its length over its width. But experts are
                # slices of a dense feed-forward, whose weights must move as far as they would there however thin the slice, so
                # over d_model. (scaling_law.py, small, E = 16, 0.36M tokens, over the width and over d_model: g = 16 4.45
                # and 4.37 nats; g = 8 beside a shared expert 4.38 and 4.34.)
                width = min(rows, cols) if p.dim() == 2 else rows if group["paired"] else cols
                update = local(part_like(update, p)) if p.dim() == 2 else update
                local(p).add_(update.to(p.dtype), alpha=-group["lr"] * (max(rows, cols) / width) ** 0.5)


def matmul_dtype(device: torch.device) -> torch.dtype:
    """BF16 where the hardware multiplies it faster than FP32: CUDA, AMX, AVX512-BF16. FP32 elsewhere."""
    if device.type == "cpu" and not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    return torch.bfloat16


def mixed_precision(device: torch.device) -> torch.autocast:
    """Matmuls in matmul_dtype; weights, gradients and all that is summed for long stay FP32."""
    dtype = matmul_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# AdamW's rates as fractions of Muon's, found in runs of `tiny` over 0.4M tokens, one seed each; held-out bits per byte of
# docstrings after 0.35M: everything at 0.15 of Muon's 0.02: 2.52 (the dense twin: 2.53); at 0.4: 2.39, but a router that fast
# keeps the load at 5:1 and drops 9 % of the routes; router back at 0.1: 2.37, load 1.5:1, 0.2 % dropped. Muon at 0.035 instead
# of 0.02 was worse and dropped 9 %; initial weights of 0.05 instead of 0.02 did no better (2.41).
EMBEDDING_SHARE, ROUTER_SHARE, NORM_SHARE = 0.4, 0.1, 0.4


def optimizers(model: MobileMoE, stages: dict[str, Stage]) -> list[torch.optim.Optimizer]:
    """AdamW for the paper's sizes; for short runs Muon on the blocks' matrices and AdamW on embedding, router and norms.

    No weight decay on norms. A group's "share" of the stage's rate survives the schedule, which sets "lr" each step.
    """
    adam = dict(betas=(0.9, 0.95), fused=True)
    embedding, router, norms, paired, matrices = [], [], [], [], []
    for name, p in model.named_parameters():
        kind = (norms if p.dim() < 2 else embedding if "embed_tokens" in name else router if "router" in name
                else paired if "gate_up_proj" in name else matrices)
        kind.append(p)
    if stages is PAPER:
        groups = [dict(params=embedding + router + paired + matrices, weight_decay=0.1, share=1.0),
                  dict(params=norms, weight_decay=0.0, share=1.0)]
        return [torch.optim.AdamW(groups, **adam)]
    groups = [dict(params=embedding, weight_decay=0.01, share=EMBEDDING_SHARE),
              dict(params=router, weight_decay=0.01, share=ROUTER_SHARE),
              dict(params=norms, weight_decay=0.0, share=NORM_SHARE)]
    muon = [dict(params=matrices, paired=False, share=1.0), dict(params=paired, paired=True, share=1.0)]
    return [Muon([group for group in muon if group["params"]], lr=0.0),
            torch.optim.AdamW([group for group in groups if group["params"]], **adam)]


def lr_factor(stage: Stage, step: int, steps: int) -> float:
    """Fraction of the peak at a step: 2 % linear warm-up, then cosine or linear down to stage.final_lr."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    curve = 0.5 * (1 + math.cos(math.pi * progress)) if stage.decay == "cosine" else 1 - progress
    return stage.final_lr + (1 - stage.final_lr) * curve

# ----------------------------------------------------------------------------------------------------------------------
# One stage


def train_step(model, opts, stage: Stage, batches: Batches, step: int, steps: int, micro_rows: int) -> dict:
    """One optimizer step. Gradients of `micro_rows` rows at a time are accumulated to the stage's batch.

    Every rank makes the whole batch (it is a function of the seed and the step) and takes every WORLD-th part of it. A part
    is the same whoever computes it, so the number of ranks changes nothing but the order of sums.
    """
    device = next(model.parameters()).device
    factor = lr_factor(stage, step, steps)
    inputs, targets = batches.batch(step, stage.batch // stage.context)    # [B, T]
    wanted = (targets != -100).sum()
    sums, load = torch.zeros(2, device=device), None                       # loss and dropped fraction
    for x, y in list(zip(inputs.split(micro_rows), targets.split(micro_rows)))[RANK::WORLD]:
        # Rows hold different numbers of answer tokens: weight each part by its own, or the split would change the loss.
        share = ((y != -100).sum() / wanted).to(device)
        with mixed_precision(device):
            loss, routing = model(x.to(device), y.to(device), capacity_factor=stage.capacity)
            objective = loss
            if routing is not None:
                objective = loss + model.config.z_loss * routing.z_loss
                if model.config.balance_loss:       # nowhere in the presets, and times 0 it would still cost its gradient
                    objective = objective + model.config.balance_loss * routing.balance_loss
        (objective * share).backward()
        sums[0] += loss.detach() * share
        if routing is not None:
            load = routing.load if load is None else load + routing.load
            sums[1] += routing.dropped * share
    total, dropped = sum_over_ranks(sums).tolist()
    if load is not None:
        load = sum_over_ranks(load)
    if not whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).isfinite():      # the norm over all ranks
        total = math.nan            # a finite loss can have an infinite gradient
    if math.isfinite(total):        # one bad batch must not poison the weights for ever
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = stage.peak_lr * factor * group["share"]
            opt.step()
        if load is not None and stage.bias_rate:
            # The balancing step falls with the learning rate: a constant 1e-2 keeps tokens hopping between experts to the end.
            model.update_expert_bias(load, stage.bias_rate * factor)
    for opt in opts:
        opt.zero_grad()
    return {"loss": total, "load": load, "dropped": dropped}


class Progress:
    """The live line on a terminal, plain lines elsewhere, and log.jsonl."""

    def __init__(self, run: Path, name: str, steps: int, batch: int):
        self.log, self.name, self.steps, self.batch = run / "log.jsonl", name, steps, batch
        self.began = self.printed = time.time()
        self.first_step = None

    def show(self, step: int, record: dict, last: bool):
        now = time.time()
        if self.first_step is None:
            self.first_step, self.began = step, now     # the first step builds kernels; it would spoil the estimate
            return
        if RANK:
            return
        rate = (step - self.first_step) * self.batch / max(now - self.began, 1e-9)
        record |= {"stage": self.name, "step": step + 1, "tokens_per_s": round(rate)}
        with open(self.log, "a") as file:
            file.write(json.dumps(record) + "\n")
        terminal = sys.stdout.isatty()
        if not last and not terminal and now - self.printed < 10:
            return
        self.printed = now
        left = (self.steps - step - 1) * self.batch / max(rate, 1e-9)
        balance = f"load {record['load']:.1f}:1 dropped {100 * record['dropped']:.1f}% | " if "load" in record else ""
        balance += f"{record['skipped']} steps skipped | " if record["skipped"] else ""
        line = (f"{self.name} {step + 1}/{self.steps} | loss {record['loss']:.3f} | {record['bits_per_byte']:.3f} bits/byte | "
                f"{balance}{rate:,.0f} tok/s | {int(left) // 60}:{int(left) % 60:02d} left")
        print(("\r\033[K" if terminal else "") + line, end="" if terminal and not last else "\n", flush=True)


def recompute_activations(model: MobileMoE) -> None:
    """Keep only what enters each block and run its forward pass once more during backward: a third more work, and activations
    of one block instead of all. What the first pass reported (load, dropped) counts; the second's reports go nowhere.
    """
    for block in model.model.layers:
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def train_stage(model: MobileMoE, name: str, stage: Stage, batches: Batches, prepared: dict, run: Path, *,
                micro_rows: int = 0, recompute: bool = False, resume: dict | None = None, save=None) -> dict:
    """Run one stage to its end. -> summary: tokens, seconds, loss, steps skipped, load per layer and expert, dropped fraction.

    `resume` is the state that `save(state)` was given in a run that was stopped: (seed, step) decides the batch and nothing
    else is random, so weights, optimizer state and the step are all of it. Raises UserError after five losses in a row that
    are not finite.
    """
    steps = max(1, round(stage.tokens / stage.batch))
    rows = stage.batch // stage.context
    micro_rows = micro_rows or math.ceil(rows / WORLD)
    if math.ceil(rows / micro_rows) % WORLD:
        raise UserError(f"{name}: {rows} rows, {micro_rows} at a time, are not the same number of parts for {WORLD} processes: "
                        "choose another --micro-rows or --nproc_per_node")
    first, seconds, bad, skipped = 0, 0.0, 0, 0
    if resume:
        model.load_state_dict(resume["model"])
        first, seconds, skipped = resume["step"], resume["seconds"], resume["skipped"]
        if first >= steps:
            raise UserError(f"{name} was stopped after step {first}, which is past the {steps} asked for now")
    if stage.int4:
        attach(model)
    if recompute:
        recompute_activations(model)
    shard(model)
    device = next(model.parameters()).device
    opts = optimizers(model, stages_for(model.config))                     # last: sharding puts new parameters into the model
    for opt, state in zip(opts, resume["optimizers"] if resume else ()):
        load_optimizer(opt, state)
    progress = Progress(run, name, steps, stage.batch)
    glance = None                   # 16 windows from all over the held-out prose; the report measures all of it
    for held in list(prepared["heldout"].values())[:1]:
        spread = range(0, len(held["ids"]), max(stage.context, len(held["ids"]) // 16))
        ids = torch.cat([held["ids"][start:start + stage.context] for start in spread])
        glance = ids, held["bytes"] * len(ids) / len(held["ids"]), stage.context
    bpb, load_sum, dropped_sum, window = float("nan"), 0, 0.0, 0
    began = saved = time.time()
    save_cost = 0.0
    for step in range(first, steps):
        result = train_step(model, opts, stage, batches, step, steps, micro_rows)
        bad = 0 if math.isfinite(result["loss"]) else bad + 1
        skipped += bad > 0
        if bad == 5:
            raise UserError(f"{name}: the loss is not a number five steps in a row (step {step + 1}); lower the learning rate")
        window += 1
        if result["load"] is not None:
            load_sum, dropped_sum = load_sum + result["load"], dropped_sum + result["dropped"]
        last = step + 1 == steps
        if glance and (last or (step - first) % max(1, steps // 10) == 0):
            bpb = bits_per_byte(model, *glance)
        if last or step % 5 == 0:
            record = {"loss": round(result["loss"], 4), "bits_per_byte": round(bpb, 4), "skipped": skipped}
            if result["load"] is not None:
                record |= {"load": round((load_sum.amax(1) / load_sum.mean(1)).max().item(), 2),
                           "dropped": round(dropped_sum / window, 4)}
            progress.show(step, record, last)
            if not last:
                load_sum, dropped_sum, window = 0, 0.0, 0
        # Every minute, or less often where saving is slow: it may cost at most a twentieth of the time.
        # Rank 0's clock decides for all: a rank that began to gather alone would wait for ever.
        due = RANK == 0 and not last and time.time() - saved > max(60, 20 * save_cost)
        if save and sum_over_ranks(torch.tensor(float(due), device=device)):
            start = time.time()
            save({"model": gather(master_state_dict(model)), "optimizers": [gather_optimizer(opt) for opt in opts],
                  "step": step + 1, "seconds": seconds + start - began, "skipped": skipped})
            saved, save_cost = time.time(), time.time() - start
    summary = {"stage": name, "tokens": steps * stage.batch, "seconds": seconds + time.time() - began, "loss": result["loss"],
               "skipped": skipped}
    if result["load"] is not None:
        summary |= {"load": load_sum.tolist(), "dropped": dropped_sum / window}
    return summary

# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: what one stage hands to the next


def write_checkpoint(path: Path, model: MobileMoE, prepared: dict, stage_name: str, stage: Stage, history: list[dict]):
    """A plain dict of tensors, numbers and strings. The held-out text travels along, so any later script can measure."""
    config = dataclasses.replace(model.config, max_context=max(model.config.max_context, stage.context))
    checkpoint = {"format": "mobilemoe/1", "config": dataclasses.asdict(config), "stage": stage_name,
                  "step": round(stage.tokens / stage.batch), "quantized": stage.int4, "context": stage.context,
                  "model": master_state_dict(model), "tokenizer": prepared["tokenizer"], "heldout": prepared["heldout"],
                  "xz": prepared["xz"], "questions": prepared["questions"], "sft_heldout": prepared["sft_heldout"],
                  "history": history}
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def write_resume_state(run: Path, stage_name: str, state: dict):
    """Keep the last two, and let go of the older one only when a third is written: the disk may be full by now."""
    newest, older = run / "resume.pt", run / "resume.old.pt"
    with atomic_write(newest) as file:
        torch.save({"stage": stage_name, **state}, file)
        if newest.exists():
            newest.replace(older)


def read_resume_state(run: Path, stage_name: str) -> dict | None:
    """The newest readable state of that stage; None if it never got as far as a save."""
    for path in (run / "resume.pt", run / "resume.old.pt"):
        if not path.exists():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:           # as in load_checkpoint: damage shows itself in many ways
            print(f"{path} is damaged: falling back to the save before it", file=sys.stderr)
            path.unlink(missing_ok=True)        # or the next save would make it the older one, in place of a good one
            continue
        if state["stage"] == stage_name:
            print(f"{stage_name}: resuming after step {state['step']}", flush=True)
            return state
    return None


def run_stage(name: str, run: Path, args, prepared: dict, device: torch.device) -> None:
    """Load what the stage starts from, train, measure, sample, save."""
    position, encoding = STAGES.index(name), tokenizer_from_dict(prepared["tokenizer"])
    torch.manual_seed(args.seed)
    if position:
        before = load_checkpoint(run / f"{STAGES[position - 1]}.pt")
        if before["tokenizer"] != prepared["tokenizer"]:
            raise UserError(f"{run / 'tokens.pt'} has another tokenizer than {STAGES[position - 1]}.pt: start another --run")
        model, history = model_from_checkpoint(before), before["history"]
    else:
        require_room(prepared, args.config.vocab_size)      # tokens.pt may be older than the choice of a preset
        model, history = MobileMoE(args.config), []
    model.to(device)
    config, stage = model.config, stages_for(model.config)[name]
    if args.tokens:
        stage = dataclasses.replace(stage, tokens=args.tokens)
    begun = {"seed": args.seed, "config": dataclasses.asdict(config)}      # what must not change while a stage is resumed
    resume = read_resume_state(run, name) if args.resume else None
    if resume and any(resume[key] != value for key, value in begun.items()):
        raise UserError(f"{run} was begun with another --seed, --preset or --config: give the same again")
    batches = Batches(prepared, stage, args.seed + position)
    summary = train_stage(model, name, stage, batches, prepared, run, micro_rows=args.micro_rows,
                          recompute=args.checkpoint_activations, resume=resume,
                          save=lambda state: RANK == 0 and write_resume_state(run, name, state | begun))
    weights = gather(master_state_dict(model))
    if RANK:
        return
    model = MobileMoE(config).to(device)        # in one piece again: text is made by rank 0 alone
    model.load_state_dict(weights)
    if stage.int4:
        attach(model)
    measured = {"context": stage.context, "heldout": prepared["heldout"]}
    # In the precision of training; an INT4 model in FP32 on its lattice, which is what the phone computes.
    with contextlib.nullcontext() if stage.int4 else mixed_precision(device):
        summary["bits_per_byte"] = heldout_bits_per_byte(model, measured)
    with parametrize.cached():      # round INT4 weights once, not at every token
        summary["sample"] = sample(model, encoding, prepared, chat="chat" in stage.mixture)
    if name == "sft":               # rounded without having been trained for it (PTQ): what QAT has to beat
        summary["bits_per_byte_ptq"] = heldout_bits_per_byte(attach(model), measured)
    write_checkpoint(run / f"{name}.pt", model, prepared, name, stage, [*history, summary])
    print(f"{name}: {summary['seconds']:.0f} s; held-out bits per byte "
          + ", ".join(f"{d} {b:.3f}" for d, b in summary["bits_per_byte"].items()) + f" -> {run / name}.pt\n"
          + "\n".join("    " + line for line in summary["sample"].splitlines()), flush=True)


def sample(model: MobileMoE, encoding, prepared: dict, chat: bool) -> str:
    """What the model says: to held-out questions if it chats, after the first lines of held-out docstrings otherwise."""
    def continue_(prompt):
        stop = stop_tokens(encoding, model.config.vocab_size)
        return encoding.decode(generate(model, prompt, 96, temperature=0.5, top_p=0.9, stop=stop))
    if chat:
        return "\n".join(f"Q: {question}\nA: {continue_(encode_chat(encoding, [dict(role='user', content=question)], True))}"
                         for question in prepared["questions"])
    begin = encoding.encode_single_token("<|begin_of_text|>")
    samples = []
    for held in list(prepared["heldout"].values())[:1]:
        starts = (held["ids"] == begin).nonzero().flatten()
        for start in starts[len(starts) // 6::max(1, len(starts) // 3)].tolist():          # three documents
            opening = encoding.decode(held["ids"][start + 1:start + 64].tolist()).split("\n")[0] + "\n\n"
            samples.append(opening + continue_([begin, *encoding.encode_ordinary(opening)]))
    return "\n\n".join(samples)

# ----------------------------------------------------------------------------------------------------------------------
# Report


def write_report(run: Path, exported: str, minutes: float) -> str:
    """report.md (returned) from the last checkpoint's history; report.png where matplotlib is installed."""
    checkpoint = load_checkpoint(run / "qat.pt")
    config, history = config_from_dict(checkpoint["config"]), checkpoint["history"]
    domains = list(checkpoint["heldout"])
    lines = [f"# Report of {run}", "", f"{config.active_params() / 1e6:.1f}M active of {config.total_params() / 1e6:.1f}M "
             f"parameters, {config.n_layers} layers, d_model {config.d_model}, {config.n_routed} routed experts "
             f"(top {config.active_routed}){' and a shared one' if config.shared_expert else ''}; {minutes:.1f} minutes "
             f"in all on {torch.get_num_threads()} threads", "",
             "| stage | tokens | minutes | tokens/s | load max:mean | dropped | " + " | ".join(domains) + " |",
             "|---|" + "---:|" * (5 + len(domains)),
             "| `xz -9e` | | | | | | " + " | ".join(f"{checkpoint['xz'][d]:.3f}" for d in domains) + " |"]
    for row in history:
        balance = "| |"
        if "load" in row:
            load = torch.tensor(row["load"])                               # [layers, E]
            balance = f"{(load.amax(1) / load.mean(1)).max():.1f} | {100 * row['dropped']:.1f} % |"
        lines.append(f"| {row['stage']} | {row['tokens'] / 1e6:.2f}M | {row['seconds'] / 60:.1f} | "
                     f"{row['tokens'] / row['seconds']:,.0f} | {balance} "
                     + " | ".join(f"{row['bits_per_byte'][d]:.3f}" for d in domains) + " |")
    lines += ["", "Held-out bits per byte by domain; load is the busiest expert of the worst layer against the mean.", "",
              "| INT4 | " + " | ".join(domains) + " |", "|---|" + "---:|" * len(domains)]
    sft, qat = history[2:]
    for name, row in (("sft, as trained (BF16)", sft["bits_per_byte"]),
                      ("sft, INT4 after training (PTQ)", sft["bits_per_byte_ptq"]),
                      ("qat, INT4 in training (QAT)", qat["bits_per_byte"])):
        lines.append(f"| {name} | " + " | ".join(f"{row[d]:.4f}" for d in domains) + " |")
    lines += ["", "The exported file and, where xllamacpp is installed, llama.cpp's answers to held-out questions:", "",
              "```", exported, "```", ""]
    for row in history:
        lines += [f"A sample after {row['stage']}:", "", "```", row["sample"], "```", ""]
    text = "\n".join(lines)
    with atomic_write(run / "report.md") as file:
        file.write(text.encode())
    try:
        draw_report(run, history)
    except ImportError:
        print("no report.png: `pip install matplotlib` draws it")
    return text


def draw_report(run: Path, history: list[dict]):
    """Loss and held-out bits per byte over all tokens, expert load (balance per layer) at the end of each stage."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    records = {(record["stage"], record["step"]): record for record in map(json.loads, open(run / "log.jsonl"))}
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), width_ratios=(3, 2), layout="constrained")
    start = 0
    for color, row in zip(("tab:blue", "tab:green", "tab:orange", "tab:red"), history):
        # Sorted, and once each: a run that was resumed has logged some steps twice.
        mine = [record for (stage, _), record in sorted(records.items()) if stage == row["stage"]]
        if not mine:
            continue
        tokens = [start + record["step"] / mine[-1]["step"] * row["tokens"] / 1e6 for record in mine]
        left.plot(tokens, [record["loss"] for record in mine], color=color, alpha=0.4, lw=1)
        measured = {}               # every tenth of a stage; the lines between repeat the last figure
        for at, record in zip(tokens, mine):
            measured.setdefault(record["bits_per_byte"], at)
        left.plot(measured.values(), measured.keys(), "o-", ms=3, color=color, lw=2, label=row["stage"])
        start = tokens[-1]
    left.set(xlabel="million tokens", title="training loss (thin, nats per token), held-out bits per byte (dots)", ylim=(0, 6))
    left.legend()
    left.grid(alpha=0.3)
    loads = [(row["stage"], torch.tensor(row["load"])) for row in history if "load" in row]
    for color, (name, load) in zip(("tab:blue", "tab:green", "tab:orange", "tab:red"), loads):
        share = (load / load.mean(1, keepdim=True)).sort(dim=1, descending=True).values.mean(0)        # [E]
        right.plot(share, color=color, label=name)
    right.axhline(1, color="black", lw=0.8, ls=":")
    right.set(xlabel="expert, busiest first (mean over layers)", title="tokens per expert against the mean", ylim=(0, None))
    right.legend()
    right.grid(alpha=0.3)
    with atomic_write(run / "report.png") as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)

# ----------------------------------------------------------------------------------------------------------------------
# Command line


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", default="all", help=f"all (default), {', '.join(STAGES)}")
    parser.add_argument("--preset", default="tiny", help=f"one of {', '.join(PRESETS)} (%(default)s)")
    parser.add_argument("--config", metavar="FILE", help="a JSON file of config fields, in place of a preset")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="where checkpoints and reports go (runs/PRESET)")
    parser.add_argument("--data", metavar="FOLDER", help="text (.txt, .jsonl, .jsonl.gz, .parquet) or shards made by "
                        "`python data.py tokenize`, in place of the embedded corpus")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tiktoken rank file, such as Llama-3's tokenizer.model")
    parser.add_argument("--tokens", type=float, help="train this stage on so many tokens instead of the table's")
    parser.add_argument("--micro-rows", type=int, default=0, help="rows in memory at a time, the rest accumulated")
    parser.add_argument("--checkpoint-activations", action="store_true", help="less memory, a third more time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    args = parser.parse_args()
    if args.stage not in ("all", *STAGES):
        raise UserError(f"unknown stage {args.stage!r}: choose all, {', '.join(STAGES)}")
    if args.preset not in PRESETS:
        raise UserError(f"unknown preset {args.preset!r}: choose {', '.join(PRESETS)}")
    if args.tokens is not None and (args.stage == "all" or not 1 <= args.tokens < math.inf):
        raise UserError("--tokens wants a single stage and a number of at least 1")
    if args.seed < 0 or args.micro_rows < 0:
        raise UserError("--seed and --micro-rows cannot be negative")
    args.run = args.run or Path("runs") / (Path(args.config).stem if args.config else args.preset)
    if args.config:
        try:
            args.config = config_from_dict(json.loads(Path(args.config).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"cannot read the config {args.config}: {error}") from None
    else:
        args.config = PRESETS[args.preset]
    return args


def main():
    args, start = read_arguments(), time.time()
    run, everything = args.run, args.stage == "all"
    finished = [name for name in STAGES if (run / f"{name}.pt").exists()]
    if everything and not args.resume and (finished or list(run.glob("resume*.pt"))):
        raise UserError(f"{run} already holds a run: --resume continues it, --run FOLDER starts another")
    if not everything and (position := STAGES.index(args.stage)) and STAGES[position - 1] not in finished:
        before = STAGES[position - 1]
        raise UserError(f"{args.stage} starts from {run / before}.pt, which is missing: "
                        f"`python train.py {before} --run {run}` makes it")
    device = join_ranks(args.device)
    if RANK:
        wait_for_ranks()            # rank 0 makes tokens.pt, the others read it
    prepared = prepare_data(run, args.data, args.tokenizer, args.config.vocab_size)
    stages = STAGES if everything else (args.stage,)
    if set(stages) & {"sft", "qat"} and not len(prepared["chat"]["lengths"]):
        if not finished:            # or the next attempt would not look into the folder again
            (run / "tokens.pt").unlink(missing_ok=True)
        raise UserError(f"{args.data or run / 'tokens.pt'} holds no conversations, which sft and qat learn from: add .jsonl "
                        'lines with "messages", or run only `train.py pretrain` and `train.py midtrain`')
    if not RANK:
        wait_for_ranks()
    for name in stages:
        if not (everything and name in finished):
            run_stage(name, run, args, prepared, device)
            for leftover in (*run.glob("resume*.pt"), *run.glob(".*.part")) if RANK == 0 else ():     # .part: a killed save
                leftover.unlink()
            wait_for_ranks()        # the next stage reads the checkpoint
    if WORLD > 1:
        dist.destroy_process_group()
    if everything and RANK == 0:
        gguf = run / "mobilemoe.gguf"
        export = Path(__file__).with_name("export_mobile.py")
        command = [sys.executable, export, run / "qat.pt", "--out", gguf]
        if importlib.util.find_spec("xllamacpp"):
            command += [word for question in prepared["questions"] for word in ("--ask", question)]
        exported = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if exported.returncode:
            sys.exit(2)             # it has said why
        print("\n" + write_report(run, exported.stdout.strip(), (time.time() - start) / 60))


def keep_memory():
    """Start this process again with glibc asked for 2 MB pages in place of 4 kB ones and to keep what is freed, which it can be
    told only at the start.

    A step writes hundreds of buffers of megabytes. By default glibc hands the larger ones back to the system each time, and
    the next one comes back page by page. With both a step of S takes 19 s (`PYTHONPATH=. python tests/step_of_S.py`), with 2
    MB pages alone 29 (the same after `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`: who sets the variable is obeyed). Price: torch
    is imported twice.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ("glibc.malloc.hugetlb=1:"
                                        "glibc.malloc.mmap_max=0:"      # no buffer is too large to be kept
                                        "glibc.malloc.trim_threshold=1099511627776")
        os.execv(sys.executable, sys.orig_argv)


if __name__ == "__main__":
    keep_memory()
    run_main(main)
