"""lab/evaluate.py against plain forward passes, llama.cpp, lm-eval's own command, and people's mistakes."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UserError, encode, encode_chat, encode_prompt, load_checkpoint, stop_tokens
from lab import evaluate
from mobilemoe import generate

SUMMARIES = ["Return the sorted list.", "Open a file.", "Compute the mean — élan.", "Close the door.",
             "Raise an error if the name is unknown.", "Print a tree.", "Multiply."]


def conversation(kind, answer, question, reply):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"kind": kind, "answer": answer, "messages": messages}


QUIZ = [conversation("quiz", text, f"What does x.f{n} do?", text) for n, text in enumerate(SUMMARIES)]
SUMS = [conversation("sum of two", reply, question, reply) for question, reply in (
    ("What is 14 + 5?", "14 + 5 = 19. The answer is 19."), ("What is 4 + 5?", "4 + 5 = 9. The answer is 9."))]


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """The finished run with a quiz and a sum among its held-out questions; its own text had none."""
    folder = tmp_path_factory.mktemp("asked")
    for stage in ("pretrain", "sft", "qat"):
        checkpoint = load_checkpoint(finished_run / f"{stage}.pt")
        checkpoint["sft_heldout"] = json.dumps(QUIZ + SUMS)
        for held in checkpoint["heldout"].values():
            held["ids"] = held["ids"][:200].clone()
        torch.save(checkpoint, folder / f"{stage}.pt")
    shutil.copy(finished_run / "mobilemoe.gguf", folder)
    return folder


@pytest.fixture
def sft(run):
    return evaluate.Subject(run / "sft.pt")


def plain(model, ids, first) -> tuple[float, bool]:
    """log P(ids[first:] | ids[:first]) by one forward pass; does greedy decoding say that?"""
    with torch.no_grad():
        rows = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[first - 1:]
    return rows[range(len(rows)), ids[first:]].sum().item(), rows.argmax(-1).tolist() == ids[first:]


def some_ids(count, seed=0):
    return torch.randint(0, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def cells(table: str) -> list[list[str]]:
    """The rows of a Markdown table, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_log_likelihoods_are_those_of_a_plain_forward_pass(sft, lively):
    sft.model = lively()
    sequences = [(some_ids(n, n), first) for n, first in ((2, 1), (40, 39), (17, 3), (65, 1), (30, 20))]
    said = some_ids(12, 5)
    sequences.append((said + list(generate(sft.model, said, 4, temperature=0)), 12))
    found = sft.log_likelihoods(sequences, "test")
    assert [greedy for _, greedy in found] == [False] * 5 + [True]
    for (score, greedy), sequence in zip(found, sequences):
        assert (pytest.approx(score, abs=1e-4), greedy) == plain(sft.model, *sequence)


