"""The commands of README run.   python -m pytest tests/test_readme.py"""

import re
import runpy
import shlex
import shutil
import sys

from conftest import ROOT, TINY

HUB = {"lm1b", "owt", "tinystories", "gpt2"}        # what these name is not on this machine
SMALL = {"sample.py": [], "exact.py": [], "judge.py": ["-n", "20"]}        # the others train


def commands(text):
    """The command lines of a text's ```-blocks that run one of our programs: lists of words."""
    lines = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.S)
             for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    return [line[1:] for line in words if (ROOT / line[1]).suffix == ".py" and "/" not in line[1]]


def test_every_command_of_the_readme_runs_in_a_copy(tmp_path, monkeypatch):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    todo = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert todo
    for script, *words in todo:
        if HUB & set(words) or "--help" in words:
            continue
        for name in (word for word in words if word.endswith(".txt")):
            (tmp_path / name).write_text("to be or not to be, that is the question.\n" * 400)
        print(script, *words)                       # pytest shows the last one with its error
        monkeypatch.setattr(sys, "argv", [script, *words, *SMALL.get(script, TINY)])
        runpy.run_path(script, run_name="__main__")
