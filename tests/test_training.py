"""Training, checkpoints, resuming.   python -m pytest tests/test_training.py"""

import dataclasses
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gumbel_distill as gd
from conftest import ROOT


def config(folder, **more):
    """A run of seconds: text of 4 letters, with dropout, so that its draws count too."""
    text = folder / "text.txt"
    if not text.exists():
        letters = np.random.default_rng(0).choice(list("abc\n"), 3000)
        text.write_text("".join(letters))
    given = dict(dataset="text", train_files=str(text), seq_len=8, n_layer=1, n_head=2, n_embd=16,
                 dropout=0.1, batch_size=8, max_steps=8, warmup=2, eval_every=2, n_samples=20,
                 nfe="2", noise="gumbel", out_dir=str(folder / "run"))
    return gd.Config(**{**given, **more})


def trained(cfg):
    """Teacher and student of one run, as the state of their checkpoints."""
    cfg, data = gd.prepare(cfg)
    gd.train_student(cfg, gd.get_teacher(cfg, data), data)
    return [gd.load_checkpoint(os.path.join(cfg.out_dir, name), kind)
            for name, kind in (("teacher.pt", "teacher"), (f"student-{cfg.noise}.pt", "student"))]


def assert_same_state(a, b):
    for key in ("model", "ema"):
        assert a[key].keys() == b[key].keys()
        assert all(a[key][name].equal(b[key][name]) for name in a[key])
    for i, slot in a["optimizer"]["state"].items():
        assert all(torch.equal(slot[k], b["optimizer"]["state"][i][k]) for k in slot)


def interrupt_after(monkeypatch, n_steps):
    """Send this process a SIGTERM in the n-th optimiser step."""
    update, calls = gd.learning_rate, []

    def counted(*args):
        calls.append(1)
        if len(calls) == n_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)
    monkeypatch.setattr(gd, "learning_rate", counted)


@pytest.mark.parametrize("more", [{}, dict(labels="teacher"), dict(labels="mixture"),
                                  dict(block_size=4, clip=True)])
@pytest.mark.parametrize("stop_at", [3, 13])
def test_resumed_equals_uninterrupted_bit_for_bit(stop_at, more, tmp_path, monkeypatch):
    whole = trained(config(tmp_path, **more))
    cut = config(tmp_path, **more, out_dir=str(tmp_path / "cut"))
    interrupt_after(monkeypatch, stop_at)
    with pytest.raises(gd.UserError, match="stopped at step .*--resume") as stopped:
        trained(cut)
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    with pytest.raises(gd.UserError, match="interrupted at step .*--resume"):
        trained(cut)
    resumed = trained(dataclasses.replace(cut, resume=True))
    for a, b in zip(whole, resumed):
        assert_same_state(a, b)


def test_another_seed_gives_another_model(tmp_path):
    a = trained(config(tmp_path))[0]
    b = trained(config(tmp_path, seed=1, out_dir=str(tmp_path / "other")))[0]
    assert not all(a["model"][k].equal(b["model"][k]) for k in a["model"])


@pytest.mark.parametrize("labels", ["teacher", "mixture"])
def test_labels_of_the_teacher_are_its_texts_with_their_noise(labels, tmp_path, monkeypatch):
    """The noise handed to the loss makes the teacher write the very texts it comes with."""
    real, is_recorded = gd.student_loss, []

    def spy(student, teacher, x0, t, key, recorded=None, *rest):
        if key[1] == "loss":
            is_recorded.append(recorded is not None)
            if recorded is not None:
                xi = torch.cat([recorded(slice(0, 3)), recorded(slice(3, 8))])
                assert gd.serial_extraction(teacher, xi)[0].equal(x0)
        return real(student, teacher, x0, t, key, recorded, *rest)
    monkeypatch.setattr(gd, "student_loss", spy)
    trained(config(tmp_path, labels=labels, max_steps=4))
    assert is_recorded == [labels == "teacher" or step % 2 == 1 for step in range(4)]


def test_pieces_of_a_batch_add_up_to_its_gradient(tmp_path):
    """grad_accum changes the draws, not the law: the loss of all pieces is their mean over B T."""
    cfg, data = gd.prepare(config(tmp_path, grad_accum=4, noise="none", dropout=0.0))
    steps = []
    student = gd.Student(cfg, data.tokenizer.vocab_size)
    for piece in range(4):
        strata = torch.arange(2 * piece, 2 * piece + 2)
        steps.append(gd.stratified_time(strata, 8, torch.rand(2, generator=gd.rng(piece))))
    t, x0 = torch.cat(steps), data.rows(range(8))
    assert ((t - gd.T_MIN) / (1 - gd.T_MIN) * 8).floor().tolist() == list(range(8))
    xt = torch.where(torch.rand(8, 8, generator=gd.rng(1)) < t[:, None], student.mask_id, x0)

    def loss(rows):
        is_masked = xt[rows] == student.mask_id
        nll = F.cross_entropy(student(xt[rows]), x0[rows][is_masked], reduction="none")
        weight = (1 / t[rows])[:, None].expand(-1, 8)[is_masked]
        return (weight * nll).sum() / x0[rows].numel()
    parts = sum(loss(slice(2 * i, 2 * i + 2)) for i in range(4)) / 4
    assert torch.allclose(parts, loss(slice(0, 8)))
    assert trained(cfg)[1]["step"] == 8


