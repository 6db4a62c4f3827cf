"""The script for a card, tried on the CPU.   python -m pytest tests/test_gpu.py"""

import argparse
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import bench
import gpu
import gumbel_distill as gd
import sample
from conftest import ROOT

ARGS = argparse.Namespace(device="cpu", dtype="float32", tiny=True, seed=0)


def run(folder, *flags):
    call = [sys.executable, ROOT / "tests" / "gpu.py", *flags]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def part(out, title):
    """The lines of one numbered part of what was printed."""
    return re.search(rf"^\d\. {title}.*\n((?:(?!\d\. ).*\n?)*)", out, re.M)[1].strip().splitlines()


def test_every_part_runs_and_every_check_holds(tmp_path):
    done = run(tmp_path, "--device", "cpu", "--tiny")
    assert done.returncode == 0, done.stderr
    checks = part(done.stdout, "Checks")
    assert len(checks) > 40
    assert all(line.endswith("  ok") or "skipped" in line for line in checks), checks
    assert sum("skipped" in line for line in checks) == 1       # that of two cards
    rows = [line.split()[:2] for line in part(done.stdout, "Speed")]
    assert all([model, side] in rows for model in bench.MODELS for side in ("ours", "dense"))
    hours = "\n".join(part(done.stdout, "Hours"))
    assert "lm1b" in hours and "owt" in hours and "gumbel-draft: 8 sequences" in hours
    assert not list(tmp_path.iterdir())                         # it leaves nothing behind


@pytest.mark.skipif(gd.HAS_GPU, reason="there is a card")
def test_without_a_card_the_cure_is_named(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: no CUDA card here")
    assert "--device cpu" in done.stderr and done.stderr.count("\n") == 1


def test_training_without_two_files_is_refused_at_once(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a text")
    for flags, said in (([], "--train-files"), (["--train-files", "none/*"], "none/*"),
                        (["--train-files", tmp_path], tmp_path.name),
                        (["--train-files", "one.txt"], "one.txt")):
        status, out, err = cli(gpu.main, "--device", "cpu", "--tiny", "--minutes", 1, *flags)
        assert status == 1 and err.startswith("error: ") and said in err and out == "", err


def every_second_time(change):
    """A break that the device shows and the CPU does not: checks call the CPU first."""
    def wrap(real):
        calls = []

        def broken(*args, **how):
            calls.append(1)
            result = real(*args, **how)
            return result if len(calls) % 2 else change(result)
        return broken
    return wrap


def without_gradient(real):
    """As in torch before 2.10 or so, whose autocast lost it after a use under no_grad."""
    def logits(net, h):
        if not torch.is_autocast_enabled("cpu"):
            return real(net, h)
        return F.linear(h, net.head.weight.detach()).float()
    return logits


@pytest.mark.parametrize("check, where, name, wrap", [
    (gpu.check_losses, gd.Transformer, "logits", without_gradient),
    (gpu.check_losses, gd, "student_loss", every_second_time(lambda loss: 1.001 * loss)),
    (gpu.check_samplers, gd, "sample", every_second_time(lambda x: x.roll(1))),
    (gpu.check_posterior, gd, "posterior_gumbel",
     lambda real: lambda logp, x0, g: gd.sample_gumbel(logp.shape, g)),
    (gpu.check_posterior, gd, "posterior_gumbel", lambda real: lambda *args: real(*args) + 0.01),
    (gpu.check_tail, gd, "sample_gumbel", lambda real: lambda *args: real(*args).clamp(max=10)),
    (gpu.check_exact, sample, "draft_and_verify",
     lambda real: lambda *args: (real(*args)[0].roll(1), real(*args)[1]))])
def test_a_check_can_fail(check, where, name, wrap, monkeypatch, capsys):
    monkeypatch.setattr(where, name, wrap(getattr(where, name)))
    assert gpu.run_checks(ARGS, [check]) > 0 and "FAILED" in capsys.readouterr().out


def test_a_dense_side_that_needs_too_much_memory_is_a_row(monkeypatch, capsys):
    def measure(model, side, args):
        if side == "dense":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dict(tok_s=1000.0, seconds=0.5, loss=6.0)
    monkeypatch.setattr(bench, "measure", measure)
    assert gpu.training_speed(ARGS) == dict.fromkeys(bench.MODELS, 0.001)
    assert capsys.readouterr().out.count("out of memory") == len(bench.MODELS)


def test_the_largest_piece_is_found_by_doubling(monkeypatch, capsys):
    real = bench.loss_of

    def loss_of(side, student, teacher, x0, *args):
        if len(x0) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(side, student, teacher, x0, *args)
    monkeypatch.setattr(bench, "loss_of", loss_of)
    gpu.largest_piece(argparse.Namespace(**vars(ARGS), batch_size=8))
    assert capsys.readouterr().out.startswith("gumbel-draft: 2 sequences")


def test_training_for_some_minutes_ends_in_a_judged_table(tmp_path, real_data, cli, monkeypatch):
    """On two shards; the second call finds all models trained, and prints the same table."""
    monkeypatch.setattr(gpu, "run_checks", lambda args: 0)
    out, tables = tmp_path / "run", []
    for _ in range(2):
        status, said, err = cli(gpu.main, "--device", "cpu", "--tiny", "--minutes", 0.1,
                                "--train-files", real_data / "lm1b" / "*-0000[12]-of-*",
                                "--out-dir", out)
        assert status == 0, err
        tables.append(said[said.index("\nmodel ", said.index("4. Training")):])
        models = {line.split()[0] for line in tables[-1].splitlines() if line}
        assert models >= {"real", "teacher", "mdlm", "gumbel", "gumbel-draft"}
    assert tables[0] == tables[1] and "gen_ppl" in tables[0]
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*.pt"))
    assert names == ["gumbel-draft.pt", "gumbel.pt", "judge/teacher.pt", "mdlm.pt", "teacher.pt"]
    halves = [{path.resolve() for path in (out / "files" / half).iterdir()} for half in "ab"]
    assert len(halves[0]) == len(halves[1]) == 1 and not halves[0] & halves[1]


@pytest.mark.parametrize("model, most, n_products", [
    ("teacher", 3, 3), ("mdlm", 2, 3), ("gumbel", 6, 6), ("gumbel-draft", 10, 7)])
def test_a_step_moves_few_v_wide_bytes_and_multiplies_nothing_twice(model, most, n_products):
    """MB a token under bfloat16. Products with a table (V, C): the labels 1, the noise 2, a draft
    1 each, the output 3."""
    megabytes, products, kernels = bench.count(model, "ours", batch_size=2)
    assert 0.5 < megabytes <= most and products == n_products, kernels
