"""The default experiment, shortened.   python -m pytest tests/test_maze_run.py"""

import json

import gumbel_distill as gd
import sample


def row(rows, model, nfe=None, **settings):
    return next(r for r in rows if r["model"] == model and nfe in (None, r["nfe"])
                and all(r.get(k) == v for k, v in settings.items()))


def test_the_table_is_saved_as_it_was_made(maze_run):
    folder, rows = maze_run
    assert json.loads((folder / "results.json").read_text()) == rows
    assert {p.name for p in folder.iterdir()} == {
        "teacher.pt", "student-none.pt", "student-gumbel.pt", "results.json", "log.jsonl"}


def test_noise_carries_the_joint_that_independent_draws_lose(maze_run):
    _, rows = maze_run
    teacher, gumbel = row(rows, "teacher"), row(rows, "gumbel", 1)
    mdlm = row(rows, "mdlm", 1, temperature=1.0)
    assert teacher["valid"] > 0.9
    assert mdlm["valid"] < 0.1 < 0.3 < gumbel["valid"]
    assert gumbel["distinct"] > 40
    assert row(rows, "gumbel", 3)["tv"] < row(rows, "mdlm", 3, temperature=1.0)["tv"] - 0.1


def test_argmax_without_noise_collapses(maze_run):
    _, rows = maze_run
    assert row(rows, "mdlm", 3, temperature=0.0)["tv"] > row(rows, "gumbel", 3)["tv"] + 0.15


def test_agreement_stands_far_above_its_floors(maze_run):
    _, rows = maze_run
    gumbel = row(rows, "gumbel", 1)
    floor = max(gumbel["shuffled"], row(rows, "best constant text")["agree_token"],
                row(rows, "mdlm", 1, temperature=0.0)["agree_token"])
    assert gumbel["agree_token"] > floor + 0.1
    assert row(rows, "teacher")["agree_seq"] == 1


def test_exact_mode_is_the_teacher_in_fewer_rounds(maze_run):
    _, rows = maze_run
    exact, alone = row(rows, "exact, gumbel"), row(rows, "exact, no student")
    assert exact["equal"] == alone["equal"] == 1
    assert exact["rounds"] < 4 < alone["rounds"]
    assert exact["tv"] == row(rows, "teacher")["tv"]


def test_samples_are_drawn_as_mazes(maze_run, cli):
    folder, _ = maze_run
    status, said, _ = cli(sample.main, "--ckpt", folder / "student-gumbel.pt", "--nfe", 3, "-n", 2)
    assert status == 0 and said.count("o") >= 22 and said.count("+---+---+---+---+---+---+") == 4
    status, said, _ = cli(sample.main, "--ckpt", folder / "student-gumbel.pt", "--exact", "-n", 100,
                          "--prompt", "b1 c1")
    assert status == 0 and "serial teacher  8 calls" in said and "100 of 100" in said


def test_a_second_start_reuses_everything(maze_run, capsys):
    folder, rows = maze_run
    again = gd.run(gd.Config(max_steps=600, eval_every=300, n_samples=1000, nfe="1,3",
                             out_dir=str(folder)))
    out = capsys.readouterr().out
    assert out.count("reused") == 2 and "teacher: " in out
    assert [{k: v for k, v in r.items() if "seconds" not in k} for r in again] == [
        {k: v for k, v in r.items() if "seconds" not in k} for r in rows]
