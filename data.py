"""From text to tokens: where the corpus comes from, how it becomes integers, and how the integers become batches.

In reading order: about 10 MB of text found on the reader's own disk (nothing is downloaded) and questions and answers about
it for supervised fine-tuning (SFT), or a folder of the reader's own text (--data); 5 % of either held out; a byte-pair
tokenizer, learned or loaded; token streams cut into windows, conversations packed into rows; for text larger than memory,
shards of tokens on the disk. What it is not: a cleaner. Nobody looks for duplicates or leaks in what `tokenize` is given.

    python data.py          # a table of the embedded corpus, how far xz compresses it, and a sample of everything
    python data.py tokenize web/*.jsonl.gz --domain prose --out shards      # once per domain; then train.py --data shards

Sources: MobileMoE (arXiv 2605.27358) for the stages and their mixtures; Sennrich et al. 2016 for byte-pair encoding; Llama 3
for the split pattern and the chat tokens; Raffel et al. 2020 for packing several examples into one row.
"""
import argparse
import ast
import base64
import functools
import gc
import gzip
import hashlib
import heapq
import importlib.util
import inspect
import itertools
import json
import lzma
import os
import random
import re
import sysconfig
import time
import warnings
import zlib
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
import regex
import tiktoken

from mobilemoe import PRESETS, UserError, atomic_write, encode_chat, run_main

# Domains stay apart to the last batch: stages mix them by weight as the paper does, broad first, then more code and maths.
DOMAINS = ("prose", "code", "knowledge", "maths")


@dataclass
class Corpus:
    """Documents by domain, and conversations: {"kind": str, "messages": [{"role", "content"}, ...], "answer": str}."""
    train: dict[str, list[str]] = field(default_factory=lambda: {domain: [] for domain in DOMAINS})
    heldout: dict[str, list[str]] = field(default_factory=lambda: {domain: [] for domain in DOMAINS})
    sft_train: list[dict] = field(default_factory=list)
    sft_heldout: list[dict] = field(default_factory=list)


# ----------------------------------------------------------------------------------------------------------------------
# What is held out


def held_out(text: str) -> bool:
    """True for 5 % of all texts. The text alone decides, so the answer is the same in every stage, run and file order.
    After a seeded random split, a text held out in pre-training could turn up among the questions of fine-tuning."""
    return hashlib.sha256(text.encode()).digest()[0] < 13               # 13/256 = 5.1 %


# Docstrings shorter than this are left out: "Return the name." stands in a hundred texts, and could not be kept unseen.
MIN_WORDS = 8
words_of = re.compile(r"\w+").findall


class LeakCheck:
    """Does a training text quote a held-out docstring, whatever the indentation, quotes or line breaks around it?
    Many a docstring is the beginning of another one. Look up the first eight words of each, then compare all of them."""
    def __init__(self, docstrings: Iterable[str]):
        self.by_start = defaultdict(list)
        for words in map(words_of, docstrings):
            self.by_start[tuple(words[:MIN_WORDS])].append(f" {' '.join(words)} ")

    def __call__(self, text: str) -> bool:
        words = words_of(text)
        flat, starts = f" {' '.join(words)} ", set(zip(*(words[i:] for i in range(MIN_WORDS))))
        return any(docstring in flat for start in starts & self.by_start.keys() for docstring in self.by_start[start])


# ----------------------------------------------------------------------------------------------------------------------
# Prose: the docstrings of the standard library, NumPy and PyTorch. Code: the library's source without its docstrings

# ("numpy.linalg.norm", the module that holds it: "numpy.linalg", "(x, ord=None)" or "", "Matrix or vector norm. ...")
Documented = namedtuple("Documented", "name module signature text")


def signature_of(node: ast.AST, is_method: bool) -> str:
    """The arguments as source text, without annotations (longer than the names, and absent from most of the corpus)."""
    if isinstance(node, ast.ClassDef):                                  # a class is called like its __init__
        return next((signature_of(child, True) for child in node.body if getattr(child, "name", "") == "__init__"), "")
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    text = ast.unparse(node.args)
    return f"({re.sub(r'^(self|cls)(, /)?(, |$)', '', text) if is_method else text})"


