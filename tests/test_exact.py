"""exact.py: the teacher's texts in fewer calls.   python -m pytest tests/test_exact.py"""

import pytest
import torch
import torch.nn.functional as F

import blocks
import exact
import gumbel_distill as gd
from conftest import STUDENTS, T, TINY, V, tiny_student

pytestmark = pytest.mark.quick
OPEN = torch.full((300, T), V)
XI = gd.sample_gumbel((300, T, V), gd.rng("exact"), torch.float64)


@pytest.mark.parametrize("n_known", [0, 2])
@pytest.mark.parametrize("name", [*STUDENTS, None])
def test_exact_mode_is_serial_extraction_whatever_the_student(name, n_known, teacher):
    xt = OPEN.clone()
    xt[:, :n_known] = torch.randint(V, (300, n_known), generator=gd.rng("known"))
    x, rounds = exact.draft_and_verify(name and tiny_student(name), teacher, XI, xt)
    assert x.equal(teacher.write(xt, XI)) and x[:, :n_known].equal(xt[:, :n_known])
    assert 1 <= rounds.min() < rounds.max() <= T - n_known


@pytest.mark.parametrize("wrong, n_rounds", [([], 1), ([T - 1], 1), ([3], 2), ([0, 3], 3)])
def test_each_error_of_the_student_costs_one_round(wrong, n_rounds, teacher):
    text = teacher.write(OPEN, XI)
    guess = text.clone()
    guess[:, wrong] = (guess[:, wrong] + 1) % V

    def student(draft, noise):
        return F.one_hot(guess[draft == V], V)
    student.reads_noise = True
    x, rounds = exact.draft_and_verify(student, teacher, XI)
    assert x.equal(text) and (rounds == n_rounds).all()


def test_draft_and_answer_agree_as_often_as_shared_noise_makes_them(teacher):
    """argmax(log p + xi) and argmax(log q + xi) agree with probability (1 - TV) / (1 + TV) or more.
    Drawn independently they would not."""
    p = teacher.logp(teacher.hidden(OPEN[:1]))[0, 0].exp()
    q = 0.7 * p + 0.3 / V

    def student(draft, noise):
        return q.log().expand(len(noise), V)
    student.reads_noise = False
    is_first = []                                               # the first token agrees, by round
    xi = gd.sample_gumbel((4000, T, V), gd.rng("agree"), torch.float64)
    exact.draft_and_verify(student, teacher, xi, on_round=lambda live, draft, answer, n_keep:
                           is_first.append(draft[:, 0] == answer[:, 0]))
    tv = (p - q).abs().sum() / 2
    bound = (1 - tv) / (1 + tv)
    assert p @ q < bound - 0.1 and is_first[0].double().mean() > bound - 0.02


@pytest.mark.parametrize("name", STUDENTS)
def test_apd_goes_from_the_teacher_to_the_student_alone(name, teacher):
    student, equal, rounds = tiny_student(name), [], []
    for ratio in (0.0, 0.5, 1.0):
        x, said = exact.compare_exact(student, teacher, 300, T, seed=5, ratio=ratio)
        is_equal = (x == gd.generate(teacher, 300, T, seed=5)).all(dim=1)
        assert said["equal"] == pytest.approx(is_equal.double().mean().item())
        equal.append(said["equal"])
        rounds.append(said["rounds"])
    assert equal[0] == pytest.approx(1) and equal[0] > equal[1] > equal[2]
    assert rounds[0] > rounds[1] > rounds[2] == pytest.approx(1)
    xi, _ = gd.sequence_noise(5, torch.arange(300), T, teacher)
    score = student(OPEN, xi.flatten(0, 1)).view(300, T, V)
    assert x.equal((score if student.reads_noise else score + xi).argmax(dim=-1))


def test_the_command_takes_students_of_whole_texts_and_knows_their_teacher(cli, tmp_path):
    students = {"gumbel": gd.GumbelStudent, "bd3lm": blocks.BlockStudent}
    for folder in ("a", "b"):
        words = [*TINY, "--seed", str(ord(folder)), "--out-dir", str(tmp_path / folder)]
        gd.main(students, blocks.BlockConfig, words)
    path = tmp_path / "a/gumbel.pt"
    status, out, err = cli(exact.main, "--ckpt", path, "-n", 20)
    assert status == 0 and "equal to serial: 100.0%" in out and not err
    for wrong, said in ((["--ckpt", path, "--ratio", 2], "2"), (["--ckpt", path, "-n", 0], "0"),
                        (["--ckpt", tmp_path / "a/bd3lm.pt"], "bd3lm"),
                        (["--ckpt", tmp_path / "a/teacher.pt"], "teacher")):
        status, out, err = cli(exact.main, *wrong)
        assert status == 1 and said in err and "\n" not in err and not out
    (tmp_path / "b/teacher.pt").rename(tmp_path / "a/teacher.pt")
    status, _, err = cli(exact.main, "--ckpt", path, "-n", 2, "--ratio", 1)
    assert status == 0 and "is not the teacher" in err
