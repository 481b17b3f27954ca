"""Two optimizer steps of preset S on a CPU, a row of 2048 tokens each. Prints peak GB, loss, seconds.

    PYTHONPATH=. python tests/step_of_S.py
"""
import dataclasses
import functools
import re
import time
import types
from pathlib import Path

import torch

import train
from mobilemoe import PRESETS, MobileMoE

train.keep_memory()         # as `python train.py --checkpoint-activations` has it
stage = dataclasses.replace(train.PAPER["pretrain"], batch=2048)
rows = torch.randint(PRESETS["S"].vocab_size, (2, 1, 2049), generator=torch.Generator().manual_seed(0))
batches = types.SimpleNamespace(batch=lambda step, n: (rows[step, :, :-1], rows[step, :, 1:]))     # [1, T]
model = MobileMoE(PRESETS["S"])
model.compute_dtype = train.matmul_dtype(torch.device("cpu"))
for block in model.model.layers:
    block.forward = functools.partial(train.recompute, block.forward, use_reentrant=False)
opts = train.optimizers(model, train.PAPER)
for step in range(2):
    start, result = time.time(), train.train_step(model, opts, stage, batches, step, 1000, 1)
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    print(f"{peak:.2f} {result['loss']:.3f} {time.time() - start:.1f}", flush=True)
