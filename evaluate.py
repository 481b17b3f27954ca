"""How good a model is, and where its tokens go: the same questions to every stage and to the exported file.

    python evaluate.py runs/tiny/{pretrain,midtrain,sft,qat}.pt runs/tiny/mobilemoe.gguf --out docs
    python evaluate.py lm-eval run --model mobilemoe --model_args checkpoint=runs/tiny/midtrain.pt --tasks mobilemoe14

The first asks what the run itself held out from every stage: bits per byte by domain; a docs quiz (which of four summaries
belongs to this function? log-likelihoods decide, as in HellaSwag and ARC); arithmetic (the last number of a greedy answer is
right or wrong, as in GSM8K). The second is lm-evaluation-harness' own command; `mobilemoe14` are the paper's 14 tasks.

One rule makes stages comparable: a question is put in the format that the checkpoint's last stage taught. `pretrain` and
`midtrain` continue a document ("numpy.mean", an empty line, the summary; "Problem: What is 9 + 5 - 7?", "Working:"), `sft` and
`qat` are asked in a chat. The items, the choices and the scoring are the same.

What it is not: a leaderboard. A model trained for half an hour on documentation is asked about documentation, on a CPU.
"""
import argparse
import hashlib
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mobilemoe
from mobilemoe import KVCache, UserError, atomic_write, load_checkpoint, run_main
from quantize import attach, heldout_bits_per_byte

# ----------------------------------------------------------------------------------------------------------------------
# What a model makes of token sequences: log-likelihoods and greedy answers, in batches


class Progress:
    """`sft, quiz: 41,200/58,113 tokens, 9,800/s, 0:02 left`, live on a terminal, every ten seconds elsewhere."""

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.began = self.printed = time.time()

    def add(self, count: int):
        self.done += count
        now, live, last = time.time(), sys.stdout.isatty(), self.done >= self.total
        if last or now - self.printed > (0.5 if live else 10):
            self.printed, rate = now, self.done / max(now - self.began, 1e-9)
            left = int((self.total - self.done) / rate)
            print(("\r\033[K" if live else "") + f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.0f}/s, "
                  f"{left // 60}:{left % 60:02d} left", end="" if live and not last else "\n", flush=True)


