"""Other noise and other losses.   python -m pytest tests/test_ablation.py"""

import json

import pytest
import torch
import torch.nn.functional as F

import ablation
import gumbel_distill as gd
from conftest import CPU, LETTERS, tiny_config
from test_gumbel import KS_LIMIT, gumbel_cdf, ks_one_sample
from test_models import assert_equals_the_dense_form

V, T = LETTERS.vocab_size, 6
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
@pytest.mark.parametrize("name", ablation.OTHER_NOISE)
def test_other_noise_is_read_in_the_dense_form_too(name, n_draft, monkeypatch):
    """In value and gradient: the student is the gumbel one, with changed noise in place of xi."""
    monkeypatch.setattr(gd, "DRAFT_TOKENS", n_draft)
    student = ablation.OtherNoise(tiny_config(), name, V).double()
    assert student.is_draft == name.endswith("-draft") and student.reads_noise
    kind = name.split("-")[0]
    assert_equals_the_dense_form(student, lambda xi: ablation.change_noise(xi, kind))


@pytest.mark.parametrize("name", [
    name for name in ablation.OTHER_NOISE if name not in INDEPENDENT])
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
    students = [*ablation.OTHER_NOISE, "mdlm"]
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


def test_all_students_of_other_noise_learn(tmp_path):
    """The validation loss falls below that of the letters' frequencies, as in test_training."""
    words = "abcabd\n" * 300
    (tmp_path / "text.txt").write_text(words)
    small = dict(CPU, dataset="text", train_files=str(tmp_path / "text.txt"), seq_len=8, n_layer=1,
                 n_head=2, n_embd=32, max_steps=200, eval_every=200, lr=5e-3, batch_size=8,
                 warmup=20, n_samples=8, nfe=[1])
    cfg, data = gd.prepare(gd.Config(**small, out_dir=str(tmp_path)))
    teacher = gd.get_teacher(cfg, data)
    for name in ablation.OTHER_NOISE:
        student = ablation.OtherNoise(cfg, name, teacher.vocab_size)
        gd.train_student(student, cfg, teacher, data, ablation.other_loss)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(log) == 7 and all(row["val"] < 1.4 for row in log)


def test_the_command_prints_a_row_for_each_run_with_means_over_seeds(tmp_path, cli, monkeypatch):
    """Here no run is trained; their settings are checked all the same."""
    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, _, names, configs):
            return [[{"model": name, "nfe": 1, "valid": 0.1 * cfg.seed}]
                    for name, cfg in zip(names, configs)]
    monkeypatch.setattr(ablation, "ProcessPoolExecutor", Pool)
    status, out, err = cli(ablation.main, "--out-dir", tmp_path)
    assert (status, err) == (0, "")
    table = {row["run"]: row for row in json.loads((tmp_path / "ablation.json").read_text())}
    assert list(table) == list(ablation.RUNS) and all(name in out for name in ablation.RUNS)
    for name, (_, n_seeds) in ablation.RUNS.items():
        assert table[name]["valid"] == pytest.approx(0.1 * (n_seeds - 1) / 2)
        assert ("valid_sd" in table[name]) == (n_seeds > 1)
    assert table["default"]["valid_sd"] == pytest.approx(0.1)
