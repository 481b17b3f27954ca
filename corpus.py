"""The text every reader has: docstrings, source and language reference of Python, NumPy and PyTorch.

About 10 MB are found on the reader's own disk; nothing is downloaded. This file makes documents of it, and
puts them together with the questions and answers of skills.py, for supervised fine-tuning (SFT). 5 % of
everything is held out from all stages. What it is not: a tokenizer or batches (data.py), or a cleaner of the
reader's own text. Nothing to run; `python data.py` shows what it finds.

Sources: MobileMoE (arXiv 2605.27358) for the domains; the rest is this project's own.
"""
import ast
import hashlib
import inspect
import os
import random
import re
import warnings
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

import skills

# Domains stay apart to the last batch: each stage mixes them by weight, first broadly, then with more code
# and maths, as the paper does.
DOMAINS = ("prose", "code", "knowledge", "maths")


class Corpus:
    """Documents by domain, and conversations: {"kind", "messages": [{"role", "content"}, ...], "answer"}.

    Text to train on and text held out never meet again: the same hash decides in every stage. "answer" is
    what a test compares; "kind" is that of skills.py, "quiz" or, of the reader's own data, "chat".
    """
    def __init__(self, source: str):
        self.source = source                                            # what was read, in words
        self.train: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
        self.heldout: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
        self.sft_train, self.sft_heldout = [], []

# ----------------------------------------------------------------------------------------------------------
# What is held out


def held_out(text: str) -> bool:
    """True for 5 % of all texts. The text alone decides: the same in every stage, run and order of files.

    After a seeded random split, a text that is held out in pre-training could turn up in fine-tuning.
    """
    return hashlib.sha256(text.encode()).digest()[0] < 13               # 13/256 = 5.1 %


# Shorter docstrings are left out: "Return the name." stands in a hundred texts and cannot be kept unseen.
MIN_WORDS = 8
words_of = re.compile(r"\w+").findall


class LeakCheck:
    """Does a text quote a held-out docstring, whatever the indentation, quotes or line breaks around it?

    Many a docstring begins like another one: look up its first eight words, then compare all of them.
    """
    def __init__(self, docstrings: Iterable[str]):
        self.by_start = defaultdict(list)
        for words in map(words_of, docstrings):
            self.by_start[tuple(words[:MIN_WORDS])].append(f" {' '.join(words)} ")

    def __call__(self, text: str) -> bool:
        words = words_of(text)
        starts = set(zip(*(words[i:] for i in range(MIN_WORDS)))) & self.by_start.keys()
        flat = f" {' '.join(words)} "
        return any(docstring in flat for start in starts for docstring in self.by_start[start])

# ----------------------------------------------------------------------------------------------------------
# Prose: docstrings of the standard library, NumPy and PyTorch. Code: the library without its docstrings
#
# Source is parsed (ast), never run: importing a thousand modules would start their side effects. What is
# written in C has no source to parse, but NumPy and PyTorch add its docstrings by calls that can be read.

# ("numpy.linalg.norm", where it is: "numpy.linalg", "(x, ord=None)" or "", "Matrix or vector norm. ...")
Documented = namedtuple("Documented", "name module signature text")


def signature_of(node: ast.AST, is_method: bool) -> str:
    """The arguments as source text, without annotations, which are longer than the names and seldom there."""
    if isinstance(node, ast.ClassDef):                                  # a class is called like its __init__
        return next((signature_of(n, True) for n in node.body if getattr(n, "name", "") == "__init__"), "")
    for argument in ast.walk(node.args):
        argument.annotation = None
    text = ast.unparse(node.args)
    return f"({re.sub(r'^(self|cls)(, /)?(, |$)', '', text) if is_method else text})"