def literal_text(node: ast.AST) -> str:
    """The text of a string expression: a literal, a + b, r'...'.format(...), or NumPy's ("attribute", "text")."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.BinOp(left=left, right=right):
            return literal_text(left) + literal_text(right)
        case ast.Tuple(elts=[*_, last]):
            return literal_text(last)
        case ast.Call(func=ast.Attribute(value=template, attr="format")):
            # The values exist only once torch is imported. A line that is nothing but a placeholder goes.
            text = re.sub(r"^[ \t]*\{\w+\}[ \t]*\n", "", literal_text(template), flags=re.M)
            return re.sub(r"(?<!\{)\{\w*\}(?!\})", "", text).replace("{{", "{").replace("}}", "}")
    return ""


def added_docstring(statement: ast.stmt, module: str) -> Documented | None:
    """The docstring that a call gives to something written in C, if the statement is such a call:

    torch:  add_docstr(torch.abs, "...")      diff = _add_docstr(_C.diff, "...")      add_docstr_all("abs", "...")
    numpy:  add_newdoc("numpy._core.multiarray", "ndarray", ("shape", "..."))
    """
    match statement:
        case ast.stmt(value=ast.Call(func=ast.Name(id="add_newdoc"), args=[*target, last])):
            target += last.elts[:-1] if isinstance(last, ast.Tuple) else []
            name = ".".join(map(literal_text, target)).replace("numpy._core.multiarray", "numpy")
        case ast.stmt(value=ast.Call(func=ast.Name(id="add_docstr_all"), args=[method, last])):     # of torch.Tensor, say:
            name = f"torch.{module.split('._')[-1].removesuffix('_docs').capitalize()}.{literal_text(method)}"
        case ast.stmt(value=ast.Call(func=ast.Name(id="add_docstr" | "_add_docstr"), args=[target, last])):
            name = f"{module}.{statement.targets[0].id}" if isinstance(statement, ast.Assign) else ast.unparse(target)
        case _:
            return None
    text, signature = inspect.cleandoc(literal_text(last)), ""
    # ast sees no signature of what is written in C; its first line shows one: "abs(input) -> Tensor" or "copy($self, /)\n--".
    if first_line := re.match(r"[\w.]+(\(.*\))(?: *->.*|\n--)\s+", text):
        signature, text = re.sub(r"\$self(, /)?(, )?", "", first_line[1]), text[first_line.end():]
    return Documented(name, name.rpartition(".")[0], signature, text)


def find_documented(tree: ast.Module, module: str, source: str) -> Iterator[Documented]:
    """Everything documented in one parsed module, in file order, under the name a reader can import it by."""
    # NumPy defines functions in private files. A decorator names the module they belong to, itself or by a partial().
    partial = re.search(r"array_function_(?:dispatch|from_dispatcher),\s*module='([\w.]+)'", source)

    def visit(body: list[ast.stmt], module_of_class: str, owner: str) -> Iterator[Documented]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                decorators = " ".join(map(ast.unparse, node.decorator_list))
                named = re.search(r"set_module\('([\w.]+)'\)", decorators) or ("array_function_" in decorators and partial)
                home = module_of_class or (named[1] if named else module)
                name = f"{owner or home}.{node.name}"
                if text := ast.get_docstring(node):
                    is_method = bool(owner) and "staticmethod" not in decorators.split()
                    yield Documented(name, home, signature_of(node, is_method), text)
                if isinstance(node, ast.ClassDef):                      # nobody can call a function inside a function
                    yield from visit(node.body, home, name)
            elif isinstance(node, (ast.If, ast.Try)):
                yield from visit([*node.body, *node.orelse], module_of_class, owner)
            elif found := added_docstring(node, module):
                yield found

    if text := ast.get_docstring(tree):
        yield Documented(module, module, "", text)
    yield from visit(tree.body, "", "")


def without_docstrings(source: str, tree: ast.Module) -> str:
    """The source without strings that are statements, lest a held-out one come back as code. (`ast.unparse` loses comments.)"""
    lines = source.encode().splitlines(keepends=True)                   # ast counts columns in bytes of UTF-8
    for parent in ast.walk(tree):
        body = getattr(parent, "body", None)
        for node in body if isinstance(body, list) else ():
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                first, last = node.lineno - 1, node.end_lineno - 1
                head, tail = lines[first][:node.col_offset], lines[last][node.end_col_offset:]
                lines[first:last + 1] = [b""] * (last + 1 - first)      # later nodes' line numbers must stay right
                if len(body) == 1 or head.strip() or tail.strip():
                    lines[first] = head + b"pass" + tail
    return re.sub(r"\n{4,}", "\n\n\n", b"".join(lines).decode())        # two blank lines, where a docstring left more


def split_text(text: str, separator: str, size: int) -> list[str]:
    """Cut a long text at separators into pieces of at least `size` characters, so that parts of it can be held out."""
    pieces = [""]
    for part in text.split(separator):
        if len(pieces[-1]) >= size:
            pieces.append("")
        pieces[-1] += (separator if pieces[-1] else "") + part
    return [piece.strip("\n") + "\n" for piece in pieces if piece.strip()]


SKIP = frozenset("""test tests testing idlelib lib2to3 turtledemo encodings pydoc_data ensurepip distutils f2py
    site-packages dist-packages""".split())


def scan_packages() -> tuple[list[Documented], list[str]]:
    """Parse, never import, the standard library, NumPy and PyTorch: all that is documented, and the library's code."""
    roots = {"": Path(sysconfig.get_path("stdlib"))}
    roots |= {name: Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")}
    documented, code = [], []
    gc.disable()        # a syntax tree is a million small objects, none of them garbage yet: this halves the time
    for package, path in ((package, path) for package, root in roots.items() for path in sorted(root.rglob("*.py"))):
        *folders, stem = path.relative_to(roots[package]).with_suffix("").parts
        # Private packages document internals (a compiler's passes, say); numpy._core holds all of NumPy.
        if any(name in SKIP or name[0] == "_" and name != "_core" for name in folders):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        with warnings.catch_warnings(action="ignore"):                  # "invalid escape sequence" is not ours to cure
            tree = ast.parse(source)
        module = ".".join(part for part in (package, *folders, stem) if part not in ("", "__init__"))
        documented += find_documented(tree, module, source)
        if not package and not folders and stem[0] != "_":              # the single-file modules: the readable part
            pieces = split_text(without_docstrings(source, tree), "\n\n\n", 2000)
            code += [f"# {stem}.py\n{piece}" for piece in pieces]
    gc.enable()
    return documented, code


def language_reference() -> list[str]:
    """The topics of Python's `help()`, the language reference, in pieces of about 2,000 characters."""
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    if not path.is_file():
        raise UserError(f"this Python came without {path}: install the full standard library, or give --data FOLDER")
    assignment = next(n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.Assign))
    topics = ast.literal_eval(assignment.value)
    return [f"{topic}\n\n{piece}" for topic in sorted(topics) for piece in split_text(topics[topic], "\n\n", 2000)]


