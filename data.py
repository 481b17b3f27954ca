"""From text to batches: files become documents, documents become integers, integers become batches.

Top to bottom: a folder of the reader's own text (--data; the text every reader has is in corpus.py); a
byte-pair tokenizer, learned or loaded; token streams cut into windows, and conversations packed into rows;
for text larger than memory, shards of tokens on the disk; and `prepare`, which puts all of this together for
train.py. What it is not: a cleaner. Nobody looks for leaks in the reader's own text.

    python data.py          # a table of the embedded corpus, and a sample of every domain and question
    python data.py tokenize web/*.jsonl.gz --domain prose --out shards      # once per domain ...
    python train.py --data shards                                           # ... then train on them

Sources: MobileMoE (arXiv 2605.27358) for the stages and their mixtures; Sennrich et al. 2016 for byte-pair
encoding; Llama 3 for the split pattern and the chat tokens; Raffel et al. 2020 for packing.
"""
import base64
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import lzma
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch

from common import (Parser, Progress, UserError, atomic_write, chat_parts, encode, load_checkpoint,
                    markdown_table, read_json, run_main, tokenizer_from_dict)
from corpus import DOMAINS, Corpus, embedded_corpus
from mobilemoe import PRESETS
from skills import SHOWN

# ----------------------------------------------------------------------------------------------------------
# The reader's own text: one reader for --data and for `tokenize`

FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
NEAR_MISSES = {"web": "prose", "coding": "code", "math": "maths", "mathematics": "maths"}
PAGE = 4_000            # a .txt may be a book: it is cut at blank lines, into pages of so many characters
LONGEST = 2 ** 15       # characters of any document: about the 8,192 tokens of the longest context
HELDOUT = 100_000       # characters held out per domain, at most: a run measures them again and again


def find_files(inputs: list[str | Path]) -> tuple[list[Path], Counter]:
    """All files of FORMATS among the inputs and below them, in order, and a count of what is left out.

    Follows symlinks, and reads each folder and file once. Raises UserError for an input that is not there.
    """
    files, left_out, seen = [], Counter(), set()
    todo = [Path(path) for path in reversed(inputs)]
    for path in todo:
        if not path.exists():
            raise UserError(f"no file or folder {path}")
    while todo:
        path = todo.pop()
        if os.path.realpath(path) in seen:
            continue
        seen.add(os.path.realpath(path))
        if path.name == "runs" or (path / "tokens.pt").is_file():
            left_out["training runs"] += 1
        elif path.is_dir():
            children = sorted(path.iterdir(), reverse=True)
            todo += [child for child in children if not child.name.startswith(".")]
            left_out["hidden"] += sum(child.name.startswith(".") for child in children)
        elif path.is_file() and path.name.lower().endswith(FORMATS):
            files.append(path)
        else:
            left_out[path.suffix or "without ending"] += 1
    return files, left_out


def counted(counts: dict[str, int]) -> str:
    """{"prose": 12, "code": 0} -> "12 prose": what a line of the log says was read or left out."""
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number) or "none"


def domain_of(path: Path) -> str:
    """The last domain that the path names, so that a file's own name goes first; without one, "prose"."""
    names = "|".join((*DOMAINS, *NEAR_MISSES))
    found = re.findall(rf"(?<![a-z])({names})(?![a-z])", path.as_posix().lower()) or ["prose"]
    return NEAR_MISSES.get(found[-1], found[-1])


def read_records(file) -> Iterator[bytes | dict]:
    """The rows of a .parquet, or the lines of any other file. A file may be larger than memory."""
    name = file.name.lower()
    if name.endswith(".parquet"):
        from pyarrow import parquet
        # A row group can be gigabytes: without a buffer size, pyarrow holds its whole column in memory.
        table = parquet.ParquetFile(file, buffer_size=2 ** 20, pre_buffer=False)
        columns = [name for name in ("text", "messages") if name in table.schema_arrow.names]
        batches = table.iter_batches(64, columns=columns, use_threads=False)
        return (row for batch in batches for row in batch.to_pylist())
    return gzip.open(file) if name.endswith(".gz") else file


