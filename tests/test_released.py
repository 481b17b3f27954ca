"""released.py: folders as the released models come, against unpackings of the test's own, `tokenizers` and
llama.cpp. No real released weight is at hand: folders are made of models of this project."""
import json
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
import torch

import common
import export_mobile
import mobilemoe
import quantize
import released
import train
from common import ask_llama_cpp, encode_chat, load_checkpoint, tokenizer_from_dict
from mobilemoe import config_from_dict, model_from_checkpoint
from test_export import PASSAGES, TRICKY

LLAMA4 = dict(zip(*common.CHAT_NAMES))


@pytest.fixture(scope="module")
def bf16(finished_run, tmp_path_factory) -> Path:
    """sft.pt of the finished run in BF16, in three shards, with Llama 4's names for the chat's tokens."""
    folder = tmp_path_factory.mktemp("hf") / "bf16"
    checkpoint = load_checkpoint(finished_run / "sft.pt")
    special = checkpoint["tokenizer"]["special_tokens"]
    checkpoint["tokenizer"]["special_tokens"] = {LLAMA4[name]: i for name, i in special.items()}
    released.write_folder(checkpoint, folder)
    tensors = released.open_tensors(folder / "model.safetensors")
    names = list(tensors)
    for n in range(3):
        part = {name: tensors[name].clone() for name in names[n::3]}
        write_safetensors(part, folder / f"model-{n + 1}.safetensors")
    (folder / "model.safetensors").unlink()
    return folder


def write_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """As the released files are laid out: F32, BF16, F16, U8, then by name; padded header."""
    order = ["F32", "BF16", "F16", "U8"]
    kinds = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint8": "U8"}
    kind = {name: kinds[str(x.dtype).removeprefix("torch.")] for name, x in tensors.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = sorted(tensors, key=lambda name: (order.index(kind[name]), name))
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": kind[name], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())


def packed(q: torch.Tensor) -> torch.Tensor:
    """int8 [..., n] -> uint8 [..., n/2]: two's complement, the even element in the low half."""
    return (q[..., 0::2].int() & 15 | (q[..., 1::2].int() & 15) << 4).to(torch.uint8)


def qat_tensors(config, matrix) -> dict[str, torch.Tensor]:
    """A QAT release's tensors; matrix(name, shape) -> (q, scale) along the last dimension."""
    tensors = {}
    for name, x in export_mobile.empty_state(config).items():
        if x.dim() > 1 and "router" not in name:
            q, scale = matrix(name, x.shape)
            stem = name.removesuffix("_proj") if "experts." in name else name
            tensors[name.removesuffix("weight").removesuffix("proj") + "qweight"] = packed(q)
            tensors[f"{stem}_scale"] = scale
        else:
            dtype = torch.float32 if "router" in name else torch.bfloat16
            tensors[name] = torch.ones(x.shape, dtype=dtype) * (0.1 if "router" in name else 1)
    return tensors


def write_qat_folder(bf16: Path, folder: Path, tensors: dict, **changes) -> Path:
    folder.mkdir()
    write_safetensors(tensors, folder / "model.safetensors")
    config = json.loads((bf16 / "config.json").read_text()) | {"quantization": {
        "format": "mobilemoe-int4-g32", "group_size": 32, "embedding_group_size": 32,
        "scale_dtype": "float16", "linear_group_axis": "in (last dim of [out, in])",
        "expert_group_axis": "out (last dim of [E, in, out])"}} | changes
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bf16 / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def qat(bf16, tmp_path_factory):
    """(folder, {name: (q, scale)}) of the same model, experts on a lattice along their output."""
    state, stored = load_checkpoint(bf16)["model"], {}

    def matrix(name, shape):
        stored[name] = quantize.int4_groups(state[name].float(), dim=len(shape) - 1)
        return stored[name]
    config = config_from_dict(load_checkpoint(bf16)["config"])
    folder = tmp_path_factory.mktemp("hf") / "qat"
    tensors = qat_tensors(config, matrix)
    for name in tensors.keys() & state.keys():
        tensors[name] = state[name].to(tensors[name].dtype)
    return write_qat_folder(bf16, folder, tensors), stored


def test_a_bf16_folder_has_the_logits_of_its_source(bf16, finished_run):
    source = model_from_checkpoint(load_checkpoint(finished_run / "sft.pt"))
    for name, parameter in source.named_parameters():
        parameter.data = parameter if "router" in name else parameter.bfloat16().float()
    ours = model_from_checkpoint(load_checkpoint(bf16))
    tokens = torch.randint(500, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), source(tokens), rtol=0, atol=1e-5)