# ----------------------------------------------------------------------------------------------------------------------
# Maths with worked steps, and questions and answers. Every answer is read off the source or computed; none is invented

# ("14 + 5 - 7", "A shop had 14 cards, ...?", "14 + 5 = 19, 19 - 7 = 12", "12")
Problem = namedtuple("Problem", "sum question steps answer")
STORIES = {
    "++": ("{name} has {a} {things}, finds {b} and gets {c} more. How many {things} does {name} have now?",
           "There are {a} {things} here, {b} next door and {c} upstairs. How many are there?"),
    "+-": ("{name} has {a} {things}, gets {b} more and gives away {c}. How many {things} are left?",
           "A shop had {a} {things}, bought {b} and sold {c}. How many {things} remain?"),
    "-+": ("{name} has {a} {things}, gives away {b} and gets {c} more. How many {things} does {name} have now?",
           "A shop had {a} {things}, sold {b} and bought {c}. How many {things} are there?"),
    "--": ("{name} has {a} {things}, loses {b} and gives away {c}. How many {things} are left?",
           "A shop had {a} {things} and sold {b} and then {c}. How many {things} remain?"),
}
NAMES = ("Ada", "Ben", "Chen", "Dina", "Emil", "Fatima", "Grace", "Hugo", "Ines", "Jun")
THINGS = ("apples", "books", "coins", "stamps", "pencils", "marbles", "cards", "shells", "tickets", "buttons")


def make_problems(rng: random.Random) -> list[Problem]:
    """Sums of two steps, once as they are and once as a story: a number up to 20, two from 2 to 9, no result beyond 20.

    Some 230 steps make thousands of sums. So even a model of 3M active parameters, after minutes, can know the steps by heart,
    and show on sums it never saw that it can put two of them together.
    """
    problems = []
    for first, second, a, b, c in itertools.product("+-", "+-", range(2, 21), range(2, 10), range(2, 10)):
        middle = a + b if first == "+" else a - b
        answer = middle + c if second == "+" else middle - c
        if 1 <= min(middle, answer) and max(middle, answer) <= 20:
            numbers, steps = f"{a} {first} {b} {second} {c}", f"{a} {first} {b} = {middle}, {middle} {second} {c} = {answer}"
            story = rng.choice(STORIES[first + second]).format(a=a, b=b, c=c, name=rng.choice(NAMES), things=rng.choice(THINGS))
            problems += [Problem(numbers, question, steps, str(answer)) for question in (f"What is {numbers}?", story)]
    return problems


PHRASINGS = {
    "summary": ("What does `{name}` do?", "What is `{name}` for?", "Explain `{name}` in one sentence.", "Summarise `{name}`."),
    "signature": ("What is the signature of `{name}`?", "Which arguments does `{name}` take?", "How do I call `{name}`?"),
    "module": ("Which module holds `{short}`?", "Where is `{short}` defined?", "In which module can I find `{short}`?"),
}


def questions(documented: dict[str, Documented], problems: list[Problem], rng: random.Random) -> Iterator[tuple[str, ...]]:
    """(key, kind, question, reply, answer): the key decides what is held out, the answer is what a quiz can compare."""
    short = {text: thing.name.removeprefix(f"{thing.module}.") for text, thing in documented.items()}
    bearers = Counter(short.values())
    for text, thing in documented.items():
        if re.search(r"(^|\.)_", thing.name) or thing.name == thing.module:     # private, or a module
            continue
        ask = {kind: rng.choice(choices).format(name=thing.name, short=short[text]) for kind, choices in PHRASINGS.items()}
        summary, call = " ".join(thing.text.split("\n\n")[0].split()), thing.name + thing.signature
        if re.fullmatch(r"[A-Z].{20,200}\.", summary):
            yield text, "summary", ask["summary"], summary, summary
        if 2 < len(thing.signature) <= 120:
            yield text, "signature", ask["signature"], f"`{call}`", call
        if bearers[short[text]] == 1:           # else the question has several answers
            yield text, "module", ask["module"], f"`{short[text]}` is in the module `{thing.module}`.", thing.module
    for problem in problems:
        yield problem.sum, "arithmetic", problem.question, f"{problem.steps}. The answer is {problem.answer}.", problem.answer


EXAMPLES_PER_KIND = 2_000           # conversations for training, at most