def literal_text(node: ast.AST) -> str:
    """The text of a string expression: a literal, a + b, or r'...'.format(...)."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.BinOp(left=left, right=right):
            return literal_text(left) + literal_text(right)
        case ast.Call(func=ast.Attribute(value=template, attr="format")):
            # The values exist only once torch is imported. A line that is nothing but a placeholder goes.
            text = re.sub(r"^[ \t]*\{\w+\}[ \t]*\n", "", literal_text(template), flags=re.M)
            return re.sub(r"(?<!\{)\{\w*\}(?!\})", "", text).replace("{{", "{").replace("}}", "}")
    return ""


def added_docstring(statement: ast.stmt, module: str) -> Documented | None:
    """The docstring that a call gives to something written in C, if the statement is such a call:

    torch:  add_docstr(torch.abs, "...")      diff = _add_docstr(_C.diff, "...")
            add_docstr_all("abs", "...")      of torch.Tensor, in the module torch._tensor_docs
    numpy:  add_newdoc("numpy._core.multiarray", "ndarray", ("shape", "..."))
    """
    call = getattr(statement, "value", None)
    source = ast.unparse(call) if isinstance(call, ast.Call) else ""
    if not re.match(r"(add_newdoc|_?add_docstr(_all)?)\(", source):
        return None
    *target, last = [*call.args[:-1], *getattr(call.args[-1], "elts", call.args[-1:])]
    name = ".".join(literal_text(part) or ast.unparse(part) for part in target)
    if isinstance(statement, ast.Assign):
        name = f"{module}.{statement.targets[0].id}"
    elif "." not in name:
        name = f"torch.{module.split('._')[-1].removesuffix('_docs').capitalize()}.{name}"
    name = name.replace("numpy._core.multiarray", "numpy")
    # C has no signature that ast could see. A first line shows one: "abs(input) -> Tensor",
    # "copy($self)\n--".
    text = inspect.cleandoc(literal_text(last))
    signature, rest = re.match(r"(?:[\w.]+(\(.*\))(?: *->.*|\n--)\s+)?((?s:.*))", text).groups(default="")
    return Documented(name, name.rpartition(".")[0], re.sub(r"\$self(, /)?(, )?", "", signature), rest)


def find_documented(parent: ast.AST, module: str, owner: str, partial: re.Match | None) -> Iterator:
    """Everything documented below a module, class or `if`, in file order, under the name to import it by."""
    for node in [*parent.body, *getattr(parent, "orelse", ())]:
        if isinstance(node, (ast.If, ast.Try)):
            yield from find_documented(node, module, owner, partial)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            # NumPy defines functions in private files. A decorator, or a partial() of it, has the public
            # module.
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            named = re.search(r"set_module\('([\w.]+)'\)", decorators)
            named = named or ("array_function_" in decorators and partial)
            home = named[1] if named and not owner else module
            name = f"{owner or home}.{node.name}"
            if text := ast.get_docstring(node):
                is_method = owner and "staticmethod" not in decorators
                yield Documented(name, home, signature_of(node, is_method), text)
            if isinstance(node, ast.ClassDef):                  # nobody can call a function inside a function
                yield from find_documented(node, home, name, partial)
        elif found := added_docstring(node, module):
            yield found


def without_docstrings(source: str, tree: ast.Module) -> str:
    """The source without strings that are statements: a held-out one must not come back as code.

    (`ast.unparse` would do it in a line, but lose the comments.)
    """
    lines = source.encode().splitlines(keepends=True)           # ast counts columns in bytes of UTF-8
    for parent in ast.walk(tree):
        body = getattr(parent, "body", None)
        for node in body if isinstance(body, list) else ():
            if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
                first, last = node.lineno - 1, node.end_lineno - 1
                head, tail = lines[first][:node.col_offset], lines[last][node.end_col_offset:]
                lines[first:last + 1] = [b""] * (last + 1 - first)      # later line numbers must stay right
                if len(body) == 1 or head.strip() or tail.strip():
                    lines[first] = head + b"pass" + tail
    return re.sub(r"\n{4,}", "\n\n\n", b"".join(lines).decode())        # two blank lines, where more are left


def split_text(text: str, separator: str, size: int) -> list[str]:
    """Cut a text at separators into pieces of at least `size` characters: some of them can be held out."""
    pieces = re.findall(rf"(?s)(.{{{size},}}?|.+)(?:{separator}|\Z)", text)
    return [piece.strip("\n") + "\n" for piece in pieces if piece.strip()]


SKIP = frozenset("""test tests testing idlelib lib2to3 turtledemo encodings pydoc_data ensurepip distutils
    f2py site-packages dist-packages""".split())


def scan_packages() -> tuple[list[Documented], list[str]]:
    """Parse, never run, the standard library, NumPy and PyTorch: all that is documented, and some code."""
    documented, code = [], []
    warnings.simplefilter("ignore", SyntaxWarning)              # "invalid escape sequence": not ours to cure
    for package, root in (("", os.__file__), ("numpy", np.__file__), ("torch", torch.__file__)):
        for path in sorted(Path(root).parent.rglob("*.py")):
            *folders, stem = path.relative_to(Path(root).parent).with_suffix("").parts
            # Private packages document internals (a compiler's passes, say); numpy._core holds all of NumPy.
            if any(name in SKIP or name[0] == "_" and name != "_core" for name in folders):
                continue
            source = path.read_text(encoding="utf-8", errors="replace")
            tree = ast.parse(source)
            module = ".".join(part for part in (package, *folders, stem) if part not in ("", "__init__"))
            if text := ast.get_docstring(tree):
                documented.append(Documented(module, module, "", text))
            partial = re.search(r"array_function_(?:dispatch|from_dispatcher),\s*module='([\w.]+)'", source)
            documented += find_documented(tree, module, "", partial)
            if not package and not folders and stem[0] != "_":  # single-file modules are the readable part
                pieces = split_text(without_docstrings(source, tree), "\n\n\n", 2000)
                code += [f"# {stem}.py\n{piece}" for piece in pieces]
    return documented, code


def language_reference() -> list[str]:
    """The topics of Python's `help()`, the language reference, in pieces of about 2,000 characters."""
    from pydoc_data.topics import topics
    return [f"{topic}\n\n{piece}" for topic in sorted(topics)
            for piece in split_text(topics[topic], "\n\n", 2000)]