def windows(length: int, first: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, scored, end): read ids[start:end], score ids[scored:end]. Scores first ... length - 1 exactly once each.

    A text longer than the context is read in windows that overlap by half, so that no token is judged with less than half a
    context before it (those at the text's own beginning aside), and memory depends on the context, not on the text.
    """
    while first < length:
        end = min(length, max(first + max(context // 2, 1), context + 1))
        yield max(0, end - context - 1), first, end
        first = end


class Subject:
    """A checkpoint ready to be asked: its model computes what its last stage did, in INT4 after QAT and in FP32 before."""

    def __init__(self, path: str | Path):
        self.path, self.checkpoint = Path(path), load_checkpoint(path)
        self.model = mobilemoe.model_from_checkpoint(self.checkpoint)
        if self.checkpoint["quantized"]:
            attach(self.model)      # INT4 weights, and the INT8 rounding of activations that llama.cpp applies
        self.encoding = mobilemoe.tokenizer_from_dict(self.checkpoint["tokenizer"])
        self.context, self.chat = self.checkpoint["context"], self.checkpoint["stage"] in ("sft", "qat")

    @torch.no_grad()
    @parametrize.cached()           # rounds the weights once, not in every layer of every batch
    def log_likelihoods(self, sequences: list[tuple[list[int], int]], what: str) -> list[tuple[float, bool]]:
        """For each (ids, first): log P(ids[first:] | ids[:first]) in nats, and whether greedy decoding would say just that.

        `first` is at least 1: something must come before. Windows of like length share a batch; padding stands on the right,
        where a causal model cannot see it and a dropless one loses nothing to it.
        """
        jobs = [(i, *window) for i, (ids, first) in enumerate(sequences) for window in windows(len(ids), first, self.context)]
        jobs.sort(key=lambda job: job[1] - job[3])                         # longest first: what does not fit fails at once
        if long := sum(len(ids) > self.context + 1 for ids, _ in sequences):
            print(f"{what}: {long} texts are longer than the context of {self.context} tokens and read in overlapping windows")
        total, greedy = np.zeros(len(sequences)), np.ones(len(sequences), bool)
        progress, at = Progress(what, sum(end - start for _, start, _, end in jobs), "tokens"), 0
        # Logits [B, T, V] are the largest tensor by far: about 2^24 of them at a time, 64 MB, whatever the vocabulary.
        budget = 2 ** 24 // self.model.config.vocab_size
        while at < len(jobs):
            batch = jobs[at:at + max(1, budget // (jobs[at][3] - jobs[at][1]))]
            at += len(batch)
            rows = [torch.tensor(sequences[i][0][start:end]) for i, start, _, end in batch]
            rows = nn.utils.rnn.pad_sequence(rows, batch_first=True)       # [B, T + 1]
            logits, targets = self.model(rows[:, :-1]), rows[:, 1:]        # [B, T, V], [B, T]
            chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # [B, T]
            right = chosen >= logits.amax(-1)                              # [B, T]
            log_probs = (chosen - logits.logsumexp(-1)).double()           # [B, T]
            for row, (i, start, scored, end) in enumerate(batch):
                part = slice(scored - start - 1, end - start - 1)          # ids[scored] is the target of the place before it
                total[i] += log_probs[row, part].sum().item()
                greedy[i] &= bool(right[row, part].all())
            progress.add(sum(end - start for _, start, _, end in batch))
        return list(zip(total.tolist(), greedy.tolist()))

    @torch.no_grad()
    @parametrize.cached()
    def answers(self, prompts: list[list[int]], max_new: int, until: list[str], what: str) -> list[str]:
        """The likeliest continuation of each prompt (token ids), token by token, cut before the first of the `until` strings.

        Prompts of *equal* length share a batch and a KV cache: rows of unequal length would need padding on the left, and
        with it positions and masks of their own in every layer.
        """
        max_new = min(max_new, self.context // 2)
        room, encoding = self.context - max_new, self.encoding
        if long := sum(len(prompt) > room for prompt in prompts):
            print(f"{what}: {long} prompts leave no room for {max_new} tokens of answer: their last {room} tokens are read")
        stop = set(mobilemoe.stop_tokens(encoding, self.model.config.vocab_size))
        by_length = defaultdict(list)
        for index, prompt in enumerate(prompts):
            by_length[min(len(prompt), room)].append(index)
        answers, progress = [""] * len(prompts), Progress(what, len(prompts), "answers")
        for length, members in sorted(by_length.items()):
            for group in (members[i:i + 64] for i in range(0, len(members), 64)):
                cache = KVCache(self.model.config, len(group), length + max_new)
                tokens, new, running = torch.tensor([prompts[i][-room:] for i in group]), {i: [] for i in group}, set(group)
                while running and cache.length < length + max_new - 1:
                    tokens = self.model(tokens, cache=cache)[:, -1].argmax(-1, keepdim=True)       # [B, 1]
                    for index, token in zip(group, tokens[:, 0].tolist()):
                        if index in running and token not in stop:
                            new[index].append(token)
                            answers[index] = encoding.decode(new[index])
                        if token in stop or any(text in answers[index] for text in until):
                            running.discard(index)
                progress.add(len(group))
        return [answer[:min((at for text in until if (at := answer.find(text)) >= 0), default=None)] for answer in answers]

# ----------------------------------------------------------------------------------------------------------------------
# The held-out questions

# The question as the beginning of a document and as a chat message; the choices (none in arithmetic); the right answer.
Item = namedtuple("Item", "document question choices answer")


def quiz_items(conversations: list[dict]) -> list[Item]:
    """Four-choice questions: a function's own summary among those of three other held-out functions.

    The distractors are real summaries, so nothing but the match with the name tells them apart. A hash draws them and orders
    the choices: the same quiz for every checkpoint, process and machine.
    """
    summaries = {}
    for conversation in conversations:
        if conversation["kind"] == "summary":
            summaries.setdefault(conversation["answer"], conversation["messages"][0]["content"])     # one question per answer

    def draw(question: str, text: str) -> bytes:
        return hashlib.sha256(f"{question}\n{text}".encode()).digest()
    items = []
    for answer, question in summaries.items() if len(summaries) > 3 else ():
        others = sorted(summaries.keys() - {answer}, key=lambda text: draw(question, text))[:3]
        choices = sorted([answer, *others], key=lambda text: draw(text, question))
        items.append(Item(f"{re.search('`(.+)`', question)[1]}\n\n", question, choices, answer))
    return items


def arithmetic_items(conversations: list[dict]) -> list[Item]:
    """Sums and word problems with a number as answer; each sum once, in words or not, or the items would not be independent."""
    asked = {}
    for conversation in conversations:
        if conversation["kind"] == "arithmetic":
            question, reply = (message["content"] for message in conversation["messages"])
            asked.setdefault(reply, Item(f"Problem: {question}\nWorking:", question, [], conversation["answer"]))
    return list(asked.values())


def prompt_ids(item: Item, encoding, chat: bool) -> list[int]:
    if chat:
        return mobilemoe.encode_chat(encoding, [{"role": "user", "content": item.question}], reply=True)
    return [encoding.encode_single_token("<|begin_of_text|>"), *encoding.encode_ordinary(item.document)]


def quiz_sequences(items: list[Item], encoding, chat: bool) -> list[tuple[list[int], int]]:
    """(ids, where the choice begins): every choice of every item, four in a row, then each distinct choice without a name."""
    asked = [(item, choice) for item in items for choice in item.choices]
    nameless = Item("", "What does it do?", [], "")
    asked += [(nameless, choice) for choice in dict.fromkeys(choice for _, choice in asked)]
    prompts = [prompt_ids(item, encoding, chat) for item, _ in asked]
    return [(prompt + encoding.encode_ordinary(choice), len(prompt)) for prompt, (_, choice) in zip(prompts, asked)]


def quiz_points(items: list[Item], scores: list[float]) -> dict[str, np.ndarray]:
    """From the log-likelihoods of quiz_sequences: the choices' points [items, 4] in two ways; the most points win.

    quiz        log P(choice | name) over the choice's length in bytes: HellaSwag's way. A short, common sentence is likely
                whatever is asked, and wins too often.
    name gain   log P(choice | name) - log P(choice): GPT-3's way with ARC (Brown et al. 2020). Only the difference tells what
                the *name* has to do with the choice; as a difference of two long sums it also doubles the noise of rounding.
    """
    given, choices = np.array(scores[:4 * len(items)]).reshape(-1, 4), [choice for item in items for choice in item.choices]
    nameless = dict(zip(dict.fromkeys(choices), scores[4 * len(items):]))
    return {"quiz": given / np.reshape([len(choice.encode()) for choice in choices], (-1, 4)),
            "name gain": given - np.reshape([nameless[choice] for choice in choices], (-1, 4))}


class Score(NamedTuple):
    """The fraction of right answers, its standard error, and what guessing reaches."""
    mean: float
    error: float
    chance: float

    def __str__(self):
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f} % ({(self.mean - self.chance) / self.error:+.1f} s.e.)"


def score(right: list[bool], chance: float) -> Score:
    n, mean = len(right), sum(right) / len(right)
    p = min(max(mean, 0.5 / n), 1 - 0.5 / n)            # at 0 or n of n the error would be 0: half an answer is the least
    return Score(mean, math.sqrt(p * (1 - p) / n), chance)


def quiz_score(items: list[Item], points: np.ndarray) -> Score:
    return score([item.choices[best] == item.answer for item, best in zip(items, points.argmax(1))], 1 / 4)


def arithmetic_score(items: list[Item], answers: list[str]) -> Score:
    """Chance is the best that a model could do which always says the same number."""
    numbers = [re.findall(r"-?\d+", answer.replace(",", ""))[-1:] for answer in answers]
    commonest = Counter(item.answer for item in items).most_common(1)[0][1]
    return score([found == [item.answer] for item, found in zip(items, numbers)], commonest / len(items))


def questions(subject: Subject) -> tuple[list[Item], list[Item]]:
    """(quiz, arithmetic) of the run's own held-out material; raises UserError if the checkpoint carries none."""
    try:
        conversations = json.loads(subject.checkpoint["sft_heldout"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{subject.path} carries no held-out questions: it is damaged, or of an older train.py; train it again"
                        ) from None
    return quiz_items(conversations), arithmetic_items(conversations)


def table(heads: list, rows: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [heads, ["---", *["---:"] * (len(heads) - 1)], *rows])

# ----------------------------------------------------------------------------------------------------------------------
# The exported file, in llama.cpp

GGUF_TOKENS = 1024      # per domain for bits per byte: llama.cpp's server is asked token by token


def llama_cpp_log_likelihoods(path: Path, sequences: list[tuple[list[int], int]]) -> list[float]:
    """As log_likelihoods, from the .gguf; in a child process, as a file that llama.cpp cannot load may abort its process."""
    progress, scores, trouble = Progress(path.name, len(sequences), "sequences"), [], "it gave no reason"
    with subprocess.Popen([sys.executable, __file__, "--ask-llama-cpp"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace") as child:
        json.dump([str(path), sequences], child.stdin)
        child.stdin.close()
        for line in child.stdout:           # llama.cpp's log comes the same way
            if line.startswith("log-likelihood "):
                scores.append(float(line.split()[1]))
                progress.add(1)
            elif "error" in line.lower():
                trouble = line.strip().removeprefix("error: ")
    if child.returncode:
        raise UserError(f"llama.cpp cannot run {path}: {trouble}")
    return scores


def ask_llama_cpp():
    """The child's side: [path, sequences] as JSON on stdin, a line for each sequence on stdout.

    The server tells the log-probability of the token that it chose. So let it choose the one we ask about: a bias acts on the
    choice, the probability reported is the one before it. Each prompt extends the one before, and the KV cache knows the rest.
    """
    path, sequences = json.load(sys.stdin)
    try:
        import xllamacpp
    except ImportError:
        raise UserError("it is not here: `pip install xllamacpp`") from None
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.warmup, params.verbosity = path, 1, False, -1
    params.n_ctx = max(len(ids) for ids, _ in sequences) + 8
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # Is the *file* what was trained? An F16 cache, and flash attention, which sums in F16 on a CPU, would answer another
    # question: they cost 1 % of the next tokens by themselves (tests/fidelity.py measures both).
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server, request = xllamacpp.Server(params), {"n_predict": 1, "cache_prompt": True, "temperature": -1}

    def log_probability(prompt: list[int], token: int) -> float:
        def choose(choice: int, n_probs: int):
            reply = server.handle_completions(request | {"prompt": prompt, "n_probs": n_probs, "logit_bias": [[choice, 1e6]]})
            return reply["choices"][0]["logprobs"]
        if (found := choose(token, 1)) is None:
            # A token that ends inside a character is held back, and its probability with it: choose a letter, read all V.
            ranking = choose(64, 10 ** 6)["content"][0]["top_logprobs"]
            found = {"content": [entry for entry in ranking if entry["id"] == token]}
        assert found["content"][0]["id"] == token
        return max(found["content"][0]["logprob"], -104.0)      # a probability below float32's smallest comes as -3.4e38
    for ids, first in sequences:
        total = sum(log_probability(ids[:end], ids[end]) for end in range(first, len(ids)))
        sys.stdout.write(f"\nlog-likelihood {total}\n")        # in one piece: the log may come between two
        sys.stdout.flush()


def compare_with_llama_cpp(path: Path, subject: Subject, items: list[Item]) -> str:
    """A table: quiz and bits per byte of `subject` in PyTorch and of the file in llama.cpp, on the very same tokens."""
    special, window = set(subject.encoding._special_tokens.values()), subject.context - 1      # llama.cpp's answer must fit too
    texts, size = [], Counter()     # (domain, ids); bytes by domain
    for domain, held in subject.checkpoint["heldout"].items():
        ids = held["ids"][:GGUF_TOKENS + 1].tolist()
        size[domain] = len(subject.encoding.decode_bytes([token for token in ids[1:] if token not in special]))
        texts += [(domain, ids[start:start + window]) for start in range(0, len(ids) - 1, window - 1)]
    sequences = [(ids, 1) for _, ids in texts] + quiz_sequences(items, subject.encoding, subject.chat)
    theirs = llama_cpp_log_likelihoods(path, sequences)
    ours = [value for value, _ in subject.log_likelihoods(sequences, f"{subject.path.name} on the same")]
    rows, bits, points = [], [], []
    for name, values in ((f"{subject.path.name}, PyTorch", ours), (f"{path.name}, llama.cpp", theirs)):
        nats = Counter()
        for (domain, _), value in zip(texts, values):
            nats[domain] -= value
        bits.append([nats[domain] / math.log(2) / size[domain] for domain in size])
        points.append(quiz_points(items, values[len(texts):]) if items else {})
        rows.append([name, *(f"{value:.4f}" for value in bits[-1]), *(quiz_score(items, p) for p in points[-1].values())])
    lines = [table([f"first {GGUF_TOKENS:,} tokens of each domain", *size, *points[0]], rows),
             f"\nLargest difference {np.abs(np.subtract(*bits)).max():.4f} bits per byte."]
    for task, mine in points[0].items():
        differ = mine.argmax(1) != points[1][task].argmax(1)               # [items]
        lead = np.sort(mine)[:, -1] - np.sort(mine)[:, -2]                 # [items] of the winner over the second
        lines.append(f"{task}: the same answer to {np.mean(~differ):.1%} of {len(items)}. The winner's lead in PyTorch: "
                     f"{np.median(lead):.3f} in the median, {[round(x, 3) for x in lead[differ].tolist()]} where they differ.")
    return "\n".join(lines)

# ----------------------------------------------------------------------------------------------------------------------
# Routing: which experts each domain uses

ROUTING_WINDOWS = 32    # of held-out text per domain, spread over all of it


@torch.no_grad()
def routing_shares(subject: Subject) -> dict[str, Tensor]:
    """Each expert's part of the routes, by domain: {domain: [2, layers, E]}. The first axis is two halves of the domain's text.

    Two samples of one domain never use the experts quite alike. How alike they are is the measure for two domains.
    """
    shares, seen = {}, []           # seen: the load [E] of one router after the other
    routers = [module for module in subject.model.modules() if isinstance(module, mobilemoe.Router)]
    hooks = [router.register_forward_hook(lambda router, inputs, output: seen.append(output[2].load)) for router in routers]
    for domain, held in subject.checkpoint["heldout"].items():
        T = min(subject.context, len(held["ids"]) // 2)
        rows = held["ids"].long().unfold(0, T, T)                          # [windows, T]
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, ROUTING_WINDOWS).astype(int))]
        with parametrize.cached():
            for half in (rows[0::2], rows[1::2]):
                subject.model(half)
        loads = torch.stack(seen).unflatten(0, (2, len(routers)))          # [2, layers, E]
        shares[domain] = loads / loads.sum(-1, keepdim=True)
        seen.clear()
    for hook in hooks:
        hook.remove()
    return shares


def overlap(p: Tensor, q: Tensor) -> float:
    """The part of the routes that two texts have in common, mean over layers: 1 the same, 0 no expert in common."""
    return torch.minimum(p, q).sum(-1).mean().item()


def routing_summary(names: list[str], shares: list[dict[str, Tensor]]) -> str:
    """A table, and a sentence that says nothing but what the table shows."""
    rows, before, E = [], None, next(iter(shares[0].values())).shape[-1]
    for halves in shares:
        whole = {domain: p.mean(0) for domain, p in halves.items()}        # [layers, E]
        mean = torch.stack(list(whole.values())).mean(0)                   # [layers, E] the domains weighing alike
        row = {"max:mean": (mean.amax(1) * E).max().item()}
        row |= {f"in use of {E}: {d}": torch.special.entr(p).sum(1).exp().mean().item() for d, p in whole.items()}
        row["halves of one domain (least)"] = min(overlap(*p) for p in halves.values())
        # Whole domains would agree better than halves just for being more text: compare halves with halves.
        between = {f"{a}/{b}": (overlap(p[0], q[1]) + overlap(p[1], q[0])) / 2
                   for (a, p), (b, q) in combinations(halves.items(), 2)}
        row["one domain, row above"] = float(np.mean([overlap(whole[d], before[d]) for d in whole])) if before else math.nan
        rows.append(row | between)
        before = whole
    lines = [table(["routing", *rows[0]], [[name, *(f"{x:.2f}" for x in row.values())] for name, row in zip(names, rows)]),
             "\nmax:mean: the busiest expert of the worst layer; in use: exp(entropy); the others: the routes in common."]
    if between:
        near, far = max(between, key=between.get), min(between, key=between.get)
        least = row["halves of one domain (least)"]
        lines.append(f"{names[-1]}: {sum(x < least for x in between.values())} of {len(between)} pairs of domains share less "
                     f"than two halves of any domain ({least:.2f}).\nMost alike are {near} ({between[near]:.2f}), least alike "
                     f"{far} ({between[far]:.2f}).")
    return "\n".join(lines)

# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def panels(rows: int, columns: int, size: tuple[float, float]):
    """(figure, axes [rows, columns])"""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: `pip install matplotlib`") from None
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path: Path):
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
    print(f"picture: {path}", flush=True)


def draw_routing(names: list[str], shares: list[dict[str, Tensor]], path: Path):
    """A row of panels per checkpoint, a panel per layer: domains by experts, colour = share of the routes against the mean.

    Experts stand in one order in all rows: by the domain that uses them most in the last checkpoint. An expert's number means
    nothing; neighbours with like habits make a pattern visible.
    """
    domains = list(shares[-1])
    whole = [torch.stack([halves[d].mean(0) for d in domains]) for halves in shares]               # [domains, layers, E] each
    n_layers, E = whole[-1].shape[1:]
    figure, axes = panels(len(names), n_layers, (2 + 3.4 * n_layers, 0.9 + (0.5 + 0.22 * len(domains)) * len(names)))
    for layer in range(n_layers):
        peak, domain = whole[-1][:, layer].max(0)                          # [E], [E]
        order = sorted(range(E), key=lambda e: (domain[e].item(), -peak[e].item()))
        for name, share, axis in zip(names, whole, axes[:, layer]):
            image = axis.imshow(share[:, layer, order] * E, aspect="auto", cmap="magma", vmin=0, vmax=4)
            axis.set_xticks([])
            axis.set_yticks(range(len(domains)), domains if layer == 0 else [""] * len(domains), fontsize=8)
            axis.set_title(f"{name}, layer {layer}", fontsize=9)
    figure.colorbar(image, ax=axes, label="share / mean", extend="max", shrink=0.8)
    figure.supxlabel(f"{E} experts, sorted by the domain that uses them most in {names[-1]}", fontsize=9)
    save_figure(figure, path)


def draw_progress(names: list[str], bits: list[dict[str, float]], scores: list[dict[str, Score]], path: Path):
    figure, [(left, right)] = panels(1, 2, (11, 4))
    for domain in bits[0]:
        left.plot(names, [row[domain] for row in bits], "o-", label=domain)
    left.set(title="held-out bits per byte", ylim=(0, None))
    left.legend()
    for color, task in zip(("tab:blue", "tab:cyan", "tab:orange"), scores[0]):
        mean, error, chance = 100 * np.array([row[task] for row in scores]).T
        right.errorbar(names, mean, error, fmt="o-", capsize=4, color=color, label=task)
        right.axhline(chance[0], color=color, ls=":")
    right.set(title="right answers, %, ± one standard error (dotted: chance)", ylim=(0, 100))
    right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)

