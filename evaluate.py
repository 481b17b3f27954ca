"""How good a model is, and where its tokens go: the same questions to every stage and to the exported file.

    python evaluate.py runs/tiny/{pretrain,midtrain,sft,qat}.pt runs/tiny/mobilemoe.gguf
    python evaluate.py runs/tiny/midtrain.pt --tasks mobilemoe14            lm-evaluation-harness, the paper's 14 tasks
    python evaluate.py lm-eval run --model mobilemoe --model_args checkpoint=runs/tiny/sft.pt --tasks piqa    its own command

In the order of the file: log-likelihoods and greedy answers in batches, the held-out questions, the exported file in llama.cpp,
routing, pictures, the adapter to lm-evaluation-harness, the tables.

Three measures, all on material held out from every stage:
  bits per byte   how well the model predicts text, domain by domain
  docs quiz       which of four summaries belongs to this function? Log-likelihoods decide, as in HellaSwag and ARC
  arithmetic      the last number of a greedy answer is right or wrong (GSM8K)

One rule makes stages comparable: a question is put in the format that a checkpoint's last stage taught. `pretrain` and
`midtrain` continue a document ("numpy.mean", an empty line, the summary; "Problem: 47 + 38", "Working:"), `sft` and `qat` are
asked in a chat. The items, the choices and the scoring are the same. (So chat models also have to read a story where base
models are given the bare sum; the other way round, base models would meet a kind of text they have never seen.)

What it is not: a leaderboard. A model trained for half an hour on documentation is asked about documentation.
"""
import argparse
import hashlib
import json
import math
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import data
from mobilemoe import (
    KVCache,
    MobileMoE,
    Router,
    UserError,
    atomic_write,
    encode_chat,
    load_checkpoint,
    model_from_checkpoint,
    run_main,
    tokenizer_from_dict,
)
from quantize import attach, heldout_bits_per_byte

# ----------------------------------------------------------------------------------------------------------------------
# What a model makes of token sequences: log-likelihoods and greedy answers, in batches


