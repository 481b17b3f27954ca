"""data.py: nothing held out is trained on, no token is lost or repeated in batches, bad input gets one line."""

import ast
import base64
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
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
        a, operation, b, other, c = (first.partition(" = ")[0] + second.partition(" = ")[0].removeprefix(middle)).split()
        assert re.findall(r"\d+", question) == [a, b, c]
        assert "What" not in question or question == f"What is {a} {operation} {b} {other} {c}?"
    known, needed = ({step for _, steps, _ in part for step in steps.split(", ")} for part in (train, heldout))
    assert needed <= known                      # held-out sums are new, the steps they are made of are not
    worked = {steps for _, steps, _ in train}
    assert not worked & {steps for _, steps, _ in heldout}
    for pairs, allowed in ((corpus.sft_train, worked), (corpus.sft_heldout, {steps for _, steps, _ in heldout})):
        assert {pair["messages"][1]["content"].partition(". The answer")[0] for pair in pairs if pair["kind"] == "arithmetic"
                } <= allowed


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
    (rank_lines(BYTES) + "garbage\n", "cannot read"),
    (rank_lines(BYTES) + "!!! 256\n", "cannot read"),
    (rank_lines(BYTES)[:-5], "cannot read"),                               # truncated in the middle of the last line
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
    ("a.jsonl", GOOD + '{"text": "\\ud800"}\n', "cannot read .*a.jsonl, near line 2"),
    ("a.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}\n', "a.jsonl, line 2: broken JSON"),
    ("a.txt", b"caf\xe9", "cannot read .*a.txt"),
    ("a.jsonl.gz", GOOD, "cannot read .*a.jsonl.gz"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode() * 1000)[:-12], "cannot read .*a.jsonl.gz"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:20] + b"\xff" * 999, "cannot read .*a.jsonl.gz"),
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
# Shards


def shard_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "given.tiktoken"
    path.write_text(rank_lines(data.train_bpe([SAMPLE], 400)))
    return path


@pytest.fixture(scope="module")
def small(rank_file):
    return data.load_tokenizer_file(rank_file)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(data, "SAVE_SECONDS", 0)
    monkeypatch.setattr(data, "CHUNK", 5_000)


TEXTS = [f"Document {i}: {SAMPLE[i % 50:i % 90 + 50]}\n" for i in range(4000)]


def write_jsonl(path: Path, key: str, values: list) -> Path:
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({key: value}) + "\n" for value in values)
    return path


def test_shards_are_the_documents_in_order_whatever_the_workers(tmp_path, small, rank_file, small_shards):
    files = [write_jsonl(tmp_path / name, "text", texts)
             for name, texts in (("a.jsonl", TEXTS[:2500]), ("b.jsonl.gz", TEXTS[2500:]))]
    (tmp_path / "c.txt").write_text("\n\n".join(f"Paragraph {i}. " + "It goes on and on. " * 20 for i in range(100)))
    pieces = [text for text, _, _ in data.read_documents(tmp_path / "c.txt")]
    assert len(pieces) > 5
    for workers in (1, 3):
        data.tokenize_files([*files, tmp_path / "c.txt"], "web", tmp_path / f"out{workers}", rank_file, workers)
    assert shard_files(tmp_path / "out1") == shard_files(tmp_path / "out3")
    held = json.loads((tmp_path / "out1" / "prose.json").read_text())["heldout"].values()
    assert TEXTS[0] in held and 2 < len(held) < 12                      # one in a thousand, and the first
    stream = data.open_shards(tmp_path / "out1")["train"]["prose"]
    expected = data.tokenize_documents([text for text in TEXTS + pieces if text not in held], small)
    assert len(stream) == len(expected) and (stream == expected).all()
    assert isinstance(stream, np.memmap)                                # on the disk, not in memory
    plain, mapped = (data.Mixture({"code": tokens}, {"code": 1.0}, 16, seed=1) for tokens in (expected, stream))
    for step in range(20):
        assert all((a == b).all() for a, b in zip(plain.batch(step, 8), mapped.batch(step, 8)))
    opened = data.open_shards(tmp_path / "out1")
    assert opened["heldout"]["prose"]["ids"].tolist() == data.tokenize_documents(held, small).tolist()
    assert opened["heldout"]["prose"]["bytes"] == sum(len(text.encode()) for text in held)
    assert opened["xz"] == {"prose": data.xz_bits_per_byte(list(held))} and not len(opened["chat"]["ids"])
    assert tokenizer_from_dict(opened["tokenizer"]).encode_ordinary(SAMPLE) == small.encode_ordinary(SAMPLE)