# ----------------------------------------------------------------------------------------------------------------------
# The paper's tasks: an adapter to lm-evaluation-harness

# lm-eval's name -> (the paper's, the metric, the released S base model's score where the paper's figure is known to us)
MOBILEMOE14 = {
    "hellaswag": ("HellaSwag", "acc_norm", 58.9), "piqa": ("PIQA", "acc_norm", 75.4), "social_iqa": ("SIQA", "acc", 46.8),
    "winogrande": ("WinoGrande", "acc", 58.6), "mmlu": ("MMLU", "acc", "-"), "nq_open": ("NQ", "exact_match", "-"),
    "triviaqa": ("TriviaQA", "exact_match", "-"), "arc_easy": ("ARC-e", "acc_norm", 73.9),
    "arc_challenge": ("ARC-c", "acc_norm", "-"), "openbookqa": ("OpenBookQA", "acc_norm", 34.6),
    "boolq": ("BoolQ", "acc", 60.2), "drop": ("DROP", "f1", "-"), "gsm8k": ("GSM8K", "exact_match", "-"),
    "bbh": ("BBH", "exact_match", "-")}
PAPER_AVERAGES = "The paper's averages over all 14: S 46.5, M 55.4, L 59.8; after INT4 QAT 44.0, 52.5, 57.8."


