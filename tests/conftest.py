"""What tests share: one thread, a folder of text, a finished run of the `test` preset, scripts in-process."""
import json
import os
import pydoc_data.topics
import shutil
import sys
from pathlib import Path

# Before torch is imported, and inherited by child processes: two runs end bit for bit alike only if they
# split their sums alike, and matrices this small are slower on two threads than on one.
os.environ["OMP_NUM_THREADS"] = "1"
# `--device cpu` for every script, also for those that scripts start: a GPU sums in another order.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

import train
from common import run_main
from mobilemoe import PRESETS, Config, MobileMoE


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """A folder for --data: prose, maths and conversations, a few pages in all."""
    folder = tmp_path_factory.mktemp("text")
    topics = pydoc_data.topics.topics
    (folder / "prose.txt").write_text("\n\n".join(topics[name] for name in sorted(topics)[:12]))
    sums = [{"text": "\n".join(f"{a} + {b} = {a + b}" for b in range(12))} for a in range(4, 24)]
    chats = [{"messages": [{"role": "user", "content": f"What is {a} + 7?"},
                           {"role": "assistant", "content": f"{a + 7}."}]} for a in range(40)]
    for name, lines in (("maths", sums), ("chat", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def finished_run(text_folder, tmp_path_factory) -> Path:
    """The folder that `python train.py --preset test --data FOLDER` leaves behind. Look, do not write."""
    run = tmp_path_factory.mktemp("runs") / "test"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--preset", "test", "--data", str(text_folder), "--run", str(run)]
        patch.setattr(sys, "argv", ["train.py", *arguments])
        train.main()
    return run


@pytest.fixture
def run_with(finished_run, tmp_path):
    """run_with("tokens", "sft"): a folder of the test's own with these files of the finished run."""
    def copy(*names) -> Path:
        for name in names:
            shutil.copy(finished_run / f"{name}.pt", tmp_path)
        return tmp_path
    return copy


@pytest.fixture
def call(monkeypatch, capsysbinary):
    """call(main, *arguments): run a script's main as a shell would. -> (exit code, stdout, stderr)."""
    def run(main, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [Path(main.__code__.co_filename).name, *map(str, arguments)])
        capsysbinary.readouterr()
        code = 0
        try:
            run_main(main)
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsysbinary.readouterr()
        return code, out.decode(errors="replace"), err.decode(errors="replace")
    return run


@pytest.fixture
def refused(call):
    """refused(main, *arguments): expect exit code 2 and one line on stderr, which is returned."""
    def run(main, *arguments) -> str:
        code, _, err = call(main, *arguments)
        assert code == 2 and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
        return err
    return run


@pytest.fixture(scope="session")
def lively():
    """lively(config): a model whose every tensor is random, so that no mistake hides in zeros."""
    def make(config: Config = PRESETS["test"], seed: int = 0) -> MobileMoE:
        generator = torch.Generator().manual_seed(seed)
        model = MobileMoE(config).eval()
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("expert_bias"):
                tensor.copy_(0.1 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.2 * noise)                       # norms
            else:               # stacked experts are [E, in, out], the rest [out, in]
                tensor.copy_(noise * (0.3 if "embed" in name else tensor.shape[1] ** -0.5))
        return model
    return make
