"""README.md keeps its promises: commands that take seconds run as they stand, links lead somewhere."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python ")]
TAKES_SECONDS = re.compile(r"python (mobilemoe|export_mobile|quantize)\.py runs/tiny|scaling_law plan")
QUICK = list(filter(TAKES_SECONDS.search, COMMANDS))


@pytest.fixture
def checkout(finished_run, tmp_path) -> Path:
    """A folder like the repository's, in which the default run is the finished `test` run."""
    for path in [*ROOT.glob("*.py"), ROOT / "lab"]:
        (tmp_path / path.name).symlink_to(path)
    shutil.copytree(finished_run, tmp_path / "runs" / "tiny")
    return tmp_path


@pytest.mark.parametrize("command", QUICK)
def test_a_command_of_the_readme_runs_as_it_stands(command, checkout):
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=checkout, capture_output=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    assert done.stdout.strip()


def test_the_quick_commands_were_found():
    assert len(QUICK) == 5 and all("python" in line for line in COMMANDS)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/exercises.md", "docs/experiments.md"])
def test_links_lead_to_files_and_every_script_named_exists(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for script in re.findall(r"python ((?:tests/)?\w+\.py)", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m lab\.(\w+)", text):
        assert (ROOT / "lab" / f"{module}.py").exists(), module


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 200
    assert [line for line in README.splitlines() if len(line) > 110 and line[0] != "|"] == []