def windows(length: int, first: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, scored, end): read ids[start:end], score ids[scored:end]. Scores first ... length - 1 exactly once each.

    A text longer than the context is read in windows that overlap by half, so that no token is judged with less than half a
    context before it (those at the text's own beginning aside), and memory depends on the context, not on the text.
    """
    while first < length:
        end = min(length, max(first + max(context // 2, 1), context + 1))
        yield max(0, end - context - 1), first, end
        first = end


@torch.no_grad()
def log_likelihoods(model: MobileMoE, sequences: list[tuple[list[int], int]], context: int) -> list[tuple[float, bool]]:
    """For each (ids, first): log P(ids[first:] | ids[:first]) in nats, and whether greedy decoding would say just that.

    `first` is at least 1: something must come before. Windows of like length share a batch; padding stands on the right,
    where a causal model cannot see it and a dropless one loses nothing to it.
    """
    device = model.model.embed_tokens.weight.device
    jobs = [(owner, *window) for owner, (ids, first) in enumerate(sequences) for window in windows(len(ids), first, context)]
    jobs.sort(key=lambda job: job[1] - job[3])                             # longest first: what does not fit fails at once
    total, greedy = np.zeros(len(sequences)), np.ones(len(sequences), bool)
    # Logits [B, T, V] are the largest tensor by far: about 2^24 of them at a time, 64 MB, whatever the vocabulary.
    budget, at = max(1, 2 ** 24 // model.config.vocab_size), 0
    while at < len(jobs):
        batch = jobs[at:at + max(1, budget // (jobs[at][3] - jobs[at][1]))]
        at += len(batch)
        rows = [torch.tensor(sequences[owner][0][start:end]) for owner, start, _, end in batch]
        rows = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)                        # [B, T + 1]
        logits, targets = model(rows[:, :-1]), rows[:, 1:]                 # [B, T, V], [B, T]
        chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)      # [B, T]
        right = (chosen >= logits.amax(-1)).cpu()                          # [B, T]
        log_probs = (chosen - logits.logsumexp(-1)).double().cpu()         # [B, T]
        for row, (owner, start, scored, end) in enumerate(batch):
            part = slice(scored - start - 1, end - start - 1)              # ids[scored] is the target of the place before it
            total[owner] += log_probs[row, part].sum().item()
            greedy[owner] &= bool(right[row, part].all())
    return [(float(value), bool(flag)) for value, flag in zip(total, greedy)]


@torch.no_grad()
def greedy_answers(model: MobileMoE, encoding, prompts: list[list[int]], max_new: int, until: list[str]) -> list[str]:
    """The likeliest continuation of each prompt (token ids), token by token, cut before the first of the `until` strings.

    Prompts of *equal* length share a batch and a KV cache: rows of unequal length would need padding on the left, and with it
    positions and masks of their own in every layer.
    """
    device = model.model.embed_tokens.weight.device
    end_ids = {encoding.encode_single_token(name) for name in ("<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>")}
    by_length = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    answers = [""] * len(prompts)
    for length, members in sorted(by_length.items()):
        for group in (members[i:i + 32] for i in range(0, len(members), 32)):
            cache = KVCache(model.config, len(group), length + max_new, device)
            tokens, new, running = torch.tensor([prompts[i] for i in group], device=device), [[] for _ in group], set(group)
            for _ in range(max_new):
                tokens = model(tokens, cache=cache)[:, -1].argmax(-1, keepdim=True)                # [B, 1]
                for ids, index, token in zip(new, group, tokens[:, 0].tolist()):
                    if index not in running:
                        continue
                    if token >= encoding.n_vocab or token in end_ids:      # (ids without a token exist where V was rounded up)
                        running.discard(index)
                        continue
                    ids.append(token)
                    answers[index] = encoding.decode(ids)
                    if any(stop in answers[index] for stop in until):
                        running.discard(index)
                if not running:
                    break
    return [answer[:min((at for stop in until if (at := answer.find(stop)) >= 0), default=None)] for answer in answers]

# ----------------------------------------------------------------------------------------------------------------------
# The held-out questions


@dataclass(frozen=True)
class Item:
    """One question: as the beginning of a document, as a chat message, and the choices or the answer."""
    document: str
    question: str
    choices: tuple[str, ...]        # empty for arithmetic
    answer: str                     # the right choice, or the number

    def prompt(self, encoding, chat: bool) -> list[int]:
        if chat:
            return encode_chat(encoding, [{"role": "user", "content": self.question}], reply=True)
        return [encoding.encode_single_token("<|begin_of_text|>"), *encoding.encode_ordinary(self.document)]


def quiz_items(conversations: list[dict]) -> list[Item]:
    """Four-choice questions: a function's own summary among those of three other held-out functions.

    The distractors are real summaries, so nothing but the match with the name tells them apart. A hash draws them and orders
    the choices: the same quiz for every checkpoint, process and machine. In a reader's own corpus, which has no summaries, the
    first question and reply of its held-out chats take their place.
    """
    kind = "summary" if any(c["kind"] == "summary" for c in conversations) else "chat"
    pairs = {}
    for conversation in conversations:
        first, *rest = conversation["messages"]
        if conversation["kind"] == kind and first["role"] == "user":
            pairs.setdefault(rest[0]["content"].strip() if rest else "", first["content"])       # one question per reply
    pairs.pop("", None)

    def draw(question: str, text: str) -> bytes:
        return hashlib.sha256(f"{question}\n{text}".encode()).digest()
    items = []
    for answer, question in pairs.items():
        others = sorted(pairs.keys() - {answer}, key=lambda text: draw(question, text))[:3]
        if len(others) == 3:
            name = re.search(r"`(.+)`", question) if kind == "summary" else None
            choices = tuple(sorted([answer, *others], key=lambda text: draw(text, question)))
            items.append(Item(f"{name[1] if name else question}\n\n", question, choices, answer))
    return items


def arithmetic_items(conversations: list[dict], documents: list[str]) -> list[Item]:
    """Word problems with a number as answer. `documents` are the held-out maths texts, which hold each story's bare sum."""
    sums = {steps: problem for text in documents for problem, steps in re.findall(r"Problem: (.*)\nWorking: (.*)\n", text)}
    items = []
    for conversation in conversations:
        first, *rest = conversation["messages"]
        number = re.fullmatch(r"(-?\d+)\.?", conversation["answer"].strip())
        if conversation["kind"] in ("arithmetic", "chat") and number and first["role"] == "user":
            steps = rest[0]["content"].rpartition(". The answer is")[0] if rest else ""
            document = f"Problem: {sums[steps]}\nWorking:" if steps in sums else f"{first['content']}\n\n"
            items.append(Item(document, first["content"], (), number[1]))
    return items


def heldout_items(corpus: data.Corpus, checkpoint: dict, path: Path) -> tuple[list[Item], list[Item]]:
    """(quiz, arithmetic) of the corpus that the checkpoint was trained on; raises UserError if it was another one.

    What is held out depends on the text alone, so the same text gives the same split. A checkpoint carries its held-out text
    as token ids: if they are not the corpus's, its questions may be ones that the model was trained on.
    """
    encoding = tokenizer_from_dict(checkpoint["tokenizer"])
    for domain, documents in corpus.heldout.items():
        ids = checkpoint["heldout"].get(domain, {"ids": []})["ids"]
        if not np.array_equal(data.tokenize_documents(documents, encoding), np.asarray(ids)):
            raise UserError(f"{path} was trained on other {domain} than this, so what is held out may differ: give the --data "
                            "FOLDER of its training, or use the Python, NumPy and PyTorch whose documentation it learned")
    return quiz_items(corpus.sft_heldout), arithmetic_items(corpus.sft_heldout, corpus.heldout["maths"])


NAMELESS = Item("", "What does it do?", (), "")         # the question that is left when the name is taken away


def quiz_sequences(items: list[Item], encoding, chat: bool) -> list[tuple[list[int], int]]:
    """(ids, where the choice begins): every choice of every item, four in a row, then each distinct choice without a name."""
    asked = [(item, choice) for item in items for choice in item.choices]
    asked += [(NAMELESS, choice) for choice in distinct_choices(items)]
    prompts = [item.prompt(encoding, chat) for item, _ in asked]
    return [(prompt + encoding.encode_ordinary(choice), len(prompt)) for prompt, (_, choice) in zip(prompts, asked)]


def distinct_choices(items: list[Item]) -> list[str]:
    return list(dict.fromkeys(choice for item in items for choice in item.choices))


def quiz_answers(items: list[Item], scores: list[float], per_byte: bool = False) -> np.ndarray:
    """Which choice each item gets, from the log-likelihoods of quiz_sequences: [items].

    The one whose log-likelihood the name raises most: log P(choice | name) - log P(choice), GPT-3's way with ARC (Brown et al.
    2020). A short, common sentence is likely whatever is asked; only the difference tells what the *name* has to do with it.
    per_byte divides log P(choice | name) by the length instead, HellaSwag's way, which leaves "common" in. Measured on 335
    items: after mid-training 53.7 % against 37.6 % (the plain sum 31.0 %), after SFT 65.7 % against 33.7 % (30.4 %).
    """
    given = np.array(scores[:4 * len(items)]).reshape(-1, 4)               # [items, 4]
    if per_byte:
        return (given / [[len(choice.encode()) for choice in item.choices] for item in items]).argmax(1)
    nameless = dict(zip(distinct_choices(items), scores[4 * len(items):]))
    return (given - [[nameless[choice] for choice in item.choices] for item in items]).argmax(1)


@dataclass(frozen=True)
class Score:
    """A fraction of right answers, what guessing reaches, and how far chance alone moves it."""
    right: np.ndarray               # [items] bool
    chance: float

    @property
    def mean(self) -> float:
        return float(self.right.mean())

    @property
    def error(self) -> float:       # the standard error; at 0 or 1 of n it would be 0, so half an answer is the least
        n = len(self.right)
        p = min(max(self.mean, 0.5 / n), 1 - 0.5 / n)
        return math.sqrt(p * (1 - p) / n)

    def __str__(self):
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f} % ({(self.mean - self.chance) / self.error:+.1f} s.e.)"


