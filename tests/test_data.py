"""data.py: nothing held out is trained on, no token is lost or repeated in batches, bad input gets one line."""

import ast
import base64
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex

import data
from mobilemoe import UserError, encode_chat, tokenizer_from_dict

ROOT = Path(data.__file__).parent


@pytest.fixture(scope="module")
def other_process():
    """A second scan, of another hash seed, beside the first one: half a minute becomes a quarter."""
    script = "import data, hashlib; print(hashlib.sha256(repr(data.embedded_corpus()).encode()).hexdigest())"
    environment = dict(os.environ, PYTHONHASHSEED="7", PYTHONPATH=str(ROOT))
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield process


@pytest.fixture(scope="module")
def corpus(other_process) -> data.Corpus:
    return data.embedded_corpus()


@pytest.fixture(scope="module")
def encoding(corpus):
    return data.make_tokenizer(data.train_bpe(corpus.train["knowledge"][:60] + corpus.train["maths"][:20], 700), "test")


def flat(text: str) -> str:
    return " ".join(text.split())


# ----------------------------------------------------------------------------------------------------------------------
# The embedded corpus


def test_corpus_has_the_promised_size_and_share_held_out(corpus):
    size = {domain: sum(map(len, corpus.train[domain])) / 1e6 for domain in data.DOMAINS}
    assert 8 < sum(size.values()) < 16 and all(megabytes > 0.3 for megabytes in size.values())
    for domain in data.DOMAINS:
        train, heldout = corpus.train[domain], corpus.heldout[domain]
        assert 0.02 < len(heldout) / len(train + heldout) < 0.1
        assert len(set(train + heldout)) == len(train) + len(heldout)   # no document twice, on either side
    assert 5_000 <= len(corpus.sft_train) <= 10_000


def test_no_held_out_docstring_stands_in_any_training_text(corpus):
    """Searched for without the code that keeps them out: all of the docstring, but for white space."""
    everything = [text for documents in corpus.train.values() for text in documents]
    everything += [message["content"] for pair in corpus.sft_train for message in pair["messages"]]
    haystack = flat("\n".join(everything))
    words = haystack.split()

    def found(docstrings: list[str]) -> list[str]:
        # Only one whose second to sixth word stand somewhere can stand there whole (the first may follow a quote mark).
        starts = {text: tuple(text.split()[1:6]) for text in docstrings}
        wanted = set(starts.values())
        present = {start for start in zip(*(words[i:] for i in range(5))) if start in wanted}
        return [text for text, start in starts.items() if start in present and text in haystack]

    heldout, trained = ([flat(document.partition("\n\n")[2]) for document in part["prose"]]
                        for part in (corpus.heldout, corpus.train))
    assert found(trained[::100]) == trained[::100]                      # the search finds what is there
    assert len(heldout) > 300 and min(map(len, heldout)) > 15
    assert found(heldout) == []


def test_leak_check_sees_through_layout():
    leaks = data.LeakCheck(["Return the sum of all the elements\nof the given array."])
    assert leaks('x = """\n    Return the sum of all the\n    elements of the given array.\n    """')
    assert leaks("Also: return. Return the sum of all the elements of the given array. Or of two.")
    assert not leaks("Return the sum of all the elements of the given list.")
    assert not leaks("Return the sum of all the elements of the given arrays.")


def test_corpus_is_the_same_in_another_process(corpus, other_process):
    output, _ = other_process.communicate(timeout=120)
    assert output.strip() == hashlib.sha256(repr(corpus).encode()).hexdigest()


def test_documents_begin_with_name_and_signature(corpus):
    documents = corpus.train["prose"] + corpus.heldout["prose"]
    names = {document.partition("\n")[0]: document for document in documents}
    assert "Matrix or vector norm." in names["numpy.linalg.norm(x, ord=None, axis=None, keepdims=False)"]
    assert any(name.startswith("heapq.merge(*iterables") for name in names)
    assert any(name.startswith("torch.nn.modules.linear.Linear(in_features, out_features") for name in names)
    assert any(name.startswith("torch.Tensor.new_full(size, fill_value") for name in names)     # from add_docstr


