"""evaluate.py against plain forward passes, llama.cpp, lm-eval's own command, and what people get wrong."""
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from mobilemoe import UserError, generate, load_checkpoint

SUMMARIES = ["Return the sorted list.", "Open a file and read it.", "Compute the mean of an array — élan.", "Close the door.",
             "Raise an error if the name is unknown.", "Print a tree of all folders.", "Multiply two matrices."]
CONVERSATIONS = [{"kind": "summary", "answer": text, "messages": [
    {"role": "user", "content": f"What does `module.f{n}` do?"}, {"role": "assistant", "content": text}]}
    for n, text in enumerate(SUMMARIES)]
STORY = {"kind": "arithmetic", "answer": "12", "messages": [
    {"role": "user", "content": "A shop had 14 coins, bought 5 and sold 7. How many coins remain?"},
    {"role": "assistant", "content": "14 + 5 = 19, 19 - 7 = 12. The answer is 12."}]}
SUM = {**STORY, "messages": [{"role": "user", "content": "What is 14 + 5 - 7?"}, STORY["messages"][1]]}     # the same one
ASKED = f"Problem: {STORY['messages'][0]['content']}\nWorking:"


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """The finished run with a quiz and a sum among its held-out material, which the reader's own folder did not have."""
    folder = tmp_path_factory.mktemp("asked")
    for stage in ("pretrain", "sft", "qat"):
        checkpoint = load_checkpoint(finished_run / f"{stage}.pt")
        encoding = evaluate.Subject(finished_run / f"{stage}.pt").encoding
        checkpoint["sft_heldout"] = json.dumps([*CONVERSATIONS, STORY])
        checkpoint["heldout"]["maths"] = {"ids": torch.tensor(encoding.encode_ordinary(ASKED)), "bytes": len(ASKED)}
        torch.save(checkpoint, folder / f"{stage}.pt")
    shutil.copy(finished_run / "mobilemoe.gguf", folder)
    return folder


@pytest.fixture(scope="module")
def sft(run):
    return evaluate.Subject(run / "sft.pt")


@pytest.fixture(scope="module")
def qat(run):
    return evaluate.Subject(run / "qat.pt")


def plain(model, ids, first) -> tuple[float, bool]:
    """log P(ids[first:] | ids[:first]) by one forward pass over all of it."""
    with torch.no_grad():
        log_probs = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[first - 1:]
    return log_probs[range(len(ids) - first), ids[first:]].sum().item(), log_probs.argmax(-1).tolist() == ids[first:]


