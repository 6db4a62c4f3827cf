"""Other noise and other losses.   python -m pytest tests/test_ablation.py"""

import json
import pickle
from concurrent.futures import Future

import pytest
import torch
import torch.nn.functional as F

import ablation
import gumbel_distill as gd
from conftest import CPU, LETTERS, tiny_config
from test_cli import TINY, assert_refused
from test_gumbel import KS_LIMIT, gumbel_cdf, ks_one_sample
from test_models import assert_equals_the_dense_form

V, T = LETTERS.vocab_size, 6
STUDENTS = [name + end for name in ablation.NOISES for end in ("", "-draft")]
INDEPENDENT = ["independent", "independent-draft"]


@pytest.mark.parametrize("kind, cdf", [
    ("uniform", lambda x: x.clip(0, 1)), ("gumbel", gumbel_cdf), ("independent", gumbel_cdf),
    ("gaussian", lambda x: torch.special.ndtr(torch.from_numpy(x)).numpy())])
def test_changed_noise_has_the_law_it_is_named_after(kind, cdf):
    xi = gd.sample_gumbel((200_000,), gd.rng("change"))
    assert ks_one_sample(ablation.change_noise(xi, kind), cdf) < KS_LIMIT


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_changed_noise_keeps_ranks_and_stays_finite(kind):
    xi = torch.linspace(-4.4, 200, 5000)  # fresh noise spans -3.5 to 36; a rare token's is larger
    z = ablation.change_noise(xi, kind)
    assert z.isfinite().all() and (z.diff() >= 0).all()
    if kind == "gaussian":  # resolves both tails, where 1 - F would have rounded to 0 or 1
        assert z[xi < 30].diff().min() > 0


@pytest.mark.parametrize("n_draft", [2, V])
@pytest.mark.parametrize("name", STUDENTS)
def test_other_noise_is_read_in_the_dense_form_too(name, n_draft, monkeypatch):
    """In value and gradient: the student is the gumbel one, with changed noise in place of xi."""
    monkeypatch.setattr(gd, "DRAFT_TOKENS", n_draft)
    student = ablation.OtherNoise(tiny_config(), name, V).double()
    assert student.is_draft == name.endswith("-draft") and student.reads_noise
    kind = name.split("-")[0]
    assert_equals_the_dense_form(student, lambda xi: ablation.change_noise(xi, kind))


@pytest.mark.parametrize("name", [
    name for name in STUDENTS if name not in INDEPENDENT])
def test_the_loss_of_changed_noise_is_that_of_the_texts_posterior_noise(name, tiny):
    _, teacher, _ = tiny
    student = ablation.OtherNoise(tiny_config(), name, V).double()
    x0, t = torch.randint(V, (8, T), generator=gd.rng(3)), torch.full((8, 1), 0.5).double()
    loss = ablation.other_loss(student, teacher, x0, t, gd.rng(12))
    assert loss.equal(gd.student_loss(student, teacher, x0, t, gd.rng(12)))
    recorded = gd.sample_gumbel((8, T, V), gd.rng(4), torch.float64)
    assert not loss.equal(ablation.other_loss(student, None, x0, t, gd.rng(12), recorded))


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_noise_is_drawn_without_teacher_or_text(name, tiny):
    """Also where the text comes with a teacher or with recorded noise. The noise has its own law:
    it is Gumbel noise that gives the text's tokens no more often than chance."""
    _, teacher, _ = tiny
    student = ablation.OtherNoise(tiny_config(), name, V).eval()
    x0, t = torch.randint(V, (500, T), generator=gd.rng(3)), torch.full((500, 1), 0.5)
    shown = []
    student.register_forward_pre_hook(lambda _, args: shown.append(args))
    recorded = gd.sample_gumbel((500, T, V), gd.rng(4))
    losses = [ablation.other_loss(student, labeller, x0, t, gd.rng(12), xi)
              for labeller, xi in ((None, None), (teacher, None), (None, recorded))]
    assert losses[0].equal(losses[1]) and losses[0].equal(losses[2])
    xt, xi, _ = shown[0]
    is_masked = xt == V
    assert xi.shape == (is_masked.sum(), V) and not xi.equal(recorded[is_masked])
    assert ks_one_sample(xi.flatten(), gumbel_cdf) < KS_LIMIT
    score = teacher(x0.clone(), is_masked) + xi                 # posterior noise always gives x0
    by_chance = teacher(x0, is_masked).exp().gather(-1, x0[is_masked][:, None]).mean()
    gives_x0 = (score.argmax(-1) == x0[is_masked]).double().mean()
    assert gives_x0.item() == pytest.approx(by_chance.item(), abs=0.06)


