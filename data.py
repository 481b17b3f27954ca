"""From text to tokens: where the corpus comes from, how it becomes integers, and how the integers become batches.

What this file does, in reading order:
  1. finds about 10 MB of real text on the reader's own disk (nothing is downloaded) and keeps 5 % of it back;
  2. writes questions and answers about that text for supervised fine-tuning (SFT);
  3. or reads a folder of the reader's own text instead (--data);
  4. trains a byte-pair tokenizer on it, or loads a given one, as a real `tiktoken.Encoding`;
  5. cuts token streams into training windows, and packs conversations into rows.

What it is not: a streaming loader. Everything fits in memory; the paper's 6T tokens need shards on many disks.

    python data.py          # a table of the embedded corpus, how far xz compresses it, and a sample of everything

Sources: MobileMoE (arXiv 2605.27358) for the stages and their mixtures; Sennrich et al. 2016 for byte-pair encoding;
Llama 3 for the split pattern and the chat tokens; Raffel et al. 2020 for packing several examples into one row.
"""

import ast
import base64
import functools
import gc
import gzip
import hashlib
import heapq
import importlib.util
import inspect
import json
import lzma
import random
import re
import sysconfig
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import regex
import tiktoken

from mobilemoe import UserError, encode_chat, run_main

# The domains stay apart from here to the last batch, so that every stage can mix them by weight as the paper does:
# broad first, then more knowledge, code and maths.
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

    A seeded random split would not do: one more file on the disk shifts every later draw, and a text held out in
    pre-training turns up among the questions of fine-tuning. (Python's own hash() differs from process to process.)
    """
    return hashlib.sha256(text.encode()).digest()[0] < 13               # 13/256 = 5.1 %


# "Return the name." stands in a hundred files and inside longer texts. Shorter docstrings than this are left out
# altogether: nobody could promise that the model never saw them.
MIN_WORDS = 8


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text)


class LeakCheck:
    """Does a training text quote a held-out docstring, whatever the indentation, quotes or line breaks around it?

    Removing exact duplicates is not enough: a one-line docstring is the first line of a longer one elsewhere, a class's
    is pasted into its factory function's. Look up the first eight words of each, then compare all of them.
    """

    def __init__(self, docstrings: Iterable[str]):
        self.by_start = defaultdict(list)
        for words in map(words_of, docstrings):
            self.by_start[tuple(words[:MIN_WORDS])].append(f" {' '.join(words)} ")

    def __call__(self, text: str) -> bool:
        words = words_of(text)
        starts = self.by_start.keys() & set(zip(*(words[i:] for i in range(MIN_WORDS))))
        flat = f" {' '.join(words)} " if starts else ""
        return any(docstring in flat for start in starts for docstring in self.by_start[start])


# ----------------------------------------------------------------------------------------------------------------------
# Prose: the docstrings of the standard library, NumPy and PyTorch. Code: the library's source without its docstrings

SKIP = frozenset("""test tests testing idlelib lib2to3 turtledemo encodings pydoc_data ensurepip distutils f2py
    site-packages dist-packages""".split())


@dataclass
class Documented:
    """A documented thing: `numpy.linalg.norm`, the module that holds it, `(x, ord=None)` or "", its docstring."""

    name: str
    module: str
    signature: str
    text: str

    def document(self) -> str:
        # The name comes first so that the model learns "name -> description": that is what a reader will ask it.
        return f"{self.name}{self.signature}\n\n{self.text}\n"


def signature_of(node: ast.AST, is_method: bool) -> str:
    """The arguments as source text, without annotations (longer than the names, and absent from most of the corpus)."""
    if isinstance(node, ast.ClassDef):                                  # a class is called like its __init__
        inits = (child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__")
        return next((signature_of(init, True) for init in inits), "")
    arguments = node.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    text = ast.unparse(arguments)
    return f"({re.sub(r'^(self|cls)(, /)?(, |$)', '', text) if is_method else text})"


def literal_text(node: ast.AST) -> str:
    """The text of a string expression: a literal, a + b, r'...'.format(...), or NumPy's ("attribute", "text")."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.BinOp):
        return literal_text(node.left) + literal_text(node.right)
    if isinstance(node, ast.Tuple):
        return literal_text(node.elts[-1])
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "format":
        # The values exist only once torch is imported. A line that is nothing but a placeholder goes.
        text = re.sub(r"^[ \t]*\{\w+\}[ \t]*\n", "", literal_text(node.func.value), flags=re.M)
        return re.sub(r"(?<!\{)\{\w*\}(?!\})", "", text).replace("{{", "{").replace("}}", "}")
    return ""


def added_docstring(statement: ast.stmt, module: str) -> Documented | None:
    """The docstring that a call gives to something written in C, if the statement is such a call:

    torch:  add_docstr(torch.abs, "...")      diff = _add_docstr(_C.diff, "...")      add_docstr_all("abs", "...")
    numpy:  add_newdoc("numpy._core.multiarray", "ndarray", ("shape", "..."))
    """
    call = getattr(statement, "value", None)
    function = getattr(getattr(call, "func", None), "id", "")
    if function not in ("add_docstr", "_add_docstr", "add_docstr_all", "add_newdoc") or len(call.args) < 2:
        return None
    *target, last = call.args
    if function == "add_newdoc":
        target += last.elts[:-1] if isinstance(last, ast.Tuple) else []
        name = ".".join(map(literal_text, target)).replace("numpy._core.multiarray", "numpy")
    elif function == "add_docstr_all":                                  # torch/_tensor_docs.py: torch.Tensor's methods
        name = f"torch.{module.split('._')[-1].removesuffix('_docs').capitalize()}.{literal_text(target[0])}"
    else:
        name = f"{module}.{statement.targets[0].id}" if isinstance(statement, ast.Assign) else ast.unparse(target[0])
    text = inspect.cleandoc(literal_text(last))
    # What is written in C shows ast no signature; its first line does: "abs(input) -> Tensor" or "copy($self, /)\n--".
    signature = ""
    if first_line := re.match(r"[\w.]+(\(.*\))(?: *->.*|\n--)\s+", text):
        signature, text = re.sub(r"\$self(, /)?(, )?", "", first_line[1]), text[first_line.end():]
    return Documented(name, name.rpartition(".")[0], signature, text)


def find_documented(tree: ast.Module, module: str, source: str) -> Iterator[Documented]:
    """Everything documented in one parsed module, in file order, under the name a reader can import it by."""
    # NumPy defines functions in private files. A decorator names the module they belong to, itself or by a partial().
    partial = re.search(r"array_function_(?:dispatch|from_dispatcher),\s*module='([\w.]+)'", source)

    def home(node) -> str:
        decorators = " ".join(map(ast.unparse, node.decorator_list))
        named = re.search(r"set_module\('([\w.]+)'\)", decorators) or ("array_function_" in decorators and partial)
        return named[1] if named else module

    def visit(body, owner: str | None, held_by: str) -> Iterator[Documented]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                where = held_by if owner else home(node)
                name = f"{owner or where}.{node.name}"
                if text := ast.get_docstring(node):
                    static = any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list)
                    yield Documented(name, where, signature_of(node, bool(owner) and not static), text)
                if isinstance(node, ast.ClassDef):                      # nobody can call a function inside a function
                    yield from visit(node.body, name, where)
            elif isinstance(node, (ast.If, ast.Try)):
                yield from visit([*node.body, *node.orelse], owner, held_by)
            elif found := added_docstring(node, module):
                yield found

    if text := ast.get_docstring(tree):
        yield Documented(module, module, "", text)
    yield from visit(tree.body, None, module)


