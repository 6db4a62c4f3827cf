"""The script for a card, tried on the CPU.   python -m pytest tests/test_gpu.py"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bench
import gpu
import gumbel_distill as gd
from config import HAS_GPU
from conftest import CPU, ROOT


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(device="cpu", dtype="float32", tiny=True, seed=0, rows={},
                              out_dir=str(tmp_path / "rows"), batch_size=8, steps=1)


def run(folder, *flags):
    call = [sys.executable, ROOT / "tests" / "gpu.py", *flags]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def rows(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


def test_every_check_holds(tmp_path):
    done = run(tmp_path, "--device", "cpu", "--tiny", "--only", "check", "--out-dir", "out")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [row for row in rows(tmp_path / "out", "check") if "ok" in row]
    assert len(checks) > 30 and all(row["ok"] for row in checks)
    assert done.stdout.count("skipped") == 1                    # that of two cards
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["check.json"]


def test_speed_is_measured_for_all_models(tmp_path):
    done = run(tmp_path, "--device", "cpu", "--tiny", "--only", "speed", "--out-dir", "out")
    assert done.returncode == 0, done.stderr
    measured = [(row["model"], row.get("side")) for row in rows(tmp_path / "out", "speed")]
    assert set(measured) >= {(model, side) for model in bench.MODELS for side in ("ours", "dense")}
    for said in ("lm1b", "owt", "gumbel-draft: 8 sequences"):
        assert said in done.stdout


def test_a_part_that_is_killed_leaves_its_rows(args, monkeypatch):
    """The third model is the last straw; what was measured before stands in the file."""
    def measure(model, side, _):
        if model == "gumbel":
            raise KeyboardInterrupt
        return dict(tok_s=1000.0, seconds=0.5, loss=6.0)
    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_speed(args)
    assert [row["model"] for row in rows(Path(args.out_dir), "speed")] == 2 * ["teacher"] + 2 * [
        "mdlm"]


@pytest.mark.skipif(HAS_GPU, reason="there is a card")
def test_without_a_card_the_cure_is_named(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: no CUDA card here")
    assert "--device cpu" in done.stderr and done.stderr.count("\n") == 1


def test_training_without_text_is_refused_at_once(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a text")
    for flags, said in (([], "--train-files"), (["--train-files", "none/*"], "none/*"),
                        (["--train-files", "one.txt", "--val-files", "none.txt"], "none.txt")):
        status, out, err = cli(gpu.main, "--device", "cpu", "--tiny", "--only", "train", *flags)
        assert status == 1 and err.startswith("error: ") and said in err and out == "", err


def test_without_datasets_and_on_too_small_a_card_the_cure_is_named(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def measure(*of):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(bench, "measure", measure)
    status, _, err = cli(gpu.main, "--device", "cpu", "--tiny", "--only", "speed")
    assert status == 1 and err.startswith("error: ") and "--size" in err
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    status, _, err = cli(gpu.main, "--device", "cpu", "--only", "text", "--train-files", "x")
    assert status == 1 and err.startswith("error: ") and "pip install datasets" in err


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
    (gpu.check_samplers, gd.Student, "write", every_second_time(lambda x: x.roll(1))),
    (gpu.check_posterior, gd, "posterior_gumbel",
     lambda real: lambda logp, x0, g: gd.sample_gumbel(logp.shape, g)),
    (gpu.check_posterior, gd, "posterior_gumbel", lambda real: lambda *args: real(*args) + 0.01),
    (gpu.check_tail, gd, "sample_gumbel", lambda real: lambda *args: real(*args).clamp(max=10))])
def test_a_check_can_fail(check, where, name, wrap, args, monkeypatch, capsys):
    monkeypatch.setattr(where, name, wrap(getattr(where, name)))
    assert gpu.run_checks(args, [check]) > 0 and "FAILED" in capsys.readouterr().out
    assert not all(row["ok"] for row in rows(Path(args.out_dir), "check") if "ok" in row)


def test_the_check_of_exact_mode_can_fail(args, monkeypatch, capsys):
    import sample
    real = sample.draft_and_verify
    monkeypatch.setattr(sample, "draft_and_verify",
                        lambda *of: (real(*of)[0].roll(1), real(*of)[1]))
    assert gpu.run_checks(args, [gpu.check_exact]) == 1
    assert "texts that are not the serial ones" in capsys.readouterr().out


def compile_without_code(model):
    """torch.compile's front end alone: it sees what would be compiled, in a second."""
    for layer in model.net.layers:
        layer.compile(backend="eager")
    return model