def test_a_qat_folder_is_unpacked_as_its_format_says(qat):
    folder, stored = qat
    state = load_checkpoint(folder)["model"]
    for name, (q, scale) in stored.items():
        want = q.float().unflatten(-1, (-1, 32)) * scale.float().unsqueeze(-1)
        assert torch.equal(state[name], want.flatten(-2)), name
        assert not torch.equal(q, -q) and not torch.equal(q, q.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


@pytest.mark.parametrize("experts", ["q4_0", "q5_0", "q8_0"])
def test_linears_of_a_qat_folder_go_into_the_file_bit_for_bit(qat, tmp_path, experts):
    folder, stored = qat
    export_mobile.export_checkpoint(folder, tmp_path / "x.gguf", experts=experts)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    shared = "model.layers.0.feed_forward.shared_expert.up_proj.weight"
    for ours, theirs in ((shared, "blk.0.ffn_up_shexp.weight"),
                         ("model.embed_tokens.weight", "token_embd.weight"),
                         ("model.layers.1.self_attn.v_proj.weight", "blk.1.attn_v.weight")):
        blocks = torch.from_numpy(tensors[theirs].data.copy()).unflatten(-1, (-1, 18))     # [rows, in/32, 18]
        q, scale = stored[ours]
        assert torch.equal(blocks[..., :2].contiguous().view(torch.float16)[..., 0], scale)
        both = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], dim=-1).to(torch.int8) - 8
        assert torch.equal(both.flatten(-2), q)
    gate = tensors["blk.0.ffn_gate_exps.weight"]
    kept = torch.from_numpy(gguf.quants.dequantize(gate.data, gate.tensor_type))           # [E, F, D]
    want = load_checkpoint(folder)["model"]["model.layers.0.feed_forward.experts.gate_up_proj"]
    want = want[..., :kept.shape[1]].transpose(1, 2)
    error = (kept - want).norm() / want.norm()
    assert error < {"q4_0": 0.12, "q5_0": 0.06, "q8_0": 0.01}[experts]