def without_docstrings(source: str, tree: ast.Module) -> str:
    """The source with every string that stands alone as a statement cut out; comments and layout stay.

    A held-out docstring must not come back through the code domain. (`ast.unparse` would lose the comments.)
    """
    lines = source.encode().splitlines(keepends=True)                   # ast counts columns in bytes of UTF-8
    for parent in ast.walk(tree):
        body = getattr(parent, "body", None)
        for node in body if isinstance(body, list) else ():
            value = node.value if isinstance(node, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                first, last = node.lineno - 1, node.end_lineno - 1
                head, tail = lines[first][:node.col_offset], lines[last][node.end_col_offset:]
                lines[first:last + 1] = [b""] * (last + 1 - first)      # later nodes' line numbers must stay right
                if len(body) == 1 or head.strip() or tail.strip():
                    lines[first] = head + b"pass" + tail
    return re.sub(r"\n{4,}", "\n\n\n", b"".join(lines).decode())      # two blank lines, where a docstring left more


def split_text(text: str, separator: str, size: int) -> list[str]:
    """Cut a long text at separators into pieces of at least `size` characters, so that parts of it can be held out."""
    pieces = [""]
    for part in text.split(separator):
        if len(pieces[-1]) >= size:
            pieces.append("")
        pieces[-1] += (separator if pieces[-1] else "") + part
    return [piece.strip("\n") + "\n" for piece in pieces if piece.strip()]


def scan_packages() -> tuple[list[Documented], list[str]]:
    """Parse, never import, the standard library, NumPy and PyTorch: all that is documented, and the library's code."""
    roots = {"": Path(sysconfig.get_path("stdlib"))}
    roots |= {name: Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")}
    documented, code = [], []
    gc.disable()        # a syntax tree is a million small objects, none of them garbage yet: this halves the time
    try:
        for package, root in roots.items():
            for path in sorted(root.rglob("*.py")):
                *folders, stem = path.relative_to(root).with_suffix("").parts
                # Private packages document internals (a compiler's passes, say); numpy._core holds all of NumPy.
                if any(name in SKIP or name[0] == "_" and name != "_core" for name in folders):
                    continue
                source = path.read_text(encoding="utf-8", errors="replace")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")                     # "invalid escape sequence" is not ours to cure
                    tree = ast.parse(source)
                module = ".".join(part for part in (package, *folders, stem) if part not in ("", "__init__"))
                documented += find_documented(tree, module, source)
                if not package and not folders and stem[0] != "_":      # the single-file modules: the readable part
                    pieces = split_text(without_docstrings(source, tree), "\n\n\n", 2000)
                    code += [f"# {stem}.py\n{piece}" for piece in pieces]
    finally:
        gc.enable()
    return documented, code


# ----------------------------------------------------------------------------------------------------------------------
# Knowledge: the language reference. Maths: generated problems with worked steps


def language_reference() -> list[str]:
    """The topics of Python's `help()`, the language reference, in pieces of about 2,000 characters."""
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    if not path.is_file():
        raise UserError(f"this Python came without {path}: install the full standard library, or give --data FOLDER")
    assignment = next(n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.Assign))
    topics = ast.literal_eval(assignment.value)
    return [f"{topic}\n\n{piece}" for topic in sorted(topics) for piece in split_text(topics[topic], "\n\n", 2000)]


@dataclass(frozen=True)
class Problem:
    operation: str      # + - * / or = for an equation
    a: int
    b: int
    question: str       # "47 + 38"
    steps: str          # "47 + 30 = 77, 77 + 8 = 85"
    answer: str         # "85"


def make_problem(rng: random.Random) -> Problem:
    """One problem in steps small enough to know by heart: a model this small cannot carry a digit unseen."""
    operation, digit = rng.choice("++--*/="), rng.randint(2, 9)
    if operation == "=":
        x, b = rng.randint(2, 20), rng.randint(1, 50)
        total = digit * x + b
        steps = f"{digit} * x = {total} - {b} = {digit * x}, x = {digit * x} / {digit} = {x}"
        return Problem("=", digit, b, f"{digit} * x + {b} = {total}", steps, str(x))
    tens, ones = 10 * rng.randint(1, 9), rng.randint(1, 9)              # 11 ... 99, never a round number:
    n, high, low = tens + ones, tens * digit, ones * digit              # no step adds or multiplies by nothing
    if operation == "*":
        steps = f"{tens} * {digit} = {high}, {ones} * {digit} = {low}, {high} + {low} = {n * digit}"
        return Problem("*", n, digit, f"{n} * {digit}", steps, str(n * digit))
    if operation == "/":
        steps = f"{high} / {digit} = {tens}, {low} / {digit} = {ones}, {tens} + {ones} = {n}"
        return Problem("/", n * digit, digit, f"{n * digit} / {digit}", steps, str(n))
    a, sign = rng.randint(n, rng.choice((99, 999))), 1 if operation == "+" else -1
    middle, result = a + sign * tens, a + sign * n
    steps = f"{a} {operation} {tens} = {middle}, {middle} {operation} {ones} = {result}"
    return Problem(operation, a, n, f"{a} {operation} {n}", steps, str(result))


def split_problems(problems: Iterable[Problem]) -> tuple[list[Problem], list[Problem]]:
    """(train, held out), by hash of the question. None held out may be a step of a training problem either."""
    problems = list(dict.fromkeys(problems))
    heldout = [problem for problem in problems if held_out(problem.question)]
    secret = {problem.question for problem in heldout}
    return [p for p in problems if secret.isdisjoint([p.question, *re.split(" = |, ", p.steps)])], heldout


# ----------------------------------------------------------------------------------------------------------------------
# Questions and answers for supervised fine-tuning. Every answer is read off the source or computed; none is invented

STORIES = {
    "+": ("{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
          "There are {a} {things} here and {b} in the next room. How many are there?", "What is {a} + {b}?"),
    "-": ("{name} has {a} {things} and gives away {b}. How many {things} are left?",
          "A shop had {a} {things} and sold {b}. How many {things} remain?", "What is {a} - {b}?"),
    "*": ("There are {b} boxes with {a} {things} in each. How many {things} are there?",
          "{name} buys {a} {things} a day for {b} days. How many {things} is that?", "What is {a} * {b}?"),
    "/": ("{a} {things} are shared equally by {b} friends. How many {things} does each get?",
          "{name} puts {a} {things} into {b} equal rows. How many {things} are in a row?", "What is {a} / {b}?"),
    "=": ("Solve {question} for x.", "What is x if {question}?"),
}
NAMES = ("Ada", "Ben", "Chen", "Dina", "Emil", "Fatima", "Grace", "Hugo", "Ines", "Jun")
THINGS = ("apples", "books", "coins", "stamps", "pencils", "marbles", "cards", "shells", "tickets", "buttons")
PHRASINGS = {
    "summary": ("What does `{name}` do?", "What is `{name}` for?", "Explain `{name}` in one sentence.",
                "Summarise `{name}`."),
    "signature": ("What is the signature of `{name}`?", "Which arguments does `{name}` take?",
                  "How do I call `{name}`?"),
    "module": ("Which module holds `{short}`?", "Where is `{short}` defined?", "In which module can I find `{short}`?"),
}


def example(kind: str, question: str, reply: str, answer: str) -> dict:
    """One turn of question and reply; `answer` is the part of the reply that a quiz can compare."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"kind": kind, "messages": messages, "answer": answer}


def word_problem(problem: Problem, rng: random.Random) -> dict:
    story = rng.choice(STORIES[problem.operation])
    question = story.format(name=rng.choice(NAMES), things=rng.choice(THINGS), **vars(problem))
    return example("arithmetic", question, f"{problem.steps}. The answer is {problem.answer}.", problem.answer)


def questions_about(thing: Documented, unambiguous: bool, rng: random.Random) -> Iterator[dict]:
    """What a public function or class does, how it is called and, if no other bears its name, where it is found."""
    short = thing.name.removeprefix(f"{thing.module}.")
    ask = {kind: rng.choice(phrasings).format(name=thing.name, short=short) for kind, phrasings in PHRASINGS.items()}
    summary = " ".join(thing.text.split("\n\n")[0].split())
    if re.fullmatch(r"[A-Z].{20,200}\.", summary):
        yield example("summary", ask["summary"], summary, summary)
    if 2 < len(thing.signature) <= 120:
        call = thing.name + thing.signature
        yield example("signature", ask["signature"], f"`{call}`", call)
    if unambiguous:
        yield example("module", ask["module"], f"`{short}` is in the module `{thing.module}`.", thing.module)


# ----------------------------------------------------------------------------------------------------------------------
# The embedded corpus

PROBLEM_DRAWS = 24_000      # before duplicates are removed
EXAMPLES_PER_KIND = 2_000   # conversations for training, at most


def embedded_corpus() -> Corpus:
    """The corpus every reader has: the same bytes for the same versions of Python, NumPy and PyTorch."""
    corpus, rng = Corpus(), random.Random(0)
    scanned, code = scan_packages()
    # The docstring alone decides what is held out; the same one under another name is no new document. The same name
    # twice (one definition per platform) could be on both sides: only the first one counts.
    documented, names = {}, set()
    for thing in scanned:
        if len(words_of(thing.text)) >= MIN_WORDS and thing.name not in names:
            documented.setdefault(thing.text, thing)
            names.add(thing.name)
    leaks = LeakCheck(text for text in documented if held_out(text))

    documents = [("prose", text, thing.document()) for text, thing in documented.items()]
    documents += [("code", text, text) for text in dict.fromkeys(code)]
    documents += [("knowledge", text, text) for text in dict.fromkeys(language_reference())]
    for domain, key, document in documents:
        if held_out(key):
            corpus.heldout[domain].append(document)
        elif not leaks(document):
            corpus.train[domain].append(document)

    problems = split_problems(make_problem(rng) for _ in range(PROBLEM_DRAWS))
    for mine, part in zip(problems, (corpus.train, corpus.heldout)):
        lines = [f"Problem: {p.question}\nWorking: {p.steps}\nAnswer: {p.answer}\n" for p in mine]
        part["maths"] = ["\n".join(lines[i:i + 8]) for i in range(0, len(lines), 8)]

    short = {text: thing.name.removeprefix(f"{thing.module}.") for text, thing in documented.items()}
    bearers = Counter(short.values())
    pairs = [(held_out(text), pair) for text, thing in documented.items()
             if not re.search(r"(^|\.)_", thing.name) and thing.name != thing.module
             for pair in questions_about(thing, bearers[short[text]] == 1, rng)]
    pairs += [(side, word_problem(p, rng)) for side, mine in enumerate(problems) for p in mine]
    rng.shuffle(pairs)
    room = Counter(dict.fromkeys([*PHRASINGS, "arithmetic"], EXAMPLES_PER_KIND))
    for heldout, pair in pairs:
        if heldout:
            corpus.sft_heldout.append(pair)
        elif room[pair["kind"]] and not leaks(pair["messages"][-1]["content"]):
            room[pair["kind"]] -= 1
            corpus.sft_train.append(pair)
    return corpus


# ----------------------------------------------------------------------------------------------------------------------
# A folder of the reader's own text


def is_chat(messages) -> bool:
    return (isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
            and all(isinstance(m.get(key), str) for m in messages for key in ("role", "content"))
            and any(m["role"] == "assistant" for m in messages))


def read_documents(path: Path) -> Iterator[str | list[dict]]:
    """The documents of one file: a str for a text, a list of messages for a chat."""
    if path.suffix == ".txt":       # one file may be a whole book: in pieces, so that some of it can be held out
        yield from split_text(path.read_text(encoding="utf-8-sig"), "\n\n", 4000)
        return
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: broken JSON ({error}); each line must be one object") from None
            record = record if isinstance(record, dict) else {}
            if not isinstance(record.get("text"), str) and not is_chat(record.get("messages")):
                raise UserError(f'{path}, line {number}: needs "text" (a string) or "messages" (a list of "role" and '
                                '"content", one of them by "assistant")')
            yield record["text"] if isinstance(record.get("text"), str) else record["messages"]


def folder_corpus(folder: str | Path) -> Corpus:
    """Every .txt, .jsonl and .jsonl.gz below `folder`; its name or its folder's, if a domain's, tells the domain.

    Raises UserError for a folder that is missing or holds too little, a file that cannot be read, a broken line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --data wants one with .txt, .jsonl or .jsonl.gz files")
    found = defaultdict(dict)       # domain, or "chat" -> {what the hash decides by: document}; a dict drops duplicates
    for path in sorted(folder.rglob("*")):
        if not path.name.endswith((".txt", ".jsonl", ".jsonl.gz")):
            continue
        names = [path.name.split(".")[0], *reversed(path.relative_to(folder).parts[:-1])]
        domain = next((name for name in names if name in DOMAINS), "prose")
        try:
            for document in read_documents(path):
                key = document if isinstance(document, str) else json.dumps(document, ensure_ascii=False)
                key.encode()        # JSON can spell half a character, "\ud800", which no tokenizer can take
                if key.strip():
                    found[domain if isinstance(document, str) else "chat"].setdefault(key, document)
        except (OSError, EOFError, zlib.error, UnicodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None

    corpus = Corpus()
    for domain, documents in found.items():
        keys = {key for key in documents if held_out(key)}
        if not 0 < len(keys) < len(documents):      # few documents: one of them, unless it is the only one
            keys = set(sorted(documents, key=lambda key: hashlib.sha256(key.encode()).digest())[:len(documents) > 1])
        for key, document in documents.items():
            if domain == "chat":
                last = [message["content"] for message in document if message["role"] == "assistant"][-1]
                part = corpus.sft_heldout if key in keys else corpus.sft_train
                part.append({"kind": "chat", "messages": document, "answer": last})
            else:
                (corpus.heldout if key in keys else corpus.train)[domain].append(document)
    if not any(corpus.heldout.values()):
        raise UserError(f"{folder} holds too little text: at least two documents in .txt, .jsonl or .jsonl.gz files")
    return corpus


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer

# Text is first split into pieces: a word with the space before it, up to three digits, punctuation, white space. No
# token spans two pieces, or " of the" would be a token and "dog." another than "dog".
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3_RANKS = 128_000      # a rank file of this size is Llama-3's, whose 256 special tokens have places of their own:
RESERVED = tuple(f"<|reserved_special_token_{i}|>" for i in range(251))
LLAMA3_SPECIAL_TOKENS = (*SPECIAL_TOKENS[:2], *RESERVED[:4], *SPECIAL_TOKENS[2:4], RESERVED[4], SPECIAL_TOKENS[4],
                         *RESERVED[5:])
LONGEST_PIECE = 100         # characters: a run of 10,000 equals signs takes the square of that, and teaches nothing


def merge_pairs(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """Byte-pair encoding of one piece as tiktoken does it: join the pair of lowest rank, leftmost first."""
    unranked = len(ranks)
    while len(parts) > 1:
        joint = [ranks.get(left + right, unranked) for left, right in zip(parts, parts[1:])]
        lowest = min(joint)
        if lowest == unranked:
            break
        i = joint.index(lowest)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2:]]
    return parts


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Learn byte-pair ranks: start from the 256 bytes and, again and again, make the most frequent pair a token.

    vocab_size counts the special tokens: make_tokenizer(train_bpe(texts, V), name).n_vocab is V, or less if the text
    has too few pairs. A pair is known by its joint bytes, not by its halves: "a" + "bc" and "ab" + "c" are one token to
    tiktoken, whose files hold no merges. Three habits make it fast: count each distinct piece of text once, touch only
    the pieces that hold the new token, let a heap find the most frequent pair.
    """
    frequency = Counter(piece for text in texts for piece in regex.findall(LLAMA3_PATTERN, text))
    pieces = [([bytes([byte]) for byte in piece.encode()], times) for piece, times in frequency.items()
              if len(piece) <= LONGEST_PIECE]
    ranks = {bytes([byte]): byte for byte in range(256)}
    count, where = Counter(), defaultdict(set)      # of a pair: how often it occurs, the pieces that (once) held it
    for index, (parts, times) in enumerate(pieces):
        for pair in map(bytes.__add__, parts, parts[1:]):
            count[pair] += times
            where[pair].add(index)
    heap = [(-times, pair) for pair, times in count.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size - len(SPECIAL_TOKENS):
        times, token = heapq.heappop(heap)
        if -times != count[token]:                  # outdated. A pair that has grown since has a newer entry, ...
            if 0 < count[token] < -times:           # ... one that has shrunk gets its place further down now
                heapq.heappush(heap, (-count[token], token))
            continue
        ranks[token] = len(ranks)
        grown = set()
        for index in where.pop(token):
            old, times = pieces[index]
            new = merge_pairs(old, ranks)
            pieces[index] = new, times
            for pair in map(bytes.__add__, old, old[1:]):
                count[pair] -= times
            for pair in map(bytes.__add__, new, new[1:]):
                count[pair] += times
                where[pair].add(index)
                grown.add(pair)
        for pair in grown:
            heapq.heappush(heap, (-count[pair], pair))
    return ranks


def make_tokenizer(ranks: dict[bytes, int], name: str) -> tiktoken.Encoding:
    """Ranks, Llama-3's split pattern, and the special tokens after the ranks."""
    special = LLAMA3_SPECIAL_TOKENS if len(ranks) == LLAMA3_RANKS else SPECIAL_TOKENS
    return tiktoken.Encoding(name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks,
                             special_tokens={token: len(ranks) + i for i, token in enumerate(special)})


def tokenizer_to_dict(encoding: tiktoken.Encoding) -> dict:
    """The checkpoint's "tokenizer" entry; mobilemoe.tokenizer_from_dict is the way back."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    return {"name": encoding.name, "pattern": encoding._pat_str, "special_tokens": dict(encoding._special_tokens),
            "ranks": "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)}


def load_tokenizer_file(path: str | Path) -> tiktoken.Encoding:
    """A Llama-3 tokenizer.model, or any tiktoken rank file (lines of: base64 bytes, space, rank). Raises UserError."""
    path, ranks = Path(path), {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{path}, line {number}: not a tiktoken rank file (base64 bytes, space, rank)") from None
    if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{path} is not a whole tiktoken rank file: ranks from 0 up, each once, all 256 bytes included")
    return make_tokenizer(ranks, path.stem)


# ----------------------------------------------------------------------------------------------------------------------
# From tokens to batches


def tokenize_documents(docs: Iterable[str], encoding: tiktoken.Encoding) -> np.ndarray:
    """One stream, <|begin_of_text|> before each document: [tokens], uint16 or, for more than 65,536 tokens, uint32.

    A document that spells "<|eot_id|>" gets its characters, not the token: no text may forge the end of a turn.
    """
    dtype = np.uint16 if encoding.n_vocab <= 65536 else np.uint32
    begin = np.array([encoding.encode_single_token("<|begin_of_text|>")], dtype)
    stream = [np.empty(0, dtype)]
    for doc in docs:
        try:
            stream += [begin, encoding.encode_to_numpy(doc, disallowed_special=()).astype(dtype)]
        except ValueError as error:     # about a million spaces in a row: tiktoken's regular expression gives up
            raise UserError(f"a document of {len(doc):,} characters cannot be tokenized: {error}") from None
    return np.concatenate(stream)


def encode_example(encoding: tiktoken.Encoding, messages: list[dict]) -> tuple[list[int], list[int]]:
    """A conversation in Llama-3's chat format: (ids, loss_mask), 1 on the assistant's words and the <|eot_id|> after.

    Trained on the questions too, the model would learn to ask them. The prompt is made by the function that makes it
    in use, so that training and use cannot drift apart by a newline.
    """
    ids = encode_chat(encoding, messages, reply=False)
    mask = [0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(encode_chat(encoding, messages[:i], reply=True))
            end = len(encode_chat(encoding, messages[:i + 1], reply=False))
            mask[start:end] = [1] * (end - start)
    return ids, mask


class Mixture:
    """Batches for pre- and mid-training. Row n of a run depends on (seed, n) alone, so resuming needs no saved state.

    Each domain's stream is cut into windows of T + 1 tokens that overlap by one: every token but the very first is a
    target exactly once per epoch. Windows come in a new order each epoch; a small domain with a large weight goes round
    more often than a large one.
    """

    CYCLE = 1000        # rows after which the plan of domains repeats, so weights are exact to a tenth of a percent

    def __init__(self, tokens: dict[str, np.ndarray], weights: dict[str, float], context: int, seed: int):
        self.tokens = {d: tokens[d] for d, weight in weights.items() if weight > 0 and len(tokens.get(d, ())) > 1}
        if not self.tokens:
            raise UserError(f"there is no text in any domain that this stage trains on ({', '.join(weights)})")
        self.context, self.seed = context, seed
        self.windows = {domain: -(-(len(stream) - 1) // context) for domain, stream in self.tokens.items()}
        # Always the domain furthest behind its share: even a small batch then holds very nearly the mixture asked for.
        total = sum(weights[domain] for domain in self.tokens)
        self.plan, self.per_cycle = [], Counter()                       # plan: (domain, how many of it came before)
        for row in range(1, self.CYCLE + 1):
            domain = max(self.tokens, key=lambda domain: row * weights[domain] / total - self.per_cycle[domain])
            self.plan.append((domain, self.per_cycle[domain]))
            self.per_cycle[domain] += 1
        self.order = functools.lru_cache(maxsize=2 * len(DOMAINS))(self._order)

    def _order(self, domain: str, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, DOMAINS.index(domain), epoch]).permutation(self.windows[domain])

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """inputs, targets: [B, T] int64. A stream's last window is short: its targets end in -100, the loss ignores."""
        inputs = np.zeros((batch_size, self.context), np.int64)         # [B, T]
        targets = np.full((batch_size, self.context), -100)             # [B, T]
        for b in range(batch_size):
            cycle, row = divmod(step * batch_size + b, self.CYCLE)
            domain, before = self.plan[row]
            epoch, position = divmod(cycle * self.per_cycle[domain] + before, self.windows[domain])
            start = int(self.order(domain, epoch)[position]) * self.context
            window = self.tokens[domain][start:start + self.context + 1]
            inputs[b, :len(window) - 1] = window[:-1]
            targets[b, :len(window) - 1] = window[1:]
        return inputs, targets


class Packed:
    """Batches for SFT and QAT: whole conversations side by side in rows of T + 1 tokens, none cut, each once per epoch.

    Which conversations share a row is drawn once, the order of the rows anew for each epoch. (Packing anew would change
    the number of rows, and batch n would then depend on every epoch before it.) A conversation can see those before it
    in its row; its <|begin_of_text|> is what teaches the model to disregard them. One longer than a row is left out and
    counted in `skipped`: cut, it would teach half an answer.
    """

    OPEN_ROWS = 64      # rows still open to more: to try all of them would waste a little less, in quadratic time

    def __init__(self, examples: list[tuple[list[int], list[int]]], context: int, seed: int, pad_id: int):
        fitting = [example for example in examples if len(example[0]) <= context + 1]
        if not fitting:
            raise UserError(f'no conversation of at most {context + 1} tokens: the data needs a .jsonl with "messages"')
        self.seed, self.skipped = seed, len(examples) - len(fitting)
        places, free, n_rows = [], {}, 0                                # free: open row -> tokens it still has room for
        for index in np.random.default_rng(seed).permutation(len(fitting)):
            length = len(fitting[index][0])
            row = next((row for row, room in free.items() if room >= length), n_rows)
            if row == n_rows:
                n_rows += 1
                free[row] = context + 1
                if len(free) > self.OPEN_ROWS:
                    del free[min(free)]
            places.append((row, context + 1 - free[row], index))
            free[row] -= length
        self.ids = np.full((n_rows, context + 1), pad_id, np.int32)     # [rows, T + 1]
        self.mask = np.zeros((n_rows, context + 1), bool)               # [rows, T + 1]
        for row, start, index in places:
            ids, mask = fitting[index]
            self.ids[row, start:start + len(ids)], self.mask[row, start:start + len(ids)] = ids, mask
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.ids))

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """inputs, targets: [B, T] int64; targets are -100, which the loss ignores, wherever there is no answer."""
        places = [divmod(step * batch_size + b, len(self.ids)) for b in range(batch_size)]
        rows = [self.order(epoch)[position] for epoch, position in places]
        ids, mask = self.ids[rows].astype(np.int64), self.mask[rows]    # [B, T + 1]
        return ids[:, :-1], np.where(mask, ids, -100)[:, 1:]