def embedded_corpus() -> Corpus:
    """The corpus every reader has: the same bytes for the same versions of Python, NumPy and PyTorch."""
    corpus, rng = Corpus(), random.Random(0)
    scanned, code = scan_packages()
    # The docstring alone decides what is held out; the same one under another name is no new document. The same name twice
    # (one definition per platform) could be on both sides: only the first one counts.
    documented, names = {}, set()
    for thing in scanned:
        if len(words_of(thing.text)) >= MIN_WORDS and thing.name not in names:
            documented.setdefault(thing.text, thing)
            names.add(thing.name)
    leaks = LeakCheck(filter(held_out, documented))

    # The name comes first so that the model learns "name -> description": that is what a reader will ask it.
    documents = {"prose": {text: f"{thing.name}{thing.signature}\n\n{text}\n" for text, thing in documented.items()},
                 "code": dict(zip(code, code)), "knowledge": {text: text for text in language_reference()}}
    for domain, texts in documents.items():
        corpus.heldout[domain] = [document for text, document in texts.items() if held_out(text)]
        corpus.train[domain] = [document for text, document in texts.items() if not held_out(text) and not leaks(document)]

    problems = make_problems(rng)
    rng.shuffle(problems)
    for is_held_out, part in ((False, corpus.train), (True, corpus.heldout)):
        lines = [f"Problem: {problem.question}\nWorking: {problem.steps}\nAnswer: {problem.answer}\n"
                 for problem in problems if held_out(problem.sum) == is_held_out]
        part["maths"] = ["\n".join(lines[i:i + 8]) for i in range(0, len(lines), 8)]

    asked = list(questions(documented, problems, rng))
    rng.shuffle(asked)
    room = Counter(dict.fromkeys([*PHRASINGS, "arithmetic"], EXAMPLES_PER_KIND))
    for key, kind, question, reply, answer in asked:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        pair = {"kind": kind, "messages": messages, "answer": answer}
        if held_out(key):
            corpus.sft_heldout.append(pair)
        elif room[kind] and not leaks(reply):
            room[kind] -= 1
            corpus.sft_train.append(pair)
    return corpus


# ----------------------------------------------------------------------------------------------------------------------
# A folder of the reader's own text

FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


def read_records(path: Path) -> Iterator[tuple[str, dict, int]]:
    """("line 7", the object there, bytes of the file read so far): lines of .jsonl(.gz), rows of .parquet, parts of .txt."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise UserError(f"{path}: to read .parquet, `pip install pyarrow`") from None
        # A row group can be gigabytes: without a buffer size, pyarrow holds its whole column in memory.
        with parquet.ParquetFile(path, buffer_size=2 ** 20, pre_buffer=False) as file:
            columns = [name for name in ("text", "messages") if name in file.schema_arrow.names]
            batches = file.iter_batches(64, columns=columns, use_threads=False)
            for row, record in enumerate((record for batch in batches for record in batch.to_pylist()), 1):
                yield f"row {row}", record, path.stat().st_size * row // file.metadata.num_rows
        return
    with open(path, "rb") as file:
        part = ""       # of a .txt, maybe a whole book: cut at blank lines, so that some of it can be held out
        for number, line in enumerate(chain(gzip.open(file) if path.suffix == ".gz" else file, [b""]), 1):
            if path.suffix == ".txt":
                part += line.decode("utf-8-sig").replace("\r\n", "\n")
                if not line or len(part) >= 4000 and part.endswith("\n\n") or len(part) > 2 ** 20:
                    yield f"line {number}", {"text": part.strip("\n") + "\n"}, file.tell()
                    part = ""
            elif line.strip():
                try:
                    yield f"line {number}", json.loads(line), file.tell()
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number}: broken JSON ({error}); each line must be one object") from None


def read_documents(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(text, False, bytes of the file read so far), or (a list of messages as JSON, True, bytes) for a conversation.
    Never more than a line and a document in memory. Raises UserError with the file and the line."""
    place = "its beginning"
    try:
        for place, record, read in read_records(path):
            match record:
                case {"text": str(text)}:
                    is_chat = False
                case {"messages": [*chat]} if (
                        all(isinstance(m, dict) and type(m.get("role")) is type(m.get("content")) is str for m in chat)
                        and any(m["role"] == "assistant" for m in chat)):
                    text, is_chat = json.dumps(chat, ensure_ascii=False), True
                case _:
                    raise UserError(f'{path}, {place}: needs "text" (a string) or "messages" (a list of "role" and "content", '
                                    'one of them by "assistant")')
            text.encode()       # JSON can spell half a character, "\ud800", which no tokenizer can take
            yield text, is_chat, read
    except (OSError, EOFError, zlib.error, ValueError) as error:     # pyarrow's errors are OSErrors or ValueErrors
        raise UserError(f"cannot read {path}, near {place}: {str(error).splitlines()[0]}") from None


def conversation(text: str) -> dict:
    """A list of messages as JSON -> an entry of Corpus.sft_train."""
    messages = json.loads(text)
    last = [message["content"] for message in messages if message["role"] == "assistant"][-1]
    return {"kind": "chat", "messages": messages, "answer": last}