def register_with_lm_eval() -> type:
    """Make `--model mobilemoe` known to lm-eval: its LM interface on top of Subject."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise UserError("lm-evaluation-harness is missing: `pip install lm-eval`") from None
    # lm-eval looks for some metrics in a package that is called `evaluate`, as this file is. Ours must not be found first.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

    @register_model("mobilemoe")
    class MobileMoELM(LM):
        """checkpoint=FILE. Contexts and continuations are plain text after <|begin_of_text|>, as in pre-training."""

        def __init__(self, checkpoint: str, batch_size=None, max_batch_size=None, device=None):
            super().__init__()          # (batch size and device come with every command; batches here follow from lengths)
            self.subject = Subject(checkpoint)

        def encode(self, text: str) -> list[int]:
            encoding = self.subject.encoding
            return [encoding.encode_single_token("<|begin_of_text|>"), *encoding.encode_ordinary(text)]

        def encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
            # A space between the two belongs to the first word after it, as in text; "a " + "b" encoded apart is not "a b".
            whole = self.encode(context + continuation)
            return whole, min(len(self.encode(context.rstrip())), len(whole) - 1)

        def loglikelihood(self, requests, disable_tqdm=False):
            return self.subject.log_likelihoods([self.encode_pair(*request.args) for request in requests], "log-likelihoods")

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            sequences = [(self.encode(request.args[0]), 1) for request in requests]
            return [score for score, _ in self.subject.log_likelihoods(sequences, "whole texts")]

        def generate_until(self, requests, disable_tqdm=False):
            groups, answers = defaultdict(list), {}
            for index, request in enumerate(requests):
                options = request.args[1]
                if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                    raise UserError("this task wants sampled answers, mobilemoe answers greedily: set do_sample to false")
                until = options.get("until") or []
                groups[(until,) if isinstance(until, str) else tuple(until), options.get("max_gen_toks", 256)].append(index)
            for (until, max_new), members in groups.items():
                prompts = [self.encode(requests[index].args[0]) for index in members]
                answers |= zip(members, self.subject.answers(prompts, max_new, until, "answers"))
            return [answers[index] for index in range(len(requests))]
    return MobileMoELM


def run_lm_eval(arguments: list[str]):
    """lm-eval's own command, which now knows `--model mobilemoe` and the task list mobilemoe14."""
    register_with_lm_eval()
    from lm_eval.__main__ import cli_evaluate
    sys.argv = ["lm-eval", *(word.replace("mobilemoe14", ",".join(MOBILEMOE14)) for word in arguments)]
    try:
        cli_evaluate()
    except UserError:
        raise
    except Exception as error:      # a task file, or its data set, can be wrong in a dozen ways, most of them many lines long
        raise UserError(f"lm-eval: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}") from None
    if any("mobilemoe14" in word for word in arguments):
        print("\n" + table(["task", "metric", "paper, S base"], list(MOBILEMOE14.values())) + "\n\n" + PAPER_AVERAGES)