@pytest.mark.parametrize("how", [{}, dict(block_size=5)])
def test_nothing_is_compiled_after_the_first_validation(how, tmp_path, monkeypatch):
    """Though the number of masked tokens changes every step. Of the 45 validation texts the last
    piece is a smaller one."""
    monkeypatch.setattr(gd, "compile_layers", compile_without_code)
    monkeypatch.setattr(gd.Data, "val_rows", lambda data, n, real=gd.Data.val_rows: real(data, 45))
    torch.compiler.reset()
    variants, real = [], gd.validation_loss

    def validation_loss(*of):
        loss = real(*of)
        variants.append(gpu.n_variants())
        return loss
    monkeypatch.setattr(gd, "validation_loss", validation_loss)
    before = gpu.n_variants()
    settings = dict(CPU, batch_size=8, max_steps=6, eval_every=2, n_samples=2, nfe=[2], dropout=0.1,
                    dtype="bfloat16", out_dir=str(tmp_path))
    gd.run(gd.Config(**{**settings, **how, "compile": True}))
    of_models = [variants[i:i + 3] for i in range(0, len(variants), 3)]
    assert len(of_models) == 4 and all(len(set(counts)) == 1 for counts in of_models)
    assert 3 <= variants[-1][0] - before[0] <= 6 and variants[-1][1] == before[1]


def test_a_dense_side_that_needs_too_much_memory_is_a_row(args, monkeypatch, capsys):
    def measure(model, side, args):
        if side == "dense":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dict(tok_s=1000.0, seconds=0.5, loss=6.0)
    monkeypatch.setattr(bench, "measure", measure)
    assert gpu.training_speed(args) == dict.fromkeys(bench.MODELS, 0.001)
    assert capsys.readouterr().out.count("out of memory") == 2 * len(bench.MODELS)


def test_the_largest_piece_is_found_by_doubling(args, monkeypatch, capsys):
    real = bench.loss_of

    def loss_of(side, student, teacher, x0, *args):
        if len(x0) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(side, student, teacher, x0, *args)
    monkeypatch.setattr(bench, "loss_of", loss_of)
    gpu.largest_piece(args)
    assert capsys.readouterr().out.startswith("gumbel-draft: 2 sequences")


def test_training_for_some_minutes_ends_in_a_judged_table(tmp_path, real_data, cli):
    """On one shard. The first call has time for no student, the second trains those that are left,
    and the third finds all of them."""
    out, said = tmp_path / "run", []
    for minutes in (1e-6, 10, 10):
        status, text, err = cli(gpu.main, "--device", "cpu", "--tiny", "--only", "train",
                                "--minutes", minutes, "--samples", 12, "--out-dir", out,
                                "--train-files", real_data / "lm1b" / "*-00002-of-*")
        assert status == 0, err
        said.append(text)
    assert said[0].count("no time for") == 1 and "no time" not in said[1] + said[2]
    rows = gpu.tables.read_rows(out / "card.jsonl")
    table = said[1][said[1].index("seq_len 16:"):said[1].index("train took")]
    assert "max_steps 10" in table and table in said[2]
    assert [row["student"] for row in rows if "nfe" not in row][0] == "real text"
    assert {(row["student"], row["init_from"]) for row in rows if "val" in row} == {
        (student, start) for student in gpu.tables.STUDENTS for start in gpu.tables.STARTS}
    assert all(row["judge_nll"] > 0 and row["n"] == 12 for row in rows)


def test_the_plan_fits_the_time_and_teaches_no_teacher_the_text_by_heart():
    cfg = argparse.Namespace(batch_size=4, seq_len=25, warmup=100)          # 100 tokens a step
    seconds = {"teacher": 0.1, "mdlm": 0.1, "gumbel": 0.3, "gumbel-draft": 0.6}
    plan = gpu.planned_steps(seconds, 1000, 10**9, cfg)
    total = 0.1 * (plan["teacher_steps"] + plan["judge_steps"]) + plan["max_steps"]
    assert 0.99 * gpu.TRAINING * 1000 < total <= gpu.TRAINING * 1000
    assert plan["teacher_steps"] > plan["judge_steps"] and plan["warmup"] == plan["max_steps"] // 10
    shorter = gpu.planned_steps(seconds, 1000, 10_000, cfg)     # 100 steps read the text once
    assert shorter["teacher_steps"] == 100 * gpu.MOST_EPOCHS
    assert shorter["max_steps"] > plan["max_steps"]


@pytest.mark.parametrize("model, most, n_products", [
    ("teacher", 3, 3), ("mdlm", 2, 3), ("gumbel", 6, 6), ("gumbel-draft", 10, 7)])
def test_a_step_moves_few_v_wide_bytes_and_multiplies_nothing_twice(model, most, n_products):
    """MB a token under bfloat16. Products with a table (V, C): the labels 1, the noise 2, a draft
    1 each, the output 3."""
    megabytes, products, kernels = bench.count(model, "ours", batch_size=2)
    assert 0.5 < megabytes <= most and products == n_products, kernels