def is_conversation(messages: list) -> bool:
    """Does every message have a role and a content, and is one of them by the assistant?"""
    spoken = (isinstance(m, dict) and type(m.get("role")) is type(m.get("content")) is str for m in messages)
    return all(spoken) and any(m["role"] == "assistant" for m in messages)


def read_documents(file, domain: str = "") -> Iterator[tuple[str, bool]]:
    """(text, False) for each document, (messages as JSON, True) for each conversation of an open file.

    The domain "chat" has only conversations, the others have only documents, and "" has both. A document
    longer than LONGEST is cut at white space, if it has any. Raises UserError with the file and the line.
    """
    number, page = 0, ""
    is_txt = file.name.lower().endswith(".txt")
    try:
        for record in itertools.chain(read_records(file), [b""]):      # an empty line ends the last page
            number += 1
            if is_txt:
                page += record.decode("utf-8-sig").replace("\r\n", "\n")
                if record and len(page) < LONGEST and not (len(page) >= PAGE and page.endswith("\n\n")):
                    continue
                record, page = {"text": page.strip("\n") + "\n"}, ""
            elif isinstance(record, bytes):
                if not record.strip():
                    continue
                record = json.loads(record)
            match record:
                case {"messages": [*chat]} if domain in ("", "chat") and is_conversation(chat) and (
                        domain or not record.get("text")):
                    is_chat, parts = True, [json.dumps(chat, ensure_ascii=False)]
                case {"text": str(text)} if domain != "chat":
                    is_chat, parts = False, re.findall(rf"(?s).{{1,{LONGEST}}}(?!\S)|.{{1,{LONGEST}}}", text)
                case _:
                    raise ValueError('needs "text" (a string) or, in the domain chat, "messages" (a list of '
                                     '"role" and "content", one of them by "assistant")')
            for part in parts:
                part.encode()               # JSON can spell half a character, "\ud800", which is no text
                if part.strip():
                    yield part, is_chat
    except Exception as error:              # JSON, UTF-8, gzip and Parquet have a dozen kinds
        kinds = {json.JSONDecodeError: "broken JSON: ", ModuleNotFoundError: "`pip install pyarrow`: "}
        why = kinds.get(type(error), "") + (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file.name}, line {number}: {why}") from None


def hold_out(texts: Iterable[str], share: float, kept: dict[str, str]) -> Iterator[str]:
    """Yield the texts to train on; put a share of them, and at least the first, into `kept` {hash: text}.

    Works on a stream, so that shards and small folders share one rule.
    The hash decides, so a copy is held out, too. Of more than HELDOUT characters those of the smallest hashes
    stay, a sample of all the text without knowing how long it is; the others are trained on.
    """
    for text in texts:
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if kept and key not in kept and int(key, 16) >= share * 2 ** 64:
            yield text
            continue
        kept[key] = text
        while sum(map(len, kept.values())) > HELDOUT and len(kept) > 1:
            yield kept.pop(max(kept))


def conversation(text: str) -> dict:
    """A list of messages as JSON -> an entry of Corpus.sft_train."""
    messages = json.loads(text)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return {"kind": "chat", "messages": messages, "answer": answers[-1]}