# ----------------------------------------------------------------------------------------------------------
# All of it


def quiz(documented: Iterable[Documented]) -> Iterator[skills.Item]:
    """What do held-out functions do? Nobody is taught that: lab/evaluate.py offers four answers."""
    for thing in documented:
        summary = " ".join(thing.text.split("\n\n")[0].split())
        is_public = not re.search(r"(^|\.)_", thing.name) and thing.name != thing.module
        if is_public and re.fullmatch(r"[A-Z].{20,200}\.", summary):
            yield skills.Item("quiz", thing.text, f"What does {thing.name} do?", summary)


def conversation(items: list[skills.Item]) -> dict:
    """Questions and their answers as one conversation, named after the first."""
    said = [(("user", item.question), ("assistant", item.reply)) for item in items]
    messages = [{"role": role, "content": content} for turn in said for role, content in turn]
    return {"kind": items[0].kind, "messages": messages, "answer": items[-1].reply}


def embedded_corpus() -> Corpus:
    """The corpus every reader has: the same bytes for the same versions of Python, NumPy and PyTorch."""
    rng = random.Random(0)
    corpus = Corpus("documentation and source of Python, NumPy and PyTorch")
    scanned, code = scan_packages()
    # The docstring alone decides what is held out: the same one under another name is no new document. One
    # name defined twice (per platform) could end on both sides: only its first definition counts.
    documented, names = {}, set()
    for thing in scanned:
        if len(words_of(thing.text)) >= MIN_WORDS and thing.name not in names:
            documented.setdefault(thing.text, thing)
            names.add(thing.name)
    leaks = LeakCheck(filter(held_out, documented))

    # The name comes first so that the model learns "name -> description": that is what a reader will ask.
    prose = {text: f"{thing.name}{thing.signature}\n\n{text}\n" for text, thing in documented.items()}
    documents = {"prose": prose, "code": {text: text for text in code},
                 "knowledge": {text: text for text in language_reference()}}
    for domain, texts in documents.items():
        corpus.heldout[domain] = [document for text, document in texts.items() if held_out(text)]
        corpus.train[domain] = [document for text, document in texts.items()
                                if not held_out(text) and not leaks(document)]
    # Skills twice: as text of the domain maths, and some of each kind as conversations.
    taught, tested = skills.skill_items(rng, held_out)
    for items, part in ((taught, corpus.train), (tested, corpus.heldout)):
        rng.shuffle(items)
        lines = [f"Question: {item.question}\nAnswer: {item.reply}\n" for item in items]
        part["maths"] = ["\n".join(lines[i:i + 8]) for i in range(0, len(lines), 8)]
    known, asked = skills.known_items(rng, held_out)
    hard = ("sum of two", "sum of three", "letters")
    room = Counter({item.kind: skills.EACH * (1 + (item.kind in hard)) for item in taught})
    for item in taught:
        if room[item.kind] > 0:
            room[item.kind] -= 1
            known.append(item)
    rng.shuffle(known)
    while known:                    # people ask a second question: so one in four conversations goes on
        turns = rng.choice((1, 1, 1, 2))
        corpus.sft_train.append(conversation(known[-turns:]))
        del known[-turns:]
    tested += [*asked, *quiz(thing for text, thing in documented.items() if held_out(text))]
    corpus.sft_heldout = [conversation([item]) for item in tested]
    return corpus
