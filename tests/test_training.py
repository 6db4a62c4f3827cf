"""Training, checkpoints, resuming.   python -m pytest tests/test_training.py"""

import functools
import math
import os
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import blocks
import gumbel_distill as gd
from conftest import ROOT, STUDENTS, TINY, V, Letters, tiny_config

DATA, load = Letters(), functools.partial(torch.load, weights_only=True)


def run(folder, name="gumbel", n_steps=8, seed=0, **more):
    """Train a new "teacher", or a student of a random teacher, in this folder; with dropout, so
    that its draws count, too. Returns the averaged model and the checkpoint."""
    os.makedirs(folder, exist_ok=True)
    config = blocks.BlockConfig if name.startswith("bd3lm") else gd.Config
    given = dict(n_layer=1, dropout=0.1, out_dir=str(folder), seed=seed)
    cfg = tiny_config(config, **{**given, **more})
    torch.manual_seed(7)
    teacher = gd.Teacher(tiny_config(), V, V).eval().requires_grad_(False)
    torch.manual_seed(seed)
    if name == "teacher":
        model, teacher = gd.Teacher(cfg, V, V), None
    else:
        model = {**STUDENTS, **blocks.BLOCK_STUDENTS}[name](cfg, V)
    model = gd.train(name, model, DATA, cfg, n_steps, teacher)
    return model, load(f"{folder}/{name}.pt")


def assert_same_state(a, b):
    assert a["step"] == b["step"]
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(a[part][key].equal(b[part][key]) for key in a[part])
    for i, slot in a["optimizer"]["state"].items():
        assert all(torch.equal(slot[key], b["optimizer"]["state"][i][key]) for key in slot)


def stop_at(patch, n):
    """Ctrl-C in the n-th optimiser step from now on, before the weights change."""
    real, before = gd.backward, iter(range(n - 1))

    def backward(*args):
        if next(before, None) is None:
            raise KeyboardInterrupt
        return real(*args)
    patch.setattr(gd, "backward", backward)


@pytest.mark.parametrize("name", ["teacher", "gumbel", "bd3lm-draft"])
def test_resumed_equals_uninterrupted_bit_for_bit(name, tmp_path, monkeypatch):
    """Stopped before any checkpoint, right after one, between two, and twice."""
    more = dict(block_size=3) if name == "bd3lm-draft" else {}
    model, whole = run(tmp_path / "whole", name, **more)
    for stops in ((2,), (3,), (6, 4)):
        for n in stops:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                stop_at(patch, n)
                run(tmp_path / str(stops), name, **more)
            torch.randn(3)                                      # another state of the generator
        assert_same_state(whole, run(tmp_path / str(stops), name, **more)[1])
    assert [step for step, _, _ in whole["log"]] == [2, 4, 6, 8]
    assert all(p.equal(whole["ema"][key]) for key, p in model.state_dict().items())
    if name == "teacher":                                       # validates on the texts kept for it
        assert whole["log"][-1][2] == pytest.approx(model.loss(DATA.val).item(), rel=1e-5)


KILLED = """
import sys, time
import gumbel_distill as gd
real = gd.backward
gd.backward = lambda *args: time.sleep(99) if args[4] and args[3] == 3 else real(*args)
gd.main(words=sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_no_second_one_writes_beside_it(tmp_path, cli):
    """Killed with kill -9 in step 3 of a student, while it holds its folder."""
    words = [*TINY, "--dropout", "0.1", "--students", "gumbel"]
    cut, whole = [*words, "--out-dir", str(tmp_path / "cut")], tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-c", KILLED, *cut], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "cut" / "gumbel.pt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        status, _, err = cli(gd.main, *cut)
        assert status == 1 and str(tmp_path / "cut") in err and "--out-dir" in err
    finally:
        process.kill()
        process.wait()
    assert load(tmp_path / "cut" / "gumbel.pt")["step"] == 2
    assert cli(gd.main, *cut)[0] == 0
    assert cli(gd.main, *words, "--out-dir", whole)[0] == 0
    for name in ("teacher.pt", "gumbel.pt"):
        assert_same_state(load(whole / name), load(tmp_path / "cut" / name))


TWO = """
import os, sys, torch
import gumbel_distill as gd
torch.set_default_dtype(torch.float64)
gd.main(words=[*sys.argv[2:], "--out-dir", sys.argv[1] + os.environ.get("RANK", "0")])
"""


def test_two_processes_go_on_with_the_checkpoint_of_the_first_and_take_the_steps_of_one(
        tmp_path, cli):
    """In float64. The teacher is there; the second process finds an empty folder."""
    words = [*TINY, "--grad-accum", "4", "--students", "gumbel", "--dropout", "0.1"]
    torch.set_default_dtype(torch.float64)
    try:
        assert cli(gd.main, *words, "--out-dir", tmp_path / "one")[0] == 0
    finally:
        torch.set_default_dtype(torch.float32)
    shutil.copytree(tmp_path / "one", tmp_path / "two-0")
    (tmp_path / "two-0" / "gumbel.pt").unlink()
    (tmp_path / "two.py").write_text(TWO)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(tmp_path / "two.py"), str(tmp_path / "two-"), *words], capture_output=True, text=True,
        timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("teacher_nll") == 1                # one process speaks
    assert not list((tmp_path / "two-1").glob("*.pt"))
    one, two = (load(tmp_path / folder / "gumbel.pt") for folder in ("one", "two-0"))
    for part in ("model", "ema"):
        for key, value in one[part].items():
            assert value.dtype == torch.float64
            assert torch.allclose(value, two[part][key], rtol=0, atol=1e-9), key


class Seen(gd.Teacher):
    """A teacher in float64 that remembers what its loss was shown: texts, times and a draw."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(tiny_config(), V, V)
        self.double().calls = []

    def loss(self, x0, t, generator, teacher):
        self.calls.append((x0, t, torch.rand(1, generator=generator)))
        return super().loss(x0)