def folder_corpus(folder: str | Path) -> Corpus:
    """Every file of FORMATS below `folder`; its name or its folder's, if a domain's, tells the domain.
    Raises UserError for a folder that is missing or holds too little, a file that cannot be read, a broken line."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --data wants one with {', '.join(FORMATS)} files")
    found = defaultdict(dict)       # domain, or "chat" -> its documents, the keys of a dict: that drops duplicates
    for path in sorted(path for path in folder.rglob("*") if path.name.endswith(FORMATS)):
        names = [path.name.split(".")[0], *reversed(path.relative_to(folder).parts[:-1])]
        domain = next((name for name in names if name in DOMAINS), "prose")
        for text, is_chat, _ in read_documents(path):
            if text.strip():
                found["chat" if is_chat else domain][text] = None

    corpus = Corpus()
    for domain, texts in found.items():
        unseen = set(filter(held_out, texts))
        if not 0 < len(unseen) < len(texts):        # few documents: one of them, unless it is the only one
            unseen = set(sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:len(texts) > 1])
        for text in texts:
            if domain == "chat":
                (corpus.sft_heldout if text in unseen else corpus.sft_train).append(conversation(text))
            else:
                (corpus.heldout if text in unseen else corpus.train)[domain].append(text)
    if not any(corpus.heldout.values()):
        raise UserError(f"{folder} holds too little text: at least two documents in {', '.join(FORMATS)} files")
    return corpus


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer

# Text is first split into pieces: a word with the space before it, up to three digits, punctuation, white space. No token
# spans two pieces, or " of the" would be a token and "dog." another than "dog".
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LONGEST_PIECE = 100         # characters: a run of 10,000 equals signs takes the square of that, and teaches nothing


def merge_pairs(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """Byte-pair encoding of one piece as tiktoken does it: join the pair of lowest rank, leftmost first."""
    while known := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]:
        _, i = min(known)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2:]]
    return parts


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Learn byte-pair ranks: start from the 256 bytes and, again and again, make the most frequent pair a token.

    vocab_size counts the special tokens; text with too few pairs gives less. A pair is known by its joint bytes: "a" + "bc"
    and "ab" + "c" are one token to tiktoken, whose files hold no merges. Three habits make it fast: count each distinct piece
    of text once, touch only the pieces that hold the new token, let a heap find the most frequent pair.
    """
    times = Counter(piece for text in texts for piece in regex.findall(LLAMA3_PATTERN, text))
    parts = {piece: [bytes([byte]) for byte in piece.encode()] for piece in times if len(piece) <= LONGEST_PIECE}
    ranks = {bytes([byte]): byte for byte in range(256)}
    count, where, changed = Counter(), defaultdict(set), set()  # of a pair: how often it occurs, the pieces that held it once

    def tally(piece: str, sign: int):
        for pair in map(bytes.__add__, parts[piece], parts[piece][1:]):
            count[pair] += sign * times[piece]
            where[pair].add(piece)
            changed.add(pair)

    for piece in parts:
        tally(piece, 1)
    heap = []
    while len(ranks) < vocab_size - len(SPECIAL_TOKENS):
        for pair in changed:        # an older entry for the same pair stays behind; it is known by its outdated count
            heapq.heappush(heap, (-count[pair], pair))
        changed.clear()
        while heap and -heap[0][0] != count[heap[0][1]]:
            heapq.heappop(heap)
        if not heap or heap[0][0] == 0:
            break
        token = heapq.heappop(heap)[1]
        ranks[token] = len(ranks)
        for piece in where.pop(token):
            tally(piece, -1)
            parts[piece] = merge_pairs(parts[piece], ranks)
            tally(piece, 1)
    return ranks


def learn_tokenizer(corpus: Corpus, vocab_size: int) -> tiktoken.Encoding:
    """From all that is trained on, conversations included: their words deserve tokens too."""
    texts = [text for documents in corpus.train.values() for text in documents]
    texts += [message["content"] for example in corpus.sft_train for message in example["messages"]]
    return make_tokenizer(train_bpe(texts, vocab_size), "mobilemoe")


def make_tokenizer(ranks: dict[bytes, int], name: str) -> tiktoken.Encoding:
    """Ranks, Llama-3's split pattern, and the special tokens after the ranks."""
    special = SPECIAL_TOKENS
    if len(ranks) == 128_000:       # Llama-3's own file: its 256 special tokens have places of their own
        reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
        special = [*special[:2], *reserved[:4], *special[2:4], reserved[4], special[4], *reserved[5:]]
    return tiktoken.Encoding(name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks,
                             special_tokens={token: len(ranks) + i for i, token in enumerate(special)})