def folder_corpus(folder: str | Path) -> Corpus:
    """Every file of FORMATS below the folder. Names of files and folders tell the domain.

    Raises UserError for a folder that is missing or holds too little, a file that cannot be read, a bad line.
    """
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}: --data wants one with {', '.join(FORMATS)} files")
    files, left_out = find_files([folder])
    kinds = Counter()
    found = defaultdict(dict)       # domain or "chat" -> its documents, as keys: that drops duplicates
    for path in files:
        where = domain = domain_of(path.relative_to(folder))
        with open(path, "rb") as file:
            for text, is_chat in read_documents(file):
                where = "chat" if is_chat else domain
                found[where][text] = None
        kinds[f"{path.suffix.lower()} ({where})"] += 1
    documents = counted({domain: len(texts) for domain, texts in found.items()})
    corpus = Corpus(f"documents: {documents} | files: {counted(kinds)} | left out: {counted(left_out)}")
    if not any(len(texts) > 1 for texts in found.values()):
        raise UserError(f"{folder} needs at least two documents in one domain: {corpus.source}")
    for domain, texts in found.items():
        kept = {}
        training = list(hold_out(texts, 0.05, kept)) or [kept.pop(max(kept))]       # one is always trained on
        if domain == "chat":
            corpus.sft_train = [conversation(text) for text in training]
            corpus.sft_heldout = [conversation(text) for text in kept.values()]
        else:
            corpus.train[domain], corpus.heldout[domain] = training, list(kept.values())
    return corpus

# ----------------------------------------------------------------------------------------------------------
# Tokenizer

# Text is first split into pieces: a word with the space before it, up to three digits, punctuation, white
# space. No token spans two pieces, or " of the" would be a token and "dog." another than "dog".
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                  "<|eot_id|>")
LONGEST_PIECE = 100     # characters: 10,000 equals signs in a row would take the square of that


def merge_pairs(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """Byte-pair encoding of one piece as tiktoken does it: join the pair of lowest rank, leftmost first."""
    while known := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]:
        _, i = min(known)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2:]]
    return parts


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Learn byte-pair ranks: start from the 256 bytes, and again and again make the most frequent pair a
    token.

    vocab_size counts the special tokens; text with too few pairs gives less. A pair is known by its joint
    bytes: "a" + "bc" and "ab" + "c" are one token to tiktoken, whose files hold no merges. Three habits make
    it fast: count each distinct piece of text once, touch only the pieces that hold the new token, let a heap
    find the most frequent pair.
    """
    times = Counter(piece for text in texts for piece in regex.findall(LLAMA3_PATTERN, text))
    parts = {piece: [bytes([byte]) for byte in piece.encode()]
             for piece in times if len(piece) <= LONGEST_PIECE}
    ranks = {bytes([byte]): byte for byte in range(256)}
    count, where = Counter(), defaultdict(set)          # of a pair: how often it occurs, pieces that held it

    def tally(piece: str, sign: int) -> list[bytes]:
        pairs = [a + b for a, b in zip(parts[piece], parts[piece][1:])]
        for pair in pairs:
            count[pair] += sign * times[piece]
            where[pair].add(piece)
        return pairs

    for piece in parts:
        tally(piece, 1)
    heap = [(-times_of_pair, pair) for pair, times_of_pair in count.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size - len(SPECIAL_TOKENS):
        negative, token = heapq.heappop(heap)
        if negative == 0 or -negative != count[token]:
            continue                    # no longer there, or an older entry: its count is outdated
        ranks[token] = len(ranks)
        changed = set()
        for piece in where.pop(token):
            changed.update(tally(piece, -1))
            parts[piece] = merge_pairs(parts[piece], ranks)
            changed.update(tally(piece, 1))
        for pair in changed:
            heapq.heappush(heap, (-count[pair], pair))
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
    """The checkpoint's "tokenizer" entry; common.tokenizer_from_dict is the way back."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)
    return {"name": encoding.name, "pattern": encoding._pat_str,
            "special_tokens": dict(encoding._special_tokens), "ranks": "".join(lines)}