def test_pieces_of_a_batch_add_up_and_have_draws_of_their_own_and_stratified_times():
    model, cfg = Seen(), tiny_config(grad_accum=2, t_min=0.2)
    for step in range(2):
        model.zero_grad()
        loss = gd.backward(model, DATA, cfg, step, None)
    for part in zip(*model.calls):
        assert len({tuple(one.flatten().tolist()) for one in part}) == 4
    for x0, t, _ in model.calls:
        assert (x0[:, None] == DATA.texts).all(-1).any(1).all()             # texts to train on
        assert t.shape == (4, 1) and ((t - 0.2) / 0.8 * 4).floor()[:, 0].tolist() == [0, 1, 2, 3]
    whole = gd.Teacher.loss(model, torch.cat([x0 for x0, _, _ in model.calls[2:]]))
    assert torch.allclose(loss.double(), whole)
    for p, expected in zip(model.parameters(), torch.autograd.grad(whole, model.parameters())):
        assert torch.allclose(p.grad, expected, atol=1e-12)


def test_each_step_has_its_learning_rate_clipped_gradient_and_average(tmp_path, monkeypatch):
    """The rate warms up and falls on a cosine. Adam's first moment after one step is a tenth of
    the gradient. The average begins with the first weights; its decay is (1 + n) / (10 + n), but
    --ema at most."""
    save, loss, saved = torch.save, gd.Teacher.loss, []
    monkeypatch.setattr(torch, "save", lambda *args: (save(*args), saved.append(load(args[1]))))
    monkeypatch.setattr(gd.Teacher, "loss", lambda *args: 1000 * loss(*args))
    run(tmp_path, "teacher", n_steps=12, eval_every=1, warmup=3, ema=0.3)
    cosine = [(1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)]
    warm = [1 / 4, 2 / 4, 3 / 4] + 9 * [1]
    rates = [state["optimizer"]["param_groups"][0]["lr"] for state in saved]
    assert rates == pytest.approx([3e-3 * a * b for a, b in zip(warm, cosine)])
    moments = [slot["exp_avg"].norm() for slot in saved[0]["optimizer"]["state"].values()]
    assert torch.stack(moments).norm().item() == pytest.approx(0.1, rel=1e-3)
    torch.manual_seed(0)
    average = dict(gd.Teacher(tiny_config(n_layer=1), V, V).named_parameters())
    for n, state in enumerate(saved):
        decay = min(0.3, (1 + n) / (10 + n))
        for key, value in state["model"].items():
            average[key] = decay * average[key] + (1 - decay) * value
            assert torch.allclose(state["ema"][key], average[key], atol=1e-6)


def test_validation_takes_every_row_once_and_all_times_and_leaves_the_generator_alone():
    model, cfg = Seen(), tiny_config(grad_accum=2, t_min=0.5)   # 13 texts: the last piece has one
    state = torch.get_rng_state()
    assert gd.mean_loss(model, DATA.val, cfg) == pytest.approx(super(Seen, model).loss(
        DATA.val).item())
    assert torch.get_rng_state().equal(state)
    rows, times, draws = (torch.cat(part) for part in zip(*model.calls))
    assert rows.equal(DATA.val) and len(set(draws.tolist())) == 4
    assert times.min() < 0.2 and times.mean() == pytest.approx(0.5, abs=0.01)


