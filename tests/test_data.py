"""data.py: nothing held out is trained on, nothing is lost without a word, bad input gets one line."""
import ast
import base64
import functools
import gzip
import hashlib
import inspect
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import torch

import data
from common import UserError, encode_chat, tokenizer_from_dict

SAMPLE = """The quick brown fox's den; the quicker fox, the quickest.
    def quick(fox):  return fox * 1234567  # the naïve Füchse, 狐狸, 🦊🦊
aaaa aaaaaaa abab ababab \t\t\n\n\n    the  then  there  these   they'll we'll\n""" * 2
TEXTS = [f"Document {i}: {SAMPLE[i % 50:i % 90 + 50]}\n" for i in range(3000)]
CHATS = [[{"role": "user", "content": f"{i} <|begin_of_text|>?"}, {"role": "assistant", "content": f"{i}!"}]
         for i in range(300)]


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


@pytest.fixture(scope="session")
def small(rank_file):
    return data.load_tokenizer_file(rank_file)

# ----------------------------------------------------------------------------------------------------------
# The embedded corpus


def test_the_corpus_has_the_promised_size_and_share_held_out(corpus):
    assert 8e6 < sum(len(text) for texts in corpus.train.values() for text in texts) < 16e6
    for domain in data.DOMAINS:
        train, heldout = corpus.train[domain], corpus.heldout[domain]
        assert 0.02 < len(heldout) / len(train + heldout) < 0.1 and len("".join(train)) > 300_000
        assert len({*train, *heldout}) == len(train) + len(heldout)     # no document twice, on either side
    assert 5_000 <= len(corpus.sft_train) <= 10_000


def test_the_corpus_is_the_same_in_another_process(corpus):
    script = "import data, hashlib; c = repr(vars(data.embedded_corpus())); print(hashlib.sha256(c.encode()).hexdigest())"
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(data.__file__).parent)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.strip() == hashlib.sha256(repr(vars(corpus)).encode()).hexdigest()


def test_no_held_out_docstring_stands_in_any_training_text(corpus):
    """Searched for without the code that keeps them out: all of the docstring, but for white space."""
    everything = [text for documents in corpus.train.values() for text in documents]
    everything += [message["content"] for pair in corpus.sft_train for message in pair["messages"]]
    words = " ".join(everything).split()
    haystack = " ".join(words)

    def found(docstrings: list[str]) -> list[str]:
        # One can stand there whole only if its second to sixth word do. (A quote mark may precede the first.)
        starts = {text: tuple(text.split()[1:6]) for text in docstrings}
        present = set(starts.values()).intersection(zip(*(words[i:] for i in range(5))))
        return [text for text, start in starts.items() if start in present and text in haystack]

    heldout, trained = ([" ".join(document.partition("\n\n")[2].split()) for document in part["prose"]]
                        for part in (corpus.heldout, corpus.train))
    assert found(trained[::100]) == trained[::100]                      # the search finds what is there
    assert len(heldout) > 300 and found(heldout) == []


def test_the_leak_check_sees_through_layout_but_not_through_other_words():
    leaks = data.LeakCheck(["Return the sum of all the elements\nof the given array."])
    assert leaks('x = """\n    Return the sum of all the\n    elements of the given array.\n    """')
    assert leaks("Also: return. Return the sum of all the elements of the given array. Or of two.")
    assert not leaks("Return the sum of all the elements of the given list.")
    assert not leaks("Return the sum of all the elements of the given arrays.")