@pytest.mark.parametrize("length, first, context", [(10, 1, 8), (100, 1, 8), (100, 60, 8), (100, 99, 7)])
def test_each_id_of_a_long_text_is_scored_once_with_half_a_context_before_it(sft, length, first, context):
    """The stand-in says "i + 1 comes after i" at a cost of 1 nat, of 1000 if it has read less than half."""
    def forward(rows):
        assert rows.shape[1] <= context
        little = torch.arange(1, rows.shape[1] + 1) < context // 2
        logits = torch.full((*rows.shape, 300), -1e9).scatter(2, rows[:, :, None] + 1, 0.0)
        logits[:, :, 299] = torch.where(little, 1000, np.log(np.e - 1))
        return logits
    forward.config = sft.model.config
    sft.model, sft.context = forward, context
    (nats, _), = sft.log_likelihoods([(list(range(length)), first)], "test")
    at_the_beginning = max(0, context // 2 - first)
    assert nats == pytest.approx(-1000 * at_the_beginning - (length - first - at_the_beginning), rel=1e-4)


def test_answers_are_those_of_generate_up_to_a_string(sft, capsys):
    stop = stop_tokens(sft.encoding, sft.model.config.vocab_size)

    def wanted(prompt):
        return sft.encoding.decode(list(generate(sft.model, prompt, 12, temperature=0, stop=stop)))
    short = some_ids(5)
    text = wanted(short)
    requests = [(short, 12, []), (short, 12, [text[2:4], text[3:5]]), (short, 0, [])]
    assert sft.answers(requests, "test") == [text, text.split(text[2:4])[0], ""]
    long = some_ids(2 * sft.context, 9)
    assert sft.answers([(long, 12, [])], "test") == [wanted(long[12 - sft.context:])]
    assert "test: 1 prompts do not fit a context" in capsys.readouterr().out


def test_quiz_has_four_choices_and_does_not_depend_on_the_order():
    items = evaluate.quiz_items(QUIZ + SUMS)
    assert [item.answer for item in items] == SUMMARIES and items[0].document == "x.f0\n\n"
    for item in items:
        assert len(set(item.choices)) == 4 and {item.answer} <= set(item.choices) <= set(SUMMARIES)
    assert sorted(evaluate.quiz_items(QUIZ[::-1])) == sorted(items)
    assert evaluate.quiz_items(QUIZ[:3]) == []                  # not enough for four choices


def test_quiz_counts_likelihood_per_byte_and_the_gain_from_the_name(sft):
    item = evaluate.Item("f\n\n", "What does `f` do?", ["ab", "a" * 10, "b" * 20, "c" * 40], "a" * 10)
    # Per byte the right answer comes second (-1, -1.2, -1.5, -0.9), but the name has helped it by 8 nats.
    sequences = []
    nats = (-2, -12, -30, -36, -1, -20, -31, -38)
    sft.log_likelihoods = lambda asked, what: sequences.extend(asked) or [(value, True) for value in nats]
    scores = evaluate.ask_quiz(sft, [item])
    assert (scores["quiz"][0], scores["name gain"][0], scores["quiz"][2]) == (0, 100, 25)
    assert [sft.encoding.decode(ids[first:]) for ids, first in sequences] == item.choices * 2
    assert sequences[1][0][:sequences[1][1]] == evaluate.prompt_ids(sft, item)


def test_a_model_is_asked_in_the_format_of_its_last_stage(run):
    item = evaluate.quiz_items(QUIZ)[1]
    for stage, text, chat in (("pretrain", "x.f1\n\n", False), ("sft", "What does x.f1 do?", True)):
        subject = evaluate.Subject(run / f"{stage}.pt")
        assert evaluate.prompt_ids(subject, item) == encode_prompt(subject.encoding, text, chat)


def test_answers_from_a_file_are_right_or_wrong_by_kind(run, monkeypatch, capsys):
    pytest.importorskip("xllamacpp")
    facts = [conversation("module of", f"`{name}` is in the module `os`.", f"Where is {name}?", "")
             for name in ("walk", "remove")]
    said = ["14 + 5 = 19. The answer is 19.", "5.", "I do not know `walk`.",
            "`remove` is in the module `os`."]
    ask = evaluate.common.ask_llama_cpp
    monkeypatch.setattr(evaluate.common, "ask_llama_cpp", lambda path, **question: {
        "answers": said[:len(ask(path, **question)["answers"])]})
    scores = evaluate.ask_skills("x", run / "mobilemoe.gguf", {"sum of two": SUMS, "module of": facts})
    for kind in ("sum of two", "module of"):
        assert scores[kind].tolist() == pytest.approx([50, 100 * (0.25 / 2) ** 0.5, 50])
    assert '"I do not know" to 50.0% of 2 facts' in capsys.readouterr().out
    assert evaluate.score([False] * 10, 0.25)[1] > 0            # ten answers are not certainty


def test_llama_cpp_agrees_on_the_exported_file(run):
    """... on special tokens and bytes that are no character, too."""
    pytest.importorskip("xllamacpp")
    qat = evaluate.Subject(run / "qat.pt")
    qat.context = 64                # two windows of 63 tokens
    ids = (encode_prompt(qat.encoding, "3 + 4 — 字 — is 7.\n", chat=True) + some_ids(127))[:127]
    qat.held_out = {"prose": {"ids": torch.tensor(ids)}}
    with torch.no_grad():
        (_, ours, theirs, same), = cells(evaluate.compare_with_llama_cpp(run / "mobilemoe.gguf", qat))
    nats = -plain(qat.model, ids[:64], 1)[0] - plain(qat.model, ids[63:], 1)[0]
    assert float(ours) == pytest.approx(nats / np.log(2) / 126, abs=1e-3)
    assert float(ours) == pytest.approx(float(theirs), abs=5e-3) and float(same.rstrip("%")) > 90


def test_routing_shares_count_every_route_and_the_table_says_what_is_in_common(sft):
    sft.held_out = {"short": {"ids": torch.tensor(some_ids(40))}}           # two windows, a half each
    seen = []
    router = sft.model.model.layers[1].feed_forward.router
    router.register_forward_hook(lambda router, inputs, output: seen.append(output[1].flatten()))
    with torch.no_grad():
        share = evaluate.routing_shares(sft)["short"]                       # [2, layers, E]
    for half, experts in zip(share[:, 1], seen):
        assert torch.allclose(half, experts.bincount(minlength=len(half)) / len(experts))
    prose = torch.tensor([0.75, 0.25, 0, 0]).expand(2, 1, 4)
    code = torch.tensor([0, 0.5, 0.5, 0]).expand(2, 1, 4)
    assert cells(evaluate.routing_table("x", {"prose": prose, "code": code})) == [
        ["prose", "1.8", "1.00", "0.25"], ["code", "2.0", "0.25", "1.00"]]


def test_command_prints_tables_and_draws_pictures(run, finished_run, call, tmp_path):
    files = [run / name for name in ("pretrain.pt", "qat.pt", "mobilemoe.gguf")]
    code, out, err = call(evaluate.main, *files, "--out", tmp_path / "new")
    assert code == 0, err
    for words in ("quiz of 7", " document |", " chat |", "in llama.cpp", "routes in", "| sum of two",
                  f"{run.name}/qat", "mobilemoe.gguf"):
        assert words in out
    assert (tmp_path / "new" / "routing.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = call(evaluate.main, finished_run / "sft.pt", "--out", tmp_path)       # has no questions
    assert (code, err) == (0, "") and "sum of two" not in out and "asked as | prose | maths |" in out


def test_refuses_what_is_missing_or_wrong(run, finished_run, refused, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    for arguments, says in [(["missing.pt"], "missing.pt"), ([run / "mobilemoe.gguf"], "beside"),
                            ([run / "sft.pt", finished_run / "sft.pt"], "different texts"),
                            ([run / "sft.pt", tmp_path / "x.gguf", "--out", tmp_path], "x.gguf")]:
        assert says in refused(evaluate.main, *arguments)


@pytest.fixture(scope="module")
def adapter(finished_run):
    pytest.importorskip("lm_eval")
    return evaluate.register_with_lm_eval()(str(finished_run / "sft.pt"))


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def test_adapter_gives_the_log_likelihoods_of_a_plain_forward_pass(adapter):
    encoding, model = adapter.subject.encoding, adapter.subject.model
    pairs = [("What is 3 + 7?", " 10."), ("", "Some text"), ("It ends in space ", "and goes on"), ("x", "y")]
    found = adapter.loglikelihood(requests(*pairs))
    for (context, continuation), (nats, greedy) in zip(pairs, found):
        ids = encode_prompt(encoding, context + continuation, chat=False)
        first = min(1 + len(encode(encoding, context.rstrip())), len(ids) - 1)
        assert (pytest.approx(nats, abs=1e-4), greedy) == plain(model, ids, first)
    assert adapter.loglikelihood(requests(("", ""), ("some", ""))) == [(0, True)] * 2
    wanted, _ = plain(model, encode_prompt(encoding, "a whole text", chat=False), 1)
    found = adapter.loglikelihood_rolling(requests(("a whole text",), ("",)))
    assert found == pytest.approx([wanted, 0], abs=1e-4)


def test_adapter_generates_by_lm_evals_conventions(adapter):
    prompt = encode_prompt(adapter.subject.encoding, "Python is", chat=False)
    ids = list(generate(adapter.subject.model, prompt, 8, temperature=0))
    text = adapter.subject.encoding.decode(ids)
    for options, wanted in [
            ({"max_gen_toks": 8}, text),
            ({"max_new_tokens": 8, "until": [""]}, text),
            ({"max_completion_tokens": 8, "until": text[1:3]}, text.split(text[1:3])[0]),
            ({"max_tokens": 0}, "")]:
        assert adapter.generate_until(requests(("Python is", options))) == [wanted], options
    with pytest.raises(UserError, match="greedily"):
        adapter.generate_until(requests(("x", {"do_sample": True})))


def test_adapter_speaks_the_chat_format_of_training(adapter):
    encoding = adapter.subject.encoding
    chat = [{"role": role, "content": f"{role}:\nthis"} for role in ("system", "user", "assistant", "user")]
    text = adapter.apply_chat_template(chat)
    prompt = encode_chat(encoding, chat, reply=True)
    assert adapter.encode(text) == prompt
    assert adapter.encode_pair(text, "Yes") == (prompt + encode(encoding, "Yes").tolist(), len(prompt))
    chat.append({"role": "assistant", "content": "The answer is"})          # begun, for the model to go on
    text = adapter.apply_chat_template(chat, add_generation_prompt=False)
    assert adapter.encode(text) == prompt + encode(encoding, "The answer is").tolist()


def test_lm_evals_own_command_runs_a_local_task(finished_run, adapter, tmp_path, monkeypatch):
    """A YAML and a JSON file, nothing from a network."""
    rows = [{"question": f"What is {a} + 7?", "choices": [f"{a + 7}.", f"{a + 9}."]} for a in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "sums.yaml"
    task.write_text(f"""{{task: local_sums, dataset_path: json, test_split: train, doc_to_target: 0,
dataset_kwargs: {{data_files: {tmp_path / 'sums.jsonl'}}}, output_type: multiple_choice,
doc_to_text: "{{{{question}}}}", doc_to_choice: "{{{{choices}}}}", metric_list: [{{metric: acc}}]}}""")
    order = ["run", "--model=mobilemoe", f"--model_args=checkpoint={finished_run / 'sft.pt'}", "--tasks"]
    command = [sys.executable, "-m", "lab.evaluate", "lm-eval", *order, task, "--apply_chat_template"]
    done = subprocess.run(command, cwd=Path(evaluate.__file__).parent.parent, capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and "|local_sums|" in done.stdout, done.stderr[-2000:]
    monkeypatch.setattr(evaluate, "register_with_lm_eval", lambda: None)    # `adapter` has
    with pytest.raises(UserError, match="lm-eval: .*missing.yaml"):
        evaluate.run_lm_eval([*order, str(tmp_path / "missing.yaml")])


def test_the_papers_list_has_fourteen_tasks_that_lm_eval_knows(monkeypatch):
    main = pytest.importorskip("lm_eval.__main__")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(evaluate, "register_with_lm_eval", lambda: None)
    monkeypatch.setattr(main, "cli_evaluate", lambda: None)
    evaluate.run_lm_eval(["run", "--tasks", "mobilemoe14", "--output_path", "out/mobilemoe14"])
    names = sys.argv[3].split(",")
    assert len(names) == 14 and sys.argv[5] == "out/mobilemoe14"
    tasks = Path(main.__file__).parent / "tasks"
    folders = ("*", "mmlu/default", "super_glue/boolq", "bbh/cot_fewshot")
    texts = "\n".join(path.read_text() for folder in folders for path in tasks.glob(f"{folder}/*.yaml"))
    assert all(f"task: {name}\n" in texts or f"group: {name}\n" in texts for name in names)
