"""The exported file against outside judges: the official gguf reader, llama.cpp, tiktoken."""
import dataclasses
import math
import os
import pydoc_data.topics
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

import export_mobile
from common import ask_llama_cpp, encode_chat, load_checkpoint
from data import SPECIAL_TOKENS, make_tokenizer, tokenizer_to_dict, train_bpe
from mobilemoe import PRESETS, model_from_checkpoint
from quantize import attach, fake_quant, master_state_dict

VOCAB = 1024
TEST = dataclasses.replace(PRESETS["test"], vocab_size=VOCAB + 32)      # 32 ids that no token has
DENSE = dataclasses.replace(TEST, n_experts=1, granularity=1, shared_expert=False)
TRICKY = [
    "", " ", "\n\n\n", " \n \n  x", "\t\t\tx", "a  b   c    d", "x = 1\n    y = 2\n\n\n     z", "end\n ",
    "0123456789", "1 22 333 4444", "3.14159e-10", "١٢٣٤", "½²", "I'll WE'RE don't 'sS", "'ſ", "\r\n\r",
    "naïve café e\u0301", "ПриветМир Ελληνικά עברית العربية", "हिन्दी ไทย 한국어 日本", "mixedТекст混合text",
    "👍🏽👨\u200d👩👧🇩🇪 ❤️", "\U0001f9ff\U000e0041", "\x00\x01\x1b[0m\x7f\x80", "\ufffd\uffff", "\ufeffB",
    "\x0b\x0c\x1c\x85\xa0\u2028\u3000x", "\u200b\u2060", "!!!???;;;", "(((([[[[{", "__init__ --flag ==>",
    "http://a.b/c?d=e&f#g", "a" * 300, " " * 300, "ab" * 200, "\n" * 100, *SPECIAL_TOKENS, "x<|eot_id|>y"]
TOPICS = pydoc_data.topics.topics.values()
PASSAGES = [part for topic in TOPICS for part in topic.split("\n\n") if part.strip()]


@pytest.fixture(scope="module")
def encoding():
    return make_tokenizer(train_bpe(PASSAGES[::3] + TRICKY, VOCAB), "test-bpe")


def export(model, encoding, path, dtype="q4_0", qat=False) -> Path:
    tensor = master_state_dict(model).__getitem__
    export_mobile.export(model.config, tensor, tokenizer_to_dict(encoding), path, dtype, qat)
    return path


@pytest.fixture(scope="module")
def exported(lively, encoding, tmp_path_factory):
    model = lively(TEST)
    return model, export(model, encoding, tmp_path_factory.mktemp("export") / "test.gguf")

# ----------------------------------------------------------------------------------------------------------
# The official reader


def test_official_reader_reads_every_field(exported, encoding):
    reader = gguf.GGUFReader(exported[1])
    fields = {name.removeprefix("glm4moe."): field.contents() for name, field in reader.fields.items()}
    for name, value in {
            "GGUF.version": 3, "general.architecture": "glm4moe", "general.file_type": 2, "block_count": 2,
            "embedding_length": 64, "attention.head_count": 2, "attention.head_count_kv": 1,
            "expert_count": 14, "expert_used_count": 2, "expert_feed_forward_length": 64,
            "expert_shared_count": 2, "expert_gating_func": 2, "expert_weights_scale": 2.5,
            "tokenizer.ggml.eot_token_id": encoding.encode_single_token("<|eot_id|>")}.items():
        assert fields[name] == value, name
    types = fields["tokenizer.ggml.token_type"]
    assert [types.count(kind) for kind in (1, 3, 5)] == [VOCAB - len(SPECIAL_TOKENS), len(SPECIAL_TOKENS), 32]
    assert len(set(fields["tokenizer.ggml.tokens"])) == len(types) == TEST.vocab_size
    plan = export_mobile.tensor_plan(TEST, export_mobile.Q4_0, export_mobile.Q4_0)
    found = [(tensor.name, tuple(tensor.shape[::-1]), tensor.tensor_type) for tensor in reader.tensors]
    assert found == [(entry.name, entry.shape, entry.kind) for entry in plan]


@pytest.mark.parametrize("dtype, qat", [
    ("q4_0", True), ("f32", True), ("f32", False), ("f16", False), ("q8_0", False)])