def tokenizer_to_dict(encoding: tiktoken.Encoding) -> dict:
    """The checkpoint's "tokenizer" entry; mobilemoe.tokenizer_from_dict is the way back."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    return {"name": encoding.name, "pattern": encoding._pat_str, "special_tokens": dict(encoding._special_tokens),
            "ranks": "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)}


def load_tokenizer_file(path: str | Path) -> tiktoken.Encoding:
    """A Llama-3 tokenizer.model, or any tiktoken rank file (lines of: base64 bytes, space, rank). Raises UserError."""
    path = Path(path)
    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error} (each line is base64 bytes, space, rank)") from None
    if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{path} is not a whole tiktoken rank file: ranks from 0 up, each once, all 256 bytes included")
    return make_tokenizer(ranks, path.stem)


# ----------------------------------------------------------------------------------------------------------------------
# From tokens to batches


def tokenize_documents(docs: Iterable[str], encoding: tiktoken.Encoding) -> np.ndarray:
    """One stream, <|begin_of_text|> before each document: [tokens], uint16 or, for more than 65,536 tokens, uint32.
    A document that spells "<|eot_id|>" gets its characters, not the token: no text may forge the end of a turn."""
    dtype = np.uint16 if encoding.n_vocab <= 65536 else np.uint32
    begin = np.array([encoding.encode_single_token("<|begin_of_text|>")], dtype)
    stream = [begin[:0]]            # nothing, for no documents
    for doc in docs:
        try:
            stream += [begin, encoding.encode_to_numpy(doc, disallowed_special=()).astype(dtype)]
        except ValueError as error:     # about a million spaces in a row: tiktoken's regular expression gives up
            raise UserError(f"a document of {len(doc):,} characters cannot be tokenized: {error}") from None
    return np.concatenate(stream)


def encode_example(encoding: tiktoken.Encoding, messages: list[dict]) -> tuple[list[int], list[int]]:
    """A conversation in Llama-3's chat format: (ids, loss_mask), 1 on the assistant's words and the <|eot_id|> after.
    Trained on the questions too, the model would learn to ask them."""
    ids = encode_chat(encoding, messages, reply=False)
    mask = [0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":      # the prompt as in use: the two cannot drift apart by a newline
            start = len(encode_chat(encoding, messages[:i], reply=True))
            end = len(encode_chat(encoding, messages[:i + 1], reply=False))
            mask[start:end] = [1] * (end - start)
    return ids, mask


@functools.lru_cache(maxsize=16)        # the batches of an epoch ask for the same order again and again
def shuffled(n: int, *key: int) -> np.ndarray:
    """0 ... n - 1 in an order that the key alone decides: (seed, epoch), say. Resuming a run needs no saved state.
    For the windows of a stream, 8 bytes for each: 40 MB for 10^10 tokens in windows of 2,048."""
    return np.random.default_rng(key).permutation(n)


class Mixture:
    """Batches for pre- and mid-training. Row n of a run depends on (seed, n) alone.
    Each domain's stream is cut into windows of T + 1 tokens that overlap by one: every token but the very first is a target
    exactly once per epoch. Windows come in a new order each epoch; a small domain with a large weight goes round more often."""
    CYCLE = 1000        # rows after which the plan of domains repeats, so weights are exact to a tenth of a percent

    def __init__(self, tokens: dict[str, np.ndarray], weights: dict[str, float], context: int, seed: int):
        self.tokens = {d: tokens[d] for d, weight in weights.items() if weight > 0 and len(tokens.get(d, ())) > 1}
        if not self.tokens:
            raise UserError(f"there is no text in any domain that this stage trains on ({', '.join(weights)})")
        self.context, self.seed = context, seed
        # Always the domain furthest behind its share: even a small batch then holds very nearly the mixture asked for.
        self.plan, total = [], sum(weights[domain] for domain in self.tokens)
        for row in range(1, self.CYCLE + 1):
            self.plan.append(max(self.tokens, key=lambda domain: row * weights[domain] / total - self.plan.count(domain)))

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """inputs, targets: [B, T] int64. A stream's last window is short: its targets end in -100, the loss ignores."""
        rows = np.full((batch_size, self.context + 1), -100)            # [B, T + 1]
        for b in range(batch_size):
            cycle, row = divmod(step * batch_size + b, self.CYCLE)
            domain = self.plan[row]
            stream, before = self.tokens[domain], cycle * self.plan.count(domain) + self.plan[:row].count(domain)
            windows = -(-(len(stream) - 1) // self.context)
            epoch, position = divmod(before, windows)
            start = int(shuffled(windows, self.seed, DOMAINS.index(domain), epoch)[position]) * self.context
            window = stream[start:start + self.context + 1]
            rows[b, :len(window)] = window
        targets = rows[:, 1:]
        return np.where(targets == -100, 0, rows[:, :-1]), targets


class Packed:
    """Batches for SFT and QAT: whole conversations side by side in rows of T + 1 tokens, none cut, each once per epoch.

    Which conversations share a row is drawn once (else the number of rows would change), their order anew for each epoch. One
    can see those before it in its row; its <|begin_of_text|> is what teaches the model to disregard them. One longer than a row
    is left out and counted in `skipped`: cut, it would teach half an answer.
    """
    OPEN_ROWS = 64      # rows still open to more: to try all of them would waste a little less, in quadratic time

    def __init__(self, examples: list[tuple[list[int], list[int]]], context: int, seed: int, pad_id: int):
        length = context + 1
        fitting = [example for example in examples if len(example[0]) <= length]
        if not fitting:
            raise UserError(f'no conversation of at most {length} tokens: the data needs a .jsonl with "messages"')
        self.seed, self.skipped = seed, len(examples) - len(fitting)
        rows, open_rows = [], []                                        # of (ids, mask)
        for index in shuffled(len(fitting), seed):
            ids, mask = fitting[index]
            row = next((row for row in open_rows if len(row[0]) + len(ids) <= length), None)
            if row is None:
                row = ([], [])
                rows.append(row)
                open_rows = [*open_rows, row][-self.OPEN_ROWS:]
            row[0].extend(ids)
            row[1].extend(mask)
        self.ids = np.array([ids + [pad_id] * (length - len(ids)) for ids, _ in rows], np.int32)        # [rows, T + 1]
        self.mask = np.array([mask + [0] * (length - len(mask)) for _, mask in rows], bool)             # [rows, T + 1]

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """inputs, targets: [B, T] int64; targets are -100, which the loss ignores, wherever there is no answer."""
        places = [divmod(step * batch_size + b, len(self.ids)) for b in range(batch_size)]
        rows = [shuffled(len(self.ids), self.seed, epoch)[position] for epoch, position in places]
        ids, mask = self.ids[rows].astype(np.int64), self.mask[rows]    # [B, T + 1]
        return ids[:, :-1], np.where(mask, ids, -100)[:, 1:]


def xz_bits_per_byte(texts: list[str]) -> float:
    """What `xz -9e` needs for these texts: a language model that needs more knows less than a dictionary coder."""
    raw = "".join(texts).encode()
    return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)


# ----------------------------------------------------------------------------------------------------------------------
# Data larger than memory: files -> tokens on the disk -> arrays that read only what a batch asks for
#
# A folder of shards has one tokenizer (RANKS) and, for each domain, prose.bin, a plain array of tokens, and prose.json, its
# index: "inputs", the files; "end" [file, document]: all before it is done; "read", bytes of them; "tokens", how many;
# "dtype"; "heldout" {hash: text}.