def test_kd_is_the_cross_entropy_with_the_teachers_distribution(tiny):
    _, teacher, _ = tiny
    student = gd.Student(tiny_config(), "mdlm", V).double()
    x0, t = torch.randint(V, (8, T), generator=gd.rng(3)), torch.full((8, 1), 0.6).double()
    loss = ablation.kd_loss(teacher)(student, None, x0, t, gd.rng(9))
    xt = gd.q_sample(x0, t, V, gd.rng(9))
    is_masked = xt == V
    p, logq = teacher(x0).exp()[is_masked], student(xt).log_softmax(-1)
    assert torch.allclose(loss, -(p * logq).sum() / 0.6 / x0.numel())
    loss.backward()
    assert student.net.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_kd_is_in_expectation_the_loss_on_the_teachers_own_texts(tiny):
    """Where x0 is the teacher's own text, p(. | x0[:i]) is the law of its token i: both losses have
    one mean, at time one, where the student sees nothing of x0."""
    _, teacher, _ = tiny
    student = gd.Student(tiny_config(), "mdlm", V).double().eval()
    student.net.head.weight.data.mul_(20.0)
    x0, t = gd.generate(teacher, 4000, T), torch.ones(4000, 1).double()
    kd = ablation.kd_loss(teacher)(student, None, x0, t, gd.rng(9))
    plain = gd.student_loss(student, None, x0, t, gd.rng(9))
    assert kd.item() == pytest.approx(plain.item(), rel=0.01)
    other = gd.student_loss(student, None, x0.roll(1, 1), t, gd.rng(9))    # no text of the teacher
    assert abs(other / kd - 1) > 0.05


def test_a_run_of_other_noise_trains_and_judges_each_of_its_students(tmp_path):
    students = [*STUDENTS, "mdlm"]
    small = dict(CPU, n_layer=1, n_embd=8, max_steps=2, eval_every=2, n_samples=8, nfe=[1])
    rows = ablation.run_other(gd.Config(**small, students=students, out_dir=str(tmp_path)))
    assert {r["model"] for r in rows} == {"teacher", "teacher, other noise", *students}
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["model"] for row in log] == ["teacher", *students]


def test_a_run_of_other_noise_hands_each_student_its_own_loss(tmp_path, monkeypatch):
    given = []

    def spy(student, cfg, teacher, data, loss):
        given.append((student.name, type(student), loss.__qualname__.split(".")[0]))
        return student
    monkeypatch.setattr(ablation, "train_student", spy)
    monkeypatch.setattr(ablation, "evaluate", lambda *_: [])
    small = dict(CPU, n_layer=1, n_embd=8, max_steps=2, eval_every=2)
    ablation.run_other(gd.Config(**small, students=["mdlm", "uniform"], out_dir=str(tmp_path)))
    assert given == [("mdlm", gd.Student, "kd_loss"),
                     ("uniform", ablation.OtherNoise, "other_loss")]


