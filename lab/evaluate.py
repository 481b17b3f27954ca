"""How good a model is, and where its tokens go: the same questions to every stage and to the exported file.

    python -m lab.evaluate runs/tiny/{pretrain,midtrain,sft,qat}.pt runs/tiny/mobilemoe.gguf --out docs
    python -m lab.evaluate lm-eval run --model mobilemoe --tasks mobilemoe14 --limit 100 \\
        --model_args checkpoint=runs/tiny/midtrain.pt

The first asks what the run itself held out from every stage: bits per byte by domain; a docs quiz (which of
four summaries belongs to this function? log-likelihoods decide, as in HellaSwag and ARC); skills, facts and
manners by exact match of a greedy answer (skills.is_right), as in GSM8K, asked of every checkpoint and of
the exported file in llama.cpp. It sets that file beside its checkpoint, and shows which experts each domain
uses. The second is lm-evaluation-harness' own command; `mobilemoe14` are the paper's 14 tasks.

One rule makes the quiz comparable: it is put in the format that the checkpoint's last stage taught.
`pretrain` and `midtrain` continue a document ("numpy.mean", an empty line, the summary), `sft` and `qat` are
asked in a chat. The questions, the choices and the scoring are the same.

What it is not: a leaderboard. A model trained for ten minutes on documentation is asked about documentation,
on a CPU.
"""
import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import common
from common import UserError, encode, encode_prompt
from export_mobile import chat_template, export_checkpoint
from mobilemoe import generate, model_from_checkpoint
from quantize import attach, heldout_bits_per_byte
from released import render_chat
from skills import PHRASINGS, is_right

# ----------------------------------------------------------------------------------------------------------
# What a model makes of token sequences


