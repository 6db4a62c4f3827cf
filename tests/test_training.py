"""Training, checkpoints, resuming.   python -m pytest tests/test_training.py"""

import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import config as settings
import gumbel_distill as gd
from conftest import CPU, ROOT, tiny_config
from data import Tokenizer


def config(folder, **more):
    """A run of seconds: text of 4 letters, with dropout, so that its draws count too."""
    text = folder / "text.txt"
    if not text.exists():
        letters = np.random.default_rng(0).choice(list("abc\n"), 3000)
        text.write_text("".join(letters))
    given = dict(CPU, dataset="text", train_files=str(text), seq_len=8, n_layer=1, n_head=2,
                 n_embd=16, dropout=0.1, batch_size=8, max_steps=8, warmup=2, eval_every=2,
                 n_samples=20, nfe=[2], students=["gumbel"], out_dir=str(folder / "run"))
    return gd.Config(**{**given, **more})


def checkpoints(cfg):
    names = ["teacher", *gd.resolve(cfg).students]
    return [gd.load_checkpoint(f"{cfg.out_dir}/{name}.pt") for name in names]


def trained(cfg):
    """The checkpoints of the teacher and the students of a run."""
    gd.run(cfg)
    return checkpoints(cfg)


def assert_same_state(a, b):
    assert (a["name"], a["step"]) == (b["name"], b["step"])
    for key in ("model", "ema"):
        assert a[key].keys() == b[key].keys()
        assert all(a[key][name].equal(b[key][name]) for name in a[key])
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    for i, slot in a["optimizer"]["state"].items():
        assert all(torch.equal(slot[k], b["optimizer"]["state"][i][k]) for k in slot)


class Stop(Exception):
    pass


def stop_at(monkeypatch, n):
    """Raise Stop in the n-th optimiser step from now on, before the weights change."""
    rate, calls = gd.learning_rate, []

    def counted(*args):
        calls.append(1)
        if len(calls) == n:
            raise Stop
        return rate(*args)
    monkeypatch.setattr(gd, "learning_rate", counted)


@pytest.mark.parametrize("more", [{}, dict(labels="teacher"),
                                  dict(block_size=4, students=["gumbel-draft"])])
def test_resumed_equals_uninterrupted_bit_for_bit(more, tmp_path, monkeypatch):
    """Stopped before any checkpoint, right after one, between two; teacher and student."""
    whole = trained(config(tmp_path, **more))
    for step, saved in ((2, None), (3, ("teacher", 2)), (6, ("teacher", 4)), (13, ("student", 4)),
                        (16, ("student", 6))):
        cut = config(tmp_path, **more, out_dir=str(tmp_path / str(step)))
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, step)
            gd.run(cut)
        if saved:
            name = "teacher" if saved[0] == "teacher" else cut.students[0]
            assert gd.load_checkpoint(f"{cut.out_dir}/{name}.pt")["step"] == saved[1]
        for a, b in zip(whole, trained(cut), strict=True):
            assert_same_state(a, b)


def test_a_run_stopped_twice_ends_as_one_that_was_not(tmp_path, monkeypatch):
    whole = trained(config(tmp_path))
    cut = config(tmp_path, out_dir=str(tmp_path / "cut"))
    for n in (4, 8):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, n)
            gd.run(cut)
    for a, b in zip(whole, trained(cut), strict=True):
        assert_same_state(a, b)


def test_another_seed_gives_another_model(tmp_path):
    a = trained(config(tmp_path))
    b = trained(config(tmp_path, seed=1, out_dir=str(tmp_path / "other")))
    for one, two in zip(a, b, strict=True):
        assert not any(one["model"][k].equal(two["model"][k]) for k in one["model"]
                       if one["model"][k].dim() == 2)


def teacher_and_student(folder, name="gumbel", **more):
    """Settings, data, a trained teacher and a new student of another seed."""
    cfg, data = gd.prepare(config(folder, **more))
    teacher = gd.get_teacher(cfg, data)
    torch.manual_seed(7)
    return cfg, data, teacher, gd.new_student(cfg, name, teacher.vocab_size)


