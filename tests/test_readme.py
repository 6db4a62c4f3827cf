"""The commands of README run.   python -m pytest tests/test_readme.py"""

import re
import runpy
import shlex
import shutil
import sys

from conftest import ROOT, TINY

ELSEWHERE = {"lm1b", "owt", "tinystories", "gpt2", "NAME"}      # need a network, or a reader
SMALL = {"sample.py": [], "exact.py": [], "judge.py": ["-n", "20"]}     # the others train


def commands(text):
    """The commands of a text that run our programs, in blocks and in `...`: lists of words."""
    lines = re.findall(r"^python (.*)|`python ([^`]*)`", text, re.M)
    words = [shlex.split(block or line, comments=True) for block, line in lines]
    return [line for line in words if re.fullmatch(r"\w+\.py", line[0])]


def test_every_command_of_the_readme_runs_in_a_copy(tmp_path, monkeypatch):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    todo = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert todo
    for script, *words in todo:
        if ELSEWHERE & set(words):
            continue
        for name in (word for word in words if word.endswith(".txt")):
            (tmp_path / name).write_text("to be or not to be, that is the question.\n" * 400)
        print(script, *words)                       # pytest shows the last one with its error
        monkeypatch.setattr(sys, "argv", [script, *words, *SMALL.get(script, TINY)])
        runpy.run_path(script, run_name="__main__")