def some_ids(count, seed=0):
    return torch.randint(0, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("length, first, context", [
    (2, 1, 8), (9, 1, 8), (10, 1, 8), (100, 1, 8), (100, 60, 8), (100, 99, 7), (5, 3, 1)])
def test_windows_score_each_token_once_with_half_a_context_before_it(length, first, context):
    scored = []
    for start, begin, end in evaluate.windows(length, first, context):
        assert 0 <= start < begin < end <= length and end - start <= context + 1
        assert begin - start >= min(begin, context // 2)
        scored += range(begin, end)
    assert scored == list(range(first, length))


def test_log_likelihoods_are_those_of_a_plain_forward_pass(sft, lively):
    subject = copy.copy(sft)
    model = subject.model = lively()
    subject.context = 64
    sequences = [(some_ids(n, n), first) for n, first in ((2, 1), (40, 39), (17, 3), (65, 1), (30, 20), (30, 10))]
    ids = some_ids(12, 5)
    for _ in range(4):              # a greedy continuation, so that the flag is seen to be True as well
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    sequences.append((ids, 12))
    found = subject.log_likelihoods(sequences, "test")
    expected = [plain(model, *sequence) for sequence in sequences]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [flag for _, flag in found] == [flag for _, flag in expected] and found[-1][1]


def test_long_text_is_scored_whole_in_bounded_windows_and_said_to_be_long(sft, capsys, monkeypatch):
    ids, longest, forward = some_ids(20 * sft.context), [0], sft.model.forward
    monkeypatch.setattr(sft.model, "forward", lambda rows: longest.append(rows.shape[1]) or forward(rows))
    score, _ = sft.log_likelihoods([(ids, 1)], "test")[0]
    assert max(longest) == sft.context and "1 texts are longer" in capsys.readouterr().out
    wanted = 0.0
    for start, begin, end in evaluate.windows(len(ids), 1, sft.context):
        wanted += plain(sft.model, ids[start:end], begin - start)[0]
    assert score == pytest.approx(wanted, abs=1e-2)
    sft.log_likelihoods([(ids[:sft.context + 1], 1)], "test")
    assert "longer" not in capsys.readouterr().out


def test_progress_tells_speed_and_time_left(monkeypatch, capsys):
    clock = iter([100.0, 105.0, 111.0, 120.0])
    monkeypatch.setattr(evaluate.time, "time", lambda: next(clock))
    progress = evaluate.Progress("sft: quiz", 4000, "tokens")
    for _ in range(3):
        progress.add(1100 if progress.done else 1800)
    assert capsys.readouterr().out == ("sft: quiz: 2,900/4,000 tokens, 264/s, 0:04 left\n"
                                       "sft: quiz: 4,000/4,000 tokens, 200/s, 0:00 left\n")


def test_greedy_answers_are_those_of_generate(sft, capsys):
    prompts = [some_ids(n, seed) for seed, n in enumerate((5, 9, 5, 12, 5))]
    stop = tuple(sft.encoding.encode_single_token(f"<|{name}|>") for name in ("eot_id", "end_of_text", "begin_of_text"))
    wanted = [sft.encoding.decode(generate(sft.model, prompt, 12, temperature=0, stop=stop)) for prompt in prompts]
    assert sft.answers(prompts, 12, [], "test") == wanted
    cut = wanted[0][2:4]
    assert cut and sft.answers(prompts[:1], 12, [cut], "test") == [wanted[0].split(cut)[0]]
    assert "no room" not in capsys.readouterr().out
    long = some_ids(2 * sft.context, 9)
    end = long[-(sft.context - 12):]
    assert sft.answers([long, end], 12, [], "test") == [sft.encoding.decode(
        generate(sft.model, end, 12, temperature=0, stop=stop))] * 2
    assert "1 prompts leave no room" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Questions


def test_quiz_has_four_choices_and_does_not_depend_on_the_order():
    items = evaluate.quiz_items(CONVERSATIONS + [STORY])
    assert len(items) == len(SUMMARIES)
    for item in items:
        assert len(set(item.choices)) == 4 and item.answer in item.choices and set(item.choices) <= set(SUMMARIES)
        assert item.document.strip() in item.question
    assert len({item.choices.index(item.answer) for item in items}) > 1
    assert items[0].document == "module.f0\n\n"
    again = evaluate.quiz_items(CONVERSATIONS[::-1])
    assert sorted(again) == sorted(items)
    assert evaluate.quiz_items(CONVERSATIONS[:3]) == []         # not enough for four choices


def test_quiz_points_are_the_gain_from_the_name_and_the_likelihood_per_byte():
    item = evaluate.Item("f\n\n", "What does `f` do?", ["ab", "a" * 10, "b" * 20, "c" * 40], "a" * 10)
    #         given the name: -2, -12, -30, -36      without: -1, -20, -31, -38
    points = evaluate.quiz_points([item], [-2.0, -12.0, -30.0, -36.0, -1.0, -20.0, -31.0, -38.0])
    assert points["name gain"].tolist() == [[-1, 8, 1, 2]] and evaluate.quiz_score([item], points["name gain"]).mean == 1
    assert points["quiz"][0] == pytest.approx([-1, -1.2, -1.5, -0.9])


def test_quiz_sequences_begin_each_choice_where_the_prompt_ends(sft):
    items = evaluate.quiz_items(CONVERSATIONS)
    for chat in (False, True):
        sequences = evaluate.quiz_sequences(items, sft.encoding, chat)
        wanted = [choice for item in items for choice in item.choices]
        wanted += dict.fromkeys(wanted)
        assert [sft.encoding.decode(ids[first:]) for ids, first in sequences] == wanted
        assert sequences[1][0][:sequences[1][1]] == evaluate.prompt_ids(items[0], sft.encoding, chat)


def test_a_model_is_asked_in_the_format_of_its_last_stage(sft):
    item, = evaluate.arithmetic_items([*CONVERSATIONS, STORY, SUM])
    assert (item.document, item.answer) == (ASKED, "12")
    document, chat = (sft.encoding.decode(evaluate.prompt_ids(item, sft.encoding, chat)) for chat in (False, True))
    assert document == f"<|begin_of_text|>{ASKED}"
    assert STORY["messages"][0]["content"] in chat and chat.endswith("assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize("text, right", [
    ("47 + 30 = 77, so 1,085.", True), ("1085", True), ("x = -1085", False), ("1085 of 2", False), ("", False)])
def test_the_last_number_of_an_answer_counts(text, right):
    assert evaluate.arithmetic_score([evaluate.Item("", "", [], "1085")], [text]).mean == right


def test_scores_have_standard_errors_and_chance_levels():
    score = evaluate.score([True] * 75 + [False] * 25, 0.25)
    assert (score.mean, score.error) == (0.75, pytest.approx(0.0433, abs=1e-4))
    assert str(score) == "75.0 ± 4.3 % (+11.5 s.e.)"
    assert evaluate.score([False] * 10, 0.25).error > 0
    items = [evaluate.Item("", "", [], answer) for answer in ("1", "2", "2", "3")]
    score = evaluate.arithmetic_score(items, ["1", "2", "", "4"])
    assert (score.mean, score.chance) == (0.5, 0.5)


def test_questions_are_those_the_checkpoint_holds_out(sft):
    items, sums = evaluate.questions(sft)
    assert [item.answer for item in items] == SUMMARIES
    assert [(item.document, item.answer) for item in sums] == [(ASKED, "12")]


# ----------------------------------------------------------------------------------------------------------------------
# llama.cpp


def test_llama_cpp_gives_the_same_log_likelihoods(qat, finished_run):
    """Whole tokens, special tokens, bytes that are no character: each is asked for, none is lost."""
    begin = qat.encoding.encode_single_token("<|begin_of_text|>")
    text = qat.encoding.encode_ordinary("The sum of 3 + 4 — 字 — is 7.\n")
    sequences = [([begin, *text], 1), ([begin, *text[:8], begin, *text[8:]], 4), ([begin, 0xC3, 0xA9, 200], 1)]
    theirs = evaluate.llama_cpp_log_likelihoods(finished_run / "mobilemoe.gguf", sequences)
    ours = [score for score, _ in qat.log_likelihoods(sequences, "test")]
    for (ids, first), a, b in zip(sequences, ours, theirs):
        assert abs(a - b) / (len(ids) - first) < 0.002          # nats per token: an activation rounded the other way


def test_llama_cpp_agrees_on_quiz_and_bits_per_byte(qat, finished_run, monkeypatch):
    monkeypatch.setattr(evaluate, "GGUF_TOKENS", 150)
    items = evaluate.quiz_items(CONVERSATIONS)
    table = evaluate.compare_with_llama_cpp(finished_run / "mobilemoe.gguf", qat, items)
    gap = float(table.split("Largest difference ")[1].split()[0])
    assert gap < 0.005 and "quiz: the same answer to 100.0% of 7" in table, table
    monkeypatch.setattr(evaluate, "llama_cpp_log_likelihoods", lambda path, sequences: np.linspace(-90, -1, len(sequences)))
    table = evaluate.compare_with_llama_cpp(finished_run / "mobilemoe.gguf", qat, items)
    assert float(table.split("Largest difference ")[1].split()[0]) > 0.5 and "100.0%" not in table     # it can fail


# ----------------------------------------------------------------------------------------------------------------------
# Routing


def test_routing_shares_count_every_route(sft, monkeypatch):
    shares, c = evaluate.routing_shares(sft), sft.model.config
    assert list(shares) == list(sft.checkpoint["heldout"])
    for share in shares.values():
        assert share.shape == (2, c.n_layers, c.n_routed) and torch.allclose(share.sum(-1), torch.ones(2, c.n_layers))
    assert not sft.model.model.layers[0].feed_forward.router._forward_hooks
    ids = sft.checkpoint["heldout"]["maths"]["ids"].long()                  # short: two windows, a half each
    T = min(sft.context, len(ids) // 2)
    monkeypatch.setattr(evaluate, "ROUTING_WINDOWS", 2)
    seen = []
    hook = sft.model.model.layers[1].feed_forward.router.register_forward_hook(lambda *args: seen.append(args[2][1]))
    with torch.no_grad():
        sft.model(ids[None, :T])
    hook.remove()
    wanted = torch.bincount(seen[0].flatten(), minlength=c.n_routed) / seen[0].numel()
    assert torch.allclose(evaluate.routing_shares(sft)["maths"][0, 1], wanted)


def test_routing_summary_says_what_the_numbers_say():
    a, b = torch.tensor([0.75, 0.25, 0, 0]).expand(2, 1, 4), torch.tensor([0, 0, 0.5, 0.5]).expand(2, 1, 4)
    apart, same = {"prose": a, "code": b}, {"prose": a, "code": a}
    table = evaluate.routing_summary(["old", "new"], [apart, same]).splitlines()
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == ["old", "1.50", "1.75", "2.00", "1.00", "nan", "0.00"]
    assert [cell.strip() for cell in table[3].split("|")[1:-1]] == ["new", "3.00", "1.75", "1.75", "1.00", "0.50", "1.00"]
    assert "new: 0 of 1 pairs" in table[-2] and "old: 1 of 1 pairs" in evaluate.routing_summary(["old"], [apart])


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_command_prints_tables_and_draws_pictures(run, call, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "GGUF_TOKENS", 40)
    files = [run / name for name in ("pretrain.pt", "qat.pt", "mobilemoe.gguf")]
    code, out, err = call(evaluate.main, *files, "--out", tmp_path)
    assert code == 0, err
    for words in ("quiz: 7 held-out", "| pretrain | document |", "| qat | chat |", "llama.cpp", "Largest difference",
                  "/s, 0:00 left", "pairs of domains"):
        assert words in out
    for name in ("progress.png", "routing.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_corpus_without_questions_is_measured_without_them(finished_run, call, tmp_path):
    code, out, err = call(evaluate.main, finished_run / "sft.pt", "--out", tmp_path)
    assert code == 0, err
    assert "quiz: 0 held-out questions; this corpus has none" in out and "arithmetic: 0 held-out" in out
    assert "| held out | asked as | prose | maths |\n" in out


def test_refuses_what_is_missing_or_wrong(run, finished_run, text_folder, refused, tmp_path):
    broken, sft, older = tmp_path / "x.gguf", run / "sft.pt", tmp_path / "older.pt"
    broken.write_bytes(b"GGUF nonsense")
    checkpoint = load_checkpoint(sft)
    del checkpoint["sft_heldout"]
    torch.save(checkpoint, older)
    for arguments, says in [
            (["missing.pt"], "missing.pt"), ([sft, "no.gguf"], "no.gguf"), ([older], "older.pt carries no held-out questions"),
            ([finished_run / "mobilemoe.gguf"], "beside"), ([text_folder / "prose.txt"], "prose.txt"),
            ([sft, "--out", "nowhere"], "nowhere"), ([sft, finished_run / "sft.pt"], "different texts"),
            ([sft, broken, "--out", tmp_path], "x.gguf")]:
        assert says in refused(evaluate.main, *arguments)


# ----------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness


@pytest.fixture
def local_task(tmp_path):
    """A multiple-choice task as a YAML with a local JSON data set, nothing from a network."""
    pytest.importorskip("lm_eval")
    rows = [{"question": f"What is {a} + 7?", "choices": [f"{a + 7}.", f"{a + 9}."], "label": 0} for a in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "sums.yaml"
    path.write_text(f"""task: local_sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / 'sums.jsonl'}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
""")
    return path


@pytest.fixture
def adapter(finished_run, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(sys, "path", list(sys.path))
    evaluate.lm_eval_adapter = getattr(evaluate, "lm_eval_adapter", None) or evaluate.register_with_lm_eval()
    return evaluate.lm_eval_adapter(str(finished_run / "pretrain.pt"))


class Request:
    def __init__(self, *args):
        self.args = args


def test_adapter_gives_the_log_likelihoods_of_a_plain_forward_pass(adapter):
    encoding, model = adapter.subject.encoding, adapter.subject.model
    begin = encoding.encode_single_token("<|begin_of_text|>")
    pairs = [("What is 3 + 7?", " 10."), ("", "Some text"), ("A context that ends in a space ", "and goes on"), ("x", "y")]
    found = adapter.loglikelihood([Request(*pair) for pair in pairs])
    for (context, continuation), (score, greedy) in zip(pairs, found):
        ids = [begin, *encoding.encode_ordinary(context + continuation)]
        first = min(1 + len(encoding.encode_ordinary(context.rstrip())), len(ids) - 1)
        wanted, flag = plain(model, ids, first)
        assert (score, greedy) == (pytest.approx(wanted, abs=1e-4), flag)
    text = "a text for the rolling log-likelihood"
    rolling, = adapter.loglikelihood_rolling([Request(text)])
    assert rolling == pytest.approx(plain(model, [begin, *encoding.encode_ordinary(text)], 1)[0], abs=1e-4)


def test_adapter_generates_until(adapter):
    encoding, model = adapter.subject.encoding, adapter.subject.model
    prompt = [encoding.encode_single_token("<|begin_of_text|>"), *encoding.encode_ordinary("Python is")]
    stop = tuple(encoding.encode_single_token(f"<|{name}|>") for name in ("eot_id", "end_of_text", "begin_of_text"))
    wanted = encoding.decode(generate(model, prompt, 8, temperature=0, stop=stop))
    requests = [Request("Python is", {"until": until, "max_gen_toks": 8}) for until in ([], wanted[1:3])]
    assert adapter.generate_until(requests) == [wanted, wanted.split(wanted[1:3])[0]]
    with pytest.raises(UserError, match="greedily"):
        adapter.generate_until([Request("x", {"do_sample": True, "temperature": 0.7})])


def lm_eval(checkpoint: Path, tasks: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, evaluate.__file__, "lm-eval", "run", "--model", "mobilemoe", "--model_args",
               f"checkpoint={checkpoint}", "--tasks", tasks]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def test_lm_evals_own_command_runs_a_local_task(finished_run, local_task, tmp_path):
    done = lm_eval(finished_run / "sft.pt", str(local_task), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|local_sums|" in done.stdout.replace(" ", "")


@pytest.mark.parametrize("text, says", [
    (None, "sums.yaml"), ("- a list", "sums.yaml"),
    ("task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\ntest_split: test\n"
     "output_type: multiple_choice\ndoc_to_text: a\ndoc_to_target: 0\ndoc_to_choice: [a, b]\n", "gone.jsonl")])
def test_refuses_task_files_that_are_missing_or_wrong(finished_run, local_task, tmp_path, text, says):
    local_task.write_text(text or "")
    if text is None:
        local_task.unlink()
    done = lm_eval(finished_run / "sft.pt", str(local_task), tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert says in done.stderr.splitlines()[-1]


def test_the_papers_table_stands_below_the_scores(monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    import lm_eval.__main__
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(evaluate, "register_with_lm_eval", lambda: None)
    seen = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: seen.extend(sys.argv))
    monkeypatch.setattr(sys, "argv", [])
    evaluate.run_lm_eval(["run", "--tasks", "mobilemoe14"])
    assert seen[:3] == ["lm-eval", "run", "--tasks"] and len(seen[3].split(",")) == 14
    assert "| PIQA | acc_norm | 75.4 |" in capsys.readouterr().out


def test_the_papers_list_has_fourteen_tasks_that_lm_eval_knows():
    pytest.importorskip("lm_eval")
    import lm_eval
    assert len(evaluate.MOBILEMOE14) == 14
    folders = ("hellaswag", "piqa", "siqa", "winogrande", "mmlu/default", "nq_open", "triviaqa", "arc", "openbookqa",
               "super_glue/boolq", "drop", "gsm8k", "bbh/cot_fewshot")
    tasks = Path(lm_eval.__file__).parent / "tasks"
    texts = "\n".join(path.read_text() for folder in folders for path in (tasks / folder).glob("*.yaml"))
    for name in evaluate.MOBILEMOE14:
        assert f"task: {name}\n" in texts or f"group: {name}\n" in texts, name
