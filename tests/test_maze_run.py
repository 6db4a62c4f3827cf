"""The default experiment, shortened.   python -m pytest tests/test_maze_run.py"""

import itertools
import json

import pytest
import torch

import data
import gumbel_distill as gd
import sample
from conftest import ROOT, maze_config


def row(rows, model, nfe=None, temperature=0.0):
    return next(r for r in rows if r["model"] == model and nfe in (None, r.get("nfe"))
                and r.get("temperature", temperature) == temperature)


def test_the_table_is_saved_as_it_was_made(maze_run):
    folder, rows = maze_run
    assert json.loads((folder / "results.json").read_text()) == rows
    assert {p.name for p in folder.iterdir()} == {
        "teacher.pt", "mdlm.pt", "gumbel.pt", "gumbel-draft.pt", "results.json", "log.jsonl"}
    settings = [(r["model"], r["temperature"], r["nfe"]) for r in rows if "temperature" in r]
    assert settings == list(itertools.product(
        ["mdlm", "gumbel", "gumbel-draft"], [0.0, 1.0], [1, 3]))


def test_noise_carries_the_joint_that_independent_draws_lose(maze_run):
    """Most of all where the students draft."""
    _, rows = maze_run
    mdlm, gumbel = row(rows, "mdlm", 1, temperature=1.0), row(rows, "gumbel", 1)
    ours = row(rows, "gumbel-draft", 1)
    assert row(rows, "teacher")["valid"] > 0.9
    assert mdlm["valid"] + 0.1 < gumbel["valid"] < ours["valid"] - 0.2
    assert ours["distinct"] > 40
    assert row(rows, "gumbel-draft", 3)["tv"] < row(rows, "mdlm", 3, temperature=1.0)["tv"] - 0.2


def test_argmax_without_noise_collapses(maze_run):
    _, rows = maze_run
    collapsed = row(rows, "mdlm", 3, temperature=0.0)
    assert collapsed["distinct"] < row(rows, "gumbel-draft", 3)["distinct"] - 10
    assert collapsed["tv"] > row(rows, "gumbel-draft", 3)["tv"] + 0.3


def test_agreement_stands_above_its_floors(maze_run):
    _, rows = maze_run
    assert row(rows, "teacher")["agree_seq"] == 1
    for column in ("agree_token", "agree_seq"):
        floor = max(r[column] for r in rows if r["model"] in ("teacher, other noise", "mdlm"))
        assert row(rows, "gumbel-draft", 1)[column] > floor + 0.2
        assert row(rows, "gumbel-draft", 1)[column] > row(rows, "gumbel", 1)[column] + 0.2


def test_shared_noise_makes_student_and_teacher_agree_as_daliri_et_al_prove(maze_run):
    """Two that draw from p and q with the same Gumbel noise agree with a probability of at least
    (1 - TV) / (1 + TV) (arXiv 2408.07978). With noise of their own they agree as often as p q."""
    folder, _ = maze_run
    teacher, _, saved = gd.load_model(str(folder / "teacher.pt"), "cpu")
    student, _, _ = gd.load_model(str(folder / "mdlm.pt"), "cpu")
    x0 = gd.load_data(gd.resolve(saved["config"])).val_rows(200)
    g, n = gd.rng("coupling"), 400
    bounds, agree, agree_alone = [], [], []
    for i in range(10):                                         # the token after i known ones
        xt = torch.full_like(x0, student.mask_id)
        xt[:, :i] = x0[:, :i]
        is_next = (torch.arange(10) == i).expand(x0.shape)
        with torch.no_grad():
            logp = teacher(x0, is_next)                         # (200, V)
            logq = student(xt).log_softmax(dim=-1)[torch.arange(200) * (10 - i)]
        tv = 0.5 * (logp.exp() - logq.exp()).abs().sum(dim=-1)
        bounds.append((1 - tv) / (1 + tv))
        xi, other = gd.sample_gumbel((2, n, *logp.shape), g)
        choice = (logp + xi).argmax(dim=-1)                     # (n, 200)
        agree.append((choice == (logq + xi).argmax(dim=-1)).double().mean(dim=0))
        agree_alone.append((choice == (logq + other).argmax(dim=-1)).double().mean(dim=0))
    bounds, agree, agree_alone = map(torch.cat, (bounds, agree, agree_alone))
    print(f"agreement {agree.mean():.3f}, bound {bounds.mean():.3f}, own noise "
          f"{agree_alone.mean():.3f}")
    error = (bounds * (1 - bounds) / n).sqrt()
    assert (agree >= bounds - 5 * error - 1e-3).all() and agree.mean() > bounds.mean()
    assert agree_alone.mean() < bounds.mean() - 0.1             # the law needs the same noise