# ----------------------------------------------------------------------------------------------------------------------


def xz_bits_per_byte(texts: list[str]) -> float:
    """What `xz -9e` needs for these texts: a language model that needs more knows less than a dictionary coder."""
    raw = "".join(texts).encode()
    return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)


def main() -> None:
    corpus = embedded_corpus()
    print(f"{'domain':<10}{'documents':>10}{'MB':>7}{'held out':>10}{'MB':>7}{'xz bits/byte':>14}")
    for domain in DOMAINS:
        train, heldout = corpus.train[domain], corpus.heldout[domain]
        size, held = (sum(len(text.encode()) for text in texts) / 1e6 for texts in (train, heldout))
        xz = xz_bits_per_byte(heldout)
        print(f"{domain:<10}{len(train):>10,}{size:>7.2f}{len(heldout):>10,}{held:>7.2f}{xz:>14.2f}")
    for side, examples in (("train", corpus.sft_train), ("held out", corpus.sft_heldout)):
        kinds = Counter(example["kind"] for example in examples)
        print(f"SFT, {side}: {len(examples):,} conversations;", ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    for domain in DOMAINS:
        print(f"\n--- {domain} ---\n{random.Random(1).choice(corpus.heldout[domain])[:500]}")
    for kind, pair in {pair["kind"]: pair for pair in corpus.sft_heldout}.items():
        print(f"\n--- {kind} ---", *(f"{m['role']}: {m['content']}" for m in pair["messages"]), sep="\n")


if __name__ == "__main__":
    run_main(main)