DISTRIBUTED = """
import json, sys, torch
import gumbel_distill as gd, text
text.CACHE = sys.argv[2]
torch.set_default_dtype(torch.float64)
cfg, data = gd.prepare(gd.Config(**json.loads(sys.argv[1])))
gd.train_student(cfg, gd.get_teacher(cfg, data), data)
"""


@pytest.mark.parametrize("noise, more", [("none", dict(block_size=4, clip=True)), ("gumbel", {})])
def test_two_processes_take_the_steps_of_one(noise, more, tmp_path):
    """Same global batch, same draws, in float64: parameters equal to 1e-9 after eight steps."""
    script, states = tmp_path / "distributed.py", []
    script.write_text(DISTRIBUTED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launcher, grad_accum in (("one", [], 4), ("two", torchrun, 4)):
        cfg = config(tmp_path, noise=noise, dropout=0.0, grad_accum=grad_accum,
                     noise_map="draft", device="cpu", out_dir=str(tmp_path / name), **more)
        done = subprocess.run(
            [sys.executable, *launcher, str(script), json.dumps(dataclasses.asdict(cfg)),
             str(tmp_path / "data")], cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("step      8/8") == 2  # process 0 alone speaks
        states.append([gd.load_checkpoint(os.path.join(cfg.out_dir, file), kind) for file, kind in
                       (("teacher.pt", "teacher"), (f"student-{noise}.pt", "student"))])
    for a, b in zip(*states):
        assert a["step"] == b["step"] == 8
        for part in ("model", "ema"):
            for name, value in a[part].items():
                assert value.dtype == torch.float64
                assert torch.allclose(value, b[part][name], rtol=0, atol=1e-9), name


def test_processes_share_the_pieces_of_a_batch_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(gd, "WORLD", 4)
    assert gd.resolve(config(tmp_path)).grad_accum == 4
    assert gd.resolve(config(tmp_path, grad_accum=8)).grad_accum == 8
    with pytest.raises(gd.UserError, match="--grad-accum 12"):
        gd.resolve(config(tmp_path, grad_accum=3))


def test_averaged_weights_follow_the_warmed_up_decay():
    model = torch.nn.Linear(1, 1, bias=False).double()
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=gd.averaging(0.5))
    expected = None
    for n, value in enumerate([3.0, 5.0, -1.0, 2.0, 8.0, 4.0, 7.0, 6.0, 9.0, 1.0, 0.5, 3.5]):
        model.weight.data.fill_(value)
        ema.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = value if n == 0 else decay * expected + (1 - decay) * value
        assert ema.module.weight.item() == pytest.approx(expected)


def test_no_averaging_at_decay_zero(tmp_path):
    for saved in trained(config(tmp_path, ema=0.0)):
        assert all(saved["ema"][k].equal(saved["model"][k]) for k in saved["model"])


def test_learning_rate_warms_up_then_falls_to_zero_or_stays():
    cfg = gd.Config(lr=1.0, warmup=4, max_steps=104, schedule="cosine")
    rates = [gd.learning_rate(cfg, step) for step in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[54] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(rates[4:], rates[5:])) and rates[-1] < 1e-3
    assert gd.learning_rate(dataclasses.replace(cfg, schedule="constant"), 90) == 1


def test_validation_loss_is_repeatable_and_leaves_training_alone(tmp_path):
    cfg, data = gd.prepare(config(tmp_path))
    teacher = gd.get_teacher(cfg, data)
    student = gd.train_student(cfg, teacher, data)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    losses = {gd.validation_loss(student, teacher, data, cfg) for _ in range(2)}
    assert len(losses) == 1 and torch.get_rng_state().equal(state)


def test_validation_takes_every_row_once_whatever_the_batch(tmp_path):
    cfg, data = gd.prepare(config(tmp_path, noise="none", block_size=4))
    x0 = data.val_rows(8 * cfg.batch_size)
    assert len(x0) % cfg.batch_size                             # the last piece is a smaller one
    torch.manual_seed(0)
    teacher = gd.Teacher(cfg, data.tokenizer).eval()
    assert gd.validation_loss(teacher, None, data, cfg) == pytest.approx(
        gd.teacher_loss(teacher, x0).item(), rel=1e-6)
    student = gd.Student(cfg, data.tokenizer.vocab_size).eval()
    t, losses = gd.validation_losses(student, teacher, data, cfg)
    assert t.shape == losses.shape == (len(x0), 2) and t.min() < 0.1 and t.max() > 0.9
    assert gd.validation_loss(student, teacher, data, cfg) == pytest.approx(losses.mean().item())


def test_log_has_one_line_for_each_validation(tmp_path):
    cfg = config(tmp_path)
    trained(cfg)
    with open(os.path.join(cfg.out_dir, "log.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    assert [(r["model"], r["step"]) for r in rows] == [
        (m, s) for m in ("teacher", "gumbel") for s in (2, 4, 6, 8)]
    assert {"loss", "val", "lr", "grad", "tok_s", "seconds"} < rows[0].keys()


def test_a_checkpoint_needs_nothing_else_and_keeps_code_out(tmp_path):
    cfg = config(tmp_path)
    saved = trained(cfg)[1]
    assert saved["step"] == 8 and saved["versions"]["torch"] == str(torch.__version__)
    student, tokenizer = gd.load_student(saved, "cpu")
    assert tokenizer.decode([0, 1, 2]) == "\nab"
    assert gd.generate(student, 2, 8, nfe=2).shape == (2, 8)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    torch.save({"kind": "student", "model": Evil()}, tmp_path / "evil.pt", pickle_module=pickle)
    with pytest.raises(gd.UserError, match="no checkpoint of this program"):
        gd.load_checkpoint(str(tmp_path / "evil.pt"), "student")
    assert not (tmp_path / "ran").exists()


def test_finished_models_are_reused_and_other_settings_refused(tmp_path, capsys):
    trained(config(tmp_path))
    capsys.readouterr()
    trained(config(tmp_path, nfe="1", tau="0.5"))
    assert "reused" in capsys.readouterr().out
    with pytest.raises(gd.UserError, match="noise_map draft there, raw now.*--out-dir"):
        trained(config(tmp_path, noise_map="raw"))
    kept = gd.load_checkpoint(str(tmp_path / "run" / "student-gumbel.pt"), "student")
    assert kept["settings"]["noise_map"] == "draft"


def test_a_cut_off_write_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    whole = trained(config(tmp_path))
    cut = config(tmp_path, out_dir=str(tmp_path / "cut"))
    save, calls = torch.save, []

    def full_disk(state, path):
        calls.append(path)
        if len(calls) == 3:
            with open(path, "wb") as f:
                f.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        trained(cut)
    monkeypatch.undo()
    assert gd.load_checkpoint(str(tmp_path / "cut" / "teacher.pt"), "teacher")["step"] == 4
    for a, b in zip(whole, trained(dataclasses.replace(cut, resume=True))):
        assert_same_state(a, b)


def test_non_finite_loss_names_its_step_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    loss = gd.teacher_loss
    calls = []

    def breaking(teacher, x0):
        calls.append(1)
        return loss(teacher, x0) * (math.nan if teacher.training and sum(calls) > 6 else 1)
    monkeypatch.setattr(gd, "teacher_loss", breaking)
    cfg = config(tmp_path)
    with pytest.raises(gd.UserError, match="loss nan.* at step .*--lr"):
        trained(cfg)
    saved = gd.load_checkpoint(os.path.join(cfg.out_dir, "teacher.pt"), "teacher")
    assert 0 < saved["step"] < 8 and all(p.isfinite().all() for p in saved["model"].values())


def test_ctrl_c_in_the_real_script_saves_and_resume_finishes(tmp_path):
    cfg = config(tmp_path, max_steps=100_000, eval_every=100_000)
    command = [sys.executable, str(ROOT / "train_teacher.py")]
    for f in ("dataset train_files seq_len n_layer n_head n_embd batch_size max_steps eval_every "
              "out_dir").split():
        command += [gd.flag(f), str(getattr(cfg, f))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("teacher: device cpu")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err
    assert gd.load_checkpoint(os.path.join(cfg.out_dir, "teacher.pt"), "teacher")["step"] > 0


@pytest.mark.parametrize("noise", ["none", "gumbel", "gaussian", "uniform", "independent"])
def test_every_kind_of_noise_learns(noise, tmp_path):
    """On text with one repeated word, the loss falls below that of the letters' frequencies."""
    (tmp_path / "text.txt").write_text("abcabd\n" * 300)
    cfg = config(tmp_path, noise=noise, n_embd=32, max_steps=400, eval_every=400, lr=3e-3,
                 dropout=0.0)
    cfg, data = gd.prepare(cfg)
    teacher = gd.get_teacher(cfg, data)
    student = gd.train_student(cfg, teacher, data)
    assert gd.validation_loss(student, teacher, data, cfg) < 1.4  # ln 5 = 1.61 nats