def test_find_documented_names_signatures_and_added_docstrings():
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
    found = [(t.name + t.signature, t.module, t.text.strip()) for t in
             data.find_documented(ast.parse(source), "torch.special", source)]
    assert found == [
        ("torch.special", "torch.special", "A module."),
        ("torch.special.A(size, *, deep=False)", "torch.special", "A class."),
        ("torch.special.A.method(x=1)", "torch.special", "A method."),
        ("torch.special.A.free(x, /, *rest, **more)", "torch.special", "A static method."),
        ("torch.abs(input, *, out=None)", "torch", "Absolute {value}."),
        ("torch.special.diff", "torch.special", "Differences."),
        ("numpy.ndarray.shape", "numpy.ndarray", "The shape."),
        ("numpy.where(a, /)", "numpy", "Where it is."),
    ]


@pytest.mark.parametrize("name", ["heapq", "dataclasses", "typing", "turtle"])
def test_source_without_docstrings_is_the_same_program(name):
    class Strip(ast.NodeTransformer):
        def generic_visit(self, node):
            super().generic_visit(node)
            if isinstance(body := getattr(node, "body", None), list):
                kept = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
                                                and isinstance(n.value.value, str))]
                node.body = kept or [ast.Pass()]
            return node

    source = Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text(encoding="utf-8")
    stripped = data.without_docstrings(source, ast.parse(source))
    assert ast.dump(ast.parse(stripped)) == ast.dump(Strip().visit(ast.parse(source))) != ast.dump(ast.parse(source))
    assert "# " in stripped                                             # comments stay


def test_without_docstrings_in_tight_places():
    source = ('def f(): "é doc"\nclass A:\n    """doc\n    more"""\n    x = "kept"; "gone"\n'
              '    def g(self):\n        "doc"\n')
    stripped = data.without_docstrings(source, ast.parse(source))
    assert stripped == 'def f(): pass\nclass A:\n    x = "kept"; pass\n    def g(self):\n        pass\n'


def test_arithmetic_is_right_and_held_out_problems_are_never_worked(corpus):
    train, heldout = ({match[1]: match.groups() for document in part["maths"] for match in
                       re.finditer(r"Problem: (.*)\nWorking: (.*)\nAnswer: (.*)\n", document)}
                      for part in (corpus.train, corpus.heldout))
    assert len(train) > 5_000 and len(heldout) > 300
    for question, steps, answer in [*train.values(), *heldout.values()]:
        if "x" in question:
            left, right = question.replace("x", answer).split(" = ")
            assert eval(left) == eval(right)
        else:
            assert eval(question) == int(answer)
        for step in steps.split(", "):
            assert len({eval(side.replace("x", answer)) for side in step.split(" = ")}) == 1
        assert steps.endswith(f" = {answer}")
    worked = {side for _, steps, _ in train.values() for step in steps.split(", ") for side in step.split(" = ")}
    assert not heldout.keys() & (train.keys() | worked)
    replies = " ".join(pair["messages"][1]["content"] for pair in corpus.sft_train if pair["kind"] == "arithmetic")
    assert not heldout.keys() & set(re.split(" = |, |[.] ", replies))


# ----------------------------------------------------------------------------------------------------------------------
# Questions and answers


def test_fine_tuning_pairs_are_honest_short_and_separate(corpus, encoding):
    for pairs in (corpus.sft_train, corpus.sft_heldout):
        assert set(Counter(pair["kind"] for pair in pairs)) == {"summary", "signature", "module", "arithmetic"}
    signatures, subjects = {document.partition("\n")[0] for document in corpus.train["prose"]}, []
    for pairs in (corpus.sft_train, corpus.sft_heldout):
        for pair in pairs:
            question, reply = pair["messages"]
            assert (question["role"], reply["role"]) == ("user", "assistant")
            assert pair["answer"] in reply["content"]
            assert len(question["content"]) + len(reply["content"]) < 600
        subjects.append({re.search("`(.*)`", pair["messages"][0]["content"])[1] for pair in pairs if "`" in str(pair)
                         and pair["kind"] in ("summary", "signature")})
    assert subjects[0] and subjects[1] and subjects[0].isdisjoint(subjects[1])
    calls = [pair["answer"] for pair in corpus.sft_train if pair["kind"] == "signature"]
    assert sum(call in signatures for call in calls) / len(calls) > 0.98    # the rest: short of words, or quoting
    longest = max(len(data.encode_example(encoding, pair["messages"])[0]) for pair in corpus.sft_train[:500])
    assert longest < 300                                                # with a 700-token vocabulary; 104 with 4,096