def test_file_holds_the_weights_that_were_trained(exported, encoding, tmp_path, dtype, qat):
    """QAT's masters as rounded in training, bit for bit; other weights as they are, in Q8_0 nearly.

    Sorted here. That each lies where llama.cpp looks for it is what the next tests show.
    """
    def in_order(tensors) -> torch.Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors]).sort().values
    weights = [weight for name, weight in exported[0].state_dict().items()
               if weight.dim() > 1 and "router" not in name]
    ours = in_order(fake_quant(weight, dim=1) if qat else weight for weight in weights)
    reader = gguf.GGUFReader(export(exported[0], encoding, tmp_path / "x.gguf", dtype, qat))
    its = in_order(torch.tensor(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors
                   if len(tensor.shape) > 1 and "gate_inp" not in tensor.name)
    if dtype == "q8_0":
        assert (ours - its).abs().max() <= ours.abs().max() / 127
    else:
        assert torch.equal(ours.half().float() if dtype == "f16" else ours, its)

# ----------------------------------------------------------------------------------------------------------
# llama.cpp


def compare(model, path, ids, last, kv="f32") -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of PyTorch and of llama.cpp at the last positions of a text, each [last, V]."""
    with torch.no_grad():
        ours = model(ids[None])[0, -last:].log_softmax(-1).numpy()
    prompts = [ids[:end].tolist() for end in range(len(ids) - last + 1, len(ids) + 1)]
    return ours, ask_llama_cpp(path, prompts=prompts, kv=kv, threads=1)["logprobs"]


IDS = torch.randint(0, VOCAB, (1000,), generator=torch.Generator().manual_seed(1))
OTHER = dataclasses.replace(TEST, d_head=64, n_heads=4, top_k=3, norm_eps=1e-6, rope_theta=1e4)
NO_SHARED = dataclasses.replace(TEST, shared_expert=False)


@pytest.mark.parametrize("config", [TEST, DENSE, NO_SHARED, OTHER], ids=["moe", "dense", "alone", "other"])
def test_llama_cpp_computes_the_same_function(lively, config, encoding, tmp_path):
    model = lively(config)
    ours, theirs = compare(model, export(model, encoding, tmp_path / "x.gguf", "f32"), IDS[:48], 40)
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("config", [TEST, DENSE], ids=["moe", "dense"])
def test_llama_cpp_computes_what_qat_trains(lively, config, encoding, tmp_path):
    """4-bit weights times 8-bit activations: attach(model) has the phone's arithmetic, too."""
    model = lively(config)
    ours, theirs = compare(attach(model), export(model, encoding, tmp_path / "x.gguf"), IDS[:48], 40)
    # Where two experts nearly tie, a last bit decides: one position in forty may differ.
    assert np.median(np.abs(ours - theirs).max(axis=1)) < 1e-4
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.97


def test_llama_cpp_predicts_what_the_finished_run_does(finished_run):
    """From training to the phone's runtime: held-out text, the default F16 cache."""
    checkpoint = load_checkpoint(finished_run / "qat.pt")
    model = attach(model_from_checkpoint(checkpoint))
    for held in checkpoint["heldout"].values():
        ids = torch.as_tensor(held["ids"][:checkpoint["context"] - 1], dtype=torch.int64)
        ours, theirs = compare(model, finished_run / "mobilemoe.gguf", ids, len(ids), kv="f16")
        assert (np.exp(ours) * (ours - theirs)).sum(-1).mean() < 0.005
        assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.98


def test_rope_scaling_is_nearly_kept(lively, encoding, tmp_path):
    """Pairs that the released scaling slows stand still in the file: closer than turning them unslowed."""
    config = dataclasses.replace(TEST, d_head=64, max_context=16384, rope_scaling=True)
    path = export(lively(config), encoding, tmp_path / "x.gguf", "f32")
    ours, theirs = compare(lively(config), path, IDS, 20)
    unscaled, _ = compare(lively(dataclasses.replace(config, rope_scaling=False)), path, IDS, 20)
    kl = (np.exp(ours) * (ours - theirs)).sum(-1).mean()
    assert kl < 1e-3 and (np.exp(ours) * (ours - unscaled)).sum(-1).mean() > 100 * kl
    assert gguf.GGUFReader(path).fields["glm4moe.context_length"].contents() == 8192


def test_tokens_are_those_of_tiktoken(exported, encoding):
    alphabet, letters = "aaabet 's\n\n  \t.,_()123éßжあ字👍\u0301\u200d\x00<|eot_id|>", random.Random(0)
    noise = ["".join(letters.choices(alphabet, k=60)) for _ in range(500)]
    texts = TRICKY + noise + ["\n\n".join(PASSAGES)] + PASSAGES[1::3] + PASSAGES[2::3]
    for text, ids in zip(texts, ask_llama_cpp(exported[1], texts=texts)["tokens"]):
        assert ids == encoding.encode_ordinary(text), text


def test_chat_template_is_encode_chat(exported, encoding):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?\n\nwords"},
                {"role": "assistant", "content": "  Four.\n"}, {"role": "user", "content": "1 more 👍 "}]
    theirs = ask_llama_cpp(exported[1], template=messages)["tokens"]
    assert theirs == encode_chat(encoding, messages, reply=True)

# ----------------------------------------------------------------------------------------------------------
# The command line


def save_checkpoint(model, encoding, path, quantized) -> None:
    torch.save({"format": "mobilemoe/1", "config": dataclasses.asdict(model.config), "quantized": quantized,
                "model": model.state_dict(), "tokenizer": tokenizer_to_dict(encoding)}, path)