def test_a_loss_that_is_not_finite_names_its_model_and_keeps_the_last_checkpoint(
        tmp_path, monkeypatch):
    losses = iter([1.0, 1.0, math.nan])
    monkeypatch.setattr(gd, "mean_loss", lambda *args: next(losses))
    with pytest.raises(gd.UserError, match="gumbel: the loss is nan at step 6.*--lr"):
        run(tmp_path)
    assert load(tmp_path / "gumbel.pt")["step"] == 4


def test_a_failed_write_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    _, whole = run(tmp_path / "whole")
    real, calls = torch.save, []

    def full_disk(state, path):
        calls.append(path)
        if len(calls) < 3:
            return real(state, path)
        with open(path, "wb") as f:
            f.write(b"half")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(torch, "save", full_disk)
        run(tmp_path / "cut")
    assert load(tmp_path / "cut" / "gumbel.pt")["step"] == 4
    assert_same_state(whole, run(tmp_path / "cut")[1])


def test_a_checkpoint_says_what_it_is_and_code_in_one_never_runs(tmp_path):
    _, saved = run(tmp_path)
    assert saved["name"] == "gumbel" and saved["tokenizer"] == DATA.tokenizer
    assert saved["config"]["n_embd"] == 16 and saved["about"]["data"] == "letters"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    torch.save({**saved, "model": Evil()}, tmp_path / "gumbel.pt", pickle_module=pickle)
    with pytest.raises(pickle.UnpicklingError):
        run(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name, changed, said", [
    ("teacher", dict(lr=1e-4), "lr 0.003, not 0.0001"), ("teacher", dict(seed=1), "seed 0, not 1"),
    ("teacher", dict(n_steps=9), "n_steps 8, not 9"), ("teacher", dict(n_layer=2), "n_layer"),
    ("teacher", dict(grad_accum=2), "grad_accum"), ("gumbel", dict(t_min=0.2), "t_min 0.001, not"),
    ("gumbel", dict(init_from="teacher"), "init_from"), ("gumbel", {}, "start"),
    ("bd3lm", dict(block_size=2), "block_size 3, not 2"), ("gumbel", {}, "teacher"),
    ("gumbel", {}, "data")])
def test_a_finished_model_is_taken_as_it_is_and_one_of_other_settings_refused(
        name, changed, said, tmp_path, monkeypatch):
    more = dict(block_size=3) if name == "bd3lm" else {}
    _, saved = run(tmp_path, name, **more)
    stop_at(monkeypatch, 1)                                     # nothing may be trained from here
    more.update(nfe=[2], n_samples=7, eval_every=5)
    assert_same_state(saved, run(tmp_path, name, **more)[1])
    if said == "data":
        monkeypatch.setattr(DATA, "fingerprint", "others")
    elif not changed:                                           # the same settings, other weights
        kind, real = dict(teacher=gd.Teacher, start=gd.Student)[said], gd.fingerprint
        monkeypatch.setattr(gd, "fingerprint", lambda m: real(m) + "!" * isinstance(m, kind))
    with pytest.raises(gd.UserError, match=f"{name}.pt .*{said}"):
        run(tmp_path, name, **{**more, **changed})
    assert_same_state(saved, load(tmp_path / f"{name}.pt"))


@pytest.mark.parametrize("start", ["scratch", "teacher", "file"])
def test_a_student_begins_with_the_weights_that_init_from_names(start, cli, tmp_path):
    """With no learning rate it ends as it began. What the start lacks stays new."""
    words, run = [*TINY, "--lr", 0, "--out-dir"], tmp_path / "run"
    assert cli(gd.main, *words, tmp_path, "--students", "mdlm", "--seed", 1)[0] == 0
    init = tmp_path / "mdlm.pt" if start == "file" else start
    assert cli(gd.main, *words, run, "--students", "gumbel", "--init-from", init)[0] == 0
    torch.manual_seed(0)
    expected = STUDENTS["gumbel"](tiny_config(n_layer=1, seq_len=10), 36).state_dict()
    if start != "scratch":
        begun = load(run / "teacher.pt" if start == "teacher" else init)["model"]
        assert expected.keys() > begun.keys()
        expected.update(begun)
    for key, p in load(run / "gumbel.pt")["model"].items():
        assert p.equal(expected[key]), key


def test_settings_from_python_become_plain_numbers_or_are_refused(tmp_path):
    _, saved = run(tmp_path, seed=np.int64(3), lr=np.float64(0.01), nfe=np.array([1, 2]))
    assert saved["config"]["nfe"] == [1, 2] and type(saved["config"]["lr"]) is float
    assert_same_state(saved, run(tmp_path / "plain", seed=3, lr=0.01)[1])
    for wrong in (dict(batch_size=2.5), dict(lr="fast"), dict(nfe=["a"]), dict(nfe=3), dict(x=1)):
        with pytest.raises((TypeError, ValueError)):
            gd.Config(**wrong)