def test_loss_only_on_the_answers(encoding):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"},
                {"role": "assistant", "content": "Four."}, {"role": "user", "content": "Twice <|eot_id|> that?"},
                {"role": "assistant", "content": "Eight."}]
    ids, mask = data.encode_example(encoding, messages)
    assert ids == encode_chat(encoding, messages, reply=False) and len(ids) == len(mask)
    assert encoding.decode([i for i, m in zip(ids, mask) if m]) == "Four.<|eot_id|>Eight.<|eot_id|>"
    prompt = encode_chat(encoding, messages[:2], reply=True)
    assert ids[:len(prompt)] == prompt and not any(mask[:len(prompt)]) and mask[len(prompt)]
    assert ids.count(encoding.encode_single_token("<|eot_id|>")) == len(messages)       # the user's own forged none


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer

SAMPLE = """The quick brown fox's den; the quicker fox, the quickest.
    def quick(fox):  return fox * 1234567  # the naïve Füchse, 狐狸, 🦊🦊
aaaa aaaaaaa abab ababab \t\t\n\n\n    the  then  there  these   they'll we'll\n""" * 2


def naive_bpe(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """The definition: encode everything again after each new token, count all pairs, take the most frequent."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    pieces = [piece for text in texts for piece in regex.findall(data.LLAMA3_PATTERN, text)]
    pieces = [[bytes([byte]) for byte in piece.encode()] for piece in pieces]
    while len(ranks) < vocab_size - len(data.SPECIAL_TOKENS):
        encoded = [data.merge_pairs(piece, ranks) for piece in pieces]
        pairs = Counter(a + b for parts in encoded for a, b in zip(parts, parts[1:]))
        if not pairs:
            break
        ranks[min(pairs, key=lambda pair: (-pairs[pair], pair))] = len(ranks)
    return ranks


@pytest.mark.parametrize("vocab_size", [300, 10_000])           # the second asks for more than the text has to give
def test_bpe_equals_the_naive_definition(vocab_size):
    texts = [SAMPLE, SAMPLE.upper(), "banana bandana " * 3]
    ranks = data.train_bpe(texts, vocab_size)
    assert list(ranks.items()) == list(naive_bpe(texts, vocab_size).items())
    assert data.make_tokenizer(ranks, "test").n_vocab == (vocab_size if vocab_size == 300 else len(ranks) + 5)


def test_tiktoken_encodes_as_the_trainer_merged(corpus, encoding):
    ranks = encoding._mergeable_ranks
    for text in (SAMPLE, *corpus.heldout["prose"][:30], *corpus.heldout["code"][:3]):
        ids = [ranks[part] for piece in regex.findall(data.LLAMA3_PATTERN, text)
               for part in data.merge_pairs([bytes([byte]) for byte in piece.encode()], ranks)]
        assert encoding.encode_ordinary(text) == ids
        assert encoding.decode(ids) == text


def test_no_token_spans_two_pieces(encoding):
    assert encoding.n_vocab == 700 and encoding.encode_single_token(" the") >= 256
    assert not [token for token in encoding._mergeable_ranks if re.search(rb"[a-z][ .\n]|[0-9]{4}", token)]


def test_one_endless_piece_does_not_stall_the_trainer():
    ranks = data.train_bpe(["=" * 1_000_000 + "\nx== y=="], 300)       # to merge it would take hours
    assert b"==" in ranks and b"====" not in ranks


def test_special_tokens_and_the_checkpoint_entry(encoding):
    assert [encoding.encode_single_token(token) for token in data.SPECIAL_TOKENS] == list(range(695, 700))
    entry = tokenizer_from_dict(json.loads(json.dumps(data.tokenizer_to_dict(encoding))))
    assert entry.encode(SAMPLE + "<|eot_id|>", allowed_special="all") == encoding.encode_ordinary(SAMPLE) + [699]
    assert (entry.name, entry.n_vocab) == ("test", 700)


def rank_lines(ranks) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def test_load_tokenizer_file(tmp_path, encoding):
    path = tmp_path / "mine.tiktoken"
    path.write_text(data.tokenizer_to_dict(encoding)["ranks"])
    loaded = data.load_tokenizer_file(path)
    assert loaded.encode_ordinary(SAMPLE) == encoding.encode_ordinary(SAMPLE) and loaded.n_vocab == 700
    tokens = [bytes([byte]) for byte in range(256)] + [i.to_bytes(3, "big") for i in range(128_000 - 256)]
    path.write_text(rank_lines({token: rank for rank, token in enumerate(tokens)}))     # as many ranks as Llama-3 has
    llama3 = data.load_tokenizer_file(path)
    assert llama3.n_vocab == 128_256 and len(llama3._special_tokens) == 256
    named = {128_000: "<|begin_of_text|>", 128_001: "<|end_of_text|>", 128_005: "<|reserved_special_token_3|>",
             128_006: "<|start_header_id|>", 128_007: "<|end_header_id|>", 128_008: "<|reserved_special_token_4|>",
             128_009: "<|eot_id|>", 128_010: "<|reserved_special_token_5|>", 128_255: "<|reserved_special_token_250|>"}
    assert {i: llama3.decode([i]) for i in named} == named
    assert data.tokenize_documents(["a"], llama3).dtype == np.uint32


BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize("content, says", [
    (None, "cannot read"),
    ("", "not a whole"),
    (rank_lines(BYTES) + "garbage\n", "line 257"),
    (rank_lines(BYTES) + "!!! 256\n", "line 257"),
    (rank_lines(BYTES)[:-5], "line 256"),                               # truncated in the middle of the last line
    (rank_lines(BYTES | {b"ab": 257}), "not a whole"),                  # a hole
    (rank_lines(BYTES) + "YWI= 255\n", "not a whole"),                  # a rank twice
    (rank_lines({token: rank - 1 for token, rank in BYTES.items() if rank}), "not a whole"),     # a byte is missing
])
def test_broken_tokenizer_files(tmp_path, content, says):
    path = tmp_path / "broken.model"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says) as error:
        data.load_tokenizer_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_tokenize_documents(encoding):
    docs = ["One <|eot_id|> two", "", "狐"]
    stream = data.tokenize_documents(docs, encoding)
    begin = encoding.encode_single_token("<|begin_of_text|>")
    assert stream.dtype == np.uint16
    assert stream.tolist() == [token for doc in docs for token in (begin, *encoding.encode_ordinary(doc))]
    assert (stream >= 695).sum() == 3
    with pytest.raises(UserError, match="2,000,000 characters"):
        data.tokenize_documents([" " * 2_000_000], encoding)


def test_mixture_makes_every_token_a_target_once_per_epoch():
    stream = np.arange(1000, 1000 + 10 * 16 + 7, dtype=np.uint16)       # ten windows of 16 and a short one
    mixture = data.Mixture({"prose": stream}, {"prose": 1.0}, context=16, seed=3)
    epochs = []
    for epoch in range(2):
        inputs, targets = mixture.batch(epoch, 11)
        assert inputs.shape == targets.shape == (11, 16) and inputs.dtype == targets.dtype == np.int64
        real = targets != -100
        assert sorted(targets[real]) == stream[1:].tolist()
        assert (targets[real] == inputs[real] + 1).all()                # each predicts the token that follows it
        epochs.append(targets[:, 0].tolist())
    assert epochs[0] != epochs[1] != sorted(epochs[1])                  # a new order


def test_mixture_batches_depend_on_seed_and_step_alone():
    tokens = {"prose": np.arange(5000), "code": np.arange(10_000, 10_700), "maths": np.arange(20_000, 21_000)}
    weights = {"prose": 0.6, "code": 0.3, "maths": 0.1, "knowledge": 0.5}       # there is no knowledge: the rest share
    first = data.Mixture(tokens, weights, 32, seed=5)
    batches = [first.batch(step, 8) for step in range(300)]
    for step in (299, 0, 150):                                          # resumed, and in any order
        again = data.Mixture(tokens, weights, 32, seed=5).batch(step, 8)
        assert all((a == b).all() for a, b in zip(again, batches[step]))
    assert (data.Mixture(tokens, weights, 32, seed=6).batch(0, 8)[0] != batches[0][0]).any()
    rows = Counter(int(row) // 10_000 for inputs, _ in batches for row in inputs[:, 0])
    assert [round(rows[i] / 2400, 2) for i in range(3)] == [0.6, 0.3, 0.1]
    for inputs, _ in batches:                                           # even one small batch is close to the mixture
        assert abs((inputs[:, 0] < 10_000).sum() - 8 * 0.6) <= 2


def test_mixture_without_text():
    with pytest.raises(UserError, match="no text"):
        data.Mixture({"prose": np.arange(1)}, {"prose": 1.0, "code": 0.5}, 16, seed=0)


def conversations(n: int) -> list[tuple[list[int], list[int]]]:
    """n conversations of distinct tokens, of 5 to 59 tokens, the latter half of each to be learned."""
    lengths = np.random.default_rng(0).integers(5, 60, n).tolist()
    return [(list(range(1000 * i + 1, 1000 * i + 1 + length)), [0] * (length // 2) + [1] * (length - length // 2))
            for i, length in enumerate(lengths)]


def test_packing_loses_and_repeats_nothing():
    examples = conversations(300)
    packed = data.Packed(examples, context=64, seed=1, pad_id=0)
    rows = len(packed.ids)
    assert packed.skipped == 0 and rows < 1.1 * sum(len(ids) for ids, _ in examples) / 65
    orders = []
    for epoch in range(2):
        inputs, targets = packed.batch(epoch, rows)                     # one batch = one epoch
        assert inputs.shape == targets.shape == (rows, 64) and inputs.dtype == targets.dtype == np.int64
        learned = sorted(targets[targets != -100])
        assert learned == sorted(token for ids, mask in examples for token, m in zip(ids, mask) if m)
        text = [" ".join(map(str, row)) + " " for row in inputs]        # whole and in order, though a row's last ...
        for ids, _ in examples:                                         # ... token is a target only, never an input
            assert sum(" ".join(map(str, ids[:-1])) + " " in row for row in text) == 1
        assert (targets[targets != -100] == inputs[targets != -100] + 1).all()
        orders.append(inputs[:, 0].tolist())
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_packed_batches_depend_on_seed_and_step_alone():
    examples = conversations(50)
    first, again = (data.Packed(examples, 64, seed=1, pad_id=0) for _ in range(2))
    batches = [first.batch(step, 3) for step in range(40)]
    assert all((a == b).all() for a, b in zip(again.batch(33, 3), batches[33]))
    assert (data.Packed(examples, 64, seed=2, pad_id=0).batch(0, 3)[0] != batches[0][0]).any()


def test_a_conversation_longer_than_a_row_is_left_out_whole_and_counted():
    examples = conversations(50)
    packed = data.Packed(examples, context=32, seed=1, pad_id=0)
    assert packed.skipped == sum(len(ids) > 33 for ids, _ in examples) > 0
    _, targets = packed.batch(0, len(packed.ids))
    assert (targets != -100).sum() == sum(sum(mask) for ids, mask in examples if len(ids) <= 33)
    with pytest.raises(UserError, match="at most 4 tokens"):
        data.Packed(examples, context=3, seed=1, pad_id=0)


# ----------------------------------------------------------------------------------------------------------------------
# A folder of the reader's own


def test_folder_corpus(tmp_path):
    (tmp_path / "code").mkdir()
    texts = [f"Document {i} of the folder, about nothing." for i in range(200)]
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}] for i in range(60)]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts + texts[:9]))
    with gzip.open(tmp_path / "maths.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps({"text": f"{i} + 1 = {i + 1}"}) + "\n" for i in range(50)))
    (tmp_path / "code" / "a.txt").write_text("\ufeffx = 1\n", encoding="utf-8")
    (tmp_path / "code" / "b.txt").write_text("y = 'é'\r\n", encoding="utf-8")
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "README.md").write_text("not read")
    corpus = data.folder_corpus(tmp_path)
    both = {domain: sorted(corpus.train[domain] + corpus.heldout[domain]) for domain in data.DOMAINS}
    assert both["prose"] == sorted(texts) and len(both["maths"]) == 50
    assert both["code"] == ["x = 1\n", "y = 'é'\n"] and both["knowledge"] == []
    assert all(0 < len(corpus.heldout[d]) < len(corpus.train[d]) or d == "code" for d in ("prose", "code", "maths"))
    assert len(corpus.heldout["code"]) == 1                             # too few for the 5 % rule, yet one is kept
    assert len(corpus.sft_train) + len(corpus.sft_heldout) == 60 and corpus.sft_heldout
    assert corpus.sft_train[0]["messages"] in chats and corpus.sft_train[0]["kind"] == "chat"
    assert data.folder_corpus(str(tmp_path)) == corpus


def test_a_long_text_is_cut_without_losing_a_paragraph(tmp_path):
    book = "\n\n".join(f"Paragraph {i}. " + "It goes on and on. " * 20 for i in range(300))
    (tmp_path / "book.txt").write_text(book)
    corpus = data.folder_corpus(tmp_path)
    pieces = corpus.train["prose"] + corpus.heldout["prose"]
    assert len(pieces) > 20 and corpus.heldout["prose"]
    assert sorted(re.findall("Paragraph [0-9]+", "".join(pieces))) == sorted(re.findall("Paragraph [0-9]+", book))


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", GOOD + '{"text": "cut off\n', "a.jsonl, line 2: broken JSON"),
    ("a.jsonl", GOOD + "[" * 100_000 + "\n", "a.jsonl, line 2: broken JSON"),
    ("a.jsonl", GOOD + "\n[1, 2]\n", "a.jsonl, line 3: needs"),
    ("a.jsonl", '{"text": 5}\n', "a.jsonl, line 1: needs"),
    ("a.jsonl", '{"title": "no text"}\n', "a.jsonl, line 1: needs"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "no answer"}]}\n', "a.jsonl, line 1: needs"),
    ("a.jsonl", '{"messages": [{"role": "assistant", "content": null}]}\n', "a.jsonl, line 1: needs"),
    ("a.jsonl", '{"messages": "hello"}\n', "a.jsonl, line 1: needs"),
    ("a.jsonl", '{"text": "\\ud800"}\n', "cannot read .*a.jsonl"),
    ("a.jsonl", b'{"text": "caf\xe9"}\n', "cannot read .*a.jsonl"),
    ("a.txt", b"caf\xe9", "cannot read .*a.txt"),
    ("a.jsonl.gz", GOOD, "cannot read .*a.jsonl.gz"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode() * 1000)[:-12], "cannot read .*a.jsonl.gz"),
    ("a.jsonl.gz", gzip.compress(os.urandom(999), mtime=0)[:20] + b"\xff" * 999, "cannot read .*a.jsonl.gz"),
    ("a.txt", "", "too little text"),
    ("a.txt", "only one document", "too little text"),
    ("a.md", "no such kind of file", "too little text"),
])
def test_bad_folders_get_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says) as error:
        data.folder_corpus(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_folder_and_unreadable_file(tmp_path):
    with pytest.raises(UserError, match="no folder .*nowhere"):
        data.folder_corpus(tmp_path / "nowhere")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="cannot read .*gone.txt"):
        data.folder_corpus(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------


def test_the_table_of_the_corpus(corpus, capsys, monkeypatch):
    monkeypatch.setattr(data, "embedded_corpus", lambda: corpus)
    data.main()
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:5]}
    assert list(rows) == list(data.DOMAINS)
    assert 2.0 < float(rows["prose"][-1]) < 2.6                         # what the model has to beat, about 2.27
    assert "--- arithmetic ---" in out
