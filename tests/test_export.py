"""The exported file against outside judges: the official gguf reader, llama.cpp, tiktoken."""
import dataclasses
import os
import pydoc_data.topics
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

import export_mobile
from data import SPECIAL_TOKENS, make_tokenizer, tokenizer_to_dict, train_bpe
from mobilemoe import PRESETS, UserError, encode_chat, load_checkpoint, model_from_checkpoint
from quantize import attach, fake_quant, master_state_dict

VOCAB = 1024
TEST = dataclasses.replace(PRESETS["test"], vocab_size=VOCAB + 32)      # 32 ids that no token has
DENSE = dataclasses.replace(TEST, n_experts=1, granularity=1, shared_expert=False)

TRICKY = [
    "", " ", "  ", "\n", "\n\n\n", " \n \n  x", "\t\t\tx", "a  b   c    d", "x = 1\n    y = 2\n\n\n     z", "end  ", "end\n ",
    "0123456789", "1 22 333 4444 55555", "3.14159e-10", "١٢٣٤", "½²₃", "I'll WE'RE they'Ve don't 'sS", "'ſ",
    "naïve café Ångström", "e\u0301 vs \u00e9", "ПриветМир Ελληνικά עברית العربية", "हिन्दी ไทย 한국어 日本語 中文",
    "mixedТекст混合text",
    "👍👍🏽👨‍👩‍👧‍👦🇩🇪 ❤️", "\U0001f9ff\U000e0041", "\x00\x01\x1b[0m\x7f\x80\x9f", "\r\n\r\r\n",
    "\x0b\x0c\x1c\x85\xa0\u2028\u3000x", "\ufeffBOM \u200b\u200d\u2060", "\ufffd\uffff", "!!!???...;;;", "(((([[[[{{{{",
    "__init__ --flag ==> <!--", "http://a.b/c?d=e&f#g", "Ġ Ċ Ā âĢĻ", "a" * 300, " " * 300, "ab" * 200, "\n" * 100,
    *SPECIAL_TOKENS, "x<|eot_id|>y <|begin_of_text|>", "<|eot_id", "[UNUSED_1024]"]


def passages() -> tuple[list[str], list[str]]:
    """Paragraphs of Python's language reference: to train a tokenizer on, and at least 1,000 that it has not seen."""
    found = [part for topic in pydoc_data.topics.topics.values() for part in topic.split("\n\n") if part.strip()]
    return found[::3], [part for n, part in enumerate(found) if n % 3]


@pytest.fixture(scope="module")
def encoding():
    return make_tokenizer(train_bpe(passages()[0] + TRICKY, VOCAB), "test-bpe")


def export(model, encoding, path, dtype="q4_0", qat=False) -> Path:
    export_mobile.export(model.config, master_state_dict(model).__getitem__, tokenizer_to_dict(encoding), path, dtype, qat)
    return path


@pytest.fixture(scope="module")
def exported(lively, encoding, tmp_path_factory):
    model = lively(TEST)
    return model, export(model, encoding, tmp_path_factory.mktemp("export") / "test.gguf")


# ----------------------------------------------------------------------------------------------------------------------
# The official reader