@pytest.mark.parametrize("name, most", [("mdlm", 4.5), ("gumbel", 4.5), ("gumbel-draft", 2.5)])
def test_exact_mode_is_the_teacher_in_fewer_rounds(name, most, maze_run):
    folder, rows = maze_run
    teacher, _, _ = gd.load_model(str(folder / "teacher.pt"), "cpu")
    student, _, _ = gd.load_model(str(folder / f"{name}.pt"), "cpu")
    x, exact = sample.compare_exact(student, teacher, 1000, 10, 0)
    _, alone = sample.compare_exact(None, teacher, 1000, 10, 0)
    assert exact["equal"] == alone["equal"] == pytest.approx(1)
    assert exact["rounds"] < most < alone["rounds"] < 10
    judge = gd.load_data(gd.resolve(maze_config(folder))).judge
    assert judge(x)["valid"] == pytest.approx(row(rows, "teacher")["valid"], abs=0.002)


def test_samples_are_drawn_as_mazes(maze_run, cli):
    folder, _ = maze_run
    status, said, _ = cli(sample.main, "--ckpt", folder / "gumbel-draft.pt", "--nfe", 3, "-n", 2)
    assert status == 0 and said.count(data.MAZE[0]) == 4
    assert said.count("valid") + said.count("broken at move") == 2


def test_exact_mode_of_the_command_writes_the_teachers_texts(maze_run, cli):
    folder, _ = maze_run
    status, _, _ = cli(sample.main, "--ckpt", folder / "gumbel-draft.pt", "--exact", "-n", 100,
                       "--prompt", "b1 c1", "--out", folder / "exact.jsonl")
    texts = [json.loads(line)["ids"] for line in (folder / "exact.jsonl").read_text().splitlines()]
    (folder / "exact.jsonl").unlink()
    teacher, tokenizer, _ = gd.load_model(str(folder / "teacher.pt"), "cpu")
    known = torch.tensor(tokenizer.encode("b1 c1").tolist() + [36] * 8)
    assert status == 0 and texts == gd.generate(teacher, 100, 10, 0, known).tolist()


@pytest.mark.parametrize("prompt", ["a1", "b1 f6", "____ a2"])
def test_a_prompt_that_no_path_has_is_refused(prompt, maze_run, cli):
    folder, _ = maze_run
    status, _, err = cli(sample.main, "--ckpt", folder / "mdlm.pt", "--prompt", prompt)
    assert status == 1 and repr(prompt) in err and err.count("\n") == 1


def test_infilling_is_compared_with_the_paths_that_have_both_ends(
        maze_run, monkeypatch, capsys, cli):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import infilling
    everywhere = torch.tensor(data.maze_paths())                # (51, 10)
    seen = []

    def generate(model, n, seq_len, known):
        """Every path with these ends equally often; only the first of them; or the goal alone."""
        is_open = known == 36
        same = everywhere[((everywhere == known) | is_open).all(dim=1)]
        seen.append(len(same))
        if model == "exact":
            return same.repeat(n // len(same), 1)
        if model == "one path":
            return same[:1].repeat(n, 1)
        return torch.where(is_open, 35, known).repeat(n, 1)
    monkeypatch.setattr(infilling, "generate", generate)
    assert infilling.scores("exact", 2) == dict(valid=1, tv=0)
    one = infilling.scores("one path", 2)
    expected = sum(k - 1 for k in seen[:len(seen) // 2]) / sum(seen[:len(seen) // 2])
    assert one["valid"] == 1 and one["tv"] == pytest.approx(expected)
    assert infilling.scores("wrong", 2) == dict(valid=0, tv=1)
    monkeypatch.undo()
    status, said, err = cli(infilling.main, maze_run[0], maze_run[0], "-n", 2)
    assert status == 0 and said.count("gumbel-draft") == 4, err
    assert said.count("± 0.0%") == 13                           # twice the same run