def test_the_tokenizer_is_that_of_tokenizers_and_of_llama_cpp(bf16, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    judge = tokenizers.Tokenizer.from_file(str(bf16 / "tokenizer.json"))
    checkpoint = load_checkpoint(bf16)
    encoding = tokenizer_from_dict(checkpoint["tokenizer"])
    texts = [*PASSAGES[:2000], *(text for text in TRICKY if "<|" not in text)]
    assert len(texts) > 1500
    for text in texts:
        assert encoding.encode(text) == judge.encode(text, add_special_tokens=False).ids, text
    export_mobile.export_checkpoint(bf16, tmp_path / "x.gguf")
    chat = [{"role": "user", "content": " How? "}]
    want = encode_chat(encoding, chat, reply=True)
    special = encoding.encode_single_token
    assert want[:2] == [special("<|begin_of_text|>"), special("<|header_start|>")]
    assert want.count(special("<|eot|>")) == 1
    assert ask_llama_cpp(tmp_path / "x.gguf", template=chat)["tokens"] == want
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == special("<|eot|>")


def test_templates_that_disagree_are_named_in_a_line(bf16, tmp_path, capsys):
    load_checkpoint(bf16)
    assert capsys.readouterr().err == ""                                    # our own agrees
    for template in ("{{ bos_token }}You are kind. {{ messages[0]['content'] }}", "{% broken"):
        folder = tmp_path / str(len(template))
        folder.mkdir()
        for path in bf16.iterdir():
            os.link(path, folder / path.name)
        (folder / "chat_template.jinja").write_text(template)
        assert load_checkpoint(folder)["chat_template"] == template
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "encode it otherwise" in err


def test_fine_tuning_from_a_folder_exports_and_answers(bf16, text_folder, tmp_path, call, refused):
    chats = tmp_path / "chats"
    chats.mkdir()
    (chats / "chat.jsonl").write_bytes((text_folder / "chat.jsonl").read_bytes())
    run = tmp_path / "mine"
    options = ["--from", bf16, "--data", chats, "--run", run]
    short = ["--batch", 256, "--tokens", 20 * 256]
    assert call(train.main, "sft", *options, *short)[::2] == (0, "")
    assert call(train.main, "qat", *options, *short, "--lr", 0.001)[::2] == (0, "")
    before, after = (load_checkpoint(path) for path in (bf16, run / "sft.pt"))
    assert after["chat_template"] == before["chat_template"] and after["tokenizer"] == before["tokenizer"]
    assert export_mobile.export_checkpoint(run / "qat.pt", run / "x.gguf")
    assert ask_llama_cpp(run / "x.gguf", chats=[[{"role": "user", "content": "What is 3 + 7?"}]])["answers"]
    assert "--from" in refused(train.main, *options) and "--from" in refused(train.main, "pretrain", *options)
    assert "--batch 100" in refused(train.main, "sft", *options, "--batch", 100)


def test_a_folder_talks(bf16, call):
    code, out, err = call(mobilemoe.main, bf16, "What is 3 + 7?", "--tokens", 5)
    assert (code, err) == (0, "") and out.endswith("\n")


@pytest.mark.parametrize("name, value", [
    ("model_type", "llama"), ("hidden_act", "gelu"), ("use_qk_norm", False), ("tie_word_embeddings", False),
    ("norm_topk_prob", False), ("attention_bias", True), ("no_rope_layers", [1, 0]),
    ("layer_types", ["chunked_attention"] * 2), ("rope_scaling", {"rope_type": "yarn", "factor": 4}),
    ("quantization_config", {"quant_method": "gptq"}), ("quantization", {"format": "other"}),
    ("hidden_size", None), ("num_hidden_layers", "two")])
def test_a_config_that_this_model_does_not_compute_is_refused_by_name(bf16, tmp_path, refused, name, value):
    for path in bf16.iterdir():
        if path.name != "config.json":
            os.link(path, tmp_path / path.name)
    config = json.loads((bf16 / "config.json").read_text()) | {name: value}
    if value is None:
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refused(mobilemoe.main, tmp_path, "Hello")
    assert {"num_hidden_layers": "n_layers"}.get(name, name) in line


@pytest.mark.parametrize("damage, says", [
    (lambda folder: (folder / "model-2.safetensors").unlink(), "no such tensor"),
    (lambda folder: truncate(folder / "model-1.safetensors"), "model-1.safetensors is cut off"),
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json")])
def test_a_damaged_folder_is_refused_in_one_line(bf16, tmp_path, refused, damage, says):
    for path in bf16.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    assert says in refused(export_mobile.main, tmp_path, "--out", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.slow
def test_an_s_shaped_qat_folder_has_the_published_size_and_exports_in_time_and_memory(bf16, tmp_path):
    """In a process of its own: from 128k merges to a file that llama.cpp decodes."""
    config = mobilemoe.PRESETS["S"]
    generator = torch.Generator().manual_seed(0)

    def matrix(name, shape):
        q = torch.randint(-8, 8, shape, dtype=torch.int8, generator=generator)
        return q, torch.full((*shape[:-1], shape[-1] // 32), 0.003, dtype=torch.float16)
    sizes = {"hidden_size": 768, "num_hidden_layers": 20, "num_attention_heads": 12, "num_key_value_heads": 4,
             "head_dim": 64, "num_experts_per_tok": 4, "vocab_size": 128_256, "max_position_embeddings": 8192,
             "intermediate_size": 384, "intermediate_size_mlp": 1536, "num_local_experts": 60,
             "no_rope_layers": [1] * 20, "layer_types": ["full_attention"] * 20, "routed_scaling_factor": 2.5}
    folder = write_qat_folder(bf16, tmp_path / "S", qat_tensors(config, matrix), **sizes)
    assert (folder / "model.safetensors").stat().st_size == 713_916_240
    root = str(Path(released.__file__).parent)
    start = time.time()
    export = [sys.executable, "export_mobile.py", folder, "--out", tmp_path / "S.gguf"]
    subprocess.run(export, cwd=root, check=True)
    assert time.time() - start < 120
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 3e9
    answers = ask_llama_cpp(tmp_path / "S.gguf", chats=[[{"role": "user", "content": "Hi"}]], max_tokens=4)
    assert len(answers["answers"]) == 1
    start = time.time()
    subprocess.run([sys.executable, "mobilemoe.py", folder, "Hi", "--tokens", "1"], cwd=root, check=True)
    assert time.time() - start < 60
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 8e9