def last_number(text: str) -> str | None:
    numbers = re.findall(r"-?\d+", text.replace(",", ""))
    return numbers[-1] if numbers else None

# ----------------------------------------------------------------------------------------------------------------------
# One checkpoint


class Subject:
    """A checkpoint ready to be asked: its model computes what its last stage did, in INT4 after QAT and in FP32 before."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoint = load_checkpoint(path)
        self.model = model_from_checkpoint(self.checkpoint)
        if self.checkpoint["quantized"]:
            attach(self.model)
        self.encoding = tokenizer_from_dict(self.checkpoint["tokenizer"])
        self.context = self.checkpoint["context"]
        self.chat = self.checkpoint["stage"] in ("sft", "qat")
        self.long = 0               # texts that did not fit the context, for the report

    def log_likelihoods(self, sequences: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        self.long += sum(len(ids) > self.context + 1 for ids, _ in sequences)
        with parametrize.cached():      # round the weights once, not in every layer of every batch
            return log_likelihoods(self.model, sequences, self.context)

    def answers(self, prompts: list[list[int]], max_new: int, until: list[str]) -> list[str]:
        """Greedy; of a prompt that leaves no room for the answer, the end is kept."""
        max_new = min(max_new, self.context // 2)
        room = self.context - max_new
        self.long += sum(len(prompt) > room for prompt in prompts)
        with parametrize.cached():
            return greedy_answers(self.model, self.encoding, [prompt[-room:] for prompt in prompts], max_new, until)

    def quiz(self, items: list[Item]) -> list[float]:
        return [score for score, _ in self.log_likelihoods(quiz_sequences(items, self.encoding, self.chat))]

    def arithmetic(self, items: list[Item]) -> list[str | None]:
        prompts = [item.prompt(self.encoding, self.chat) for item in items]
        return [last_number(text) for text in self.answers(prompts, 80, ["\n\n"])]

    def report_long(self):
        if self.long:
            print(f"{self.path}: {self.long} texts were longer than the context of {self.context} tokens: scored in "
                  "overlapping windows, or answered from their end")
            self.long = 0


def quiz_score(items: list[Item], answers: np.ndarray) -> Score:
    return Score(np.array([item.choices[answer] == item.answer for item, answer in zip(items, answers)]), 1 / 4)


def arithmetic_score(items: list[Item], answers: list[str | None]) -> Score:
    """Chance is the best that a model could do which always says the same number."""
    commonest = Counter(item.answer for item in items).most_common(1)[0][1]
    return Score(np.array([answer == item.answer for item, answer in zip(items, answers)]), commonest / len(items))

# ----------------------------------------------------------------------------------------------------------------------
# The exported file, in llama.cpp

GGUF_TOKENS = 2048      # per domain for bits per byte: llama.cpp's server is asked token by token, a few milliseconds each


def llama_cpp_log_likelihoods(path: Path, sequences: list[tuple[list[int], int]], encoding) -> list[float]:
    """As log_likelihoods, from the .gguf in a child process: a file that llama.cpp cannot load may abort its process."""
    def whole(token: int) -> bool:
        try:
            return encoding.decode_single_token_bytes(token).decode() != "" and token not in encoding._special_tokens.values()
        except UnicodeDecodeError:
            return False
    odd = [token for token in {token for ids, first in sequences for token in ids[first:]} if not whole(token)]
    question = json.dumps({"path": str(path), "sequences": sequences, "odd": odd})
    child = subprocess.run([sys.executable, __file__, "--ask-llama-cpp"], input=question, capture_output=True, text=True,
                           errors="replace")
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if "error" in line.lower()] or [f"exit code {child.returncode}"]
        raise UserError(f"llama.cpp cannot run {path}: {lines[-1].removeprefix('error: ')}")
    return json.loads(child.stdout.splitlines()[-1])


def ask_llama_cpp():
    """The child's side: {"path", "sequences", "odd"} as JSON on stdin, one log-likelihood per sequence on stdout.

    The server tells the log-probability of the token that it chose. So let it choose the one we ask about: a bias acts on the
    choice, the probability reported is the one before it. Special tokens and those that end inside a character are held back
    together with their probabilities; for these a plain letter is chosen and all V probabilities are read (ten times slower).
    """
    try:
        import xllamacpp
    except ImportError:
        raise UserError("llama.cpp is missing: `pip install xllamacpp`") from None
    question = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.warmup = question["path"], 1, False
    params.n_ctx = max(len(ids) for ids, _ in question["sequences"]) + 8
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    odd = set(question["odd"])
    request = {"n_predict": 1, "cache_prompt": True, "temperature": -1}
    letter = 64     # any one-byte token

    def log_probability(prompt: list[int], token: int) -> float:
        chosen, n_probs = (letter, 10 ** 6) if token in odd else (token, 1)
        reply = server.handle_completions({**request, "prompt": prompt, "n_probs": n_probs, "logit_bias": [[chosen, 1e6]]})
        content = reply["choices"][0]["logprobs"]["content"][0]
        if token in odd:
            content = next(entry for entry in content["top_logprobs"] if entry["id"] == token)
        if content["id"] != token:
            raise RuntimeError(f"error: asked for token {token}, the server chose {content['id']}")
        return max(content["logprob"], -104.0)      # a probability below float32's smallest comes as -3.4e38
    totals = [sum(log_probability(ids[:end], ids[end]) for end in range(first, len(ids)))
              for ids, first in question["sequences"]]
    print("\n" + json.dumps(totals))
    sys.stdout.flush()


def glance(checkpoint: dict, encoding, context: int) -> dict[str, tuple[list[tuple[list[int], int]], int]]:
    """The first GGUF_TOKENS of each domain's held-out text as sequences of at most `context` tokens, and their bytes."""
    special, texts = set(encoding._special_tokens.values()), {}
    for domain, held in checkpoint["heldout"].items():
        ids = held["ids"][:GGUF_TOKENS + 1].tolist()
        size = sum(len(encoding.decode_single_token_bytes(token)) for token in ids[1:] if token not in special)
        texts[domain] = [(ids[i:i + context], 1) for i in range(0, len(ids) - 1, context - 1)], size
    return texts


