"""data.py: nothing held out is trained on, nothing is lost without a word, bad input gets one line."""
import ast
import base64
import gzip
import inspect
import json
import os
import pydoc
import re
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import torch

import corpus as corpus_of
import data
from common import UserError, encode_chat

SAMPLE = """The quick brown fox's den; the quicker fox, the quickest.
    def quick(fox):  return fox * 1234567  # the naïve Füchse, 狐狸, 🦊🦊
aaaa aaaaaaa abab ababab \t\t\n\n\n    the  then  there  these   they'll we'll\n""" * 2
TEXTS = [f"Document {i}: {SAMPLE[i % 50:i % 90 + 50]}\n" for i in range(3000)]
CHATS = [[{"role": "user", "content": f"{i} <|begin_of_text|>?"}, {"role": "assistant", "content": f"{i}!"}]
         for i in range(300)]
BYTES = {bytes([byte]): byte for byte in range(256)}
HOME = Path(data.__file__).parent


def write_jsonl(path: Path, key: str, values: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({key: value}) + "\n" for value in values)
    return path


def rank_lines(ranks: dict[bytes, int]) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


@pytest.fixture(scope="session")
def corpus() -> data.Corpus:
    return data.embedded_corpus()


@pytest.fixture(scope="session")
def rank_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "given.tiktoken"
    path.write_text(rank_lines(data.train_bpe([SAMPLE], 400)))
    return path

# ----------------------------------------------------------------------------------- The embedded corpus


def test_the_corpus_has_the_promised_size_and_is_the_same_in_another_process(corpus):
    for domain in data.DOMAINS:
        train, heldout = corpus.train[domain], corpus.heldout[domain]
        assert 0.02 < len(heldout) / len(train + heldout) < 0.1 and len("".join(train)) > 300_000
        assert len({*train, *heldout}) == len(train) + len(heldout)     # no document twice, on either side
    assert 8e6 < len("".join(sum(corpus.train.values(), []))) < 16e6 and len(corpus.sft_train) >= 5000
    script = "import data, zlib; print(zlib.crc32(repr(vars(data.embedded_corpus())).encode()))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    said = subprocess.check_output([sys.executable, "-c", script], cwd=HOME, env=environment)
    assert int(said) == zlib.crc32(repr(vars(corpus)).encode())


def test_no_held_out_docstring_stands_in_any_training_text(corpus):
    """Searched for without the code that keeps them out: all of the docstring, but for white space."""
    trained = sum(corpus.train.values(), [])
    trained += [message["content"] for pair in corpus.sft_train for message in pair["messages"]]
    haystack = " ".join(" ".join(trained).split()).encode()

    def found(documents: list[str]) -> int:
        texts = [" ".join(document.partition("\n\n")[2].split()) for document in documents]
        return sum(text.encode() in haystack for text in texts)

    assert found(corpus.train["prose"][:50]) == 50                      # the search finds what is there
    assert len(corpus.heldout["prose"]) > 300 and found(corpus.heldout["prose"]) == 0
    leaks = corpus_of.LeakCheck(["Return the sum of all the elements\nof the given array."])
    assert leaks('x = """\n    Return the sum of all the\n    elements of the given array.\n    """')
    assert not leaks("Return the sum of all the elements of the given arrays.")


def test_documents_are_the_docstrings_and_signatures_of_the_living_objects(corpus):
    """`inspect` sees what Python made of the text that was only parsed here, C functions included."""
    same, signatures = [], []
    for document in corpus.train["prose"] + corpus.heldout["prose"]:
        name, arguments, text = re.match(r"([\w.]+)(.*)\n\n((?s:.*))", document).groups()
        if re.match(r"(numpy\.(linalg|ndarray)|torch\.(nn|Tensor)|statistics|argparse)\.(?!.*\b_)", name):
            living = pydoc.locate(name)
            same.append(text.strip()[:40] in (inspect.getdoc(living) or ""))
            if inspect.isfunction(living):
                names = inspect.signature(living).parameters.keys() - {"self", "cls"}
                signatures.append(names <= set(re.findall(r"\w+", arguments)))
    assert len(same) > 500 and np.mean(same) > 0.95
    assert len(signatures) > 300 and np.mean(signatures) > 0.95


