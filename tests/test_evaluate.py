"""evaluate.py against plain forward passes, llama.cpp, lm-eval's own command, and what people get wrong."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from data import Corpus
from mobilemoe import UserError, generate

SUMMARIES = ["Return the sorted list.", "Open a file and read it.", "Compute the mean of an array — élan.", "Close the door.",
             "Raise an error if the name is unknown.", "Print a tree of all folders.", "Multiply two matrices."]
CONVERSATIONS = [{"kind": "summary", "answer": text, "messages": [
    {"role": "user", "content": f"What does `module.f{n}` do?"}, {"role": "assistant", "content": text}]}
    for n, text in enumerate(SUMMARIES)]
STORY = {"kind": "arithmetic", "answer": "85", "messages": [
    {"role": "user", "content": "Ada has 47 coins and gets 38 more. How many coins does Ada have now?"},
    {"role": "assistant", "content": "47 + 30 = 77, 77 + 8 = 85. The answer is 85."}]}
MATHS = "Problem: 47 + 38\nWorking: 47 + 30 = 77, 77 + 8 = 85\nAnswer: 85\n"


@pytest.fixture(scope="module")
def sft(finished_run):
    return evaluate.Subject(finished_run / "sft.pt")


@pytest.fixture(scope="module")
def qat(finished_run):
    return evaluate.Subject(finished_run / "qat.pt")


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


def test_log_likelihoods_are_those_of_a_plain_forward_pass(lively):
    model = lively()
    sequences = [(some_ids(n, n), first) for n, first in ((2, 1), (40, 39), (17, 3), (65, 1), (30, 20), (30, 10))]
    ids = some_ids(12, 5)
    for _ in range(4):              # a greedy continuation, so that the flag is seen to be True as well
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    sequences.append((ids, 12))
    found = evaluate.log_likelihoods(model, sequences, 64)
    expected = [plain(model, *sequence) for sequence in sequences]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [flag for _, flag in found] == [flag for _, flag in expected] and found[-1][1]


def test_long_text_is_scored_whole_and_said_to_be_long(sft, capsys):
    ids = some_ids(3 * sft.context)
    score, _ = sft.log_likelihoods([(ids, 1)])[0]
    wanted = 0.0
    for start, begin, end in evaluate.windows(len(ids), 1, sft.context):
        wanted += plain(sft.model, ids[start:end], begin - start)[0]
    assert score == pytest.approx(wanted, abs=1e-3)
    sft.report_long()
    assert "1 texts were longer" in capsys.readouterr().out
    sft.report_long()
    assert capsys.readouterr().out == ""


def test_greedy_answers_are_those_of_generate(sft):
    prompts = [some_ids(n, seed) for seed, n in enumerate((5, 9, 5, 12, 5))]
    stop = tuple(sft.encoding.encode_single_token(f"<|{name}|>") for name in ("eot_id", "end_of_text", "begin_of_text"))
    wanted = [sft.encoding.decode(generate(sft.model, prompt, 12, temperature=0, stop=stop)) for prompt in prompts]
    assert evaluate.greedy_answers(sft.model, sft.encoding, prompts, 12, []) == wanted
    cut = wanted[0][2:4]
    assert cut and evaluate.greedy_answers(sft.model, sft.encoding, prompts[:1], 12, [cut]) == [wanted[0].split(cut)[0]]


# ----------------------------------------------------------------------------------------------------------------------
# Questions


def test_quiz_has_four_choices_and_does_not_depend_on_the_order():
    items = evaluate.quiz_items(CONVERSATIONS + [STORY])
    assert len(items) == len(SUMMARIES)
    for item in items:
        assert len(set(item.choices)) == 4 and item.answer in item.choices and set(item.choices) <= set(SUMMARIES)
    assert len({item.choices.index(item.answer) for item in items}) > 1
    assert items[0].document == "module.f0\n\n"
    again = evaluate.quiz_items(CONVERSATIONS[::-1])
    assert set(again) == set(items)
    assert evaluate.quiz_items(CONVERSATIONS[:3]) == []         # not enough for four choices


def test_quiz_answers_by_the_gain_from_the_name_or_per_byte():
    item = evaluate.Item("f\n\n", "What does `f` do?", ("ab", "a" * 10, "b" * 20, "c" * 40), "a" * 10)
    #         given the name: -2, -12, -30, -36      without: -1, -20, -31, -38
    scores = [-2.0, -12.0, -30.0, -36.0, -1.0, -20.0, -31.0, -38.0]
    assert evaluate.quiz_answers([item], scores).tolist() == [1]                    # gains -1, 8, 1, 2
    assert evaluate.quiz_answers([item], scores, per_byte=True).tolist() == [3]     # -1, -1.2, -1.5, -0.9


def test_a_model_is_asked_in_the_format_of_its_last_stage(sft):
    item, = evaluate.arithmetic_items([*CONVERSATIONS, STORY], [MATHS])
    assert (item.document, item.answer) == ("Problem: 47 + 38\nWorking:", "85")
    assert sft.encoding.decode(item.prompt(sft.encoding, chat=False)) == "<|begin_of_text|>Problem: 47 + 38\nWorking:"
    chat = sft.encoding.decode(item.prompt(sft.encoding, chat=True))
    assert STORY["messages"][0]["content"] in chat and chat.endswith("assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize("text, number", [("47 + 30 = 77, so 1,085.", "1085"), ("x = -3", "-3"), ("none", None), ("", None)])
def test_last_number(text, number):
    assert evaluate.last_number(text) == number


def test_scores_have_standard_errors_and_chance_levels():
    score = evaluate.Score(np.array([True] * 75 + [False] * 25), 0.25)
    assert (score.mean, score.error) == (0.75, pytest.approx(0.0433, abs=1e-4))
    assert str(score) == "75.0 ± 4.3 % (+11.5 s.e.)"
    assert evaluate.Score(np.zeros(10, bool), 0.25).error > 0
    items = [evaluate.Item("", "", (), answer) for answer in ("1", "2", "2", "3")]
    score = evaluate.arithmetic_score(items, ["1", "2", None, "4"])
    assert (score.mean, score.chance) == (0.5, 0.5)


def test_refuses_questions_that_may_not_be_held_out(sft, text_folder):
    from data import folder_corpus
    corpus = folder_corpus(text_folder)
    evaluate.heldout_items(corpus, sft.checkpoint, sft.path)
    corpus.heldout["prose"] = [*corpus.heldout["prose"], "one more"]
    with pytest.raises(UserError, match="trained on other prose"):
        evaluate.heldout_items(corpus, sft.checkpoint, sft.path)
    with pytest.raises(UserError, match="trained on other"):
        evaluate.heldout_items(Corpus(), sft.checkpoint, sft.path)


# ----------------------------------------------------------------------------------------------------------------------
# llama.cpp


def test_llama_cpp_gives_the_same_log_likelihoods(qat, finished_run):
    """Whole tokens, special tokens, bytes that are no character: each is asked for, none is lost."""
    begin = qat.encoding.encode_single_token("<|begin_of_text|>")
    text = qat.encoding.encode_ordinary("The sum of 3 + 4 — 字 — is 7.\n")
    sequences = [([begin, *text], 1), ([begin, *text[:8], begin, *text[8:]], 4), ([begin, 0xC3, 0xA9, 200], 1)]
    theirs = evaluate.llama_cpp_log_likelihoods(finished_run / "mobilemoe.gguf", sequences, qat.encoding)
    ours = [score for score, _ in qat.log_likelihoods(sequences)]
    for (ids, first), a, b in zip(sequences, ours, theirs):
        assert abs(a - b) / (len(ids) - first) < 0.01           # nats per token; F16 cache, INT8 rounding


def test_llama_cpp_agrees_on_quiz_and_bits_per_byte(qat, finished_run, monkeypatch):
    monkeypatch.setattr(evaluate, "GGUF_TOKENS", 150)
    items = evaluate.quiz_items(CONVERSATIONS)
    table = evaluate.compare_with_llama_cpp(finished_run / "mobilemoe.gguf", qat, items, qat.quiz(items))
    gap = float(table.split("Largest difference ")[1].split()[0])
    assert gap < 0.005 and "the same answer to 100.0% of 7" in table, table


# ----------------------------------------------------------------------------------------------------------------------
# Routing


def test_expert_loads_count_every_route(sft):
    loads, c = evaluate.expert_loads(sft), sft.model.config
    assert list(loads) == list(sft.checkpoint["heldout"])
    for load in loads.values():
        assert load.shape == (2, c.n_layers, c.n_routed)
        per_layer = load.sum((0, 2))
        assert (per_layer == per_layer[0]).all() and per_layer[0] > 0 and per_layer[0] % c.active_routed == 0
    assert not sft.model.model.layers[0].feed_forward.router._forward_hooks


def test_routing_summary_says_what_the_numbers_say():
    a, b = torch.tensor([3.0, 1, 0, 0]), torch.tensor([0.0, 0, 2, 2])
    report = evaluate.routing_report({"prose": a.expand(2, 1, 4), "code": b.expand(2, 1, 4)})
    assert report.between == {("prose", "code"): 0.0} and report.within == {"prose": 1.0, "code": 1.0}
    assert report.imbalance == pytest.approx(1.5) and report.in_use("code") == pytest.approx(2.0)
    same = evaluate.routing_report({"prose": a.expand(2, 1, 4), "code": a.expand(2, 1, 4)})
    text = evaluate.routing_summary(["old", "new"], [report, same])
    assert "new: 0 of 1 pairs" in text and "-0.2 (code)" in text and "+0.0 (prose)" in text
    assert "old: " not in text and "1 of 1 pairs" in evaluate.routing_summary(["old"], [report])


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_command_prints_tables_and_draws_pictures(finished_run, text_folder, call, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "GGUF_TOKENS", 40)
    files = [finished_run / name for name in ("pretrain.pt", "qat.pt", "mobilemoe.gguf")]
    code, out, err = call(evaluate.main, *files, "--data", text_folder, "--out", tmp_path)
    assert code == 0, err
    for words in ("| pretrain | document |", "| qat | chat |", "llama.cpp", "Largest difference", "From pretrain to qat"):
        assert words in out
    for name in ("progress.png", "routing.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_refuses_what_is_missing_or_wrong(finished_run, text_folder, refused, tmp_path):
    broken, sft = tmp_path / "x.gguf", finished_run / "sft.pt"
    broken.write_bytes(b"GGUF nonsense")
    for arguments, says in [
            (["missing.pt"], "missing.pt"), ([sft, "no.gguf"], "no.gguf"),
            ([finished_run / "mobilemoe.gguf"], "beside"), ([text_folder / "prose.txt"], "prose.txt"),
            ([sft, "--data", "nowhere"], "nowhere"), ([sft, "--out", "nowhere"], "nowhere"),
            ([sft, broken, "--data", text_folder, "--out", tmp_path], "x.gguf")]:
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


def test_lm_evals_own_command_runs_a_local_task(finished_run, local_task, tmp_path):
    command = [sys.executable, evaluate.__file__, "lm-eval", "run", "--model", "mobilemoe", "--model_args",
               f"checkpoint={finished_run / 'sft.pt'}", "--tasks", str(local_task)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|local_sums|" in done.stdout.replace(" ", "")


def test_tasks_prints_the_papers_scores_beside_ours(finished_run, local_task, call, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(evaluate, "MOBILEMOE14", {"local_sums": ("Sums", "acc", 12.3)})
    code, out, err = call(evaluate.main, finished_run / "sft.pt", "--tasks", local_task, "--limit", 4)
    assert code == 0, err
    row = next(line for line in out.splitlines() if line.startswith("| Sums |"))
    assert row.endswith("(acc) | 12.3 |")


@pytest.mark.parametrize("text, says", [
    (None, "sums.yaml"), ("- a list", "sums.yaml"), ("{", "sums.yaml"),
    ("task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\ntest_split: test\n"
     "output_type: multiple_choice\ndoc_to_text: a\ndoc_to_target: 0\ndoc_to_choice: [a, b]\n", "task t")])
def test_refuses_task_files_that_are_missing_or_wrong(finished_run, local_task, refused, monkeypatch, text, says):
    monkeypatch.setattr(sys, "path", list(sys.path))
    local_task.write_text(text or "")
    if text is None:
        local_task.unlink()
    assert says in refused(evaluate.main, finished_run / "sft.pt", "--tasks", local_task)


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