def compare_with_llama_cpp(path: Path, subject: Subject, items: list[Item], our_quiz: list[float]) -> str:
    """A table: quiz and bits per byte of `subject` in PyTorch and of the file in llama.cpp, on the very same tokens."""
    texts = glance(subject.checkpoint, subject.encoding, subject.context - 1)       # the server keeps a place for the answer
    sequences = [sequence for parts, _ in texts.values() for sequence in parts]
    quiz = quiz_sequences(items, subject.encoding, subject.chat)
    theirs = llama_cpp_log_likelihoods(path, sequences + quiz, subject.encoding)
    ours = [score for score, _ in subject.log_likelihoods(sequences)]
    rows, at = [[], []], 0
    for parts, size in texts.values():
        for row, scores in zip(rows, (ours, theirs)):
            row.append(-sum(scores[at:at + len(parts)]) / math.log(2) / size)
        at += len(parts)
    lines = [f"| first {GGUF_TOKENS:,} tokens of each domain | " + " | ".join(texts) + " | quiz |",
             "|---|" + "---:|" * (len(texts) + 1)]
    scores = ["-", "-"]
    if items:
        answers = [quiz_answers(items, part) for part in (our_quiz, theirs[len(sequences):])]
        scores = [str(quiz_score(items, part)) for part in answers]
    for name, row, score in zip((f"{subject.path}, PyTorch", f"{path}, llama.cpp"), rows, scores):
        lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in row) + f" | {score} |")
    gap = max((abs(a - b) for a, b in zip(*rows)), default=0.0)
    agree = ""
    if items:
        ours, theirs = (quiz_answers(items, part, per_byte=True) for part in (our_quiz, theirs[len(sequences):]))
        agree = (f"; the same answer to {np.mean(answers[0] == answers[1]):.1%} of {len(items)} quiz questions, "
                 f"{np.mean(ours == theirs):.1%} when scored per byte")
    return "\n".join([*lines, "", f"Largest difference {gap:.4f} bits per byte{agree}."])