def test_documents_are_the_docstrings_and_signatures_of_the_living_objects(corpus):
    """`inspect` sees what Python made of the text that was only parsed here, C functions included."""
    same, signatures = [], []
    for document in corpus.train["prose"][::10] + corpus.heldout["prose"]:
        head, _, text = document.partition("\n\n")
        name, _, arguments = head.partition("(")
        path = name.split(".")
        places = [place for place in range(len(path) + 1) if ".".join(path[:place]) in sys.modules]
        if not places:                                                  # a module that nobody imported here
            continue
        home = sys.modules[".".join(path[:places[-1]])]
        living = functools.reduce(lambda owner, part: getattr(owner, part, None), path[places[-1]:], home)
        if living is not None and inspect.getdoc(living):
            same.append(text.strip()[:40] in inspect.getdoc(living))
            if inspect.isfunction(living):
                names = inspect.signature(living).parameters.keys() - {"self", "cls"}
                signatures.append(names <= set(re.findall(r"\w+", arguments)))
    assert len(same) > 500 and np.mean(same) > 0.97
    assert len(signatures) > 300 and np.mean(signatures) > 0.97


def test_names_signatures_and_docstrings_added_from_outside_are_found():
    source = '''
"""A module."""
if True:
    class A(B):
        """A class."""
        def __init__(self, size: int, *, deep: bool = False) -> None: pass
        def method(self, x=1):
            """A method."""
            def inner():
                """Nobody can call this."""
        @staticmethod
        def free(x, /, *rest, **more):
            """A static method."""
add_docstr(torch.abs, r"""
abs(input, *, out=None) -> Tensor

Absolute {{value}}.
    {input}
""".format(**common_args))
diff = _add_docstr(_C.special_diff, "Differences.")
add_newdoc("numpy._core.multiarray", "ndarray", ("shape", """The shape."""))
add_newdoc("numpy._core.multiarray", "where", "where($self, a, /)\\n--\\n\\nWhere it is.")
unrelated(1, "Not a docstring.")
'''
    found = [(thing.name + thing.signature, thing.module, thing.text.strip())
             for thing in data.find_documented(ast.parse(source), "torch.special", "", None)]
    assert found == [
        ("torch.special.A(size, *, deep=False)", "torch.special", "A class."),
        ("torch.special.A.method(x=1)", "torch.special", "A method."),
        ("torch.special.A.free(x, /, *rest, **more)", "torch.special", "A static method."),
        ("torch.abs(input, *, out=None)", "torch", "Absolute {value}."),
        ("torch.special.diff", "torch.special", "Differences."),
        ("numpy.ndarray.shape", "numpy.ndarray", "The shape."),
        ("numpy.where(a, /)", "numpy", "Where it is."),
    ]


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def program(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [child for child in body if not is_text(child) and not isinstance(child, ast.Pass)]
    return ast.dump(tree)


@pytest.mark.parametrize("name", ["heapq", "dataclasses", "typing", "turtle"])
def test_source_without_docstrings_is_the_same_program_with_its_comments(name):
    source = Path(os.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    source += '\ndef f(): "é doc"\nclass A:\n    """doc\n    more"""\n    x = "kept"; "gone"\n'
    stripped = data.without_docstrings(source, ast.parse(source))
    assert not any(map(is_text, ast.walk(ast.parse(stripped)))) and program(stripped) == program(source)
    assert "# " in stripped and stripped.endswith('def f(): pass\nclass A:\n    x = "kept"; pass\n')


def test_arithmetic_is_right_and_held_out_sums_are_never_worked(corpus):
    train, heldout = ([match.groups() for document in part["maths"] for match in
                       re.finditer(r"Problem: (.*)\nWorking: (.*)\nAnswer: (.*)\n", document)]
                      for part in (corpus.train, corpus.heldout))
    assert len(train) > 5_000 and len(heldout) > 200
    for question, steps, answer in [*train, *heldout]:
        first, second = steps.split(", ")
        assert all(len({eval(side) for side in step.split(" = ")}) == 1 for step in (first, second))
        middle = first.partition(" = ")[2]
        assert second.startswith(f"{middle} ") and second.endswith(f" = {answer}")
        numbers = re.findall(r"\d+", first.partition(" = ")[0] + second.partition(" = ")[0].removeprefix(middle))
        assert re.findall(r"\d+", question) == numbers
    steps, needed = ({step for _, steps, _ in part for step in steps.split(", ")} for part in (train, heldout))
    assert needed <= steps                      # held-out sums are new, the steps they are made of are not
    worked = {steps for _, steps, _ in train}
    assert not worked & {steps for _, steps, _ in heldout}
    answers = {pair["messages"][1]["content"] for pair in corpus.sft_train if pair["kind"] == "arithmetic"}
    assert {answer.partition(". The answer")[0] for answer in answers} <= worked


def test_questions_are_honest_short_and_held_out_by_subject(corpus):
    subjects = []
    for pairs in (corpus.sft_train, corpus.sft_heldout):
        assert {pair["kind"] for pair in pairs} == {"summary", "signature", "module", "arithmetic"}
        for pair in pairs:
            question, reply = pair["messages"]
            assert (question["role"], reply["role"]) == ("user", "assistant")
            assert pair["answer"] in reply["content"]
            assert len(question["content"]) + len(reply["content"]) < 600
        subjects.append({re.search("`(.*)`", pair["messages"][0]["content"])[1] for pair in pairs
                         if pair["kind"] in ("summary", "signature")})
    assert subjects[0] and subjects[1] and subjects[0].isdisjoint(subjects[1])


def test_the_table_says_what_a_model_has_to_beat(corpus, call, monkeypatch):
    monkeypatch.setattr(data, "embedded_corpus", lambda: corpus)
    code, out, _ = call(data.main)
    assert code == 0 and re.findall(r"^\| (\w+) .* 2\.[0-6]\d \|$", out, re.M)[0] == "prose"
    assert all(f"--- {kind} ---" in out for kind in (*data.DOMAINS, "arithmetic", "module"))
    text = corpus.heldout["code"][:5]
    if shutil.which("xz"):
        packed = subprocess.run(["xz", "-9e"], input="".join(text).encode(), capture_output=True).stdout
        size = data.xz_bits_per_byte(text) * len("".join(text).encode()) / 8
        assert size == pytest.approx(len(packed), abs=64)

# ----------------------------------------------------------------------------------------------------------
# Tokenizer


def naive_bpe(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """The definition: let tiktoken encode all of it again after each new token, take the most frequent pair."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    pieces = [piece.encode() for text in texts for piece in regex.findall(data.LLAMA3_PATTERN, text)]
    while len(ranks) < vocab_size - len(data.SPECIAL_TOKENS):
        encoding = data.make_tokenizer(ranks, "naive")
        pairs = Counter()
        for piece in pieces:
            parts = [encoding.decode_single_token_bytes(i) for i in encoding._encode_single_piece(piece)]
            pairs.update(a + b for a, b in zip(parts, parts[1:]))
        if not pairs:
            break
        ranks[min(pairs, key=lambda pair: (-pairs[pair], pair))] = len(ranks)
    return ranks


@pytest.mark.parametrize("vocab_size", [300, 10_000])           # the second asks for more than the text gives
def test_learned_ranks_are_those_of_the_naive_trainer(vocab_size):
    texts = [SAMPLE, SAMPLE.upper(), "banana bandana " * 3]
    ranks = data.train_bpe(texts, vocab_size)
    assert list(ranks.items()) == list(naive_bpe(texts, vocab_size).items())
    assert data.make_tokenizer(ranks, "test").n_vocab == (300 if vocab_size == 300 else len(ranks) + 5)


def test_text_comes_back_and_no_token_spans_two_pieces(corpus, small):
    ranks = data.train_bpe(corpus.train["knowledge"][:60], 700)
    assert len(ranks) == 695 and b" the" in ranks
    assert not [token for token in ranks if re.search(rb"[a-z][ .\n]|[0-9]{4}", token)]
    encoding = data.make_tokenizer(ranks, "test")
    for text in (SAMPLE, *corpus.heldout["prose"][:30], *corpus.heldout["code"][:3]):
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    entry = tokenizer_from_dict(json.loads(json.dumps(data.tokenizer_to_dict(encoding))))
    assert entry.encode(SAMPLE + "<|eot_id|>", allowed_special="all") == [*encoding.encode_ordinary(SAMPLE), 699]


def test_one_endless_piece_does_not_stall_the_trainer():
    ranks = data.train_bpe(["=" * 1_000_000 + "\nx== y=="], 300)       # to merge it would take hours
    assert b"==" in ranks and b"====" not in ranks


def test_special_tokens_are_where_llama_3_has_them(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)] + [i.to_bytes(3, "big") for i in range(128_000 - 256)]
    path = tmp_path / "tokenizer.model"
    path.write_text(rank_lines({token: rank for rank, token in enumerate(tokens)}) + "\n")
    llama3 = data.load_tokenizer_file(path)
    assert llama3.n_vocab == 128_256 and len(llama3._special_tokens) == 256
    named = {128_000: "begin_of_text", 128_001: "end_of_text", 128_005: "reserved_special_token_3",
             128_006: "start_header_id", 128_007: "end_header_id", 128_008: "reserved_special_token_4",
             128_009: "eot_id", 128_010: "reserved_special_token_5", 128_255: "reserved_special_token_250"}
    assert {i: llama3.decode([i]) for i in named} == {i: f"<|{name}|>" for i, name in named.items()}
    assert data.tokenize_documents(["a"], llama3).dtype == np.uint32


BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize("content, says", [
    ("", "not a whole"),
    (rank_lines(BYTES) + "garbage\n", "cannot read"),
    (rank_lines(BYTES) + "!!! 256\n", "cannot read"),
    (rank_lines(BYTES)[:-5], "cannot read"),                            # cut off in the last line
    (rank_lines(BYTES | {b"ab": 257}), "not a whole"),                  # a hole
    (rank_lines(BYTES) + "YWI= 255\n", "not a whole"),                  # a rank twice
    (rank_lines({token: rank - 1 for token, rank in BYTES.items() if rank}), "not a whole"),    # no byte 0
])
def test_a_broken_tokenizer_file_is_refused(tmp_path, content, says):
    path = tmp_path / "broken.model"
    path.write_text(content)
    with pytest.raises(UserError, match=says) as error:
        data.load_tokenizer_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_conversation_is_encoded_as_chat_and_only_the_assistants_words_are_learned(small):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"},
                {"role": "assistant", "content": " Four. "}, {"role": "user", "content": "<|eot_id|> And?"},
                {"role": "assistant", "content": "Eight."}]
    ids, mask = data.encode_example(small, messages)
    assert ids == encode_chat(small, messages, reply=False) and len(ids) == len(mask)
    assert small.decode([i for i, m in zip(ids, mask) if m]) == " Four. <|eot_id|>Eight.<|eot_id|>"
    prompt = encode_chat(small, messages[:2], reply=True)
    assert ids[:len(prompt)] == prompt and not any(mask[:len(prompt)]) and mask[len(prompt)]
    assert ids.count(small.encode_single_token("<|eot_id|>")) == len(messages)      # the user forged none


def test_encoding_a_conversation_takes_time_linear_in_its_messages(small, monkeypatch):
    encoded, encode = [], data.encode
    monkeypatch.setattr("common.encode", lambda encoding, text: encoded.append(text) or encode(encoding, text))
    data.encode_example(small, CHATS[0] * 800)
    assert len(encoded) <= 3 * 1600                                     # role, line breaks and content of each


def test_documents_begin_with_their_token_which_no_text_can_forge(small):
    docs = ["One <|begin_of_text|> two", "", "狐"]
    stream, begin = data.tokenize_documents(docs, small), small.encode_single_token("<|begin_of_text|>")
    assert stream.dtype == np.uint16 and (stream == begin).sum() == 3
    assert stream.tolist() == [token for doc in docs for token in (begin, *small.encode_ordinary(doc))]

# ----------------------------------------------------------------------------------------------------------
# Batches


def test_a_mixture_makes_every_token_a_target_once_per_epoch():
    stream = np.arange(1000, 1000 + 10 * 16 + 7, dtype=np.uint16)       # ten windows of 16 and a short one
    mixture = data.Mixture({"prose": stream}, {"prose": 1.0}, context=16, seed=3)
    epochs = []
    for epoch in range(2):
        inputs, targets = mixture.batch(epoch, 11)
        assert inputs.shape == targets.shape == (11, 16) and inputs.dtype == targets.dtype == np.int64
        real = targets != -100
        assert sorted(targets[real]) == stream[1:].tolist()
        assert (targets[real] == inputs[real] + 1).all()                # each is the token that follows
        epochs.append(targets[:, 0].tolist())
    assert epochs[0] != epochs[1] != sorted(epochs[1])                  # a new order


def test_a_mixture_has_exact_weights_and_resumes_exactly():
    tokens = {"prose": np.arange(5000), "code": np.arange(10_000, 10_700), "maths": np.arange(20_000, 21_000)}
    weights = {"prose": 0.6, "code": 0.3, "maths": 0.1, "knowledge": 0.5}       # no knowledge: the rest share
    first = data.Mixture(tokens, weights, 32, seed=5)
    batches = [first.batch(step, 8) for step in range(250)]
    for step in (249, 0, 150):                                          # resumed, and in any order
        again = data.Mixture(tokens, weights, 32, seed=5).batch(step, 8)
        assert np.array_equal(again, batches[step])
    assert not np.array_equal(data.Mixture(tokens, weights, 32, seed=6).batch(0, 8), batches[0])
    domains = np.array([inputs[:, 0] // 10_000 for inputs, _ in batches])       # [steps, B]
    assert np.bincount(domains.ravel()).tolist() == [1200, 600, 200]
    assert (abs((domains == 0).sum(1) - 8 * 0.6) <= 2).all()            # even one small batch is close to it
    with pytest.raises(UserError, match="no text"):
        data.Mixture({"prose": np.arange(1)}, {"prose": 1.0, "code": 0.5}, 16, seed=0)


def conversations(n: int) -> list[tuple[list[int], list[int]]]:
    """n conversations of distinct tokens, of 5 to 59 tokens, the latter half of each to be learned."""
    lengths = np.random.default_rng(0).integers(5, 60, n).tolist()
    return [(list(range(1000 * i + 1, 1000 * i + 1 + length)), [0] * (length // 2) + [1] * (length - length // 2))
            for i, length in enumerate(lengths)]


def test_packing_cuts_loses_and_repeats_nothing():
    examples = conversations(300)
    packed = data.Packed(examples, context=64, seed=1, pad_id=0)
    rows = len(packed.ids)
    assert packed.skipped == 0 and rows < 1.1 * sum(len(ids) for ids, _ in examples) / 65
    orders = []
    for epoch in range(2):
        inputs, targets = packed.batch(epoch, rows)                     # one batch = one epoch
        assert inputs.shape == targets.shape == (rows, 64) and inputs.dtype == targets.dtype == np.int64
        real = targets != -100
        assert sorted(targets[real]) == [token for ids, mask in examples for token, m in zip(ids, mask) if m]
        text = " ".join(map(str, inputs.ravel())) + " "                 # a row's last token may be a target only
        assert all(text.count(" ".join(map(str, ids[:-1])) + " ") == 1 for ids, _ in examples)
        assert (targets[real] == inputs[real] + 1).all()
        orders.append(inputs[:, 0].tolist())
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    again = data.Packed(examples, context=64, seed=1, pad_id=0)
    assert np.array_equal(again.batch(33, 3), packed.batch(33, 3))      # resumed


def test_a_conversation_longer_than_a_row_is_left_out_whole_and_said(capsys):
    examples = conversations(50)
    packed = data.Packed(examples, context=32, seed=1, pad_id=0)
    fitting = [mask for ids, mask in examples if len(ids) <= 33]
    assert packed.skipped == 50 - len(fitting) > 0
    assert f"{packed.skipped} of 50 conversations are longer than a row, 33 tokens" in capsys.readouterr().out
    assert (packed.batch(0, len(packed.ids))[1] != -100).sum() == sum(map(sum, fitting))
    with pytest.raises(UserError, match="50 of 50 .* longer context"):
        data.Packed(examples, context=3, seed=1, pad_id=0)

# ----------------------------------------------------------------------------------------------------------
# The reader's own text


def test_a_folder_is_read_whole_and_says_what_was_left_out(tmp_path):
    """Every document exactly once, whatever the file is called; nothing else stops the run."""
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    pages = [f"Page {i}. " + "It goes on and on. " * 250 for i in range(30)]
    write_jsonl(folder / "prose.jsonl", "text", TEXTS[:200] + TEXTS[:9])
    write_jsonl(folder / "chats.jsonl", "messages", CHATS)
    write_jsonl(folder / "Code" / "a.jsonl", "text", ["x = 1", "x = 2"])
    write_jsonl(folder / "math" / "b.jsonl.gz", "text", ["1 + 1 = 2", "1 + 2 = 3"])
    write_jsonl(folder / "code_01.jsonl", "text", ["x = 3", "x = 4"])
    write_jsonl(elsewhere / "knowledge.jsonl", "text", ["Bern is a city.", "Rome is a city."])
    for name in ("old.txt", ".cache", "runs", "mine"):
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text(f"\ufeffNotes in {name}.\r\nEnd.\r\n", encoding="utf-8")
    (folder / "mine" / "tokens.pt").touch()
    (folder / "BOOK.TXT").write_text("\n\n".join(pages))
    (folder / "._prose.jsonl").write_bytes(b"\0\5\x16\7\xff")
    (folder / "README.md").write_text("not read")
    for name, target in (("link", elsewhere), ("again", elsewhere), ("loop", folder), ("gone.txt", "nowhere")):
        (folder / name).symlink_to(target)
    corpus = data.folder_corpus(folder)
    read = {domain: sorted(corpus.train[domain] + corpus.heldout[domain]) for domain in data.DOMAINS}
    assert read["code"] == ["x = 1", "x = 2", "x = 3", "x = 4"] and read["maths"] == ["1 + 1 = 2", "1 + 2 = 3"]
    assert read["knowledge"] == ["Bern is a city.", "Rome is a city."]
    assert sorted(re.findall(r"Page \d+", "".join(read["prose"]))) == sorted(page.split(".")[0] for page in pages)
    assert [text for text in read["prose"] if "Page" not in text] == sorted([*TEXTS[:200], "Notes in old.txt.\nEnd.\n"])
    assert len(corpus.heldout["prose"]) < 30 and len(corpus.sft_train) + len(corpus.sft_heldout) == 300
    assert corpus.sft_heldout and {"kind": "chat", "messages": CHATS[0], "answer": "0!"} in corpus.sft_train + corpus.sft_heldout
    for said in ("231 prose", "300 chat", "4 code", "2 .jsonl (code)", "1 .gz (maths)", "2 .txt (prose)",
                 "2 hidden", "2 training runs", "1 .md", "1 .txt"):
        assert said in corpus.source


@pytest.mark.parametrize("path, domain", [
    ("Code/a.jsonl", "code"), ("math/b.jsonl", "maths"), ("code_01.jsonl", "code"), ("web.jsonl", "prose"),
    ("maths/prose.txt", "prose"), ("decode.txt", "prose"), ("a/knowledge-2.parquet", "knowledge"), ("x.txt", "prose"),
])
def test_a_near_miss_names_a_domain(path, domain):
    assert data.domain_of(Path(path)) == domain


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", GOOD + '{"text": "cut off\n', "a.jsonl, line 2: broken JSON"),
    ("a.jsonl", GOOD + "[" * 100_000 + "\n", "a.jsonl, line 2: "),
    ("a.jsonl", GOOD + "\n[1, 2]\n", "a.jsonl, line 3: needs"),
    ("a.jsonl", '{"text": 5}\n', "a.jsonl, line 1: needs"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "no answer"}]}\n', "a.jsonl, line 1: needs"),
    ("a.jsonl", '{"messages": [{"role": "assistant", "content": null}]}\n', "a.jsonl, line 1: needs"),
    ("a.jsonl", '{"messages": "hello"}\n', "a.jsonl, line 1: needs"),
    ("a.jsonl", GOOD + '{"text": "\\ud800"}\n', "a.jsonl, line 2: .*surrogates"),
    ("a.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}\n', "a.jsonl, line 2: .*utf-8"),
    ("a.txt", b"caf\xe9", "a.txt, line .*utf-8"),
    ("a.jsonl.gz", GOOD, "a.jsonl.gz, line .*gzip"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode() * 1000)[:-12], "a.jsonl.gz, line "),
    ("a.parquet", "PAR1", "a.parquet, line 0: "),
    ("a.txt", "", "two documents"),
    ("a.jsonl", GOOD, "two documents of text in one domain: documents: 1 prose"),
    ("a.jsonl", json.dumps({"messages": CHATS[0]}), "two documents of text .* 1 chat"),
    ("a.md", "no such kind of file", "left out: 1 .md"),
])
def test_bad_text_gets_one_line_with_file_and_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says) as error:
        data.folder_corpus(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no folder .*nowhere"):
        data.folder_corpus(tmp_path / "nowhere")


def test_parquet_is_read_like_jsonl(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for key, values in (("text", TEXTS[:700]), ("messages", CHATS)):
        table = arrow.table({"number": list(range(len(values))), key: values})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=200)
        with open(tmp_path / "a.parquet", "rb") as a, open(write_jsonl(tmp_path / "a.jsonl", key, values), "rb") as b:
            assert list(data.read_documents(a)) == list(data.read_documents(b)) != []


def test_one_line_of_a_megabyte_trains(tmp_path, rank_file):
    text = " ".join(f"word{i}" for i in range(120_000))
    (tmp_path / "a.txt").write_text(text)
    corpus = data.folder_corpus(tmp_path)
    assert sorted(" ".join(corpus.train["prose"] + corpus.heldout["prose"]).split()) == sorted(text.split())
    data.tokenize_files([tmp_path], "prose", tmp_path / "out", rank_file)
    streams, held = data.open_shards(tmp_path / "out")
    assert len(streams["prose"]) > 100_000 and held.heldout["prose"]

# ----------------------------------------------------------------------------------------------------------
# Shards


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_are_the_documents_in_order_whatever_the_workers(tmp_path, small, rank_file):
    files = [write_jsonl(tmp_path / "a.jsonl", "text", TEXTS[:2000]),
             write_jsonl(tmp_path / "b.jsonl.gz", "text", TEXTS[2000:])]
    for workers in (1, 3):
        data.tokenize_files(files, "web", tmp_path / f"out{workers}", rank_file, workers)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    streams, corpus = data.open_shards(tmp_path / "out1")
    held = corpus.heldout["prose"]
    assert TEXTS[0] in held and 1 < len(held) < 12                      # one in a thousand, and the first
    expected = data.tokenize_documents([text for text in TEXTS if text not in held], small)
    assert np.array_equal(streams["prose"], expected)
    assert isinstance(streams["prose"], np.memmap)                      # on the disk, not in memory


def test_tokenize_goes_on_after_the_last_finished_file(tmp_path, rank_file, call):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", "text", TEXTS[i::3]) for i in range(3)]
    data.tokenize_files(files, "prose", tmp_path / "whole", rank_file, 2)
    good, out = files[1].read_bytes(), tmp_path / "out"
    files[1].write_bytes(good[:-20])
    with pytest.raises(UserError, match="1.jsonl, line 1000: broken JSON"):
        data.tokenize_files(files, "prose", out, rank_file, 2)
    with pytest.raises(UserError, match="1.jsonl, line 1000|other files"):
        data.tokenize_files(files, "prose", out, rank_file, 2)
    with pytest.raises(UserError, match="unfinished"):
        data.open_shards(out)
    with open(out / "prose.bin", "ab") as stream:                       # as if killed while it wrote
        stream.write(b"half a tok")
    files[0].write_bytes(b"x" * files[0].stat().st_size)                # finished: nobody reads it again
    files[1].write_bytes(good)