TOKENIZE = """import signal, sys, data
signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background job ignores Ctrl-C
data.SAVE_SECONDS, data.CHUNK = 0, 5_000
data.tokenize_files(sys.argv[1:2], "prose", sys.argv[2], sys.argv[3], 2)"""


def test_killed_and_begun_again_ends_in_the_same_bytes(tmp_path, rank_file, small_shards):
    path, out = write_jsonl(tmp_path / "a.jsonl", "text", TEXTS * 12), tmp_path / "out"
    data.tokenize_files([path], "prose", tmp_path / "whole", rank_file)
    index, saved = out / "prose.json", [0]
    for blow in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        command = [sys.executable, "-c", TOKENIZE, path, out, rank_file]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not index.exists() or json.loads(index.read_text())["tokens"] < saved[-1] + 50_000:
                assert process.poll() is None, "finished before it could be killed"
                time.sleep(0.001)
            process.send_signal(blow)
        with pytest.raises(UserError, match="unfinished"):
            data.open_shards(out)
        saved.append(json.loads(index.read_text())["tokens"])
        with open(out / "prose.bin", "ab") as file:                     # as if killed while it wrote
            file.write(b"half a tok")
    data.tokenize_files([path], "prose", out, rank_file)
    assert shard_files(out) == shard_files(tmp_path / "whole")          # and no .part is left


def test_what_was_saved_is_not_made_again(tmp_path, rank_file, small_shards, monkeypatch):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", "text", TEXTS[i::3]) for i in range(3)]
    data.tokenize_files(files, "prose", tmp_path / "whole", rank_file, 1)
    encode, calls = data.encode_chunk, []

    def crash_at(limit: int):
        def crashing(docs, *rest):
            calls.append(len(docs))
            if len(calls) > limit:
                raise MemoryError
            return encode(docs, *rest)
        monkeypatch.setattr(data, "encode_chunk", crashing)

    crash_at(40)
    with pytest.raises(MemoryError):
        data.tokenize_files(files, "prose", tmp_path / "out", rank_file, 1)
    crash_at(10 ** 9)
    data.tokenize_files(files, "prose", tmp_path / "out", rank_file, 1)
    assert shard_files(tmp_path / "out") == shard_files(tmp_path / "whole")
    assert sum(calls) < len(TEXTS) + 5 * max(calls)                     # a group of four, and the one that failed


def test_a_broken_line_costs_nothing_that_was_finished(tmp_path, rank_file, small_shards):
    path = write_jsonl(tmp_path / "a.jsonl", "text", TEXTS)
    good = path.read_bytes()
    data.tokenize_files([path], "prose", tmp_path / "whole", rank_file, 2)
    lines = good.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3000], b'{"text": "cut\n', *lines[3000:]]))
    with pytest.raises(UserError, match="a.jsonl, line 3001: broken JSON"):
        data.tokenize_files([path], "prose", tmp_path / "out", rank_file, 2)
    assert json.loads((tmp_path / "out" / "prose.json").read_text())["tokens"] > 10_000
    path.write_bytes(good)
    data.tokenize_files([path], "prose", tmp_path / "out", rank_file, 2)
    assert shard_files(tmp_path / "out") == shard_files(tmp_path / "whole")


def test_conversations_in_shards(tmp_path, small, rank_file, small_shards):
    chats = [[{"role": "user", "content": f"{i} <|begin_of_text|>?"}, {"role": "assistant", "content": f"{i}!"}]
             for i in range(2000)]
    data.tokenize_files([write_jsonl(tmp_path / "a.jsonl", "messages", chats)], "chat", tmp_path / "out", rank_file, 2)
    opened = data.open_shards(tmp_path / "out")
    held = [example["messages"] for example in opened["sft_heldout"]]
    assert {"kind": "chat", "messages": chats[0], "answer": "0!"} in opened["sft_heldout"]
    expected = [data.encode_example(small, chat) for chat in chats if chat not in held]
    chat = opened["chat"]
    assert chat["lengths"].tolist() == [len(ids) for ids, _ in expected] and opened["train"] == opened["heldout"] == {}
    assert chat["ids"].tolist() == [i for ids, _ in expected for i in ids]
    assert chat["mask"].tolist() == [bool(m) for _, mask in expected for m in mask]