def load_tokenizer_file(path: str | Path) -> tiktoken.Encoding:
    """A Llama-3 tokenizer.model, any tiktoken rank file (lines of base64, space, rank), or the folder of a
    released model. Raises UserError for anything else."""
    if Path(path).is_dir():
        return tokenizer_from_dict(load_checkpoint(path)["tokenizer"])
    try:
        lines = [line.split() for line in Path(path).read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}; a line is base64, space, rank") from None
    whole = sorted(ranks.values()) == list(range(len(lines)))
    if not whole or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{path} is not a whole rank file: ranks from 0 up, once each, all 256 bytes")
    return make_tokenizer(ranks, Path(path).stem)

# ----------------------------------------------------------------------------------------------------------
# From tokens to batches


def tokenize_documents(docs: Iterable[str], encoding: tiktoken.Encoding) -> np.ndarray:
    """One stream [tokens], <|begin_of_text|> before each document: uint16, or uint32 beyond 65,536 tokens."""
    dtype = np.uint16 if encoding.n_vocab <= 65536 else np.uint32
    begin = np.array([encoding.encode_single_token("<|begin_of_text|>")], dtype)
    parts = [begin[:0]]             # nothing, for no documents
    for doc in docs:
        parts += [begin, encode(encoding, doc).astype(dtype)]
    return np.concatenate(parts)


def encode_example(encoding: tiktoken.Encoding, messages: list[dict]) -> tuple[list[int], list[int]]:
    """A conversation in Llama-3's chat format: (ids, loss_mask), 1 on the assistant's words and its
    <|eot_id|>.

    Trained on the questions too, the model would learn to ask them.
    """
    parts = list(chat_parts(encoding, messages))
    return [i for ids, _ in parts for i in ids], [int(learned) for ids, learned in parts for _ in ids]


def tokenize_chats(chats: Iterable[str], encoding: tiktoken.Encoding) -> np.ndarray:
    """Messages as JSON -> one stream [tokens] uint32. Bit 31 of a token is its loss mask.

    A mask in a file of its own could fall out of step with the tokens; a bit of each token cannot.
    """
    pairs = [encode_example(encoding, json.loads(chat)) for chat in chats]
    return np.array([i | m << 31 for ids, mask in pairs for i, m in zip(ids, mask)], np.uint32)


@functools.lru_cache(maxsize=16)        # the batches of an epoch ask for the same order again and again
def shuffled(n: int, *key: int) -> np.ndarray:
    """0 ... n - 1 in an order that the key, (seed, epoch) say, decides alone: resuming needs no saved state.

    For the windows of a stream, 8 bytes for each: 40 MB for 10^10 tokens in windows of 2,048.
    """
    return np.random.default_rng(key).permutation(n)


def xz_bits_per_byte(texts: list[str]) -> float:
    """What `xz -9e` needs for these texts: a model that needs more knows less than a dictionary coder."""
    raw = "".join(texts).encode()
    return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)