# ----------------------------------------------------------------------------------------------------------------------
# Command line


def evaluate(subjects: list[Subject], files: list[Path], out: Path):
    """Print the tables, draw the pictures."""
    names = [subject.path.stem for subject in subjects]
    names = names if len(set(names)) == len(names) else [str(subject.path) for subject in subjects]
    first, bits, scores = subjects[0], [], []
    held = [(questions(s), {domain: text["bytes"] for domain, text in s.checkpoint["heldout"].items()}) for s in subjects]
    (items, sums), _ = held[0]
    for other, different in zip(subjects, held):
        if different != held[0]:
            raise UserError(f"{first.path} and {other.path} hold out different texts; what one is asked the other may have "
                            "learned: compare checkpoints of one corpus")
    for what, found in (("quiz", items), ("arithmetic", sums)):
        print(f"{what}: {len(found)} held-out questions" + ("" if found else "; this corpus has none, so it is left out"))
    for name, subject in zip(names, subjects):
        print(f"{name}: bits per byte", flush=True)
        bits.append(heldout_bits_per_byte(subject.model, subject.checkpoint))
        scores.append({})
        if items:
            found = subject.log_likelihoods(quiz_sequences(items, subject.encoding, subject.chat), f"{name}: quiz")
            points = quiz_points(items, [value for value, _ in found])
            scores[-1] = {task: quiz_score(items, value) for task, value in points.items()}
        if sums:
            prompts = [prompt_ids(item, subject.encoding, subject.chat) for item in sums]
            answers = subject.answers(prompts, 80, ["\n\n"], f"{name}: arithmetic")
            scores[-1]["arithmetic"] = arithmetic_score(sums, answers)
    heads = ["held out", "asked as", *bits[0], *(f"{task} (chance {100 * s.chance:.1f} %)" for task, s in scores[0].items())]
    rows = [[name, "chat" if subject.chat else "document", *(f"{value:.3f}" for value in bit.values()), *right.values()]
            for name, subject, bit, right in zip(names, subjects, bits, scores)]
    print(f"\n{table(heads, rows)}\n\nBits per byte by domain; right answers ± one standard error, and how many of them above "
          "chance.", flush=True)
    draw_progress(names, bits, scores, out / "progress.png")
    for path in files:
        subject = next((s for s in reversed(subjects) if s.checkpoint["quantized"]), subjects[-1])
        print("\n" + compare_with_llama_cpp(path, subject, items), flush=True)
    routed = [(name, routing_shares(subject)) for name, subject in zip(names, subjects) if not subject.model.config.dense]
    print("\n" + (routing_summary(*zip(*routed)) if routed else "routing: none, the model is dense"))
    if routed:
        draw_routing(*zip(*routed), out / "routing.png")


def main():
    if sys.argv[1:2] == ["--ask-llama-cpp"]:
        return ask_llama_cpp()
    if sys.argv[1:2] == ["lm-eval"]:
        return run_lm_eval(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="CHECKPOINT", help=".pt files, in the order of their stages; "
                        "a .gguf is compared with the last quantised checkpoint")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the pictures go (beside the last checkpoint)")
    args = parser.parse_args()
    files = [path for path in args.files if path.suffix == ".gguf"]
    checkpoints = [path for path in args.files if path.suffix != ".gguf"]
    for path in files:
        if not path.is_file():
            raise UserError(f"no file {path}: `python export_mobile.py CHECKPOINT` makes one")
    if not checkpoints:
        raise UserError("a .gguf is judged beside the checkpoint it was made of: name that as well")
    out = args.out or checkpoints[-1].parent
    if not out.is_dir():
        raise UserError(f"no folder {out} for the pictures")
    panels(1, 1, (1, 1))            # is matplotlib here? Better to know now than after five minutes
    evaluate([Subject(path) for path in checkpoints], files, out)      # all are read first: a wrong name costs no ten minutes


if __name__ == "__main__":
    run_main(main)