@pytest.mark.parametrize("labels", ["data", "teacher"])
@pytest.mark.parametrize("name", ["gumbel", "mdlm"])
def test_the_loss_of_a_student_that_reads_noise_gets_the_teacher_or_the_noise_of_its_texts(
        name, labels, tmp_path):
    """The noise handed to the loss makes the teacher write the very texts it comes with. Real text,
    which all validation is on, comes with the teacher. A student without noise gets neither."""
    cfg, data, teacher, student = teacher_and_student(tmp_path, name, labels=labels, max_steps=4)
    texts = gd.teacher_data(teacher, data, cfg) if labels == "teacher" else data
    seen = []

    def spy(student, labeller, x0, t, generator, xi=None):
        is_recorded = name == "gumbel" and labels == "teacher" and student.training
        assert (xi is not None) == is_recorded
        assert labeller is (teacher if name == "gumbel" and not is_recorded else None)
        if is_recorded:
            assert gd.serial_extraction(teacher, xi).equal(x0)
        seen.append(student.training)
        return gd.student_loss(student, labeller, x0, t, generator, xi)
    gd.train_student(student, cfg, teacher, texts, spy)
    assert seen.count(True) == 4 and seen.count(False) > 0


def test_labels_of_the_teacher_are_what_the_teacher_writes(tmp_path):
    cfg, data = gd.prepare(config(tmp_path, max_steps=4))
    teacher = gd.get_teacher(cfg, data)
    texts = gd.teacher_data(teacher, data, cfg)
    assert texts.n_train == 32 and texts.val is data.val        # as many as the steps will see
    xi, _ = gd.sequence_noise((cfg.seed, "labels"), torch.arange(32), 8, teacher)
    assert gd.serial_extraction(teacher, xi).equal(texts.rows(range(32)))


class Backward:
    """gd.backward with the loss of a small teacher; remembers what the loss was shown."""

    def __init__(self, folder, **more):
        self.cfg, self.data = gd.prepare(config(folder, dropout=0.0, **more))
        self.calls = []

    def __call__(self, step=0):
        torch.manual_seed(0)
        model = gd.Teacher(self.cfg, self.data.tokenizer).double()

        def loss_fn(model, x0, t, generator, index):
            draw = torch.rand(1, generator=generator).item()
            self.calls.append((tuple(index.tolist()), tuple(t.flatten().tolist()), draw))
            assert x0.equal(self.data.rows(index))
            return gd.teacher_loss(model, x0)
        loss = gd.backward(model, loss_fn, self.data, self.cfg, step)
        return model, loss, [p.grad for p in model.parameters()]


def test_pieces_of_a_batch_add_up_to_its_gradient(tmp_path):
    backward = Backward(tmp_path, grad_accum=4)
    model, loss, grads = backward(step=3)
    rows = [i for index, _, _ in backward.calls for i in index]
    assert len(backward.calls) == 4 and len(rows) == 8 and len(set(rows)) > 4
    x0 = backward.data.rows(rows)
    whole = -model(x0).gather(-1, x0[..., None]).mean()
    assert torch.allclose(loss.double(), whole)
    for ours, expected in zip(grads, torch.autograd.grad(whole, list(model.parameters()))):
        assert torch.allclose(ours, expected, atol=1e-12)


def test_draws_are_another_in_each_step_and_piece(tmp_path):
    backward = Backward(tmp_path, grad_accum=4)
    backward(step=0), backward(step=1)
    for part in zip(*backward.calls):
        assert len(set(part)) == 8


@pytest.mark.parametrize("block_size", [8, 4])
def test_times_of_one_piece_are_stratified_over_all_times(block_size, tmp_path):
    backward = Backward(tmp_path, grad_accum=2, block_size=block_size, t_min=0.2)
    backward()
    for _, t, _ in backward.calls:
        part = ((torch.tensor(t) - 0.2) / (1 - 0.2) * 4).floor().view(4, -1)
        assert part.size(1) == 8 // block_size                  # a column for each block
        assert all(sorted(column) == [0, 1, 2, 3] for column in part.T.tolist())