# ----------------------------------------------------------------------------------------------------------------------
# Routing: which experts each domain uses

ROUTING_WINDOWS = 32    # of held-out text per domain, spread over all of it


@torch.no_grad()
def expert_loads(subject: Subject) -> dict[str, Tensor]:
    """Tokens that each expert got, by domain: {domain: [2, layers, E]}. The first axis is two halves of the domain's text.

    Two samples of one domain never use the experts quite alike. How alike they are is the measure for two domains.
    """
    model, c = subject.model, subject.model.config
    routers = [module for module in model.modules() if isinstance(module, Router)]
    loads = {}
    for domain, held in subject.checkpoint["heldout"].items():
        T = min(subject.context, len(held["ids"]) // 2)
        whole = len(held["ids"]) // T
        chosen = np.unique(np.linspace(0, whole - 1, min(whole, ROUTING_WINDOWS)).astype(int))
        loads[domain] = torch.zeros(2, c.n_layers, c.n_routed)
        with parametrize.cached():
            for half in (0, 1):
                def count(router, inputs, output, load=loads[domain][half]):       # load [layers, E]
                    load[routers.index(router)] += output[2].load
                hooks = [router.register_forward_hook(count) for router in routers]
                for i in chosen[half::2]:
                    model(held["ids"][None, i * T:(i + 1) * T].long())
                for hook in hooks:
                    hook.remove()
    return loads


@dataclass(frozen=True)
class RoutingReport:
    """The numbers behind the summary. Shares p [layers, E] of a domain's routes sum to 1 in each layer."""
    shares: dict[str, Tensor]                   # domain -> [layers, E]
    within: dict[str, float]                    # domain -> overlap of the two halves of its text
    between: dict[tuple[str, str], float]       # pair of domains -> overlap

    @property
    def imbalance(self) -> float:               # of the worst layer, the domains weighing alike
        mean = torch.stack(list(self.shares.values())).mean(0)             # [layers, E]
        return (mean.amax(1) * mean.shape[1]).max().item()

    def in_use(self, domain: str) -> float:
        """exp(entropy), the mean over layers: as many equally busy experts would be as hard to guess."""
        p = self.shares[domain]
        return torch.special.entr(p).sum(1).exp().mean().item()


def overlap(p: Tensor, q: Tensor) -> float:
    """The part of the routes that two domains have in common, mean over layers: 1 the same, 0 no expert in common."""
    return torch.minimum(p, q).sum(-1).mean().item()


def routing_report(loads: dict[str, Tensor]) -> RoutingReport:
    def share(load: Tensor) -> Tensor:
        return load / load.sum(-1, keepdim=True)
    shares = {domain: share(load.sum(0)) for domain, load in loads.items()}
    # Whole domains would agree better than their halves just for being twice as much text: compare halves with halves.
    halves = {domain: share(load) for domain, load in loads.items()}       # [2, layers, E]
    domains = list(loads)
    between = {(a, b): (overlap(halves[a][0], halves[b][1]) + overlap(halves[a][1], halves[b][0])) / 2
               for i, a in enumerate(domains) for b in domains[i + 1:]}
    return RoutingReport(shares, {d: overlap(*halves[d]) for d in domains}, between)


def routing_summary(names: list[str], reports: list[RoutingReport]) -> str:
    """A table, and sentences that say nothing but what the table shows."""
    domains, E = list(reports[0].shares), next(iter(reports[0].shares.values())).shape[1]
    pairs = list(reports[0].between)
    lines = ["| routing | max:mean | " + " | ".join(f"in use: {d}" for d in domains) + " | within a domain | "
             + " | ".join(f"{a}/{b}" for a, b in pairs) + " | as before |", "|---|" + "---:|" * (len(domains) + len(pairs) + 3)]
    for i, (name, report) in enumerate(zip(names, reports)):
        before = np.mean([overlap(report.shares[d], reports[i - 1].shares[d]) for d in domains]) if i else None
        lines.append(f"| {name} | {report.imbalance:.1f} | " + " | ".join(f"{report.in_use(d):.1f}" for d in domains)
                     + f" | {min(report.within.values()):.2f} to {max(report.within.values()):.2f} | "
                     + " | ".join(f"{report.between[pair]:.2f}" for pair in pairs)
                     + (" | |" if before is None else f" | {before:.2f} |"))
    lines += ["", f"max:mean is the busiest expert of the worst layer; in use, exp(entropy) out of {E} experts; pairs and "
              "'within a domain', the part of the routes that two texts share; as before, that of a domain and its row above."]
    last, name = reports[-1], names[-1]
    if pairs:
        near, far = max(pairs, key=last.between.get), min(pairs, key=last.between.get)
        least = min(last.within.values())
        apart = [pair for pair in pairs if last.between[pair] < least]
        lines.append(f"{name}: {len(apart)} of {len(pairs)} pairs of domains share less than any domain shares with itself "
                     f"({least:.2f}); most alike are {near[0]} and {near[1]} ({last.between[near]:.2f}), least alike {far[0]} "
                     f"and {far[1]} ({last.between[far]:.2f}).")
    if len(reports) > 1:
        change = {d: last.in_use(d) - reports[0].in_use(d) for d in domains}
        lines.append(f"From {names[0]} to {name} the number of experts in use changes by "
                     + ", ".join(f"{change[d]:+.1f} ({d})" for d in domains) + f" out of {E}.")
    return "\n".join(lines)

# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: `pip install matplotlib`") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_figure(figure, path: Path):
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
    pyplot().close(figure)


def draw_routing(names: list[str], reports: list[RoutingReport], path: Path):
    """A row of panels per checkpoint, a panel per layer: domains by experts, colour = share of the routes against the mean.

    Experts stand in one order in all rows: by the domain that uses them most in the last checkpoint. An expert's number means
    nothing; neighbours with like habits make a pattern visible.
    """
    plt = pyplot()
    domains = list(reports[-1].shares)
    last = torch.stack([reports[-1].shares[d] for d in domains])           # [domains, layers, E]
    n_layers, E = last.shape[1:]
    figure, axes = plt.subplots(len(reports), n_layers, squeeze=False, layout="constrained",
                                figsize=(2 + 3.4 * n_layers, 0.9 + (0.5 + 0.22 * len(domains)) * len(reports)))
    for layer in range(n_layers):
        peak, domain = last[:, layer].max(0)                               # [E], [E]
        order = sorted(range(E), key=lambda e: (domain[e].item(), -peak[e].item()))
        for name, report, axis in zip(names, reports, axes[:, layer]):
            p = torch.stack([report.shares[d][layer] for d in domains]) * E                        # [domains, E]
            image = axis.imshow(p[:, order], aspect="auto", cmap="magma", vmin=0, vmax=4, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks(range(len(domains)), domains if layer == 0 else [""] * len(domains), fontsize=8)
            axis.set_title(f"{name}, layer {layer}", fontsize=9)
    figure.colorbar(image, ax=axes, label="share / mean", extend="max", shrink=0.8)
    figure.supxlabel(f"{E} experts, sorted by the domain that uses them most in {names[-1]}", fontsize=9)
    save_figure(figure, path)


def draw_progress(names: list[str], bits: list[dict[str, float]], scores: list[dict[str, Score]], path: Path):
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for domain in bits[0]:
        left.plot(names, [row[domain] for row in bits], "o-", label=domain)
    left.set(title="held-out bits per byte", ylim=(0, None))
    for color, task in zip(("tab:blue", "tab:cyan", "tab:orange"), scores[0]):
        values = [row[task] for row in scores]
        right.errorbar(names, [100 * s.mean for s in values], [100 * s.error for s in values], fmt="o-", capsize=4, color=color,
                       label=f"{task} ({len(values[0].right)} questions)")
        right.axhline(100 * values[0].chance, color=color, ls=":", label=f"{task}, chance")
    right.set(title="right answers, %, ± one standard error", ylim=(0, 100))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    save_figure(figure, path)

# ----------------------------------------------------------------------------------------------------------------------
# The paper's tasks: an adapter to lm-evaluation-harness

# lm-eval's name -> (the paper's, the metric, the released S base model's score where the paper's figure is known to us)
MOBILEMOE14 = {
    "hellaswag": ("HellaSwag", "acc_norm", 58.9), "piqa": ("PIQA", "acc_norm", 75.4), "social_iqa": ("SIQA", "acc", 46.8),
    "winogrande": ("WinoGrande", "acc", 58.6), "mmlu": ("MMLU", "acc", None), "nq_open": ("NQ", "exact_match", None),
    "triviaqa": ("TriviaQA", "exact_match", None), "arc_easy": ("ARC-e", "acc_norm", 73.9),
    "arc_challenge": ("ARC-c", "acc_norm", None), "openbookqa": ("OpenBookQA", "acc_norm", 34.6),
    "boolq": ("BoolQ", "acc", 60.2), "drop": ("DROP", "f1", None), "gsm8k": ("GSM8K", "exact_match", None),
    "bbh": ("BBH", "exact_match", None)}
PAPER_AVERAGES = "The paper's averages over all 14: S 46.5, M 55.4, L 59.8; after INT4 QAT 44.0, 52.5, 57.8."


def register_with_lm_eval() -> type:
    """Make `--model mobilemoe` known to lm-eval: its LM interface on top of log_likelihoods and greedy_answers above."""
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
            self.begin = [self.subject.encoding.encode_single_token("<|begin_of_text|>")]

        def encode(self, text: str) -> list[int]:
            return self.subject.encoding.encode_ordinary(text)

        def encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
            # A space between the two belongs to the first word after it, as in text; "a " + "b" encoded apart is not "a b".
            stripped = context.rstrip()
            whole, before = self.encode(context + continuation), self.encode(stripped)
            return self.begin + whole, 1 + min(len(before), len(whole) - 1)

        def loglikelihood(self, requests, disable_tqdm=False):
            results = self.subject.log_likelihoods([self.encode_pair(*request.args) for request in requests])
            self.subject.report_long()
            return results

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            sequences = [(self.begin + self.encode(request.args[0]), 1) for request in requests]
            results = [score for score, _ in self.subject.log_likelihoods(sequences)]
            self.subject.report_long()
            return results

        def generate_until(self, requests, disable_tqdm=False):
            groups, answers = defaultdict(list), [""] * len(requests)
            for index, request in enumerate(requests):
                options = request.args[1]
                if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                    raise UserError("this task wants sampled answers, mobilemoe answers greedily: set do_sample to false")
                until = options.get("until") or []
                until = (until,) if isinstance(until, str) else tuple(until)
                groups[until, options.get("max_gen_toks", 256)].append(index)
            for (until, max_new), members in groups.items():
                prompts = [self.begin + self.encode(requests[index].args[0]) for index in members]
                for index, answer in zip(members, self.subject.answers(prompts, max_new, list(until))):
                    answers[index] = answer
            self.subject.report_long()
            return answers
    return MobileMoELM


def load_tasks(tasks: str):
    """"mobilemoe14", names of lm-eval's own tasks, or .yaml files, separated by commas -> (names, lm-eval's TaskManager)."""
    from lm_eval.tasks import TaskManager
    names, folders = [], []
    for entry in tasks.split(","):
        if entry.endswith((".yaml", ".yml")):
            try:
                import yaml
                loader = type("Loader", (yaml.SafeLoader,), {})     # lm-eval's "!function" is for lm-eval to resolve
                loader.add_multi_constructor("!", lambda loader, suffix, node: None)
                task = yaml.load(Path(entry).read_text(), loader)
                names.append(task["task"])
            except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
                reason = getattr(error, "strerror", None) or "not a YAML file with a `task` name"
                raise UserError(f"cannot read the task file {entry}: {reason}") from None
            folders.append(str(Path(entry).resolve().parent))
        else:
            names += MOBILEMOE14 if entry == "mobilemoe14" else [entry]
    manager = TaskManager(include_path=folders or None, include_defaults=len(folders) < len(tasks.split(",")))
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"lm-eval knows no task {name!r}: give mobilemoe14, one of `lm-eval ls tasks`, or a .yaml file")
    return names, manager


def run_tasks(paths: list[Path], tasks: str, limit: int | None) -> str:
    """lm-eval's scores of the checkpoints, and the paper's of the released S base model beside them, as a table."""
    model_class = register_with_lm_eval()
    from lm_eval import simple_evaluate
    names, manager = load_tasks(tasks)
    rows, columns = {name: [] for name in names}, []
    for path in paths:
        model = model_class(str(path))
        columns.append(path.name)
        for name in names:
            try:
                results = simple_evaluate(model, tasks=[name], task_manager=manager, limit=limit, bootstrap_iters=0,
                                          log_samples=False)["results"][name]
            except UserError:
                raise
            except Exception as error:      # a data set that cannot be loaded fails in a dozen ways, most of them long
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(f"task {name} cannot be run (is its data set there?): {first}") from None
            wanted = MOBILEMOE14.get(name, (name, "acc", None))[1]
            scores = {key: value for key, value in results.items()
                      if isinstance(value, float) and "stderr" not in key and "," in key}
            key = next((key for key in scores if key.split(",")[0] == wanted), next(iter(scores), None))
            rows[name].append("-" if key is None else f"{100 * scores[key]:.1f} ({key.split(',')[0]})")
    lines = ["| task | " + " | ".join(columns) + " | paper, S base |", "|---|" + "---:|" * (len(columns) + 1)]
    for name, cells in rows.items():
        label, _, paper = MOBILEMOE14.get(name, (name, "", None))
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {paper or '-'} |")
    return "\n".join([*lines, "", PAPER_AVERAGES + " Shots and prompts here are lm-eval's defaults."])

# ----------------------------------------------------------------------------------------------------------------------
# Command line


def evaluate(checkpoints: list[Path], files: list[Path], folder: str | None, out: Path):
    """Print the tables, draw the pictures."""
    subjects = [Subject(path) for path in checkpoints]     # all of them first: a wrong name should not cost ten minutes
    print("reading " + (folder or "the documentation and source of Python, NumPy and PyTorch"), flush=True)
    corpus = data.folder_corpus(folder) if folder else data.embedded_corpus()
    names, bits, scores, quiz, reports = [], [], [], {}, []
    for subject in subjects:
        items, sums = heldout_items(corpus, subject.checkpoint, subject.path)
        names.append(subject.path.stem)
        print(f"{subject.path}: bits per byte, {len(items)} quiz and {len(sums)} arithmetic questions, routing", flush=True)
        bits.append(heldout_bits_per_byte(subject.model, subject.checkpoint))
        row, quiz[subject] = {}, subject.quiz(items)
        if items:
            row = {"quiz": quiz_score(items, quiz_answers(items, quiz[subject])),
                   "quiz per byte": quiz_score(items, quiz_answers(items, quiz[subject], per_byte=True))}
        scores.append(row | ({"arithmetic": arithmetic_score(sums, subject.arithmetic(sums))} if sums else {}))
        subject.report_long()
        if not subject.model.config.dense:
            reports.append((subject.path.stem, routing_report(expert_loads(subject))))
    tasks = {task: score for row in scores for task, score in row.items()}
    heads = [*bits[0], *(f"{task} (chance {100 * score.chance:.1f} %)" for task, score in tasks.items())]
    print("\n| held-out | asked as | " + " | ".join(heads) + " |\n|---|---|" + "---:|" * len(heads))
    for subject, name, row, right in zip(subjects, names, bits, scores):
        cells = [f"{row[d]:.3f}" if d in row else "-" for d in bits[0]] + [str(right.get(task, "-")) for task in tasks]
        print(f"| {name} | {'chat' if subject.chat else 'document'} | " + " | ".join(cells) + " |")
    print("\nBits per byte by domain; right answers ± one standard error, and how many of them above chance.", flush=True)
    for path in files:
        subject = next((s for s in reversed(subjects) if s.checkpoint["quantized"]), subjects[-1])
        items, _ = heldout_items(corpus, subject.checkpoint, subject.path)
        print("\n" + compare_with_llama_cpp(path, subject, items, quiz[subject]), flush=True)
    print()
    if reports:
        print(routing_summary(*zip(*reports)))
        draw_routing(*zip(*reports), out / "routing.png")
    else:
        print("routing: none, the model is dense")
    draw_progress(names, bits, scores, out / "progress.png")
    print(f"pictures: {out / 'progress.png'}" + (f", {out / 'routing.png'}" if reports else ""))


def main():
    if sys.argv[1:2] == ["--ask-llama-cpp"]:
        return ask_llama_cpp()
    if sys.argv[1:2] == ["lm-eval"]:        # lm-eval's own command, which now knows `--model mobilemoe`
        register_with_lm_eval()
        from lm_eval.__main__ import cli_evaluate
        sys.argv = sys.argv[1:]
        return cli_evaluate()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="CHECKPOINT", help=".pt files, in the order of their stages; "
                        "a .gguf is compared with the last quantised checkpoint")
    parser.add_argument("--data", metavar="FOLDER", help="the folder that the checkpoints were trained on, if they were on one")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the pictures go (beside the last checkpoint)")
    parser.add_argument("--tasks", help="run lm-eval instead: mobilemoe14, its own names, or .yaml files, with commas between")
    parser.add_argument("--limit", type=int, help="only so many questions of each of these tasks")
    args = parser.parse_args()
    files = [path for path in args.files if path.suffix == ".gguf"]
    checkpoints = [path for path in args.files if path.suffix != ".gguf"]
    for path in files:
        if not path.is_file():
            raise UserError(f"no file {path}: `python export_mobile.py CHECKPOINT` makes one")
    if not checkpoints:
        raise UserError("a .gguf is judged beside the checkpoint it was made of: name that as well")
    if args.tasks:
        print("\n" + run_tasks(checkpoints, args.tasks, args.limit))
        return
    out = args.out or checkpoints[-1].parent
    if not out.is_dir():
        raise UserError(f"no folder {out} for the pictures")
    evaluate(checkpoints, files, args.data, out)


if __name__ == "__main__":
    run_main(main)
