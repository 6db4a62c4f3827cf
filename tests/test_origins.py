"""A run knows what made it.   python -m pytest tests/test_origins.py"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import gumbel_distill as gd
from conftest import ROOT, TINY

APART = """
import sys
import gumbel_distill as gd
gd.main(words=[*sys.argv[2:], "--lr", ["1e-3", "1e-2"][gd.RANK], "--out-dir",
               f"{sys.argv[1]}/{gd.RANK}"])
"""


def test_processes_with_other_settings_are_refused_before_the_first_step(tmp_path):
    (tmp_path / "apart.py").write_text(APART)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(tmp_path / "apart.py"), str(tmp_path), *TINY, "--grad-accum", "2"],
        capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode and "has lr 0.001, not 0.01" in done.stderr
    assert not list(tmp_path.glob("*/*.pt"))


def test_a_stopped_run_goes_on_in_the_same_process(cli, tmp_path, monkeypatch):
    """As in a notebook, which keeps the last error and with it the frames of the run."""
    words = [*TINY, "--students", "mdlm", "--out-dir", tmp_path]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
        patch.setattr(gd, "backward", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        cli(gd.main, *words)
    assert cli(gd.main, *words)[0] == 0 and kept.tb


@pytest.mark.parametrize("given", [dict(lr=np.float64(1e-3)), dict(compile=np.bool_(False))])
def test_settings_from_numpy_can_be_read_back_from_a_checkpoint(given, tmp_path):
    torch.save(vars(gd.Config(**given)), tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["seq_len"] == 10
