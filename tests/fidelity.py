"""Does the phone compute what was trained? A finished run's qat.pt against its mobilemoe.gguf, on held-out text.

    PYTHONPATH=. python tests/fidelity.py runs/tiny

Weights bit for bit (official gguf reader), token ids of held-out documents and conversations (llama.cpp against tiktoken), and
next-token predictions of llama.cpp against PyTorch with INT4 weights and INT8 activations; and what mid-training reached on
*all* held-out docstrings. About nine minutes; test_export.py holds the same promises on a small model in seconds.
"""
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from gguf.quants import dequantize

import data
import quantize
from mobilemoe import bits_per_byte, load_checkpoint, model_from_checkpoint, tokenizer_from_dict

PER_DOMAIN = 2000       # positions of each of the four domains, in whole windows


def main(run: Path):
    checkpoint, path = load_checkpoint(run / "qat.pt"), run / "mobilemoe.gguf"
    weights = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    same = 0
    for name, master in checkpoint["model"].items():
        if not name.endswith(("down_proj", "gate_up_proj")):
            continue
        trained = quantize.fake_quant(master, dim=1).mT.contiguous().numpy()           # [E, out, in], as the file has it
        block = f"blk.{name.split('.')[2]}.ffn_"
        file = (weights[f"{block}down_exps.weight"] if name.endswith("down_proj") else
                np.concatenate([weights[f"{block}{part}_exps.weight"] for part in ("gate", "up")], axis=1))
        assert trained.tobytes() == file.tobytes(), name
        same += trained.size
    embedding = quantize.fake_quant(checkpoint["model"]["model.embed_tokens.weight"], dim=1).numpy()
    assert embedding.tobytes() == weights["token_embd.weight"].tobytes()
    print(f"{same + embedding.size:,} weights of experts and embedding: file and QAT are equal bit for bit")

    corpus, encoding = data.embedded_corpus(), tokenizer_from_dict(checkpoint["tokenizer"])
    texts = [text for documents in corpus.heldout.values() for text in documents]
    texts += [message["content"] for example in corpus.sft_heldout for message in example["messages"]]
    equal = sum(ids == encoding.encode_ordinary(text) for text, ids in zip(texts, llama_cpp.tokenize(path, texts)))
    print(f"{equal:,} of {len(texts):,} held-out documents and messages: token ids of llama.cpp and tiktoken are equal")

    docstrings = corpus.heldout["prose"]            # all of them: the report measures 100 kB
    size, ids = sum(len(text.encode()) for text in docstrings), data.tokenize_documents(docstrings, encoding)
    middle = model_from_checkpoint(load_checkpoint(run / "midtrain.pt"))
    print(f"all {size / 1e3:.0f} kB of held-out docstrings after mid-training: "
          f"{bits_per_byte(middle, ids.astype(np.int32), size, checkpoint['context']):.3f} bits per byte; "
          f"`xz -9e` {data.xz_bits_per_byte(docstrings):.3f}")

    model, window = quantize.attach(model_from_checkpoint(checkpoint)), checkpoint["context"] // 2
    for f32_cache in (True, False):
        kl, top = [], []
        for held in checkpoint["heldout"].values():
            ids = torch.as_tensor(held["ids"], dtype=torch.int64)
            for start in range(0, min(PER_DOMAIN, len(ids) - window), window):
                text = ids[start:start + window]
                with torch.no_grad(), quantize.parametrize.cached():
                    ours = model(text[None])[0].log_softmax(-1).numpy()                # [T, V]
                theirs = llama_cpp.position_logprobs(path, text.tolist(), 0, len(text), f32_cache)
                kl.append((np.exp(ours) * (ours - theirs)).sum(-1))
                top.append(ours.argmax(-1) == theirs.argmax(-1))
        kl, top = np.concatenate(kl), np.concatenate(top)
        print(f"{len(top):,} held-out positions, {'F32' if f32_cache else 'F16'} KV cache: "
              f"same top token {100 * top.mean():.2f} %, mean KL {kl.mean():.5f} nats")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
