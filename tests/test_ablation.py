"""Distillation from the teacher's texts and probabilities.   python -m pytest tests/test_ablation.py
"""

import json

import pytest
import torch

import ablation
import gumbel_distill as gd
from conftest import TINY, Letters, T, V, sharpened, tiny_config
from test_gumbel import KS_LIMIT, ks, pinned_coupling


def test_token_kd_is_the_cross_entropy_with_the_teachers_probabilities(teacher):
    """Computed by loops, at V = 7."""
    torch.manual_seed(1)
    student = sharpened(ablation.TokenKDStudent(tiny_config(), V))
    x0, t = Letters().texts[:8], torch.linspace(0.3, 1, 8)[:, None].double()
    loss = student.loss(x0, t, gd.rng(9), teacher)
    xt = gd.q_sample(x0, t, V, gd.rng(9))
    logq = iter(student(xt).log_softmax(-1))
    total = 0.0
    for text, masked, time in zip(x0, xt, t):
        for i in range(T):
            if masked[i] == V:
                p = teacher.logp(teacher.hidden(text[None]))[0, i].exp()
                total -= (p * next(logq)).sum() / time / x0.numel()
    assert loss.item() == pytest.approx(total.item())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("label, is_right", [
    (gd.posterior_gumbel, True), (pinned_coupling, False)])
def test_posterior_noise_of_the_teachers_text_has_the_law_of_the_recorded_noise(
        label, is_right, teacher):
    """For the winner, and for the loser that was most likely. So it is serial extraction."""
    teacher.requires_grad_(False)
    recorded, _ = gd.sequence_noise(5, torch.arange(3000), T, teacher)     # (n, T, V)
    x0 = teacher.write(torch.full((3000, T), V), recorded)
    logp = teacher.logp(teacher.hidden(x0))
    posterior = label(logp, x0, gd.rng("posterior"))
    best_loser = logp.scatter(-1, x0[..., None], -torch.inf).argmax(-1, keepdim=True)
    for token in x0[..., None], best_loser:
        a, b = (xi.gather(-1, token).flatten() for xi in (recorded, posterior))
        assert (ks(a, b) < KS_LIMIT) == is_right


def test_the_teachers_texts_are_written_once_and_anew_for_another_teacher(teacher, tmp_path):
    teacher.requires_grad_(False)
    data, path = Letters(), str(tmp_path / "texts")
    own = ablation.teacher_texts(data, teacher, 30, path)
    x = own.rows(torch.arange(30))
    assert own.n_train == 30 and own.val is data.val and own.vocab_size == V
    assert data.n_train == 40 and own.fingerprint != data.fingerprint
    nll = [gd.mean_loss(teacher, texts, tiny_config()) for texts in (x, data.texts)]
    assert nll[0] < nll[1] - 0.5                                # its own texts are likelier
    written = (tmp_path / "texts").stat().st_mtime_ns
    again = ablation.teacher_texts(data, teacher, 30, path)
    assert again.rows(torch.arange(30)).equal(x) and again.fingerprint == own.fingerprint
    assert (tmp_path / "texts").stat().st_mtime_ns == written
    teacher.net.head.weight.data *= -1
    other = ablation.teacher_texts(data, teacher, 30, path)
    assert other.fingerprint != own.fingerprint and not other.rows(torch.arange(30)).equal(x)
    assert len(ablation.teacher_texts(data, teacher, 31, path).rows(torch.arange(31))) == 31


def test_the_ablation_trains_what_is_missing_and_writes_what_it_prints(cli, tmp_path, monkeypatch):
    class HerePool:
        """ProcessPoolExecutor in this process."""
        __init__ = __exit__ = lambda *_: None
        __enter__ = lambda self: self
        map = staticmethod(map)

    monkeypatch.setattr(ablation, "ProcessPoolExecutor", HerePool)
    call = (ablation.main, *TINY, "--nfe", 3, "--out-dir", tmp_path, "--only", "default", "serial")
    status, said, err = cli(*call)
    assert status == 0, err
    saved = tmp_path / "0" / "default-serial.json"
    rows = json.loads(saved.read_text())
    three = ["mdlm"] * 3 + ["gumbel"] * 3 + ["gumbel-draft"] * 3
    assert [row["model"] for row in rows] == ["data", "teacher", *three, "gumbel", "gumbel-draft"]
    assert [row["run"] for row in rows[2:5]] == ["default", "APD", "exact"]
    assert rows[4]["teacher_nll"] == rows[1]["teacher_nll"]     # exact: the teacher's own texts
    assert rows[-2]["run"] == "serial" and rows[-2] != {**rows[5], "run": "serial"}
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    (tmp_path / "0" / "serial" / "gumbel.pt").unlink()
    assert cli(*call)[0] == 0 and json.loads(saved.read_text()) == rows
    assert len(kept) == 6 and {path for path, time in kept.items()
                               if path.stat().st_mtime_ns != time} == {
        tmp_path / "0" / "serial" / "gumbel.pt"}


def test_the_ablation_refuses_before_it_trains(cli, tmp_path):
    with gd.FileLock(tmp_path / "0" / ".lock"):
        for words, said in ((["--only", "laplace"], "laplace"), (["--init-from", "x"], "x"),
                            ([], "another run")):
            status, _, err = cli(ablation.main, *TINY, *words, "--out-dir", tmp_path)
            assert status and said in err and not list(tmp_path.rglob("*.pt"))