class Subject:
    """A checkpoint ready to be asked. It computes as the phone does after QAT, and in FP32 before."""

    def __init__(self, path: Path):
        self.path = path
        self.name = f"{path.absolute().parent.name}/{path.stem}"        # tiny/sft
        self.checkpoint = common.load_checkpoint(path)
        self.model = model_from_checkpoint(self.checkpoint)
        if self.checkpoint["quantized"]:
            attach(self.model)
        self.encoding = common.tokenizer_from_dict(self.checkpoint["tokenizer"])
        self.context = self.checkpoint["context"]
        self.held_out = self.checkpoint["heldout"]      # {domain: {"ids": [n], "bytes": their text's size}}
        self.chat = self.checkpoint["stage"] in ("sft", "qat")

    def log_likelihoods(self, sequences: list[tuple[list[int], int]], what: str) -> list[tuple[float, bool]]:
        """For each (ids, first): log P(ids[first:] | ids[:first]) in nats; would greedy decoding say that?

        `first` is at least 1: something must come before. A text longer than the context is read in windows
        that overlap by half, so no token is judged with less than half a context before it.
        """
        windows = []                # (number of the sequence, some of its ids, the first of them to score)
        for i, (ids, first) in enumerate(sequences):
            while first < len(ids):
                end = min(len(ids), max(first + self.context // 2, self.context) + 1)
                start = max(0, end - self.context - 1)
                windows.append((i, torch.tensor(ids[start:end]), first - start))
                first = end
        windows.sort(key=lambda window: -len(window[1]))        # batches of like length, the longest first
        nats = [0.0] * len(sequences)
        greedy = [True] * len(sequences)
        progress = common.Progress(what, len(windows), "texts")
        # Logits are the largest tensor by far: 2^24 of them, 64 MB, if a batch is full of whole contexts.
        size = max(1, 2 ** 24 // (self.context * self.model.config.vocab_size))
        for done in range(0, len(windows), size):
            batch = windows[done:done + size]
            # Padding stands on the right, where a causal model cannot see it; a dropless one loses nothing.
            rows = nn.utils.rnn.pad_sequence([ids for _, ids, _ in batch], batch_first=True)      # [B, T + 1]
            log_probs = self.model(rows[:, :-1]).log_softmax(-1)           # [B, T, V]
            for (i, ids, first), row in zip(batch, log_probs):
                row = row[first - 1:len(ids) - 1]           # [n, V] a place predicts the id after it
                nats[i] += row.gather(1, ids[first:, None]).double().sum().item()
                greedy[i] &= torch.equal(row.argmax(1), ids[first:])
            progress.show(done + len(batch))
        return list(zip(nats, greedy))

    def answers(self, requests: list[tuple[list[int], int, list[str]]], what: str) -> list[str]:
        """For each (prompt, limit, until): its likeliest continuation, up to the first `until` string.

        It has at most `limit` tokens, and half a context. Of a prompt that leaves too little room for them,
        only the end is read.
        """
        stop = common.stop_tokens(self.encoding, self.model.config.vocab_size)
        progress = common.Progress(what, len(requests), "answers")
        answers = []
        cut = 0
        for prompt, limit, until in requests:
            limit = min(limit, self.context // 2)
            cut += len(prompt) + limit > self.context
            said = []
            answer = ""
            for token in generate(self.model, prompt[limit - self.context:], limit, temperature=0, stop=stop):
                said.append(token)
                answer = self.encoding.decode(said)
                if any(end in answer for end in until):
                    break
            for end in until:
                answer = answer.split(end)[0]
            answers.append(answer)
            progress.show(len(answers))
        if cut:
            print(f"{what}: {cut} prompts do not fit a context of {self.context}: only their end was read")
        return answers

# ----------------------------------------------------------------------------------------------------------
# The held-out questions

# The question as a document's beginning and as a chat message, four choices, and the right answer.
Item = namedtuple("Item", "document question choices answer")
EACH = 200              # items of a kind, at most


def quiz_items(conversations: list[dict]) -> list[Item]:
    """Four-choice questions: a function's own summary among those of three other held-out functions.

    The distractors are real summaries, so nothing but the match with the name tells them apart. A hash draws
    them and orders the choices: the same quiz for every checkpoint, process and machine.
    """
    questions = {}                  # by answer: one question for each
    for chat in conversations:
        if chat["kind"] == "quiz":
            questions.setdefault(chat["answer"], chat["messages"][0]["content"])
    if len(questions) < 4:
        return []

    def draw(question: str, text: str) -> bytes:
        return hashlib.sha256(f"{question}\n{text}".encode()).digest()

    items = []
    for answer, question in questions.items():
        others = sorted(questions.keys() - {answer}, key=lambda text: draw(question, text))[:3]
        choices = sorted([answer, *others], key=lambda text: draw(text, question))
        items.append(Item(f"{re.search('What does (.+) do', question)[1]}\n\n", question, choices, answer))
    return items


def prompt_ids(subject: Subject, item: Item) -> list[int]:
    text = item.question if subject.chat else item.document
    return encode_prompt(subject.encoding, text, subject.chat)


def score(right: list[bool], chance: float) -> np.ndarray:
    """[mean, standard error, what guessing reaches], in percent."""
    mean = sum(right) / len(right)
    p = min(max(mean, 0.5 / len(right)), 1 - 0.5 / len(right))     # never 0 or 1: the error would be 0
    return 100 * np.array([mean, np.sqrt(p * (1 - p) / len(right)), chance])


def ask_quiz(subject: Subject, items: list[Item]) -> dict[str, np.ndarray]:
    """Two ways to judge the same log-likelihoods. The choice with the most points is the answer.

    quiz        log P(choice | name) over the choice's length in bytes: HellaSwag's way. A short, common
                sentence is likely whatever is asked, and wins too often.
    name gain   log P(choice | name) - log P(choice): GPT-3's way with ARC (Brown et al. 2020). It tells what
                the *name* has to do with the choice; as a difference of two long sums it is noisier.
    """
    nameless = Item("", "What does it do?", [], "")
    sequences = []
    for item in items:
        for prompt in (prompt_ids(subject, item), prompt_ids(subject, nameless)):
            for choice in item.choices:
                sequences.append((prompt + encode(subject.encoding, choice).tolist(), len(prompt)))
    nats = [value for value, _ in subject.log_likelihoods(sequences, f"{subject.name}: quiz")]
    named, alone = np.reshape(nats, (-1, 2, 4)).transpose(1, 0, 2)         # [items, 4] each
    sizes = [[len(choice.encode()) for choice in item.choices] for item in items]
    best = {"quiz": (named / sizes).argmax(1), "name gain": (named - alone).argmax(1)}     # [items] each
    return {way: score([item.choices[i] == item.answer for item, i in zip(items, chosen)], chance=1 / 4)
            for way, chosen in best.items()}


def ask_skills(name: str, path: Path, skills: dict[str, list[dict]]) -> dict[str, np.ndarray]:
    """Have llama.cpp answer all questions from a .gguf file, greedily -> {kind: score}.

    Chance: what a model would reach that always gives a kind's commonest answer.
    """
    asked = [pair for pairs in skills.values() for pair in pairs]
    print(f"{name}: {len(asked):,} questions about skills, facts and manners", flush=True)
    chats = [pair["messages"][:1] for pair in asked]
    answers = iter(common.ask_llama_cpp(path, chats=chats, max_tokens=100, threads=1)["answers"])
    scores = {}
    unknown = []                # how often it does not know what it was taught
    for kind, pairs in skills.items():
        said = [next(answers) for _ in pairs]
        finals = Counter(pair["answer"].split("The answer is ")[-1] for pair in pairs)
        right = [is_right(pair["answer"], text) for pair, text in zip(pairs, said)]
        scores[kind] = score(right, finals.most_common(1)[0][1] / len(pairs))
        if kind in PHRASINGS and kind.endswith(" of"):
            unknown += [text.startswith("I do not know") for text in said]
    if unknown:
        print(f'{name}: "I do not know" to {np.mean(unknown):.1%} of {len(unknown)} facts that were taught')
    return scores


def put_questions(subjects: list[Subject], exported: list[Path]):
    """Bits per byte and quiz of every checkpoint; skills of every checkpoint and file. Prints two tables."""
    conversations = json.loads(subjects[0].checkpoint["sft_heldout"])
    quiz = quiz_items(conversations)
    rows = []
    for subject in subjects:
        bits = heldout_bits_per_byte(subject.model, subject.checkpoint)
        right = ask_quiz(subject, quiz) if quiz else {}
        cells = [f"{value:.3f}" for value in bits.values()]
        cells += [f"{mean:.1f} ± {error:.1f} %" for mean, error, _ in right.values()]
        rows.append([subject.name, "chat" if subject.chat else "document", *cells])
    heads = ["held out", "asked as", *bits, *(f"{way} of {len(quiz)}, chance 25 %" for way in right)]
    print("\n" + common.markdown_table(heads, rows) + "\n", flush=True)
    skills = defaultdict(list)
    for pair in conversations:
        if pair["kind"] not in ("quiz", "chat") and len(skills[pair["kind"]]) < EACH:
            skills[pair["kind"]].append(pair)
    if not any(skills.values()):
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {path.name: path for path in exported}
        for subject in subjects:
            path = Path(folder, f"{subject.path.stem}.gguf")
            export_checkpoint(subject.path, path, "q4_0" if subject.checkpoint["quantized"] else "f16")
            files[subject.name] = path
        scores = {name: ask_skills(name, path, skills) for name, path in files.items()}
    rows = []
    for kind, pairs in skills.items():
        cells = [f"{mean:.0f} ± {error:.0f}" for mean, error, _ in (found[kind] for found in scores.values())]
        rows.append([kind, len(pairs), f"{scores[subject.name][kind][2]:.0f}", *cells])
    print("\n" + common.markdown_table(["right, % ± one standard error", "n", "chance", *scores], rows))

# ----------------------------------------------------------------------------------------------------------
# The exported file, in llama.cpp


def compare_with_llama_cpp(path: Path, subject: Subject) -> str:
    """A table: the checkpoint in PyTorch and the file in llama.cpp on the same beginning of each domain.

    Is the *file* what was trained? So the KV cache is F32: F16 costs 1 % of the next tokens by itself
    (tests/fidelity.py measures both). One thread: two wait for each other at every token, ten times as long
    on a busy machine.
    """
    count = min(1024, 2 ** 22 // subject.model.config.vocab_size)          # tokens: each comes with V numbers
    rows = []
    for domain, held in subject.held_out.items():
        ids = held["ids"][:count + 1].long()                               # [n + 1]
        parts = ids[:-1].split(subject.context - 1)                        # llama.cpp's answer must fit too
        prompts = [part[:end + 1].tolist() for part in parts for end in range(len(part))]
        ours = torch.cat([subject.model(part[None])[0] for part in parts]).log_softmax(-1).numpy()
        theirs = common.ask_llama_cpp(path, prompts=prompts, kv="f32", threads=1)["logprobs"]
        # [n, V] each: what may follow each of the first n
        bits = [-side[range(len(side)), ids[1:]].mean() / np.log(2) for side in (ours, theirs)]
        same = (ours.argmax(1) == theirs.argmax(1)).mean()
        rows.append([domain, *(f"{value:.4f}" for value in bits), f"{same:.1%}"])
    return common.markdown_table(["bits per token", f"{subject.name} in PyTorch", f"{path.name} in llama.cpp",
                                  f"same likeliest token, of {count:,}"], rows)

# ----------------------------------------------------------------------------------------------------------
# Routing: which experts each domain uses


def routing_shares(subject: Subject) -> dict[str, Tensor]:
    """Each expert's part of the routes, by domain: {domain: [2, layers, E]}, for two halves of its text.

    Two samples of one domain never use the experts quite alike. How alike is the measure for two domains.
    """
    shares = {}
    for domain, held in subject.held_out.items():
        T = min(subject.context, len(held["ids"]) // 2)
        rows = held["ids"].long().unfold(0, T, T)                          # [windows, T]
        rows = rows[::len(rows) // 32 + 1]                                 # at most 32, spread over the text
        load = torch.stack([subject.model(half, half)[1].load for half in (rows[0::2], rows[1::2])])
        shares[domain] = load / load.sum(-1, keepdim=True)                 # [2, layers, E]
    return shares


def routing_table(name: str, shares: dict[str, Tensor]) -> str:
    """How many experts a domain uses, and what part of its routes another domain's text takes as well."""
    rows = []
    for domain, p in shares.items():
        used = torch.special.entr(p.mean(0)).sum(-1).exp().mean()          # as many, if all were used alike
        both = [torch.minimum(p[0], q[1]).sum(-1).mean() for q in shares.values()]
        rows.append([domain, f"{used:.1f}", *(f"{part:.2f}" for part in both)])
    heads = [f"routes in {name}", f"experts of {p.shape[-1]} in use"]
    return common.markdown_table([*heads, *(f"as {other}" for other in shares)], rows)


def draw_routing(shares: dict[str, dict[str, Tensor]], picture: Path):
    """A row of panels per checkpoint, a panel per layer: domains by experts, colour = share against the mean.

    Experts stand in one order in all rows: by the domain that uses them most in the last checkpoint. An
    expert's number means nothing; neighbours with like habits make a pattern visible.
    """
    whole = [torch.stack([share.mean(0) for share in halves.values()]).numpy() for halves in shares.values()]
    domains, n_layers, E = whole[-1].shape
    figure, axes = common.new_figure(len(shares), n_layers, (2 + 3.4 * n_layers, 1 + 1.4 * len(shares)))
    for layer in range(n_layers):
        order = whole[-1][:, layer].argmax(0).argsort(kind="stable")         # [E]
        for (name, halves), share, axis in zip(shares.items(), whole, axes[:, layer]):
            image = axis.imshow(share[:, layer, order] * E, aspect="auto", cmap="magma", vmin=0, vmax=4)
            axis.set(title=f"{name}, layer {layer}", xticks=[])
            axis.set_yticks(range(domains), halves)
    figure.colorbar(image, ax=axes, label=f"share / mean of {E} experts", extend="max", shrink=0.8)
    common.save_figure(figure, picture)

# ----------------------------------------------------------------------------------------------------------
# The paper's tasks: an adapter to lm-evaluation-harness

# The paper's scores of the S base model: HellaSwag 58.9, PIQA 75.4, ARC-e 73.9, OpenBookQA 34.6 (acc_norm),
# SIQA 46.8, WinoGrande 58.6, BoolQ 60.2 (acc). The averages of all 14: S 46.5, M 55.4, L 59.8; after INT4 QAT
# 44.0, 52.5, 57.8.
MOBILEMOE14 = ("hellaswag,piqa,social_iqa,winogrande,mmlu,nq_open,triviaqa,arc_easy,arc_challenge,openbookqa,"
               "boolq,drop,gsm8k,bbh")


def register_with_lm_eval() -> type:
    """Make `--model mobilemoe` known to lm-eval: its LM interface on top of Subject."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
        from lm_eval.models.utils import normalize_gen_kwargs
    except ImportError:
        raise UserError("lm-evaluation-harness is missing: `pip install lm-eval==0.4.13`") from None

    @register_model("mobilemoe")
    class MobileMoELM(LM):
        """checkpoint=FILE. A context begins a document, or is a conversation with --apply_chat_template."""
        tokenizer_name = "mobilemoe"        # tells caches of prompts apart; all have one chat format

        def __init__(self, checkpoint: str, batch_size=None, max_batch_size=None, device=None):
            super().__init__()              # (batch size and device come with every command, needed or not)
            self.subject = Subject(Path(checkpoint))
            *_, self.header_end, self.turn_end = common.chat_names(self.subject.encoding)
            self.template = (self.subject.checkpoint.get("chat_template")
                             or chat_template(self.subject.encoding))

        def chat_template(self, chat_template=False) -> str:
            return self.template            # the one in the exported file

        def apply_chat_template(self, chat_history: list[dict], add_generation_prompt=True) -> str:
            text = render_chat(self.template, self.subject.encoding, chat_history, add_generation_prompt)
            return text if add_generation_prompt else text.removesuffix(self.turn_end)      # an answer begun

        def encode(self, text: str) -> list[int]:
            if text.startswith("<|begin_of_text|>"):    # a conversation, where names of tokens are tokens
                return self.subject.encoding.encode(text, allowed_special="all")
            return encode_prompt(self.subject.encoding, text, chat=False)

        def encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
            # A space between the two belongs to the word after it: "a " and "b" apart are not "a b". But the
            # empty line that ends the header of an answer is the header's.
            whole = self.encode(context + continuation)
            before = context if context.endswith(f"{self.header_end}\n\n") else context.rstrip()
            # At least one token is scored, unless there is none.
            return whole, min(len(self.encode(before)), len(whole) - bool(continuation))

        def loglikelihood(self, requests, disable_tqdm=False):
            sequences = [self.encode_pair(*request.args) for request in requests]
            return self.subject.log_likelihoods(sequences, "log-likelihoods")

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            sequences = [(self.encode(request.args[0]), 1) for request in requests]
            return [nats for nats, _ in self.subject.log_likelihoods(sequences, "whole texts")]

        def generate_until(self, requests, disable_tqdm=False):
            asked = []
            for context, given in (request.args for request in requests):
                options = normalize_gen_kwargs(given)       # max_new_tokens and others become max_gen_toks
                if options["do_sample"] and float(given.get("temperature", 1)) > 1e-3:
                    raise UserError("this task samples, mobilemoe answers greedily: set do_sample to false")
                until = [end for end in options["until"] if end]
                asked.append((self.encode(context), options["max_gen_toks"], until))
            return self.subject.answers(asked, "answers")
    return MobileMoELM


def run_lm_eval(arguments: list[str]):
    """lm-eval's own command, which now knows `--model mobilemoe` and the task list mobilemoe14."""
    register_with_lm_eval()
    from lm_eval.__main__ import cli_evaluate
    listed = [re.sub("(?<![^=,])mobilemoe14(?![^,])", MOBILEMOE14, word) for word in arguments]
    sys.argv = ["lm-eval", *listed]
    try:
        cli_evaluate()
    except Exception as error:      # a task file or its data can be wrong in a dozen ways
        first_line = (str(error).strip() or "-").splitlines()[0]
        raise UserError(f"lm-eval: {type(error).__name__}: {first_line}") from None

# ----------------------------------------------------------------------------------------------------------
# Command line


@torch.no_grad()
@nn.utils.parametrize.cached()      # rounds an INT4 weight once, not in every batch
def main():
    if sys.argv[1:2] == ["lm-eval"]:
        return run_lm_eval(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="checkpoints by stage, and a .gguf of the last")
    parser.add_argument("--out", type=Path, help="folder for the pictures (beside the first file)")
    args = parser.parse_args()
    exported = [path for path in args.files if path.suffix == ".gguf"]
    subjects = [Subject(path) for path in args.files if path not in exported]
    if not subjects:
        raise UserError("a .gguf is judged beside the checkpoint it was made of: name that as well")
    out = args.out or args.files[0].parent
    out.mkdir(parents=True, exist_ok=True)
    corpora = {subject.checkpoint["sft_heldout"] + str([text["bytes"] for text in subject.held_out.values()])
               for subject in subjects}
    if len(corpora) > 1:
        raise UserError("these checkpoints hold out different texts: one may know the other's answers")
    for path in exported:           # first, as llama.cpp may refuse it
        print(compare_with_llama_cpp(path, subjects[-1]) + "\n", flush=True)
    put_questions(subjects, exported)
    shares = {subject.name: routing_shares(subject) for subject in subjects if not subject.model.config.dense}
    for name, by_domain in shares.items():
        print("\n" + routing_table(name, by_domain))
    if shares:
        draw_routing(shares, out / "routing.png")


if __name__ == "__main__":
    common.run_main(main)
