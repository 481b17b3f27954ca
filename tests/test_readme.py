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
COMMANDS = re.findall(r"^python .*", "".join(re.findall(r"^```\n(.*?)^```", README, re.M | re.S)), re.M)
TAKES_SECONDS = re.compile(r"python (mobilemoe|export_mobile|quantize)\.py runs/tiny|scaling_law plan")
QUICK = list(filter(TAKES_SECONDS.search, COMMANDS))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("command", QUICK)
def test_a_command_of_the_readme_runs_as_it_stands(command, finished_run, tmp_path):
    """In a folder like the repository's, in which the default run is the finished `test` run."""
    (tmp_path / "lab").mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")]:       # Windows links for administrators only
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    shutil.copytree(finished_run, tmp_path / "runs" / "tiny")
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONPATH": "."})
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.strip()


def test_the_readme_is_short_and_its_quick_commands_were_found():
    assert len(README.splitlines()) <= 200 and len(QUICK) >= 5
    assert [line for line in README.splitlines() if len(line) > 110 and line[0] != "|"] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_every_script_named_exists(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!http|#)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    scripts = re.findall(r"python ((?:tests/)?\w+\.py)", text)
    scripts += [f"lab/{module}.py" for module in re.findall(r"python -m lab\.(\w+)", text)]
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
