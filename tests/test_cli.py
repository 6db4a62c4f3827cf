"""The commands, from the shell's side.   python -m pytest tests/test_cli.py"""

import dataclasses
import functools
import os
import runpy
import shutil
import subprocess
import sys

import pytest

import blocks
import gumbel_distill as gd
from conftest import ROOT, STUDENTS, TINY


@dataclasses.dataclass
class OneName(gd.Config):
    students: str = gd.option("gumbel", "a word where a list of words is due", nargs="+")


@pytest.mark.parametrize("main, args, said", [
    (gd.main, "--students mdlm pink", ["--students", "mdlm gumbel"]),
    (gd.main, "--students gumbel-draft", ["--students", "mdlm gumbel"]),
    (functools.partial(gd.main, config=OneName), "", ["--students", "mdlm gumbel"]),
    (gd.main, "--n-embd 30", ["--n-embd", "--n-head"]),
    (gd.main, "--batch-size 10 --grad-accum 4", ["--grad-accum", "--batch-size"]),
    (functools.partial(gd.main, blocks.BLOCK_STUDENTS, blocks.BlockConfig), "--block-size 3",
     ["--block-size 3", "--seq-len 10"]),
    (gd.main, "--dataset lm1b", ["--dataset lm1b needs data.py"])])
def test_what_cannot_be_is_refused_in_one_line(main, args, said, cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "data", None)              # as if there were no data.py
    status, _, err = cli(main, *TINY, "--out-dir", tmp_path, *args.split())
    assert status in (1, 2) and all(word in err.strip().split("\n")[-1] for word in said), err
    assert not list(tmp_path.glob("[!t]*.pt"))


def test_the_command_line_has_the_defaults_of_python():
    cfg = gd.parse(gd.STUDENTS, words=[])
    assert cfg == gd.Config(students=list(gd.STUDENTS)) and cfg.out_dir == "out/maze"


def test_the_one_file_runs_alone_and_prints_its_table_and_drawings(tmp_path):
    shutil.copy(ROOT / "gumbel_distill.py", tmp_path)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "gumbel_distill.py", *TINY, "--nfe", "1", "3"],
                          cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    start = rows.index(["model", "nfe", "valid", "distinct", "tv", "teacher_nll"]) + 1
    assert [row[:2] for row in rows[start:start + 6]] == [
        ["data", "0"], ["teacher", "10"], ["mdlm", "1"], ["mdlm", "3"], ["gumbel", "1"],
        ["gumbel", "3"]]
    assert done.stdout.count(", 3 steps, ") == 2
    saved = {path.stem for path in (tmp_path / "out" / "maze").glob("*.pt")}
    assert saved == {"teacher", "mdlm", "gumbel"}


@pytest.mark.parametrize("script, names", [("drafts.py", STUDENTS),
                                           ("blocks.py", blocks.BLOCK_STUDENTS)])
def test_an_extension_is_a_file_that_one_runs(script, names, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [script, *TINY, "--out-dir", str(tmp_path)])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    out = capsys.readouterr().out
    assert all(f"{name}, " in out for name in names)
