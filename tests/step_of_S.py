"""Two optimizer steps of preset S on a CPU, one row of 2048 tokens each. Prints peak GB of memory, loss,
seconds.

    PYTHONPATH=. python tests/step_of_S.py
"""
import dataclasses
import re
import time
import types
from pathlib import Path

import torch

import train
from mobilemoe import PRESETS, MobileMoE

train.keep_memory()         # as `python train.py` has it
generator = torch.Generator().manual_seed(0)
stage = dataclasses.replace(train.PAPER["pretrain"], batch=2048)
rows = torch.randint(PRESETS["S"].vocab_size, (2, 1, 2049), generator=generator)
batches = types.SimpleNamespace(batch=lambda step, n: (rows[step, :, :-1], rows[step, :, 1:]))     # [1, T]
model = MobileMoE(PRESETS["S"])
train.recompute_activations(model)
opts = train.optimizers(model, train.PAPER)
for step in range(2):
    start = time.time()
    result = train.train_step(model, opts, stage, batches, step, 1000, 1)
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    print(f"{peak:.2f} {result['loss']:.3f} {time.time() - start:.1f}", flush=True)