@pytest.mark.parametrize("t_min", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("block_size", [8, 4])
def test_training_sees_times_from_t_min_on_and_validation_all_times(block_size, t_min, tmp_path):
    cfg, data, teacher, student = teacher_and_student(tmp_path, "mdlm", block_size=block_size)
    cfg, times = dataclasses.replace(cfg, t_min=t_min), {True: [], False: []}

    def spy(student, teacher, x0, t, generator):
        times[student.training].append(t.flatten())
        return gd.student_loss(student, teacher, x0, t, generator)
    gd.train_student(student, cfg, teacher, data, spy)
    trained, validated = (torch.cat(times[is_training]) for is_training in (True, False))
    assert len(trained) == 8 * 8 * 8 // block_size
    assert t_min <= trained.min() < t_min + 0.05 and trained.max() <= 1
    assert trained.mean() == pytest.approx((t_min + 1) / 2, abs=0.02)
    assert gd.T_MIN <= validated.min() < 0.05 and 0.95 < validated.max() <= 1


def test_three_processes_take_each_of_eight_pieces_once(tmp_path, monkeypatch):
    """What they add up is the loss and the gradient of one process."""
    backward = Backward(tmp_path, grad_accum=8)
    _, loss, grads = backward()
    alone, backward.calls = backward.calls, []
    sums, share = None, []
    monkeypatch.setattr(gd, "WORLD", 3)
    monkeypatch.setattr(gd.dist, "all_reduce", lambda tensor: summands.append(tensor.clone()))
    for rank in range(3):
        monkeypatch.setattr(gd, "RANK", rank)
        summands = []
        backward()
        share.append(len(backward.calls))
        sums = summands if sums is None else [a + b for a, b in zip(sums, summands, strict=True)]
    assert len(set(alone)) == 8 and sorted(backward.calls) == sorted(alone)
    assert share == [3, 6, 8]
    for total, expected in zip(sums, [loss] + grads, strict=True):
        assert torch.allclose(total, expected, atol=1e-12)


def test_processes_need_a_piece_each(tmp_path, monkeypatch):
    joined = []
    monkeypatch.setattr(settings, "WORLD", 3)
    monkeypatch.setattr(settings.dist, "init_process_group", lambda **how: joined.append(1))
    settings.join_group(gd.resolve(config(tmp_path, grad_accum=4)))
    with pytest.raises(gd.UserError, match="--grad-accum 2"):
        settings.join_group(gd.resolve(config(tmp_path, grad_accum=2)))
    assert joined == [1]


DISTRIBUTED = """
import json, sys, torch
import data, gumbel_distill as gd
data.CACHE = sys.argv[2]
torch.set_default_dtype(torch.float64)
gd.run_cli(lambda: gd.run(gd.Config(**json.loads(sys.argv[1]))))
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Same global batch, same draws, in float64: parameters equal to 1e-9 after eight steps."""
    script, runs = tmp_path / "distributed.py", []
    script.write_text(DISTRIBUTED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        cfg = config(tmp_path, grad_accum=4, block_size=4, students=["bd3lm", "gumbel-draft"],
                     out_dir=str(tmp_path / name))
        done = subprocess.run(
            [sys.executable, *launcher, str(script), json.dumps(dataclasses.asdict(cfg)),
             str(tmp_path / "data")], cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        with open(f"{cfg.out_dir}/log.jsonl") as f:
            log = [json.loads(line) for line in f]
        runs.append((checkpoints(cfg), log, len(done.stdout.splitlines())))
    (one, log, n_lines), (two, log_two, n_lines_two) = runs
    assert len(log) == len(log_two) == 12 and n_lines == n_lines_two        # one process speaks
    for a, b in zip(log, log_two):
        assert a["loss"] == pytest.approx(b["loss"]) and a["val"] == pytest.approx(b["val"])
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"] == 8
        for part in ("model", "ema"):
            for name, value in a[part].items():
                assert value.dtype == torch.float64
                assert torch.allclose(value, b[part][name], rtol=0, atol=1e-9), name


def test_a_run_that_fails_does_not_wait_for_the_other_processes(monkeypatch):
    """One that ends well does: all leave the group together."""
    left = []
    monkeypatch.setattr(settings, "leave_group", lambda: left.append(1))

    def fails():
        raise gd.UserError("bad value")
    with pytest.raises(SystemExit, match="error: bad value"):
        gd.run_cli(fails)
    assert left == []
    gd.run_cli(lambda: None)
    assert left == [1]


def test_averaged_weights_follow_the_warmed_up_decay(tmp_path, monkeypatch):
    """Starting from the initial weights; the decay is (1 + n) / (10 + n), but --ema at most."""
    cfg, data = gd.prepare(config(tmp_path, ema=0.3, max_steps=8, eval_every=1))
    torch.manual_seed(cfg.seed)
    expected = dict(gd.Teacher(cfg, data.tokenizer).named_parameters())
    save, states = torch.save, []
    monkeypatch.setattr(torch, "save", lambda state, path: (states.append(
        {part: {k: v.clone() for k, v in state[part].items()} for part in ("model", "ema")}),
        save(state, path)))
    gd.get_teacher(cfg, data)
    assert len(states) == 8
    for n, state in enumerate(states):
        decay = min(0.3, (1 + n) / (10 + n))
        for name, value in state["model"].items():
            expected[name] = decay * expected[name] + (1 - decay) * value
            assert torch.allclose(state["ema"][name], expected[name], atol=1e-6)


def test_no_averaging_at_decay_zero(tmp_path):
    for saved in trained(config(tmp_path, ema=0.0)):
        assert all(saved["ema"][k].equal(saved["model"][k]) for k in saved["model"])


def test_learning_rate_warms_up_then_falls_to_zero_or_stays():
    cfg = gd.Config(lr=1.0, warmup=4, max_steps=104, schedule="constant")
    stays = [gd.learning_rate(cfg, step) for step in range(104)]
    assert all(b - a == pytest.approx(stays[0]) for a, b in zip(stays[:3], stays[1:4]))
    assert 0 < stays[0] <= 0.25 and stays[4:] == [1] * 100
    falls = [gd.learning_rate(dataclasses.replace(cfg, schedule="cosine"), i) for i in range(104)]
    assert falls[0] < falls[1] < falls[2] < falls[3] <= 1 and falls[4] > 0.99
    assert all(a > b for a, b in zip(falls[4:], falls[5:])) and 0 <= falls[-1] < 1e-3
    assert falls[53] == pytest.approx(0.5, abs=0.03)


def test_validation_loss_is_repeatable_and_leaves_training_alone(tmp_path):
    cfg, data = gd.prepare(config(tmp_path))
    teacher = gd.get_teacher(cfg, data)
    student = gd.Student(cfg, "gumbel", teacher.vocab_size).eval()

    def loss_fn(model, x0, t, generator):
        return gd.student_loss(model, teacher, x0, t, generator)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    losses = {gd.validation_loss(student, loss_fn, data, cfg) for _ in range(2)}
    assert len(losses) == 1 and torch.get_rng_state().equal(state)


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_validation_takes_every_row_once_whatever_the_batch(grad_accum, tmp_path):
    cfg, data = gd.prepare(config(tmp_path, block_size=4, grad_accum=grad_accum))
    x0, shown, times = data.val_rows(8 * cfg.batch_size), [], []
    assert len(x0) % cfg.batch_size                             # the last piece is a smaller one
    torch.manual_seed(0)
    teacher = gd.Teacher(cfg, data.tokenizer).eval()

    def loss_fn(model, x0, t, generator):
        assert t.shape == (len(x0), 2) and 0 < t.min() <= t.max() <= 1
        shown.append(x0)
        times.append(t)
        return gd.teacher_loss(model, x0)
    assert gd.validation_loss(teacher, loss_fn, data, cfg) == pytest.approx(
        gd.teacher_loss(teacher, x0).item(), rel=1e-6)
    assert torch.cat(shown).equal(x0)
    assert torch.cat(times).mean() == pytest.approx(0.5, abs=0.01)
    assert torch.cat(times).var() == pytest.approx(1 / 12, rel=0.05)


def test_log_has_one_line_for_each_validation(tmp_path):
    cfg = config(tmp_path)
    trained(cfg)
    with open(f"{cfg.out_dir}/log.jsonl") as f:
        rows = [json.loads(line) for line in f]
    assert [(r["model"], r["step"]) for r in rows] == [
        (m, s) for m in ("teacher", "gumbel") for s in (2, 4, 6, 8)]
    assert {"loss", "val", "lr", "grad", "tok_s", "seconds"} < rows[0].keys()
    assert rows[0]["lr"] == gd.learning_rate(gd.resolve(cfg), 1)


def test_a_checkpoint_needs_nothing_else_and_keeps_code_out(tmp_path):
    cfg = config(tmp_path)
    saved = trained(cfg)[1]
    student, tokenizer, again = gd.load_model(f"{cfg.out_dir}/gumbel.pt", "cpu")
    assert tokenizer.decode([0, 1, 2]) == "\nab" and again["step"] == 8
    assert all(p.equal(saved["ema"][k]) for k, p in student.state_dict().items())
    assert not student.training and gd.generate(student, 2, 8, nfe=2).shape == (2, 8)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    torch.save({**saved, "config": vars(saved["config"]), "model": Evil()}, tmp_path / "evil.pt",
               pickle_module=pickle)
    with pytest.raises(gd.UserError, match="evil.pt"):
        gd.load_checkpoint(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [None, b"", b"half", b"PK\x03\x04"])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "teacher.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(gd.UserError, match="teacher.pt"):
        gd.load_checkpoint(str(path))


def test_a_checkpoint_with_an_unknown_setting_is_refused(tmp_path):
    path = str(tmp_path / "teacher.pt")
    saved = {"name": "teacher", "step": 1, "format": settings.FORMAT}
    torch.save({**saved, "config": vars(tiny_config())}, path)
    assert gd.load_checkpoint(path)["config"] == tiny_config()
    torch.save({**saved, "config": {**vars(tiny_config()), "noise_map": "raw"}}, path)
    with pytest.raises(gd.UserError, match="noise_map"):
        gd.load_checkpoint(path)
    torch.save({**saved, "config": vars(tiny_config()), "format": settings.FORMAT - 1}, path)
    with pytest.raises(gd.UserError, match=f"teacher.pt.*format {settings.FORMAT - 1}"):
        gd.load_checkpoint(path)


def test_finished_models_are_reused_and_other_settings_refused(tmp_path, monkeypatch):
    table = gd.run(config(tmp_path))
    kept = checkpoints(config(tmp_path))
    stop_at(monkeypatch, 1)                                     # nothing may be trained from here
    assert gd.run(config(tmp_path)) == table
    rows = gd.run(config(tmp_path, nfe=[1, 2], temperature=[0.5], eval_every=3))
    assert [r["nfe"] for r in rows if r["model"] == "gumbel"] == [1, 2]
    for changed, file in ((dict(lr=1e-4), "teacher"), (dict(max_steps=9), "teacher"),
                          (dict(n_layer=2), "teacher"), (dict(seed=1), "teacher"),
                          (dict(grad_accum=2), "teacher"), (dict(t_min=0.2), "gumbel"),
                          (dict(init_from="scratch"), "gumbel"), (dict(block_size=4), "gumbel"),
                          (dict(labels="teacher"), "gumbel")):
        with pytest.raises(gd.UserError, match=f"{file}.pt .*{list(changed)[0]}"):
            gd.run(config(tmp_path, **changed))
    for a, b in zip(kept, checkpoints(config(tmp_path)), strict=True):
        assert_same_state(a, b)


def test_the_teacher_of_a_short_trial_is_refused_by_a_longer_run(tmp_path):
    """Even though it is one that a stopped run could go on from."""
    cfg, data = gd.prepare(config(tmp_path, max_steps=2))
    gd.get_teacher(cfg, data)
    with pytest.raises(gd.UserError, match="teacher.pt .*max_steps 2"):
        gd.run(config(tmp_path, max_steps=8))


def test_models_of_other_data_or_of_another_teacher_are_refused(tmp_path):
    cfg = config(tmp_path)
    trained(cfg)
    other = config(tmp_path, seed=1, students=["mdlm"], out_dir=str(tmp_path / "other"))
    trained(other)
    with pytest.raises(gd.UserError, match="gumbel.pt .*teacher"):
        gd.run(dataclasses.replace(cfg, teacher=f"{other.out_dir}/teacher.pt"))
    (tmp_path / "text.txt").write_text("abc\n" * 750)           # as long, of the same letters
    with pytest.raises(gd.UserError, match="teacher.pt .*data"):
        gd.run(cfg)


def test_the_hash_of_weights_sees_each_bit_and_not_the_number_of_threads():
    torch.manual_seed(0)
    model, hashes, n_threads = torch.nn.Linear(1000, 500), set(), torch.get_num_threads()
    for n in (1, 2, 3, 5):
        torch.set_num_threads(n)
        hashes.add(gd.weights_id(model))
    torch.set_num_threads(n_threads)
    with torch.no_grad():
        model.weight.view(torch.int32)[250, 500] ^= 1
    changed = gd.weights_id(model)
    assert len(hashes) == 1 and changed not in hashes
    with torch.no_grad():
        model.weight.view(torch.int32)[250, 500] ^= 1
    assert gd.weights_id(model) in hashes


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
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(torch, "save", full_disk)
        gd.run(cut)
    assert gd.load_checkpoint(f"{cut.out_dir}/teacher.pt")["step"] == 4
    for a, b in zip(whole, trained(cut), strict=True):
        assert_same_state(a, b)


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate")])
def test_out_of_memory_is_one_line_that_names_the_flags_which_save_it(error, tmp_path, monkeypatch):
    def too_large(*args):
        raise error
    monkeypatch.setattr(gd, "teacher_loss", too_large)
    with pytest.raises(SystemExit, match="^error: .*memory.*--batch-size.*--grad-accum") as raised:
        gd.run_cli(lambda: gd.run(config(tmp_path)))
    assert "\n" not in raised.value.code


def test_other_faults_of_a_gpu_keep_their_traceback(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(gd, "teacher_loss", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gd.run_cli(lambda: gd.run(config(tmp_path)))


def after_steps(folder, loss_fn, n=1, **more):
    """The checkpoint of a teacher after n steps with that loss."""
    cfg, data = gd.prepare(config(folder, max_steps=n, eval_every=n, warmup=0, **more))
    torch.manual_seed(0)
    gd.train(gd.Teacher(cfg, data.tokenizer), loss_fn, data, cfg, [])
    return gd.load_checkpoint(f"{cfg.out_dir}/teacher.pt")


def test_weights_do_not_decay(tmp_path):
    def nothing(*given):
        return 0 * gd.teacher_loss(*given)
    after_one = after_steps(tmp_path, nothing)["model"]
    after_five = after_steps(tmp_path, nothing, n=5, out_dir=str(tmp_path / "five"))["model"]
    assert all(p.equal(after_one[name]) for name, p in after_five.items())


def test_gradients_are_clipped_to_norm_one(tmp_path):
    """Adam's first moment after one step is a tenth of the gradient that it was given."""
    saved = after_steps(tmp_path, lambda *given: 1000 * gd.teacher_loss(*given))
    moments = [slot["exp_avg"].norm() for slot in saved["optimizer"]["state"].values()]
    assert torch.stack(moments).norm().item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_multiplies_in_its_dtype(dtype, tmp_path):
    seen = set()

    def loss_fn(model, x0, *_):
        if model.training:                                      # validation is in float32
            seen.add(model.net.head(model.hidden(x0)).dtype)
        return gd.teacher_loss(model, x0)
    after_steps(tmp_path, loss_fn, dtype=dtype)
    assert seen == {getattr(torch, dtype)}


def test_compiled_training_takes_the_same_steps(tmp_path, monkeypatch):
    """With the backend "aot_eager", which needs no compiler; each layer is compiled."""
    real, compiled = torch.nn.Module.compile, []

    def compile_eagerly(module):
        compiled.append(module)
        real(module, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    runs = []
    for is_compiled in (False, True):
        cfg = config(tmp_path, compile=is_compiled, dropout=0.0, students=["gumbel-draft"],
                     n_layer=2, out_dir=str(tmp_path / str(is_compiled)))
        runs.append([saved["model"] for saved in trained(cfg)])
    assert len(compiled) == 2 * 3                               # teacher, its copy, the student
    for plain, with_it in zip(*runs):
        assert all(torch.allclose(p, with_it[name], atol=1e-5) for name, p in plain.items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("is_validation", [False, True])
def test_a_loss_that_is_not_finite_names_its_model_and_keeps_the_last_checkpoint(
        is_validation, value, tmp_path, monkeypatch):
    """In training or in validation, here from step 5 on. Its gradient stays as it is."""
    loss, calls = gd.teacher_loss, []

    def breaking(teacher, *args):
        calls.append(teacher.training)
        is_broken = sum(calls) > 4 and teacher.training != is_validation
        return loss(teacher, *args) + (value if is_broken else 0)
    monkeypatch.setattr(gd, "teacher_loss", breaking)
    cfg = config(tmp_path)
    with pytest.raises(gd.UserError, match="teacher: no finite loss at step 6.*--lr"):
        gd.run(cfg)
    saved = gd.load_checkpoint(f"{cfg.out_dir}/teacher.pt")
    assert saved["step"] == 4 and all(p.isfinite().all() for p in saved["model"].values())


def saved_teacher(cfg, tokenizer):
    """The averaged weights of a random teacher, in a checkpoint of these settings."""
    torch.manual_seed(3)
    teacher = gd.Teacher(cfg, tokenizer)
    about = {name: getattr(cfg, name) for name in gd.SHAPE}
    gd.save_checkpoint(f"{cfg.out_dir}/teacher.pt", dict(ema=teacher), name="teacher",
                       settings=dict(about, tokens=tokenizer.fingerprint), config=vars(cfg),
                       tokenizer=tokenizer.state)
    return teacher.state_dict()


def unequal_to(tensors, others):
    """The names of those tensors that differ from the others of the same name, or have none."""
    return {name for name, p in tensors.items() if name not in others or not p.equal(others[name])}


@pytest.mark.parametrize("tokens", ["char", "gpt2-1024"])
@pytest.mark.parametrize("name, block_size, own", [
    ("mdlm", 8, set()), ("gumbel", 8, {"embed_noise"}), ("gumbel-draft", 4, {"scale"})])
def test_a_start_from_the_teacher_takes_all_but_the_mask_row_positions_and_noise_table(
        name, block_size, own, tokens, tmp_path, request):
    """Where the tokens are letters the teacher's last row is its BOS, which it has trained."""
    tokenizer = Tokenizer(list("abcd"))
    if tokens != "char":
        request.getfixturevalue("real_data")
        tokenizer = Tokenizer(size=1024)
    cfg = gd.resolve(config(tmp_path, block_size=block_size, out_dir=str(tmp_path)))
    assert cfg.init_from == "teacher"
    teacher = saved_teacher(cfg, tokenizer)
    V = tokenizer.vocab_size
    student = gd.new_student(cfg, name, V)
    before = {key: p.clone() for key, p in student.state_dict().items()}
    data = gd.Data(np.zeros(100, np.uint16), np.zeros(100, np.uint16), 8, tokenizer)
    after = gd.start_weights(student, cfg, data)
    matrices = {key for key, p in teacher.items() if p.dim() == 2}
    assert matrices <= unequal_to(before, teacher)              # else there is nothing to see
    assert unequal_to(after, teacher) == {"net.embed.weight", "embed_pos.weight"} | own
    assert unequal_to(after, before) == matrices
    rows = after["net.embed.weight"]
    assert rows[:V].equal(teacher["net.embed.weight"][:V])
    assert rows[V].equal(before["net.embed.weight"][V])
    assert not rows[V].equal(teacher["net.embed.weight"][V])
    student.load_state_dict(after)                              # nothing is missing or left over


@pytest.mark.parametrize("start", ["scratch", "teacher", "mdlm.pt"])
def test_a_student_begins_with_the_start_that_init_from_names(start, tmp_path):
    """With no learning rate it ends as it began. The teacher is this run's, or --teacher."""
    run = str(tmp_path / "run")
    cfg, data, teacher, mdlm = teacher_and_student(tmp_path, "mdlm", lr=0.0, init_from="scratch")
    gd.train_student(mdlm, cfg, teacher, data)
    source = {"scratch": {}, "teacher": teacher.state_dict(), "mdlm.pt": mdlm.state_dict()}[start]
    more = dict(init_from=start.replace("mdlm.pt", f"{run}/mdlm.pt"), block_size=4, lr=0.0)
    for out, given in (("run", None), ("elsewhere", f"{run}/teacher.pt")):
        cfg, _ = gd.prepare(config(tmp_path, **more, teacher=given, out_dir=str(tmp_path / out)))
        torch.manual_seed(8)
        student = gd.new_student(cfg, "gumbel", teacher.vocab_size)
        began = {key: p.clone() for key, p in student.state_dict().items()}
        ended = gd.train_student(student, cfg, teacher, data).state_dict()
        for key, p in ended.items():
            expected = source.get(key, began[key])
            if start == "teacher" and key == "net.embed.weight":
                expected = torch.cat([expected[:-1], began[key][-1:]])
            assert p.equal(expected), key


@pytest.mark.parametrize("changed, there", [
    (dict(n_head=1), 2), (dict(n_layer=2), 1), (dict(n_embd=8), 16), (dict(seq_len=4), 8)])
@pytest.mark.parametrize("start", ["teacher", "mdlm"])
def test_a_start_of_another_shape_or_length_is_refused_with_both_values(
        start, changed, there, tmp_path):
    cfg, data, teacher, student = teacher_and_student(tmp_path, "mdlm", max_steps=2)
    gd.train_student(student, cfg, teacher, data)
    (name, here), = changed.items()
    init = "teacher" if start == "teacher" else f"{cfg.out_dir}/mdlm.pt"
    other, data = gd.prepare(config(tmp_path, **changed, init_from=init,
                                    teacher=f"{cfg.out_dir}/teacher.pt"))
    student = gd.new_student(other, "gumbel", data.tokenizer.vocab_size)
    with pytest.raises(gd.UserError, match=f"{start}.pt .*{name} {there}, not {here}") as raised:
        gd.start_weights(student, other, data)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("start", ["teacher", "mdlm"])
def test_a_start_of_other_tokens_is_refused_with_both_values(start, tmp_path):
    """As many tokens, so that the weights would fit."""
    cfg, data, teacher, student = teacher_and_student(tmp_path, "mdlm", max_steps=2)
    gd.train_student(student, cfg, teacher, data)
    words = Tokenizer(list("wxyz"))
    assert words.vocab_size == data.tokenizer.vocab_size
    other = gd.Data(data.train, data.val, 8, words)
    init = "teacher" if start == "teacher" else f"{cfg.out_dir}/mdlm.pt"
    both = f"tokens {data.tokenizer.fingerprint}, not {words.fingerprint}"
    with pytest.raises(gd.UserError, match=f"{start}.pt .*{both}"):
        gd.start_weights(student, dataclasses.replace(cfg, init_from=init), other)


def test_a_start_from_a_teacher_of_transformers_is_refused_and_from_scratch_it_is_not(tmp_path):
    for name in ("gpt2", str(tmp_path)):
        with pytest.raises(gd.UserError, match=f"--teacher {name}.*--init-from scratch") as raised:
            gd.resolve(config(tmp_path, teacher=name, init_from="teacher"))
        assert "\n" not in str(raised.value)
        assert gd.resolve(config(tmp_path, teacher=name, init_from="scratch")).teacher == name
    gd.resolve(config(tmp_path, teacher="out/teacher.pt", init_from="teacher"))


@pytest.mark.parametrize("name", ["mdlm", "gumbel", "gumbel-draft"])
def test_every_student_learns(name, tmp_path):
    """On text with one repeated word, the loss falls below that of the letters' frequencies."""
    (tmp_path / "text.txt").write_text("abcabd\n" * 300)
    cfg, data = gd.prepare(config(tmp_path, n_embd=32, max_steps=200, eval_every=200, lr=5e-3,
                                  dropout=0.0, warmup=20))
    teacher = gd.get_teacher(cfg, data)
    gd.train_student(gd.Student(cfg, name, teacher.vocab_size), cfg, teacher, data)
    with open(f"{cfg.out_dir}/log.jsonl") as f:
        val = [json.loads(line)["val"] for line in f][-1]
    assert val < 1.4                                            # the frequencies have 1.55 nats


def test_the_error_of_one_training_ends_those_beside_it_at_once():
    cfg = gd.resolve(gd.Config(**CPU))
    ended = []

    def trains():
        while not settings.STOP.wait(0.01):
            pass
        ended.append(True)

    def fails():
        raise gd.UserError("no finite loss")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.raises(gd.UserError, match="no finite loss"):
        settings.side_by_side([trains, fails], cfg)
    assert ended == [True] and not settings.STOP.is_set()
    torch.set_num_threads(threads)


def test_a_student_that_is_named_twice_is_trained_once():
    cfg = gd.resolve(gd.Config(**CPU, students=["mdlm", "bd3lm", "gumbel"], block_size=5))
    assert cfg.students == ["bd3lm", "gumbel"]


def test_the_runs_own_teacher_is_known_by_its_path_too(tmp_path):
    for path in (f"{tmp_path}/teacher.pt", f"{tmp_path}/../{tmp_path.name}/teacher.pt"):
        cfg = gd.resolve(gd.Config(**CPU, init_from=path, out_dir=str(tmp_path)))
        assert cfg.init_from == "teacher"


def test_trainings_side_by_side_end_with_the_weights_of_one_after_the_other(tmp_path):
    """So they draw nothing from the generator of the process, which all threads share."""
    threads, ended = torch.get_num_threads(), []
    for n in (1, 2):                                            # with one thread: one by one
        torch.set_num_threads(n)
        cfg = gd.Config(**CPU, max_steps=12, eval_every=12, batch_size=4, n_samples=4, n_embd=16,
                        n_layer=1, nfe=[1], out_dir=str(tmp_path / str(n)))
        gd.run(cfg)
        ended.append([gd.load_model(f"{cfg.out_dir}/{name}.pt", "cpu")[0].state_dict()
                      for name in ("teacher", "mdlm", "gumbel", "gumbel-draft")])
    torch.set_num_threads(threads)
    for one, other in zip(*ended):
        assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_without_dropout_leaves_the_generator_of_the_process_alone(dropout, tmp_path):
    cfg, data = gd.prepare(config(tmp_path, dropout=dropout))
    student = gd.Student(cfg, "mdlm", data.tokenizer.vocab_size)

    def loss(model, x0, t, generator, index):
        return gd.student_loss(model, None, x0, t, generator)
    before = torch.get_rng_state()
    gd.backward(student, loss, data, cfg, 0)
    assert torch.get_rng_state().equal(before) == (dropout == 0)
