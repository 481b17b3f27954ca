"""Does the phone compute what was trained? A run's qat.pt against its mobilemoe.gguf, on held-out text.

    PYTHONPATH=. python tests/fidelity.py runs/tiny

Weights bit for bit (official gguf reader), token ids of held-out documents and conversations (llama.cpp
against tiktoken), next-token predictions of llama.cpp against PyTorch with INT4 weights and INT8 activations;
and what mid-training reached on *all* held-out docstrings. About nine minutes; test_export.py holds the same
promises on a small model in seconds.
"""
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

import data
import quantize
from common import ask_llama_cpp, load_checkpoint, tokenizer_from_dict
from mobilemoe import bits_per_byte, model_from_checkpoint

PER_DOMAIN = 2000       # positions of each of the four domains, in whole windows


def main(run: Path):
    checkpoint, path = load_checkpoint(run / "qat.pt"), run / "mobilemoe.gguf"
    file = {entry.name: dequantize(entry.data, entry.tensor_type) for entry in gguf.GGUFReader(path).tensors}
    pairs = [(checkpoint["model"]["model.embed_tokens.weight"].mT, ["token_embd"])]
    for name, master in checkpoint["model"].items():
        if name.endswith(("experts.down_proj", "experts.gate_up_proj")):                   # [E, in, out]
            parts = ("down",) if name.endswith("down_proj") else ("gate", "up")
            pairs.append((master, [f"blk.{name.split('.')[2]}.ffn_{part}_exps" for part in parts]))
    for master, names in pairs:
        trained = quantize.fake_quant(master.contiguous(), dim=-2).mT.contiguous().numpy()
        found = np.concatenate([file[f"{name}.weight"] for name in names], axis=-2)
        assert trained.tobytes() == found.tobytes(), names
    print(f"{sum(master.numel() for master, _ in pairs):,} weights of experts and embedding: "
          "file and QAT are equal bit for bit")

    corpus, encoding = data.embedded_corpus(), tokenizer_from_dict(checkpoint["tokenizer"])
    texts = [text for documents in corpus.heldout.values() for text in documents]
    texts += [message["content"] for example in corpus.sft_heldout for message in example["messages"]]
    found = ask_llama_cpp(path, texts=texts)["tokens"]
    equal = sum(ids == encoding.encode_ordinary(text) for text, ids in zip(texts, found))
    print(f"{equal:,} of {len(texts):,} held-out documents and messages: "
          "token ids of llama.cpp and tiktoken are equal")

    docstrings = corpus.heldout["prose"]            # all of them: the report measures 100 kB
    size, ids = len("".join(docstrings).encode()), data.tokenize_documents(docstrings, encoding)
    middle = model_from_checkpoint(load_checkpoint(run / "midtrain.pt"))
    print(f"all {size / 1e3:.0f} kB of held-out docstrings after mid-training: "
          f"{bits_per_byte(middle, ids.astype(np.int32), size, checkpoint['context']):.3f} bits per byte; "
          f"`xz -9e` {data.xz_bits_per_byte(docstrings):.3f}")

    model, window = quantize.attach(model_from_checkpoint(checkpoint)), checkpoint["context"] // 2
    for kv in ("f32", "f16"):
        kl, top = [], []
        for held in checkpoint["heldout"].values():
            ids = torch.as_tensor(held["ids"], dtype=torch.int64)
            for start in range(0, min(PER_DOMAIN, len(ids) - window), window):
                text = ids[start:start + window]
                with torch.no_grad(), quantize.parametrize.cached():
                    ours = model(text[None])[0].log_softmax(-1).numpy()                # [T, V]
                prompts = [text[:end].tolist() for end in range(1, len(text) + 1)]
                theirs = ask_llama_cpp(path, prompts=prompts, kv=kv, threads=1)["logprobs"]
                kl.append((np.exp(ours) * (ours - theirs)).sum(-1))
                top.append(ours.argmax(-1) == theirs.argmax(-1))
        kl, top = np.concatenate(kl), np.concatenate(top)
        print(f"{len(top):,} held-out positions, {kv.upper()} KV cache: "
              f"same top token {100 * top.mean():.2f} %, mean KL {kl.mean():.5f} nats")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
