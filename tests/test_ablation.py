"""Laws of distillation, and the table of runs.   python -m pytest tests/test_ablation.py"""

import json

import pytest
import torch

import ablation
import gumbel_distill as gd
from conftest import TINY, Letters, T, V, sharpened, tiny_config
from test_gumbel import KS_LIMIT, ks, pinned_coupling


def test_token_kd_is_the_cross_entropy_with_the_teachers_probabilities(teacher):
    torch.manual_seed(1)
    student = sharpened(ablation.TokenKDStudent(tiny_config(), V))
    x0, t = Letters().texts[:8], torch.linspace(0.3, 1, 8)[:, None].double()
    loss = student.loss(x0, t, gd.rng(9), teacher)
    xt = gd.q_sample(x0, t, V, gd.rng(9))
    text, place = (xt == V).nonzero(as_tuple=True)
    p = teacher.logp(teacher.hidden(x0))[text, place].exp()
    nll = -(p * student(xt).log_softmax(-1)).sum(-1) / t[text, 0]
    assert loss.item() == pytest.approx(nll.sum().item() / (8 * T))


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
    assert own.n_train == 30 and data.n_train == 40 and own.val is data.val
    nll = [gd.mean_loss(teacher, texts, tiny_config()) for texts in (x, data.texts)]
    assert nll[0] < nll[1] - 0.5                                # its own texts are likelier
    written = (tmp_path / "texts").stat().st_mtime_ns
    assert ablation.teacher_texts(data, teacher, 30, path).rows(torch.arange(30)).equal(x)
    assert (tmp_path / "texts").stat().st_mtime_ns == written
    teacher.net.head.weight.data *= -1
    other = ablation.teacher_texts(data, teacher, 30, path)
    assert other.fingerprint != own.fingerprint and not other.rows(torch.arange(30)).equal(x)
    assert len(ablation.teacher_texts(data, teacher, 31, path).rows(torch.arange(31))) == 31


def test_the_ablation_trains_what_is_missing_and_writes_what_it_prints(cli, tmp_path, monkeypatch):
    class HerePool:                     # ProcessPoolExecutor in this process
        __init__ = __exit__ = lambda *_: None
        __enter__ = lambda self: self
        map = staticmethod(map)

    monkeypatch.setattr(ablation, "ProcessPoolExecutor", HerePool)
    call = (ablation.main, *TINY, "--nfe", 3, "--out-dir", tmp_path, "--only", "default", "serial")
    status, said, err = cli(*call)
    assert status == 0, err
    saved = tmp_path / "0" / "default-serial.json"
    rows = json.loads(saved.read_text())
    assert [(r["run"], r["model"]) for r in rows] == [("", "data"), ("", "teacher")] + [
        (run, name) for name in ("mdlm", "gumbel", "gumbel-draft")
        for run in ("default", "APD", "exact")] + [("serial", "gumbel"), ("serial", "gumbel-draft")]
    assert rows[4]["teacher_nll"] == rows[1]["teacher_nll"]     # exact: the teacher's own texts
    assert rows[-2]["teacher_nll"] != rows[5]["teacher_nll"]    # both gumbel, not of one text
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    missing = tmp_path / "0" / "serial" / "gumbel.pt"
    missing.unlink()
    assert cli(*call)[0] == 0 and json.loads(saved.read_text()) == rows
    assert [path for path in kept if path.stat().st_mtime_ns != kept[path]] == [missing]


def test_the_ablation_refuses_before_it_trains(cli, tmp_path):
    with gd.FileLock(tmp_path / "0" / ".lock0"):
        for words, said in ((["--only", "laplace"], "laplace"), (["--init-from", "x"], "x"),
                            ([], "another run")):
            status, _, err = cli(ablation.main, *TINY, *words, "--out-dir", tmp_path)
            assert status and said in err and not list(tmp_path.rglob("*.pt"))