@pytest.mark.parametrize("name", ["heapq", "dataclasses", "typing", "turtle"])
def test_source_without_docstrings_is_the_same_program_with_its_comments(name):
    def program(source: str) -> str:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                text = re.compile(r"Pass|Expr\(value=Constant\(value=['\"]").match
                node.body = [child for child in body if not text(ast.dump(child))]
        return ast.dump(tree)

    source = Path(os.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    source += '\ndef f(): "é doc"\nclass A:\n    """doc\n    more"""\n    x = "kept"; "gone"\n'
    stripped = corpus_of.without_docstrings(source, ast.parse(source))
    assert program(stripped) == program(source) and "# " in stripped
    assert stripped.endswith('def f(): pass\nclass A:\n    x = "kept"; pass\n')


def test_the_table_says_what_a_model_has_to_beat(corpus, call, monkeypatch):
    monkeypatch.setattr(data, "embedded_corpus", lambda: corpus)
    code, out, _ = call(data.main)
    assert code == 0 and re.search(r"^\| prose .* 2\.[0-6]\d \|$", out, re.M) and "--- module of ---" in out

# ---------------------------------------------------------------------------------------------- Tokenizer


def naive_bpe(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """The definition: after each new token let tiktoken encode all again, take the most frequent pair."""
    ranks = dict(BYTES)
    pieces = [piece.encode() for text in texts for piece in regex.findall(data.LLAMA3_PATTERN, text)]
    while len(ranks) < vocab_size - len(data.SPECIAL_TOKENS):
        encoding = data.make_tokenizer(ranks, "naive")
        encoded = [encoding.decode_tokens_bytes(encoding._encode_single_piece(piece)) for piece in pieces]
        pairs = Counter(a + b for parts in encoded for a, b in zip(parts, parts[1:]))
        if not pairs:
            break
        ranks[min(pairs, key=lambda pair: (-pairs[pair], pair))] = len(ranks)
    return ranks


@pytest.mark.parametrize("vocab_size", [300, 10_000])           # the second asks for more than the text gives
def test_learned_ranks_are_those_of_a_naive_trainer_around_tiktoken(vocab_size):
    texts = [SAMPLE, SAMPLE.upper(), "banana bandana " * 3]
    ranks = data.train_bpe([*texts, "=" * 1_000_000], vocab_size)       # would take hours: left out
    assert list(ranks.items()) == list(naive_bpe(texts, vocab_size).items())
    assert data.make_tokenizer(ranks, "test").n_vocab == min(vocab_size, len(ranks) + 5)


def test_special_tokens_are_where_llama_3_has_them(tmp_path):
    tokens = [*BYTES, *(i.to_bytes(3, "big") for i in range(128_000 - 256))]
    path = tmp_path / "tokenizer.model"
    path.write_text(rank_lines({token: rank for rank, token in enumerate(tokens)}) + "\n")
    llama3 = data.load_tokenizer_file(path)
    names = {128_000: "begin_of_text", 128_001: "end_of_text", 128_005: "reserved_special_token_3",
             128_006: "start_header_id", 128_007: "end_header_id", 128_008: "reserved_special_token_4",
             128_009: "eot_id", 128_010: "reserved_special_token_5", 128_255: "reserved_special_token_250"}
    assert {i: llama3.decode([i]) for i in names} == {i: f"<|{name}|>" for i, name in names.items()}
    assert llama3.n_vocab == 128_256 and data.tokenize_documents(["a"], llama3).dtype == np.uint32


@pytest.mark.parametrize("content", [
    "", rank_lines(BYTES) + "garbage\n", rank_lines(BYTES) + "!!! 256\n", rank_lines(BYTES)[:-5],
    rank_lines(BYTES | {b"ab": 257}), rank_lines(BYTES) + "YWI= 255\n",         # a hole, a rank twice
    rank_lines({bytes([byte]): byte - 1 for byte in range(1, 256)})])           # no byte 0
def test_a_broken_tokenizer_file_is_refused(tmp_path, content):
    (tmp_path / "broken.model").write_text(content)
    with pytest.raises(UserError, match=r"broken\.model.*(base64|is not a whole rank file)"):
        data.load_tokenizer_file(tmp_path / "broken.model")


def test_only_the_assistants_words_are_learned_and_nobody_can_forge_a_token(rank_file, monkeypatch):
    small, encode, encoded = data.load_tokenizer_file(rank_file), data.encode, []
    said = [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", " Four. "),
            ("user", "<|eot_id|> And?"), ("assistant", "Eight.")]
    messages = [{"role": role, "content": content} for role, content in said]
    ids, mask = data.encode_example(small, messages)
    assert ids == encode_chat(small, messages, reply=False) and len(ids) == len(mask)
    assert small.decode([i for i, m in zip(ids, mask) if m]) == " Four. <|eot_id|>Eight.<|eot_id|>"
    prompt = encode_chat(small, messages[:2], reply=True)
    assert ids[:len(prompt)] == prompt and mask[:len(prompt) + 1] == [0] * len(prompt) + [1]
    begin = small.encode_single_token("<|begin_of_text|>")
    texts = [begin, *small.encode("<|begin_of_text|>", disallowed_special=()), begin, *small.encode("狐")]
    assert data.tokenize_documents(["<|begin_of_text|>", "狐"], small).tolist() == texts
    monkeypatch.setattr("common.encode", lambda *given: encoded.append(given) or encode(*given))
    data.encode_example(small, messages * 400)
    assert len(encoded) == 1 + 2 * 2000         # linear in messages: line breaks, then role and content

# ------------------------------------------------------------------------------------------------ Batches


def test_a_mixture_makes_every_token_a_target_once_per_epoch():
    stream = np.arange(1000, 1000 + 10 * 16 + 7, dtype=np.uint16)       # ten windows of 16 and a short one
    mixture = data.Mixture({"prose": stream}, {"prose": 1.0}, context=16, seed=3)
    (inputs, targets), (_, second) = mixture.batch(0, 11), mixture.batch(1, 11)
    real = targets != -100
    assert sorted(targets[real]) == sorted(second[second != -100]) == stream[1:].tolist()
    assert (targets[real] == inputs[real] + 1).all()                    # each is the token that follows
    assert targets[:, 0].tolist() != second[:, 0].tolist() != sorted(second[:, 0])      # a new order


def test_a_mixture_has_exact_weights_and_resumes_exactly():
    tokens = {"prose": np.arange(5000), "code": np.arange(10_000, 10_700), "maths": np.arange(20_000, 21_000)}
    weights = {"prose": 0.6, "code": 0.3, "maths": 0.1, "knowledge": 0.5}       # no knowledge: the rest share
    first = data.Mixture(tokens, weights, 32, seed=5)
    batches = [first.batch(step, 8) for step in range(250)]
    for step in (249, 0, 150):                                          # resumed, and in any order
        assert np.array_equal(data.Mixture(tokens, weights, 32, seed=5).batch(step, 8), batches[step])
    assert not np.array_equal(data.Mixture(tokens, weights, 32, seed=6).batch(0, 8), batches[0])
    domains = np.array([inputs[:, 0] // 10_000 for inputs, _ in batches])       # [steps, B]
    assert np.bincount(domains.ravel()).tolist() == [1200, 600, 200]
    assert (abs((domains == 0).sum(1) - 8 * 0.6) <= 2).all()            # even one small batch is close to it


def test_packing_cuts_and_repeats_nothing_and_says_what_it_leaves_out(capsys):
    lengths = [5 + 11 * i % 55 for i in range(300)]                     # every token is another one
    examples = [(list(range(100 * i + 1, 100 * i + 1 + n)), [0] * (n // 2) + [1] * (n - n // 2))
                for i, n in enumerate(lengths)]
    packed = data.Packed(examples, context=64, seed=1, pad_id=0)
    rows = len(packed.ids)
    assert packed.skipped == 0 and rows < 1.1 * sum(lengths) / 65
    (inputs, targets), (second, _) = packed.batch(0, rows), packed.batch(1, rows)       # an epoch each
    real = targets != -100
    assert sorted(targets[real]) == [i for ids, mask in examples for i, learned in zip(ids, mask) if learned]
    assert (targets[real] == inputs[real] + 1).all()
    text = " ".join(map(str, inputs.ravel()))                           # a row's last token is a target only
    assert all(text.count(" ".join(map(str, ids[:-1]))) == 1 for ids, _ in examples)
    assert inputs[:, 0].tolist() != second[:, 0].tolist() and sorted(inputs[:, 0]) == sorted(second[:, 0])
    assert np.array_equal(data.Packed(examples, 64, seed=1, pad_id=0).batch(33, 3), packed.batch(33, 3))
    short = data.Packed(examples, context=32, seed=1, pad_id=0)         # rows of 33 tokens
    assert short.mask.sum() == sum(sum(mask) for ids, mask in examples if len(ids) <= 33)
    left_out = sum(n > 33 for n in lengths)
    assert f"{left_out} of 300 conversations exceed a row of 33 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="300 of 300 .* longer context"):
        data.Packed(examples, context=3, seed=1, pad_id=0)

# ---------------------------------------------------------------------------------- The reader's own text


def test_a_folder_is_read_whole_and_says_what_was_left_out(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write_jsonl(folder / "prose.jsonl", "text", TEXTS[:200] + TEXTS[:9])
    write_jsonl(folder / "chats.jsonl", "messages", CHATS)
    write_jsonl(folder / "Code" / "a.jsonl", "text", ["x = 1", "x = 2"])
    write_jsonl(folder / "code_01.jsonl", "text", ["x = 3"])
    write_jsonl(folder / "math" / "b.jsonl.gz", "text", ["1 + 1 = 2"])
    for name in ("old.txt", ".cache", "runs", "mine"):
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_bytes(f"\ufeffIn {name}.\r\nEnd.\r\n".encode())
    (folder / "mine" / "tokens.pt").touch()
    pages = [f"Page {i}. " + "It goes on. " * 350 + "\n" for i in range(30)]
    (folder / "BOOK.TXT").write_text("\n".join(pages))
    (folder / "._prose.jsonl").write_bytes(b"\0\5\x16\7\xff")
    (folder / "README.md").write_text("not read")
    elsewhere.mkdir()
    parquet.write_table(arrow.table({"n": [1, 2], "text": ["Bern", "Rome"]}), elsewhere / "knowledge.parquet")
    links = {"link": elsewhere, "again": elsewhere, "loop": folder, "gone.txt": "nowhere"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    corpus = data.folder_corpus(folder)
    prose, *others = (sorted(corpus.train[domain] + corpus.heldout[domain]) for domain in data.DOMAINS)
    assert prose == sorted([*TEXTS[:200], "In old.txt.\nEnd.\n", *pages])       # and no document twice
    assert others == [["x = 1", "x = 2", "x = 3"], ["Bern", "Rome"], ["1 + 1 = 2"]]    # one holds out none
    assert len(corpus.sft_train) + len(corpus.sft_heldout) == 300 and 0 < len(corpus.sft_heldout) < 30
    for said in ("231 prose", "300 chat", "3 code", "2 .jsonl (code)", "1 .gz (maths)", "2 .txt (prose)",
                 "1 .parquet (knowledge)", "2 hidden", "2 training runs", "1 .md", "1 .txt"):
        assert re.search(rf"[ :]{re.escape(said)}(,| \||$)", corpus.source), corpus.source
    paths = ["a/web.jsonl", "maths/prose.txt", "decode.txt", "mathematics-2.parquet"]
    assert [data.domain_of(Path(path)) for path in paths] == ["prose", "prose", "prose", "maths"]


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", GOOD + '{"text": "cut off\n', "a.jsonl, line 2: broken JSON"),
    ("a.jsonl", GOOD + "[" * 100_000 + "\n", "a.jsonl, line 2: "),
    ("a.jsonl", GOOD + "\n[1, 2]\n", "a.jsonl, line 3: needs"),
    ("a.jsonl", '{"text": 5}\n', "a.jsonl, line 1: needs"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "no answer"}]}\n', "a.jsonl, line 1: needs"),
    ("a.jsonl", '{"messages": [{"role": "assistant", "content": null}]}\n', "a.jsonl, line 1: needs"),
    ("a.jsonl", GOOD + '{"text": "\\ud800"}\n', "a.jsonl, line 2: .*surrogates"),       # half a character
    ("a.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}\n', "a.jsonl, line 2: .*utf-8"),
    ("c.jsonl", '{"messages": [{"role": "assistant", "content": "\\ud800"}]}\n', "line 1: .*surrogates"),
    ("a.txt", b"word\n" * 2500 + b"caf\xe9", "a.txt, line 2501: .*utf-8"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode() * 1000)[:-12], "a.jsonl.gz, line "),
    ("a.parquet", "PAR1", "a.parquet, line 0: "),
    ("a.jsonl", json.dumps({"messages": CHATS[0]}), "two documents in one domain.* 1 chat"),
    ("a.md", "no such kind of file", "two documents .* left out: 1 .md"),
])
def test_bad_text_gets_one_line_with_file_and_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says) as error:
        data.folder_corpus(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [0, 8, 45])      # of 8 and 45 the hash would hold out both
def test_of_two_documents_one_is_trained_on_and_one_held_out(tmp_path, number):
    write_jsonl(tmp_path / "a.jsonl", "text", [f"First {number}.", f"Second {number}."])
    corpus = data.folder_corpus(tmp_path)
    assert len(corpus.train["prose"]) == len(corpus.heldout["prose"]) == 1


def test_one_line_of_a_megabyte_trains(tmp_path, rank_file):
    words = [f"word{i:06}" for i in range(110_000)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    corpus = data.folder_corpus(tmp_path)
    assert sorted(" ".join(corpus.train["prose"] + corpus.heldout["prose"]).split()) == words
    data.tokenize_files([tmp_path], "prose", tmp_path / "out", rank_file)
    assert len(data.open_shards(tmp_path / "out")[0]["prose"]) > 300_000

# ------------------------------------------------------------------------------------------------- Shards


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_are_the_documents_in_order_whatever_the_workers(tmp_path, rank_file):
    files = [write_jsonl(tmp_path / "a.jsonl", "text", TEXTS[:2000]),
             write_jsonl(tmp_path / "b.jsonl.gz", "text", TEXTS[2000:])]
    for workers in (1, 3):
        data.tokenize_files(files, "web", tmp_path / f"out{workers}", rank_file, workers)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    streams, corpus = data.open_shards(tmp_path / "out1")
    held = corpus.heldout["prose"]
    assert TEXTS[0] in held and 1 < len(held) < 12                      # one in a thousand, and the first
    expected = [text for text in TEXTS if text not in held]
    expected = data.tokenize_documents(expected, data.load_tokenizer_file(rank_file))
    assert np.array_equal(streams["prose"], expected)
    assert isinstance(streams["prose"], np.memmap)                      # on the disk, not in memory


def test_tokenize_goes_on_after_the_last_finished_file(tmp_path, rank_file):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", "text", TEXTS[i::2]) for i in range(2)]
    data.tokenize_files(files, "prose", tmp_path / "whole", rank_file)
    out, good = tmp_path / "out", [path.read_bytes() for path in files]
    for broken in (0, 1):
        files[broken].write_bytes(good[broken][:-3] + b"\n")            # no closing brace; mending adds bytes
        with pytest.raises(UserError, match=f"{broken}.jsonl, line 1500: broken JSON"):
            data.tokenize_files(files, "prose", out, rank_file)
        with pytest.raises(UserError, match="prose .* unfinished"):     # though there is no index yet
            data.open_shards(out)
        files[broken].write_bytes(good[broken])
    with open(out / "prose.bin", "ab") as stream:
        stream.write(b"half a tok")                                     # as if killed while it wrote
    files[0].write_bytes(b"x" * len(good[0]))                           # finished: nobody reads it again
    data.tokenize_files(files, "prose", out, rank_file)
    assert contents(out) == contents(tmp_path / "whole")


def test_tokenize_refuses_what_does_not_fit_what_is_there(tmp_path, refused, rank_file):
    path, other = (write_jsonl(tmp_path / name, "text", TEXTS[:100]) for name in ("a.jsonl", "b.jsonl"))
    (tmp_path / "other").write_text(rank_lines(BYTES))
    out = tmp_path / "out"

    def says(path: Path, domain: str = "prose", ranks: Path = rank_file) -> str:
        return refused(data.main, "tokenize", path, "--domain", domain, "--out", out, "--tokenizer", ranks)

    assert "unknown domain 'news'" in says(path, "news") and "no file or folder" in says(tmp_path / "c.txt")
    assert "a.jsonl, line 1: needs" in says(path, "chat")
    assert "nothing to train on" in says(tmp_path / "other")            # the right files still may
    data.tokenize_files([path], "prose", out, rank_file)
    assert "of other files" in says(other) and "another tokenizer" in says(path, "code", tmp_path / "other")
    index = (out / "prose.json").read_text()
    for damage in (lambda: os.truncate(out / "prose.bin", 100), (out / "prose.bin").unlink,
                   lambda: (out / "prose.json").write_text(index[:20])):
        damage()
        with pytest.raises(UserError, match="prose.json"):
            data.open_shards(out)
        assert "prose.json" in says(path)                               # and no zeros where tokens were


def test_no_text_is_lost_where_more_is_held_out_than_is_measured(tmp_path):
    texts = [f"Document {n}. " + "word " * 400 for n in range(2000)]       # 4 MB, of which 5 % are 200 kB
    write_jsonl(tmp_path / "prose.jsonl", "text", texts)
    corpus = data.folder_corpus(tmp_path)
    train, heldout = corpus.train["prose"], corpus.heldout["prose"]
    assert sum(map(len, heldout)) <= data.HELDOUT and sorted(train + heldout) == sorted(texts)


def test_the_default_tokenizer_is_learned_once_and_kept(tmp_path, monkeypatch, call):
    corpus, calls = data.Corpus("test"), []
    corpus.train["prose"] = TEXTS[:50]
    monkeypatch.setattr(data, "embedded_corpus", lambda: calls.append(1) or corpus)
    path = write_jsonl(tmp_path / "a.jsonl", "text", TEXTS[:100])
    for domain in ("math", "code", "code"):
        code, said, _ = call(data.main, "tokenize", path, "--domain", domain, "--out", tmp_path / "out")
        assert code == 0 and "99 to train on, 1 held out | files: 1 .jsonl | left out: none" in said
    assert calls == [1] and list(data.open_shards(tmp_path / "out")[0]) == ["code", "maths"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_files(tmp_path, rank_file):
    pytest.importorskip("resource")
    script = """import resource, sys, data
data.tokenize_files(sys.argv[1:2], "prose", sys.argv[2], sys.argv[3], 2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    peaks = []
    for times in (10, 100):                                             # 4 MB and 40 MB
        path = write_jsonl(tmp_path / f"{times}.jsonl", "text", TEXTS * times)
        command = [sys.executable, "-c", script, path, tmp_path / str(times), rank_file]
        peaks.append(int(subprocess.check_output(command, cwd=HOME).split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 60 and peaks[1] < 1000, peaks           # MB


def test_prepare_gives_the_same_from_text_and_from_shards(tmp_path, rank_file):
    texts = [text for text in TEXTS[:500] if not corpus_of.held_out(text)]   # 5 and 0.1 %
    chats = [chat for chat in CHATS if not corpus_of.held_out(json.dumps(chat))]
    for domain, key, values in (("prose", "text", texts), ("chat", "messages", chats)):
        path = write_jsonl(tmp_path / "text" / f"{domain}.jsonl", key, values)
        data.tokenize_files([path], domain, tmp_path / "shards", rank_file)
    text = data.prepare(str(tmp_path / "text"), rank_file, 400)
    shards = data.prepare(str(tmp_path / "shards"), None, 400)
    assert np.array_equal(*(data.text_streams(prepared)["prose"] for prepared in (text, shards)))
    for key in ("chat", "heldout", "glance"):
        torch.testing.assert_close(text[key], shards[key], rtol=0, atol=0)
    assert all(text[key] == shards[key] for key in ("sft_heldout", "questions", "openings"))
    assert text["questions"][0][:2] == [chats[0][0]["content"], "chat"]
    assert len(text["chat"]["lengths"]) == len(chats) - 1
    assert text["heldout"]["prose"]["xz"] == data.xz_bits_per_byte(texts[:1])
    torch.save(text, tmp_path / "tokens.pt")
    assert torch.load(tmp_path / "tokens.pt", weights_only=True).keys() == shards.keys() == text.keys()