def test_checkpoint_exports_as_its_model_does_and_answers(exported, encoding, tmp_path, call):
    path = tmp_path / "x.gguf"
    save_checkpoint(exported[0], encoding, tmp_path / "qat.pt", quantized=True)
    code, out, _ = call(export_mobile.main, tmp_path / "qat.pt", "--out", path, "--ask", "Well?")
    assert code == 0 and path.read_bytes() == exported[1].read_bytes()
    assert re.match(r".*x\.gguf: 0\.\d MB, 34 tensors for glm4moe, .*\nQ: Well\?\nA: ", out)


@pytest.mark.parametrize("value, quantized, refusing", [
    (math.nan, False, "f32 f16 q8_0 q4_0"), (-math.inf, True, "f32 f16 q8_0 q4_0"), (6e4, False, ""),
    (-6.2e4, True, "f16"),                  # QAT's lattice takes it to -8 * 6.2e4 / 7.5
    (7e4, False, "f16"), (-5e5, False, "f16 q4_0"), (9e6, False, "f16 q4_0 q8_0")])
@pytest.mark.parametrize("name", ["self_attn.o_proj.weight", "feed_forward.experts.gate_up_proj"])
def test_weights_that_the_file_cannot_hold_are_refused_by_name(
        value, quantized, refusing, name, lively, encoding, tmp_path, call, refused):
    """FP16 ends at 65,504. Q8_0 stores max/127 of a block in it, Q4_0 max/7.5."""
    model = lively(TEST)
    model.get_parameter(f"model.layers.1.{name}").data.flatten()[7] = value
    save_checkpoint(model, encoding, tmp_path / "x.pt", quantized)
    for dtype in ("f32", "f16", "q8_0", "q4_0"):
        arguments = (tmp_path / "x.pt", "--out", tmp_path / "x.gguf", "--dtype", dtype)
        if dtype in refusing.split():
            assert f"model.layers.1.{name} holds " in refused(export_mobile.main, *arguments)
            assert os.listdir(tmp_path) == ["x.pt"]
            continue
        assert call(export_mobile.main, *arguments)[0] == 0
        for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
            assert np.isfinite(dequantize(tensor.data, tensor.tensor_type)).all()
        (tmp_path / "x.gguf").unlink()


def test_a_norm_that_is_not_finite_is_refused_whatever_the_matrices_are(lively, encoding, tmp_path, refused):
    model = lively(TEST)
    model.model.norm.weight.data[5] = math.nan
    save_checkpoint(model, encoding, tmp_path / "x.pt", False)
    line = refused(export_mobile.main, tmp_path / "x.pt", "--out", tmp_path / "x.gguf")
    assert "model.norm.weight holds nan" in line and os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("arguments, says", [
    ([], "required"), (["missing.pt", "--preset", "S"], "not allowed"), (["--preset", "XXL"], "XXL"),
    (["missing.pt"], "missing.pt"), (["cut.pt"], "cut.pt"),
    (["--preset", "test", "--out", "no/x.gguf"], "no folder"), (["--preset", "many"], "512 experts"),
    (["--preset", "scaled"], "rope_scaling")])
def test_refuses_in_one_line(refused, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "many", dataclasses.replace(TEST, n_experts=200))
    monkeypatch.setitem(PRESETS, "scaled", dataclasses.replace(DENSE, rope_scaling=True))
    Path("cut.pt").write_bytes(b"PK\3\4")
    assert says in refused(export_mobile.main, "--out", "x.gguf", *arguments)
    assert os.listdir() == ["cut.pt"]


def test_the_checkpoint_is_not_overwritten(run_with, refused):
    run = run_with("sft")
    for name in ("sft.pt", f"../{run.name}/sft.pt"):
        assert "choose another --out" in refused(export_mobile.main, run / "sft.pt", "--out", run / name)
    load_checkpoint(run / "sft.pt")


def test_full_disk_leaves_nothing_behind(refused, tmp_path):
    """The system stops a file at 200 kB, amid the weights; an older file of that name survives."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.gguf"
    path.write_bytes(b"older")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        assert "large" in refused(export_mobile.main, "--preset", "test", "--out", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["x.gguf"] and path.read_bytes() == b"older"


@pytest.mark.slow
def test_preset_s_size_time_and_memory(tmp_path):
    """The released shape: 713.9 MB within 1 %, under 90 s, under 8 GB, and llama.cpp runs it."""
    resource = pytest.importorskip("resource")
    start, path = time.monotonic(), tmp_path / "s.gguf"
    subprocess.run([sys.executable, export_mobile.__file__, "--preset", "S", "--out", path], check=True)
    assert time.monotonic() - start < 90
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 8e9
    assert path.stat().st_size == pytest.approx(713.9e6, rel=0.01)
    predicted = ask_llama_cpp(path, prompts=[[1, 2, 3]])["logprobs"]
    assert predicted.shape == (1, 128_256) and np.exp(predicted).sum() == pytest.approx(1, abs=1e-3)