def test_parquet(tmp_path, rank_file, small_shards):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}] for i in range(300)]
    for domain, key, values in (("prose", "text", TEXTS[:700]), ("chat", "messages", chats)):
        columns = {"number": list(range(len(values))), key: values}
        parquet.write_table(arrow.table(columns), tmp_path / "a.parquet", row_group_size=200)
        data.tokenize_files([tmp_path / "a.parquet"], domain, tmp_path / "a", rank_file, 1)
        data.tokenize_files([write_jsonl(tmp_path / "a.jsonl", key, values)], domain, tmp_path / "b", rank_file, 1)
        for name in (f"{domain}.bin", "mobilemoe.tiktoken"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() != b""
    for bad, says in (({"text": ["fine", None]}, "row 2: needs"), ({"body": ["no such column"]}, "row 1: needs")):
        parquet.write_table(arrow.table(bad), tmp_path / "bad.parquet")
        with pytest.raises(UserError, match=f"bad.parquet, {says}"):
            data.tokenize_files([tmp_path / "bad.parquet"], "code", tmp_path / "a", None, 1)
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot read .*bad.parquet") as error:
        data.tokenize_files([tmp_path / "bad.parquet"], "code", tmp_path / "a", None, 1)
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        next(data.read_documents(tmp_path / "a.parquet"))


def test_a_text_without_blank_lines_is_cut(tmp_path):
    (tmp_path / "a.txt").write_text("é word\n" * 400_000)
    pieces = [text for text, _, _ in data.read_documents(tmp_path / "a.txt")]
    assert len(pieces) == 3 and "".join(pieces) == "é word\n" * 400_000


def test_the_default_tokenizer_is_learned_once_and_kept(tmp_path, monkeypatch, call, refused, rank_file):
    corpus = data.Corpus()
    corpus.train["prose"] = TEXTS[:50]
    calls = []
    monkeypatch.setattr(data, "embedded_corpus", lambda: calls.append(1) or corpus)
    path, out = write_jsonl(tmp_path / "a.jsonl", "text", TEXTS[:100]), tmp_path / "out"
    for domain in ("web", "code", "web"):
        code, said, _ = call(data.main, "tokenize", path, "--domain", domain, "--out", out)
        assert code == 0
    assert "finished before" in said and calls == [1]
    learned = data.learn_tokenizer(corpus, 4096)
    opened = data.open_shards(out)
    assert opened["tokenizer"] == data.tokenizer_to_dict(learned) and list(opened["train"]) == ["prose", "code"]
    arguments = ("tokenize", path, "--domain", "maths", "--out", out, "--tokenizer", rank_file)
    assert "another tokenizer" in refused(data.main, *arguments)


def test_what_tokenize_refuses(tmp_path, refused, rank_file):
    path, out = write_jsonl(tmp_path / "a.jsonl", "text", TEXTS[:100]), tmp_path / "out"
    chat = write_jsonl(tmp_path / "chat.jsonl", "messages", [[{"role": "assistant", "content": "Hello."}]])
    (tmp_path / "a.md").write_text("text")

    def says(file: Path, domain: str = "prose") -> str:
        return refused(data.main, "tokenize", file, "--domain", domain, "--out", out, "--tokenizer", rank_file)

    assert "unknown domain 'news'" in says(path, "news")
    assert "a.md is not" in says(tmp_path / "a.md") and "b.txt is not" in says(tmp_path / "b.txt")
    assert "chat.jsonl, document 1" in says(chat) and "a.jsonl, document 1" in says(path, "chat")
    assert not out.exists() or list(out.iterdir()) == [out / data.RANKS]
    data.tokenize_files([path], "prose", out, rank_file, 1)
    assert "other files" in says(chat)
    index = (out / "prose.json").read_text()
    for damage in (lambda: os.truncate(out / "prose.bin", 100), (out / "prose.bin").unlink,
                   lambda: (out / "prose.json").write_text(index[:20])):
        damage()
        with pytest.raises(UserError, match="prose.json or its .bin is damaged"):
            data.open_shards(out)
        assert "damaged" in says(path)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_files(tmp_path, rank_file):
    script = TOKENIZE.replace("0, 5_000", "1, 2 ** 19") + """
import resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    peaks = []
    for times in (10, 100):
        path = write_jsonl(tmp_path / f"{times}.jsonl", "text", TEXTS * times)
        command = [sys.executable, "-c", script, path, tmp_path / str(times), rank_file]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        peaks.append(int(said.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 60 and peaks[1] < 1000, peaks           # MB; the files are 5 MB and 50 MB


# ----------------------------------------------------------------------------------------------------------------------


def test_the_table_of_the_corpus(corpus, call, monkeypatch):
    monkeypatch.setattr(data, "embedded_corpus", lambda: corpus)
    _, out, _ = call(data.main)
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:5]}
    assert list(rows) == list(data.DOMAINS)
    assert 2.0 < float(rows["prose"][-1]) < 2.6                         # what the model has to beat, about 2.27
    assert "--- arithmetic ---" in out