def test_official_reader_reads_every_field(exported, encoding):
    model, path = exported
    reader = gguf.GGUFReader(path)
    wanted = {"GGUF.version": 3, "general.architecture": "glm4moe", "general.file_type": 2, "general.alignment": 32,
              "glm4moe.block_count": 2, "glm4moe.embedding_length": 64, "glm4moe.context_length": 64,
              "glm4moe.attention.head_count": 2, "glm4moe.attention.head_count_kv": 1, "glm4moe.rope.dimension_count": 32,
              "glm4moe.rope.freq_base": 500_000.0, "glm4moe.expert_count": 14, "glm4moe.expert_used_count": 2,
              "glm4moe.expert_feed_forward_length": 64, "glm4moe.expert_shared_count": 2, "glm4moe.expert_gating_func": 2,
              "glm4moe.expert_weights_norm": True, "glm4moe.expert_weights_scale": 2.5, "tokenizer.ggml.model": "gpt2",
              "tokenizer.ggml.bos_token_id": encoding.encode_single_token("<|begin_of_text|>"),
              "tokenizer.ggml.eot_token_id": encoding.encode_single_token("<|eot_id|>")}
    for key, value in wanted.items():
        assert reader.fields[key].contents() == value, key
    tokens, types = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert len(tokens) == len(set(tokens)) == len(types) == TEST.vocab_size
    assert [types.count(kind) for kind in (1, 3, 5)] == [VOCAB - len(SPECIAL_TOKENS), len(SPECIAL_TOKENS), 32]
    metadata = {**export_mobile.model_metadata(TEST, export_mobile.Q4_0),
                **export_mobile.tokenizer_metadata(tokenizer_to_dict(encoding), TEST.vocab_size)}
    for key, value in metadata.items():
        assert reader.fields[key].contents() == pytest.approx(list(value) if isinstance(value, np.ndarray) else value), key
    assert {key for key in reader.fields if not key.startswith("GGUF.")} == set(metadata)

    plan = {entry.name: entry for entry in export_mobile.tensor_plan(TEST, export_mobile.Q4_0)}
    assert [tensor.name for tensor in reader.tensors] == list(plan)
    for tensor in reader.tensors:
        assert (tuple(tensor.shape[::-1]), tensor.tensor_type) == (plan[tensor.name].shape, plan[tensor.name].kind)
        assert tensor.data_offset % 32 == 0
    last = reader.tensors[-1]
    assert last.data_offset + last.n_bytes + -last.n_bytes % 32 == path.stat().st_size