class HerePool:
    """The face of ProcessPoolExecutor in this process: what goes to another one is pickled."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        function, args = pickle.loads(pickle.dumps((function, args)))
        done = Future()
        done.set_result(function(*args))
        return done


def test_the_ablation_trains_what_is_missing_and_prints_what_it_writes(cli, tmp_path, monkeypatch):
    """Two entries of it."""
    monkeypatch.setattr(ablation, "ProcessPoolExecutor", HerePool)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(ablation, "RUNS", {
        "default": (dict(students=["mdlm", "gumbel"]), 2),
        "blocks of 5": (dict(students=["bd3lm"], block_size=5, nfe=[2, 6]), 1)})
    call = (ablation.main, *TINY, "--out-dir", tmp_path)
    status, said, err = cli(*call)
    assert status == 0, err
    table = json.loads((tmp_path / "ablation.json").read_text())
    assert [(r["run"], r["model"], r["seeds"]) for r in table] == [
        ("default", model, 2) for model in ("mdlm", "mdlm", "gumbel", "gumbel", "mdlm, APD",
                                            "mdlm, exact mode", "gumbel, APD", "gumbel, exact mode")
    ] + [("blocks of 5", "bd3lm", 1)] * 2
    assert [r["nfe"] for r in table[:4]] == [1, 3, 1, 3] and table[0]["nfe_sd"] == 0
    assert [r["nfe"] for r in table[8:]] == [2, 6] and "valid_sd" not in table[8]
    for i in (0, 1):
        assert (tmp_path / str(i) / "default" / "results.json").exists()
    lines = said.splitlines()
    assert sum(line.endswith(" done") for line in lines) == 3
    assert len(lines) == 3 + 1 + len(table) and "blocks of 5" in lines[-1]

    kept, again = (tmp_path / "0" / name for name in ("default/mdlm.pt", "blocks-of-5/bd3lm.pt"))
    before = kept.stat().st_mtime_ns
    again.unlink()
    assert cli(*call)[0] == 0
    assert json.loads((tmp_path / "ablation.json").read_text()) == table
    assert kept.stat().st_mtime_ns == before and again.exists()
    assert "bd3lm" in (tmp_path / "0" / "blocks-of-5" / "log.txt").read_text()
    assert not (tmp_path / "0" / "blocks-of-5" / "teacher.pt").exists()


def rows_of_seed(name, cfg, n_threads):
    """In place of ablation.run_alone: two rows without any training."""
    return [{"model": "mdlm", "nfe": 1, "valid": 0.25 * 2**cfg.seed, "tv": 0.5},
            {"model": "mdlm, APD", "nfe": 2.0 + cfg.seed, "valid": 1.0}]


def test_the_ablation_is_a_table_of_means_and_deviations(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "ProcessPoolExecutor", HerePool)
    monkeypatch.setattr(ablation, "run_alone", rows_of_seed)
    monkeypatch.setattr(ablation, "RUNS", {"default": ({}, 2), "blocks of 5": ({}, 1)})
    status, _, err = cli(ablation.main, *TINY, "--out-dir", tmp_path)
    assert status == 0, err
    first, second, *one_seed = json.loads((tmp_path / "ablation.json").read_text())
    assert (first["valid"], first["tv"], first["nfe"]) == pytest.approx((0.375, 0.5, 1))
    assert (first["valid_sd"], first["tv_sd"]) == pytest.approx((0.25 / 2**0.5, 0))
    assert (second["nfe"], second["nfe_sd"]) == pytest.approx((2.5, 0.5**0.5))
    assert "tv" not in second and "agree_seq" not in first
    assert [r["valid"] for r in one_seed] == [0.25, 1] and "valid_sd" not in one_seed[0]


def test_rows_of_the_ablation_are_those_of_the_usual_temperature(tmp_path, monkeypatch):
    rows = [{"model": "teacher"}] + [{"model": name, "temperature": temperature}
                                     for name in ("mdlm", "bd3lm", "gumbel", "gumbel-draft")
                                     for temperature in (1.0, 0.0)]
    monkeypatch.setattr(ablation, "run", lambda cfg: rows)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    kept = ablation.run_alone("blocks of 5", gd.Config(out_dir=str(tmp_path / "a")), 1)
    assert [(r["model"], r["temperature"]) for r in kept] == [
        ("mdlm", 1), ("bd3lm", 1), ("gumbel", 0), ("gumbel-draft", 0)]


def test_the_ablation_refuses_bad_settings_before_it_trains(cli, tmp_path):
    for args, *said in (
            (["--n-embd", 30], "--n-embd", "30"), (["--students", "mdlm"], "--students"),
            (["--batch-size", 0], "--batch-size"), (["--n-layer", "x"], "--n-layer")):
        assert_refused(cli(ablation.main, *args, "--out-dir", tmp_path / "a"), *said)
    assert not (tmp_path / "a").exists()


def test_every_run_of_the_ablation_is_one_of_the_program(tmp_path):
    """Its settings exist, and the default run, which trains the teachers, has all their seeds."""
    for change, n_seeds in ablation.RUNS.values():
        gd.resolve(gd.Config(**change))
        assert 1 <= n_seeds <= ablation.RUNS["default"][1]