class Mixture:
    """Batches for pre- and mid-training. Row n of a run depends on (seed, n) alone.

    Each domain's stream is cut into windows of T + 1 tokens that overlap by one: every token but the first is
    a target once per epoch. Windows come in a new order each epoch; a small domain goes round more often.
    """
    CYCLE = 1000        # rows after which the plan repeats, so weights are exact to a tenth of a percent

    def __init__(self, streams: dict[str, np.ndarray], weights: dict[str, float], context: int, seed: int):
        self.streams, self.context, self.seed = streams, context, seed
        present = [d for d, weight in weights.items() if weight > 0 and len(streams.get(d, ())) > 1]
        if not present:
            raise UserError(f"there is no text in any domain of this stage: {', '.join(weights)}")
        # Always the domain furthest behind its share: even a small batch is close to the mixture asked for.
        self.plan = []
        total = sum(weights[domain] for domain in present)
        for row in range(1, self.CYCLE + 1):
            self.plan.append(max(present, key=lambda d: row * weights[d] / total - self.plan.count(d)))

    def window(self, row: int) -> np.ndarray:
        """Row n of the run: [T + 1], or less at the end of a stream."""
        cycle, place = divmod(row, self.CYCLE)
        domain = self.plan[place]
        before = cycle * self.plan.count(domain) + self.plan[:place].count(domain)
        windows = -(-(len(self.streams[domain]) - 1) // self.context)           # rounded up
        epoch, position = divmod(before, windows)
        order = shuffled(windows, self.seed, DOMAINS.index(domain), epoch)
        start = int(order[position]) * self.context
        return self.streams[domain][start:start + self.context + 1]

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """inputs, targets: [B, T] int64. Where a window is short, targets are -100: no loss."""
        rows = np.full((batch_size, self.context + 1), -100)                    # [B, T + 1]
        for b in range(batch_size):
            window = self.window(step * batch_size + b)
            rows[b, :len(window)] = window
        targets = rows[:, 1:]
        return np.where(targets == -100, 0, rows[:, :-1]), targets


class Packed:
    """Batches for SFT and QAT: whole conversations side by side in rows of T + 1 tokens, none cut.

    Which of them share a row is drawn once, or the number of rows would change; the order of rows anew for
    each epoch. A conversation can see those before it in its row; its <|begin_of_text|> teaches the model to
    disregard them. One longer than a row is left out, and that is said: cut, it would teach half an answer.
    """
    OPEN_ROWS = 64      # the latest rows are open to more: to try all would take quadratic time

    def __init__(self, examples: list[tuple[list[int], list[int]]], context: int, seed: int, pad_id: int):
        length = context + 1
        fitting = [example for example in examples if len(example[0]) <= length]
        self.seed, self.skipped = seed, len(examples) - len(fitting)
        said = f"{self.skipped:,} of {len(examples):,} conversations exceed a row of {length:,} tokens"
        if not fitting:
            raise UserError(f'{said}: add shorter "messages", or choose a longer context')
        if self.skipped:
            print(f"data: {said} and are left out", flush=True)
        rows = []                                                               # of (ids, mask)
        for index in shuffled(len(fitting), seed):
            ids, mask = fitting[index]
            open_rows = (row for row in rows[-self.OPEN_ROWS:] if len(row[0]) + len(ids) <= length)
            row = next(open_rows, None) or ([], [])
            if not row[0]:
                rows.append(row)
            row[0].extend(ids)
            row[1].extend(mask)
        self.ids = np.full((len(rows), length), pad_id, np.int32)               # [rows, T + 1]
        self.mask = np.zeros((len(rows), length), bool)                         # [rows, T + 1]
        for row, (ids, mask) in enumerate(rows):
            self.ids[row, :len(ids)] = ids
            self.mask[row, :len(mask)] = mask

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """inputs, targets: [B, T] int64; targets are -100, no loss, where there is no answer."""
        places = [divmod(step * batch_size + b, len(self.ids)) for b in range(batch_size)]
        rows = [shuffled(len(self.ids), self.seed, epoch)[position] for epoch, position in places]
        ids, mask = self.ids[rows].astype(np.int64), self.mask[rows]            # [B, T + 1]
        return ids[:, :-1], np.where(mask, ids, -100)[:, 1:]

# ----------------------------------------------------------------------------------------------------------
# Text larger than memory: files -> tokens on the disk -> arrays that read only what a batch asks for
#
# A folder of shards has one tokenizer (RANKS) and, for each domain, prose.bin, a plain array of tokens, file
# after file, and prose.json, written anew after each file: {"inputs": [[name, bytes], ...], "finished":
# files, "tokens", "documents", "dtype", "heldout": {hash: text}}.

RANKS = "mobilemoe.tiktoken"


def is_sharded(folder: str | Path) -> bool:
    """Did `tokenize` make this folder? Its tokenizer is written first, so even an unfinished one has it."""
    return Path(folder, RANKS).is_file()


def shard_tokenizer(out: Path, file: str | None) -> tiktoken.Encoding:
    """The tokenizer of a folder of shards. At first: the file's, or that of the default training run."""
    if not is_sharded(out):
        vocab_size = PRESETS["tiny"].vocab_size
        given = load_tokenizer_file(file) if file else learn_tokenizer(embedded_corpus(), vocab_size)
        with atomic_write(out / RANKS) as ranks:
            ranks.write(tokenizer_to_dict(given)["ranks"].encode())
    encoding = load_tokenizer_file(out / RANKS)
    if file and load_tokenizer_file(file)._mergeable_ranks != encoding._mergeable_ranks:
        raise UserError(f"{out} has another tokenizer than {file}: leave it out, or choose another --out")
    return encoding


def tokenize_files(inputs: list, domain: str, out: str | Path, tokenizer: str | None = None, workers=0):
    """Files of FORMATS, or folders of them -> shards of one domain in the folder `out`.

    The same bytes whatever the number of workers. Started again, it skips finished files. Raises UserError.
    """
    domain, out = NEAR_MISSES.get(domain, domain), Path(out)            # the paper says "web"
    if domain not in (*DOMAINS, "chat"):
        raise UserError(f"unknown domain {domain!r}: choose {', '.join(DOMAINS)}, or chat for conversations")
    files, left_out = find_files(inputs)
    out.mkdir(parents=True, exist_ok=True)
    encoding = shard_tokenizer(out, tokenizer)
    workers = workers or os.cpu_count()
    to_tokens = tokenize_chats if domain == "chat" else tokenize_documents
    to_tokens = functools.partial(to_tokens, encoding=encoding)
    sizes = [path.stat().st_size for path in files]
    index = {"inputs": [[path.name, size] for path, size in zip(files, sizes)], "finished": 0, "tokens": 0,
             "documents": 0, "dtype": to_tokens([]).dtype.name, "heldout": {}}
    begun = read_json(out / f"{domain}.json") if (out / f"{domain}.json").is_file() else index
    if begun["tokens"]:                     # finished files must be the same; those that follow may be new
        if index["inputs"][:begun["finished"]] != begun["inputs"][:begun["finished"]]:
            raise UserError(f"{domain} in {out} is of other files: give those first, or choose another --out")
        index = begun | {"inputs": index["inputs"]}
    progress = Progress(domain, sum(sizes) / 1e6, "MB")
    # Threads will do: tiktoken lets go of Python's lock while it works.
    with open(out / f"{domain}.bin", "ab") as stream, ThreadPoolExecutor(workers) as pool:
        def save():
            stream.flush()
            os.fsync(stream.fileno())       # else the index could be on the disk before the tokens it counts
            with atomic_write(out / f"{domain}.json") as file:
                file.write(json.dumps(index).encode())

        size = index["tokens"] * to_tokens([]).itemsize
        if stream.tell() < size:
            raise UserError(f"{out / domain}.json counts tokens that its .bin lacks: delete both")
        stream.truncate(size)               # what an interrupted file left behind goes
        save()                              # at once, so that nobody trains on less than all by mistake
        for number in range(index["finished"], len(files)):
            with open(files[number], "rb") as file:
                texts = (text for text, _ in read_documents(file, domain))
                training = hold_out(texts, 0.001, index["heldout"])
                while group := list(itertools.islice(training, 256 * workers)):     # all that is in memory
                    for ids in pool.map(to_tokens, [group[i:i + 64] for i in range(0, len(group), 64)]):
                        stream.write(ids)
                        index["tokens"] += len(ids)
                    index["documents"] += len(group)
                    progress.show((sum(sizes[:number]) + file.tell()) / 1e6, f"{index['tokens']:,} tokens")
            index["finished"] += 1
            save()
    kinds = Counter(path.suffix.lower() for path in files)
    print(f"{domain}: {index['tokens']:,} tokens | documents: {index['documents']:,} to train on, "
          f"{len(index['heldout'])} held out | files: {counted(kinds)} | left out: {counted(left_out)}")
    if not index["tokens"]:
        raise UserError(f"{domain} has nothing to train on: it wants two documents at least, one to hold out")


def open_shards(folder: str | Path) -> tuple[dict[str, np.ndarray], Corpus]:
    """({domain or "chat": tokens, mapped into memory, not read}, what is held out). Raises UserError."""
    streams, corpus = {}, Corpus(f"shards in {folder}")
    for path in (Path(folder, f"{domain}.json") for domain in (*DOMAINS, "chat")):
        if not path.is_file():
            continue
        index = read_json(path)
        if index["finished"] < len(index["inputs"]) or not index["tokens"]:
            raise UserError(f"{path.stem} in {folder} is unfinished: start that `data.py tokenize` again")
        try:
            tokens = path.with_suffix(".bin")
            streams[path.stem] = np.memmap(tokens, index["dtype"], "r", shape=index["tokens"])
        except (ValueError, OSError):
            raise UserError(f"{path} or its .bin is damaged: delete both, and tokenize again") from None
        if path.stem == "chat":
            corpus.sft_heldout = [conversation(text) for text in index["heldout"].values()]
        else:
            corpus.heldout[path.stem] = list(index["heldout"].values())
    return streams, corpus

# ----------------------------------------------------------------------------------------------------------
# What training needs to know


def tokenize_heldout(corpus: Corpus, encoding: tiktoken.Encoding) -> dict[str, dict]:
    """{domain: {"ids": int32 [n], "bytes" of their text, "xz": its bits per byte}} of what is held out."""
    heldout = {}
    for domain, held in corpus.heldout.items():
        if held:
            held = held[::-(-sum(map(len, held)) // HELDOUT)]           # from all over the domain
            ids = torch.from_numpy(tokenize_documents(held, encoding).astype(np.int32))
            heldout[domain] = {"ids": ids, "bytes": len("".join(held).encode()), "xz": xz_bits_per_byte(held)}
    return heldout


def prepare(folder: str | None, tokenizer_file: str | None, vocab_size: int) -> dict:
    """Corpus -> tokenizer -> token streams, as a dict that torch.save can write.

    {"shards": the folder if the training text stays on the disk, else "", "tokenizer", "train": {domain:
    ids}, "heldout": as tokenize_heldout has it, "chat": {"ids" int32, "mask" bool, "lengths" int64},
    "sft_heldout": JSON, "questions": a few of those as [text, kind, answer], "openings": of three held-out
    documents, "glance": (ids, bytes) of a little held-out text from all over the first domain}
    Without a folder it takes the embedded corpus, without a tokenizer file it learns one. Raises UserError.
    """
    shards = str(folder) if folder and is_sharded(folder) else ""
    if shards and tokenizer_file:
        raise UserError(f"{folder} holds tokens already, made with its own tokenizer: leave --tokenizer out")
    if vocab_size > 65536 and not shards and not tokenizer_file:
        raise UserError(f"a vocabulary of {vocab_size:,} is not learned from a folder: give --tokenizer FILE "
                        "(a Llama-3 tokenizer.model or any tiktoken rank file)")
    if shards:
        streams, corpus = open_shards(folder)
        encoding = load_tokenizer_file(Path(folder, RANKS))
        chat = streams.get("chat", np.zeros(0, np.uint32))
    else:
        what = folder or "documentation and source of Python, NumPy and PyTorch"
        print(f"data: reading {what}", flush=True)
        corpus = folder_corpus(folder) if folder else embedded_corpus()
        encoding = (load_tokenizer_file(tokenizer_file) if tokenizer_file else
                    learn_tokenizer(corpus, vocab_size))
        chat = tokenize_chats((json.dumps(example["messages"]) for example in corpus.sft_train), encoding)
    train = {domain: torch.from_numpy(tokenize_documents(texts, encoding))
             for domain, texts in corpus.train.items()}
    heldout = tokenize_heldout(corpus, encoding)
    ids = (chat & 0x7FFFFFFF).astype(np.int32)
    begin = encoding.encode_single_token("<|begin_of_text|>")           # no text can forge one
    starts = np.flatnonzero(ids == begin)
    chat = {"ids": ids, "mask": chat >> 31 == 1, "lengths": np.diff(starts, append=len(ids))}
    first = {example["kind"]: example for example in reversed(corpus.sft_heldout)}
    shown = [first[kind] for kind in ("chat", *SHOWN) if kind in first]
    questions = [[next(m["content"] for m in example["messages"] if m["role"] == "user"), example["kind"],
                  example["answer"]] for example in shown]
    glance = ()
    openings = []
    for domain in list(heldout)[:1]:
        ids = heldout[domain]["ids"]
        spread = [ids[start:start + 256] for start in range(0, len(ids), max(256, len(ids) // 16))]
        part = torch.cat(spread)
        glance = part, heldout[domain]["bytes"] * len(part) / len(ids)
        texts = corpus.heldout[domain]
        texts = texts[len(texts) // 6::max(1, len(texts) // 3)]
        openings = [text.split("\n")[0][:200] + "\n\n" for text in texts]
    prepared = {"shards": shards, "tokenizer": tokenizer_to_dict(encoding), "train": train,
                "heldout": heldout, "chat": {key: torch.from_numpy(x) for key, x in chat.items()},
                "sft_heldout": json.dumps(corpus.sft_heldout), "openings": openings, "glance": glance,
                "questions": questions}
    tokens = {domain: len(stream) for domain, stream in text_streams(prepared).items()}
    print(f"data: tokens: {counted(tokens)} | conversations: {len(starts):,} | {corpus.source}", flush=True)
    return prepared


def text_streams(prepared: dict) -> dict[str, np.ndarray]:
    """{domain: its tokens}, in memory, or mapped from the shards."""
    if prepared["shards"]:
        return open_shards(prepared["shards"])[0]
    return {domain: ids.numpy() for domain, ids in prepared["train"].items()}


def main() -> None:
    parser = Parser(description=__doc__)
    command = parser.add_subparsers(dest="command").add_parser("tokenize", help="files -> shards for --data")
    command.add_argument("inputs", nargs="+", help=f"{', '.join(FORMATS)} files, or folders of them")
    command.add_argument("--domain", required=True, help=f"one of {', '.join(DOMAINS)}, chat")
    command.add_argument("--out", required=True, metavar="FOLDER", help="one for all domains")
    command.add_argument("--tokenizer", metavar="FILE", help="a tiktoken rank file (that of the default run)")
    args = parser.parse_args()
    if args.command:
        return tokenize_files(args.inputs, args.domain, args.out, args.tokenizer)
    corpus = embedded_corpus()
    rows = []
    for domain in DOMAINS:
        train, heldout = ("".join(part[domain]).encode() for part in (corpus.train, corpus.heldout))
        xz = xz_bits_per_byte(corpus.heldout[domain])
        rows.append([domain, len(corpus.train[domain]), f"{len(train) / 1e6:.2f}",
                     len(corpus.heldout[domain]), f"{len(heldout) / 1e6:.2f}", f"{xz:.2f}"])
    print(markdown_table(["domain", "documents", "MB", "held out", "MB", "xz bits/byte"], rows))
    print("conversations:", counted(Counter(pair["kind"] for pair in corpus.sft_train)))
    for domain in DOMAINS:
        print(f"\n--- {domain} ---\n{random.Random(1).choice(corpus.heldout[domain])[:500]}")
    for kind, pair in {pair["kind"]: pair for pair in corpus.sft_heldout}.items():
        print(f"\n--- {kind} ---", *(f"{m['role']}: {m['content']}" for m in pair["messages"]), sep="\n")


if __name__ == "__main__":
    run_main(main)