def expected_tensors(model, weight) -> dict[str, torch.Tensor]:
    """The file's tensors by name, laid out independently of export_mobile; `weight(name)` is what they should hold."""
    c = model.config
    rows = [head * c.d_head + pair * 2 + odd for head in range(c.n_heads) for odd in (0, 1) for pair in range(c.d_head // 2)]
    tensors = {"token_embd.weight": weight("model.embed_tokens.weight"), "output_norm.weight": weight("model.norm.weight")}
    for n in range(c.n_layers):
        ours, theirs = f"model.layers.{n}.", f"blk.{n}."
        for file_name, name in (("attn_norm", "input_layernorm.weight"), ("attn_v", "self_attn.v_proj.weight"),
                                ("attn_output", "self_attn.o_proj.weight"), ("ffn_gate_inp", "feed_forward.router.weight"),
                                ("post_attention_norm", "post_attention_layernorm.weight")):
            tensors[f"{theirs}{file_name}.weight"] = weight(ours + name)
        tensors[f"{theirs}attn_q.weight"] = weight(ours + "self_attn.q_proj.weight")[rows]
        tensors[f"{theirs}attn_k.weight"] = weight(ours + "self_attn.k_proj.weight")[rows[:c.n_kv_heads * c.d_head]]
        tensors[f"{theirs}attn_q_norm.weight"] = tensors[f"{theirs}attn_k_norm.weight"] = torch.ones(c.d_head)
        tensors[f"{theirs}exp_probs_b.bias"] = weight(ours + "feed_forward.expert_bias")
        gate_up, down = (weight(f"{ours}feed_forward.experts.{part}_proj") for part in ("gate_up", "down"))
        for part, experts in zip(("gate", "up", "down"), (*gate_up.chunk(2, dim=-1), down)):
            tensors[f"{theirs}ffn_{part}_exps.weight"] = torch.stack([expert.T for expert in experts])
            tensors[f"{theirs}ffn_{part}_shexp.weight"] = weight(f"{ours}feed_forward.shared_expert.{part}_proj.weight")
    return tensors


@pytest.mark.parametrize("dtype, qat", [("q4_0", True), ("f32", True), ("f32", False), ("f16", False), ("q8_0", False)])
def test_file_holds_the_weights(exported, encoding, tmp_path, dtype, qat):
    """Q4_0, and QAT masters in F32: the fake-quantised weights, bit for bit. F32 and F16: the weights. Q8_0: nearly."""
    model, _ = exported
    state = model.state_dict()

    def weight(name):
        exact = state[name].dim() == 1 or name.endswith("router.weight") or not qat
        return state[name] if exact else fake_quant(state[name], dim=1)
    path = export(model, encoding, tmp_path / "x.gguf", dtype, qat)
    expected = expected_tensors(model, weight)
    reader = gguf.GGUFReader(path)
    assert {tensor.name for tensor in reader.tensors} == set(expected)
    for tensor in reader.tensors:
        found, wanted = dequantize(tensor.data, tensor.tensor_type), expected[tensor.name].contiguous().numpy()
        if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            wanted = wanted.astype(np.float16).astype(np.float32)
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            assert np.abs(found - wanted).max() <= np.abs(wanted).max() / 127
        else:
            assert found.tobytes() == wanted.tobytes(), tensor.name


# ----------------------------------------------------------------------------------------------------------------------
# llama.cpp


def compare(model, path, ids, last) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of PyTorch and of llama.cpp at the last positions of a text, each [last, V]."""
    with torch.no_grad():
        ours = model(ids[None])[0, -last:].log_softmax(-1).numpy()
    return ours, llama_cpp.position_logprobs(path, ids.tolist(), len(ids) - last, last, f32_cache=True)


def some_ids(count):
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [
    pytest.param(TEST, id="moe"), pytest.param(dataclasses.replace(TEST, shared_expert=False), id="no shared expert"),
    pytest.param(dataclasses.replace(TEST, d_head=64, n_heads=4, top_k=3, norm_eps=1e-6, rope_theta=1e4, routed_scale=1.0),
                 id="every number changed"), pytest.param(DENSE, id="dense")])
def test_llama_cpp_computes_the_same_function(lively, config, encoding, tmp_path):
    model = lively(config)
    ours, theirs = compare(model, export(model, encoding, tmp_path / "x.gguf", "f32"), some_ids(48), 40)
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("config", [pytest.param(TEST, id="moe"), pytest.param(DENSE, id="dense")])
def test_llama_cpp_computes_what_qat_trains(lively, config, encoding, tmp_path):
    """4-bit weights times 8-bit activations: attach(model) is the phone's arithmetic, not only its weights."""
    model = lively(config)
    ours, theirs = compare(attach(model), export(model, encoding, tmp_path / "x.gguf"), some_ids(48), 40)
    # Where two experts nearly tie, a last bit decides: one position in forty may differ.
    assert np.median(np.abs(ours - theirs).max(axis=1)) < 1e-4
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.97


def test_llama_cpp_predicts_what_the_finished_run_does(finished_run):
    """From training to the phone's runtime, held-out text, the default F16 cache."""
    checkpoint = load_checkpoint(finished_run / "qat.pt")
    model, length = attach(model_from_checkpoint(checkpoint)), checkpoint["context"] - 1
    for held in checkpoint["heldout"].values():
        ids = torch.as_tensor(held["ids"][:length], dtype=torch.int64)
        with torch.no_grad():
            ours = model(ids[None])[0].log_softmax(-1).numpy()
        theirs = llama_cpp.position_logprobs(finished_run / "mobilemoe.gguf", ids.tolist(), 0, len(ids))
        assert (np.exp(ours) * (ours - theirs)).sum(-1).mean() < 0.005
        assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.98


def test_rope_scaling_is_nearly_kept(lively, encoding, tmp_path):
    """Pairs that the released scaling stretches stand still in the file: far closer than turning them unstretched."""
    config = dataclasses.replace(TEST, d_head=64, max_context=16384, rope_scaling=True)
    model, plain = lively(config), lively(dataclasses.replace(config, rope_scaling=False))
    path = export(model, encoding, tmp_path / "x.gguf", "f32")
    ours, theirs = compare(model, path, some_ids(1000), 20)
    kl = (np.exp(ours) * (ours - theirs)).sum(-1).mean()
    with torch.no_grad():
        unscaled = plain(some_ids(1000)[None])[0, -20:].log_softmax(-1).numpy()
    assert kl < 1e-3
    assert (np.exp(ours) * (ours - unscaled)).sum(-1).mean() > 100 * kl
    assert gguf.GGUFReader(path).fields["glm4moe.context_length"].contents() == 8192


def test_tokens_are_those_of_tiktoken(exported, encoding):
    unseen, letters = passages()[1], random.Random(0)
    alphabet = "aaabet 's\n\n  \t.,_()123éßжあ字👍\u0301\u200d\x00<|eot_id|>"
    noise = ["".join(letters.choices(alphabet, k=60)) for _ in range(500)]
    texts = TRICKY + noise + ["\n\n".join(unseen)] + unseen
    assert len(unseen) >= 1000
    for text, ids in zip(texts, llama_cpp.tokenize(exported[1], texts)):
        assert ids == encoding.encode_ordinary(text), text


def test_chat_template_is_encode_chat(exported, encoding):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?\n\n(in words)"},
                {"role": "assistant", "content": "Four."}, {"role": "user", "content": "1 more 👍"}]
    assert llama_cpp.chat_tokens(exported[1], messages) == encode_chat(encoding, messages, reply=True)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused: one line, and nothing half-written


def drop(mapping: dict, key) -> dict:
    return {name: value for name, value in mapping.items() if name != key}


def broken(checkpoint: dict, what: str) -> dict:
    tokenizer, state = checkpoint["tokenizer"], checkpoint["model"]
    lines = tokenizer["ranks"].splitlines()
    q_proj = "model.layers.1.self_attn.q_proj.weight"
    return {**checkpoint, **{
        "no tensor": {"model": drop(state, "model.norm.weight")},
        "wrong shape": {"model": {**state, q_proj: torch.zeros(64, 96)}},
        "impossible config": {"config": {**checkpoint["config"], "top_k": 99}},
        "too many experts": {"config": {**checkpoint["config"], "n_experts": 200}},
        "dense and scaled": {"config": {**dataclasses.asdict(DENSE), "rope_scaling": True}},
        "no byte": {"tokenizer": {**tokenizer, "ranks": "\n".join(lines[:97] + lines[98:])}},
        "other pattern": {"tokenizer": {**tokenizer, "pattern": r"\w+|\W+"}},
        "no special": {"tokenizer": {**tokenizer, "special_tokens": drop(tokenizer["special_tokens"], "<|eot_id|>")}},
        "too many tokens": {"config": {**checkpoint["config"], "vocab_size": 512}},
    }[what]}


@pytest.fixture(scope="module")
def checkpoint(exported, encoding):
    model, _ = exported
    return {"format": "mobilemoe/1", "config": dataclasses.asdict(TEST), "stage": "qat", "step": 1, "quantized": True,
            "model": model.state_dict(), "tokenizer": tokenizer_to_dict(encoding)}


def test_checkpoint_exports_as_its_model_does(exported, checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "qat.pt")
    line = export_mobile.export_checkpoint(tmp_path / "qat.pt", tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == exported[1].read_bytes()
    assert "x.gguf" in line and "MB" in line and "\n" not in line


@pytest.mark.parametrize("what, says", [
    ("no tensor", "model.norm.weight"), ("wrong shape", "q_proj"), ("impossible config", "99 active"),
    ("too many experts", "512"), ("dense and scaled", "rope_scaling"), ("no byte", "byte-level"), ("other pattern", "split"),
    ("no special", "eot_id"), ("too many tokens", "512")])
def test_refuses_what_the_runtime_could_not_load(checkpoint, tmp_path, what, says):
    torch.save(broken(checkpoint, what), tmp_path / "x.pt")
    with pytest.raises(UserError, match=says) as refusal:
        export_mobile.export_checkpoint(tmp_path / "x.pt", tmp_path / "x.gguf")
    assert "\n" not in str(refusal.value)
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("arguments, says", [
    (["x.pt", "--dtype", "q5_k"], "q5_k"), (["--preset", "XXL"], "XXL"), ([], "either"), (["x.pt", "--preset", "S"], "either"),
    (["missing.pt"], "missing.pt"), (["empty.pt"], "empty.pt"), (["cut.pt"], "cut.pt"), (["x.pt", "--out", "no/x.gguf"], "no")])
def test_refuses_what_the_command_line_got_wrong(checkpoint, refused, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint, "x.pt")
    Path("empty.pt").touch()
    Path("cut.pt").write_bytes(Path("x.pt").read_bytes()[:-5000])
    before = sorted(os.listdir())
    assert says in refused(export_mobile.main, "--out", "x.gguf", *arguments)
    assert sorted(os.listdir()) == before


def test_full_disk_leaves_nothing_behind(refused, tmp_path):
    """The system stops a file at 200 kB, in the middle of the weights; an older file of that name survives."""
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
    start, path = time.monotonic(), tmp_path / "s.gguf"
    script = Path(export_mobile.__file__)
    done = subprocess.run([sys.executable, script, "--preset", "S", "--out", path], capture_output=True, text=True)
    seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size == pytest.approx(713.9e6, rel=0.01)
    assert seconds < 90 and peak < 8e9
    predicted = llama_cpp.logprobs(path, [[1, 2, 3]])
    assert predicted.shape == (1, 128_256) and np.exp(predicted).sum() == pytest.approx(1, abs=1e-3)