RANKS = "mobilemoe.tiktoken"
CHUNK, SAVE_SECONDS = 2 ** 19, 10       # characters that a thread gets at a time; the index is written every ten seconds
HELDOUT = 200_000                       # characters held out per domain, at most: a run measures them again and again


def read_chunks(paths: list[Path], index: dict, is_chat: bool) -> Iterator[tuple[list[str], dict]]:
    """From where the index says: about CHUNK characters of training documents, and what is new in the index after them.
    One document in 1000 is held out, and the first, so that no domain is without. The hash decides, so a copy is held out too;
    those of smallest hash are measured: a sample of all files, without knowing how many there are."""
    kept, docs, size, (first, done) = dict(index["heldout"]), [], 0, index["end"]
    before = sum(path.stat().st_size for path in paths[:first])
    for number, path in enumerate(paths[first:], first):
        for document, (text, chat, read) in enumerate(read_documents(path), 1):
            if number == first and document <= done or not text.strip():
                continue
            if chat != is_chat:
                raise UserError(f"{path}, document {document}: conversations, and nothing else, belong to --domain chat")
            size, key = size + len(text), hashlib.sha256(text.encode()).hexdigest()[:16]
            if int(key, 16) < 2 ** 64 // 1000 or key in kept or not kept:
                kept[key] = text if chat else text[:HELDOUT // 4]
                while sum(map(len, kept.values())) > HELDOUT and len(kept) > 1:
                    del kept[max(kept)]
            else:
                docs.append(text)
            if size >= CHUNK:
                yield docs, {"end": [number, document], "read": before + read, "heldout": dict(kept)}
                docs, size = [], 0
        before += path.stat().st_size
    yield docs, {"end": [len(paths), 0], "read": before, "heldout": kept}


def encode_chunk(docs: list[str], encoding: tiktoken.Encoding, is_chat: bool) -> np.ndarray:
    """One stream of tokens. In conversations bit 31 of a token is its loss mask: one file, and nothing to fall out of step."""
    if not is_chat:
        return tokenize_documents(docs, encoding)
    pairs = [encode_example(encoding, json.loads(doc)) for doc in docs]
    return np.array([i | m << 31 for ids, mask in pairs for i, m in zip(ids, mask)], np.uint32)


def folder_tokenizer(out: Path, file: str | None) -> tiktoken.Encoding:
    """The tokenizer of a folder of shards. At first: the file's, or that of the default run, learned from the corpus."""
    given, kept = load_tokenizer_file(file) if file else None, out / RANKS
    if kept.is_file():
        encoding = load_tokenizer_file(kept)
        if given and given._mergeable_ranks != encoding._mergeable_ranks:
            raise UserError(f"{out} was made with another tokenizer than {file}: leave it out, or choose another --out")
        return encoding
    if not given:
        print("tokenizer: learning that of the default training run from the embedded corpus", flush=True)
        given = learn_tokenizer(embedded_corpus(), PRESETS["tiny"].vocab_size)
    with atomic_write(kept) as ranks:
        ranks.write(tokenizer_to_dict(given)["ranks"].encode())
    return given


def read_domain(path: Path) -> tuple[dict, np.ndarray]:
    """(index, its tokens, mapped into memory, not read). A killed writer leaves more of them than it counted, not fewer."""
    try:
        index = json.loads(path.read_bytes())
        if not index["tokens"]:         # an empty file cannot be mapped
            return index, np.zeros(0, index["dtype"])
        return index, np.memmap(path.with_suffix(".bin"), index["dtype"], "r", shape=index["tokens"])
    except (ValueError, FileNotFoundError):
        raise UserError(f"{path} or its .bin is damaged: delete both, and tokenize this domain again") from None


def tokenize_files(files: list[str], domain: str, out: str | Path, tokenizer: str | None = None, workers: int = os.cpu_count()):
    """Files of FORMATS -> tokens of one domain in the folder `out`, byte for byte the same whatever the number of workers.
    Called again after an interruption, it goes on from what was last saved. Raises UserError for what it cannot read."""
    paths, out, domain = [Path(file) for file in files], Path(out), "prose" if domain == "web" else domain  # the paper's "web"
    if domain not in (*DOMAINS, "chat"):
        raise UserError(f"unknown domain {domain!r}: choose {', '.join(DOMAINS)}, or chat for conversations")
    for path in paths:
        if not path.name.endswith(FORMATS) or not path.is_file():
            raise UserError(f"{path} is not a file of {', '.join(FORMATS)}")
    out.mkdir(parents=True, exist_ok=True)
    encoding, is_chat, index_file = folder_tokenizer(out, tokenizer), domain == "chat", out / f"{domain}.json"
    dtype = encode_chunk([], encoding, is_chat).dtype
    index = {"inputs": [str(path) for path in paths], "end": [0, 0], "read": 0, "tokens": 0, "dtype": dtype.name, "heldout": {}}
    if index_file.is_file():
        inputs, (index, _) = index["inputs"], read_domain(index_file)
        if inputs != index["inputs"]:
            raise UserError(f"{index_file} was begun with other files: give the same again, or choose another --out")
        if index["end"][0] == len(paths):
            return print(f"{domain}: finished before, {index['tokens']:,} tokens in {out}")

    chunks, total, first = read_chunks(paths, index, is_chat), sum(path.stat().st_size for path in paths), index["read"]
    began, saved = time.time(), 0.0         # 0: the first save is at once, so that nobody trains on less than all by mistake
    for leftover in out.glob(f".{domain}*.part"):       # an index whose writing was killed
        leftover.unlink()
    # A few chunks for each thread at a time. Threads will do: tiktoken lets go of Python's lock while it works.
    group = list(islice(chunks, 4 * workers))           # before any file is opened: it may be refused
    with open(index_file.with_suffix(".bin"), "ab") as file, ThreadPoolExecutor(workers) as pool:
        file.truncate(index["tokens"] * dtype.itemsize)         # what follows was written, but not yet counted
        while group:
            for ids in pool.map(lambda chunk: encode_chunk(chunk[0], encoding, is_chat), group):
                file.write(ids)
                index["tokens"] += len(ids)
            index |= group[-1][1]
            now, read = time.time(), index["read"]
            if now - saved > SAVE_SECONDS or index["end"][0] == len(paths):
                file.flush()
                os.fsync(file.fileno())         # else the index could be on the disk before the tokens it counts
                with atomic_write(index_file) as index_part:
                    index_part.write(json.dumps(index).encode())
                speed, saved = max(1, read - first) / (now - began), now
                minutes, seconds = divmod(int((total - read) / speed), 60)
                print(f"{domain}: {read / 1e6:,.1f} of {total / 1e6:,.1f} MB, {index['tokens']:,} tokens | "
                      f"{speed / 1e6:.1f} MB/s | {minutes}:{seconds:02d} left", flush=True)
            group = list(islice(chunks, 4 * workers))


def shard_streams(folder: str | Path) -> dict[str, np.ndarray]:
    """The tokens in a folder of shards by domain ("chat" included), mapped into memory, not read. Raises UserError."""
    streams = {}
    for path in (Path(folder, f"{domain}.json") for domain in (*DOMAINS, "chat")):
        if path.is_file():
            index, streams[path.stem] = read_domain(path)
            if index["end"][0] < len(index["inputs"]):
                raise UserError(f"{path.stem} in {folder} is unfinished: give the same `python data.py tokenize ...` again")
    return streams


def is_sharded(folder: str | Path) -> bool:
    return Path(folder, RANKS).is_file()


def open_shards(folder: str | Path) -> dict:
    """What training needs to know, under the names of train.py's tokens.pt, as arrays; "train" are streams on the disk.

    {"tokenizer", "train": {domain: tokens}, "heldout": {domain: {"ids" int32, "bytes"}}, "xz": {domain: bits per byte},
    "chat": {"ids" int32, "mask" bool, "lengths" int64}, "sft_heldout": conversations as in Corpus}
    Conversations are read into memory: packing them into rows has to see them all.
    """
    streams, encoding = shard_streams(folder), load_tokenizer_file(Path(folder, RANKS))
    texts = {domain: list(read_domain(Path(folder, f"{domain}.json"))[0]["heldout"].values()) for domain in streams}
    chat, asked = streams.pop("chat", np.zeros(0, np.uint32)), [conversation(text) for text in texts.pop("chat", ())]
    ids = (chat & 0x7FFFFFFF).astype(np.int32)
    starts = np.flatnonzero(ids == encoding.encode_single_token("<|begin_of_text|>"))      # no text can forge one
    heldout = {domain: {"ids": tokenize_documents(held, encoding).astype(np.int32), "bytes": sum(len(t.encode()) for t in held)}
               for domain, held in texts.items() if held}
    return {"tokenizer": tokenizer_to_dict(encoding), "train": streams, "heldout": heldout,
            "xz": {domain: xz_bits_per_byte(texts[domain]) for domain in heldout}, "sft_heldout": asked,
            "chat": {"ids": ids, "mask": chat >> 31 == 1, "lengths": np.diff(starts, append=len(ids))}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(dest="command").add_parser("tokenize", help="files -> shards of tokens for train.py --data")
    command.add_argument("files", nargs="+", help=", ".join(FORMATS))
    command.add_argument("--domain", required=True, help=f"one of {', '.join(DOMAINS)} (or web: prose); chat for conversations")
    command.add_argument("--out", required=True, metavar="FOLDER", help="one for all domains; interrupted, say the same again")
    command.add_argument("--tokenizer", metavar="FILE", help="a tiktoken rank file; by default that of the default run")
    args = parser.parse_args()
    if args.command:
        return tokenize_files(args.files, args.domain, args.out, args.tokenizer)
    corpus = embedded_corpus()
    print(f"{'domain':<10}{'documents':>10}{'MB':>7}{'held out':>10}{'MB':>7}{'xz bits/byte':>14}")
    for domain in DOMAINS:
        train, heldout = corpus.train[domain], corpus.heldout[domain]
        size, held = (sum(len(text.encode()) for text in texts) / 1e6 for texts in (train, heldout))
        print(f"{domain:<10}{len(train):>10,}{size:>7.2f}{len(heldout):>10,}{held:>7.2f}{xz_bits_per_byte(heldout):>14.2f}")
    for side, pairs in (("train", corpus.sft_train), ("held out", corpus.sft_heldout)):
        kinds = Counter(pair["kind"] for pair in pairs)
        print(f"SFT, {side}: {len(pairs):,} conversations;", ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    for domain in DOMAINS:
        print(f"\n--- {domain} ---\n{random.Random(1).choice(corpus.heldout[domain])[:500]}")
    for kind, pair in {pair["kind"]: pair for pair in corpus.sft_heldout}.items():
        print(f"\n--- {kind} ---", *(f"{m['role']}: {m['content']}" for m in pair["messages"]), sep="\n")


if __name__ == "__main__":
    run_main(main)
