"""The notebooks run, and tell right from wrong.   python -m pytest tests/test_notebooks.py"""

import ast
import re
import shutil
import sys
import textwrap

import pytest
import torch

import data
import gumbel_distill as gd
from conftest import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# A wrong answer to each exercise. The right ones are in notebooks/solutions.
WRONG = {
    "01_gumbel_max": ["lambda logp, xi: (logp + 2 * xi).argmax(-1)", "0.0", "{'argmax'}"],
    "02_why_parallel_decoding_breaks": ["1.0", "true_p[0].sum().item()", "0.5"],
    "03_gumbel_distillation": ["True", "5", "lambda tau: 51"],
    "04_text": ["4", "'nothing'", "'first'"],
    "05_heads": ["{2}", "lambda a: 1 + sum(a)", "(0.5, 0.5)"],
    "06_other_couplings": ["[0, 1, 2]", "{'valid', 'tv', 'agree_token'}",
                           "lambda p, q: torch.minimum(p, q).sum()"],
}


def solutions(path):
    """Code of the worked solutions to a notebook's exercises, one text for each."""
    text = (path.parent / "solutions" / f"{path.stem}.py").read_text()
    _, *others = re.split(r"^# Exercise \d\. ", text, flags=re.M)
    return ["# " + code for code in others]


COURSE = ROOT / "notebooks" / "README.md"


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def printed(cell):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def names_of(path):
    """The functions and classes that a file defines."""
    return {node.name for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_every_exercise_has_a_worked_solution():
    assert [p.stem for p in NOTEBOOKS] == list(WRONG)
    for path in NOTEBOOKS:
        text = "".join(c.source + "\n" for c in code_cells(path))
        numbers = sorted(int(n) for n in re.findall(r"^answer_(\d) = None", text, re.M))
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 3
        assert len(WRONG[path.stem]) == len(numbers)
        for n, code in enumerate(solutions(path), 1):
            assert f"\nanswer_{n} = " in code and len(code.split("\nanswer_")[0]) > 60


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_its_checks_tell_right_from_wrong(path, tmp_path, monkeypatch):
    """At a small size; every exercise answered rightly, then wrongly, after it had no answer."""
    monkeypatch.setenv("GD_SMALL", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(path, as_version=4)
    cells, n_checks = [], 0
    for cell in book.cells:
        cells.append(cell)
        call = re.search(r"^check\(answer_(\d)", cell.source, re.M)
        if cell.cell_type == "code" and call:
            number = int(call[1])
            n_checks += 1
            for answer in (solutions(path)[number - 1],
                           f"answer_{number} = {WRONG[path.stem][number - 1]}"):
                cells.append(nbformat.v4.new_code_cell(
                    f"{answer}\ntry:\n" + textwrap.indent(cell.source, "    ")
                    + "\nexcept AssertionError as e:\n    print('refused:', e)"))
    assert n_checks == len(WRONG[path.stem])
    book.cells = cells
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}}).execute()
    said = [printed(c) for c in book.cells if c.cell_type == "code"]
    verdicts = [s for s in said if re.match(r"no answer|right!|refused: \S", s)]
    expected = ["no answer", "right!", "refused: "] * n_checks
    assert len(verdicts) == len(expected), verdicts
    assert all(s.startswith(e) for s, e in zip(verdicts, expected)), verdicts


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_short_cells_with_stored_outputs_and_redefines_nothing(path):
    book = nbformat.read(path, as_version=4)
    for word in ("**Goal.**", "**In the paper.**", "**In the code.**", "**Time.**"):
        assert word in book.cells[0].source
    own = set().union(*(names_of(ROOT / f) for f in ("data.py", "gumbel_distill.py", "sample.py",
                                                   "judge.py")))
    for name in re.findall(r"`([\w-]+)`", book.cells[0].source.split("**Time.**")[0]):
        assert name in own or name in ["block_size", *gd.STUDENTS], name
    cells = code_cells(path)
    assert cells[0].source == code_cells(NOTEBOOKS[0])[0].source     # it finds the project
    questions = [c for c in book.cells if c.cell_type == "markdown"
                 and "**Predict before you run.**" in c.source]
    assert len(questions) >= 2
    for cell in questions:  # the answer is what the next cell puts out
        following = book.cells[book.cells.index(cell) + 1]
        assert following.cell_type == "code" and following.outputs
    for cell in cells:
        assert len(cell.source.splitlines()) <= 15 and cell.execution_count
        assert not own & set(re.findall(r"^(?:def|class) (\w+)", cell.source, re.M))
        assert max(map(len, cell.source.splitlines())) <= 100
        assert not [o for o in cell.outputs if o.output_type == "error"]
    pictures = [o for c in cells for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 2


def test_the_contents_page_names_every_chapter():
    text = COURSE.read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d\d_\w+)\.ipynb\)", text) == [p.stem for p in NOTEBOOKS]


def test_a_notebook_finds_the_project_or_fetches_it(tmp_path, monkeypatch):
    """From the project, a folder in it, the folder that holds it; else from REPOSITORY."""
    code = code_cells(NOTEBOOKS[0])[0].source
    project = tmp_path / "holder" / "project"
    (project / "notebooks" / "figures").mkdir(parents=True)
    shutil.copy(ROOT / "notebooks" / "classroom.py", project / "notebooks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for start in (project, project / "notebooks" / "figures", tmp_path / "holder"):
        monkeypatch.chdir(start)
        exec(code, {})
        assert sys.path.pop(0) == str(project / "notebooks")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(AssertionError, match="REPOSITORY"):
        exec(code, {})
    calls = []

    def run(command, check):
        calls.append(command)
        if command[0] == "git":
            shutil.copytree(project, command[-1])
    monkeypatch.setattr("subprocess.run", run)
    exec(code.replace('REPOSITORY = ""', 'REPOSITORY = "https://somewhere/it.git"'), {})
    assert sys.path[0] == str(tmp_path / "elsewhere" / "project" / "notebooks")
    assert calls[0][:3] == ["git", "clone", "https://somewhere/it.git"] and "pip" in calls[1]


def test_the_pictures_of_the_readme_are_drawn_by_one_command(
        cli, maze_run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import classroom
    folder, _ = maze_run
    monkeypatch.setattr(classroom, "FIGURES", tmp_path)
    monkeypatch.setenv("GD_SMALL", "1")
    status, said, err = cli(classroom.main, "--run", folder)
    for picture in (tmp_path / "hero.png", tmp_path / "maze_quality_vs_nfe.png"):
        assert status == 0 and str(picture) in said and picture.stat().st_size > 10_000, err
    status, said, err = cli(classroom.main, "--log", folder)
    assert status == 0 and (folder / "log.png").stat().st_size > 10_000, err
    status, said, err = cli(classroom.main, "--judged", folder / "judge")
    picture = folder / "judge" / "quality_vs_nfe.png"
    assert status == 0 and str(picture) in said and picture.stat().st_size > 10_000, err
    for flag in ("--run", "--log", "--judged"):
        status, _, err = cli(classroom.main, flag, folder / "missing")
        assert status == 1 and "missing" in err and "python gumbel_distill.py" in err
    (tmp_path / "log.jsonl").touch()
    status, _, err = cli(classroom.main, "--log", tmp_path)
    assert status == 1 and "has no validation yet" in err
    (tmp_path / "judged.json").write_text('[{"model": "teacher", "gen_ppl": 2.0}]')
    status, _, err = cli(classroom.main, "--judged", tmp_path)
    assert status == 1 and "no student is judged in it" in err
    (folder / "log.png").unlink()
    shutil.rmtree(folder / "judge")


def test_pictures_tell_the_students_apart(maze_run, tmp_path, monkeypatch):
    """Each model has its own colour, marker and label; the hero shows all three students."""
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import classroom
    folder, rows = maze_run
    names = [*gd.resolve(gd.Config()).students, "teacher"]
    for kind in zip(*[classroom.STYLE[name] for name in names]):
        assert len(set(kind)) == len(names)
    classroom.plt.switch_backend("Agg")
    classroom.plt.close("all")
    classroom.hero(folder, tmp_path / "hero.png")
    *mazes, valid, tv = classroom.plt.gcf().axes
    labels = [classroom.STYLE[name][2] for name in names]
    assert [axis.get_title() for axis in mazes] == [f"{name}, one call" for name in labels[:3]]
    for axis in (valid, tv):
        assert [line.get_label() for line in axis.lines] == labels
    by_paper = next(row for row in rows if row["model"] == "gumbel")
    assert valid.lines[1].get_ydata()[0] == by_paper["valid"]


def test_forbidden_moves_are_told_from_allowed_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import classroom
    axis = classroom.plt.figure().add_subplot()
    path = data.maze_paths()[7]

    def colours(path):
        axis.clear()
        classroom.draw(path, axis)
        return [line.get_color() for line in axis.lines if line.get_color() != "black"]
    assert colours(path) == [classroom.BLUE] * 10
    assert colours([path[0], *path[2:], path[1]]).count(classroom.RED) >= 2
    assert colours([classroom.MASK] * 10) == []


def test_a_moving_picture_has_the_frames_of_the_film(maze_run, cli, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import classroom
    folder, _ = maze_run
    given = ["--ckpt", folder / "mdlm.pt", folder / "gumbel.pt", "--nfe", 3, "--order",
             "first-hitting", "-n", 2]
    status, said, err = cli(classroom.main, "--gif", tmp_path / "a.gif", *given)
    assert status == 0 and "a.gif" in said, err
    picture = image.open(tmp_path / "a.gif")
    assert picture.n_frames >= 2 * 4 and picture.info["loop"] == 0
    words = gd.Tokenizer(["$$", "a"])                           # no formula of matplotlib
    films = [[torch.full((60,), 2), torch.zeros(60, dtype=torch.long)]]
    classroom.write_gif([films], ["mdlm"], words, False, str(tmp_path / "text.gif"))
    picture = image.open(tmp_path / "text.gif")
    milliseconds = 0
    for number in range(picture.n_frames):
        picture.seek(number)
        milliseconds += picture.info["duration"]
    assert milliseconds == 2800                                 # the last of two frames stays
    for args, said in ((["--gif", "film.mp4"], "must end in .gif"), (["--nfe", 3], "--nfe"),
                       (["--gif", "a.gif", *given, "--exact"], "--animate")):
        status, _, err = cli(classroom.main, *args)
        assert status in (1, 2) and said in err.splitlines()[-1], err


def test_models_are_compared_at_the_entropy_that_all_reach(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import classroom

    def rows(model, *points, nfe=4):
        return [dict(model=model, nfe=nfe, tau=1, entropy=h, energy=energy, energy_se=0.03,
                     gen_ppl=ppl, gen_ppl_se=1.0) for h, ppl, energy in points]
    table = rows("a", (3.0, 50.0, 0.4), (2.0, 40.0, 0.2))
    table += rows("b", (1.5, 30.0, 0.0), (2.5, 70.0, 0.1)) + [dict(model="real", entropy=1.0)]
    table += rows("other steps", (2.0, 4.0, 0.2), (3.0, 5.0, 0.4), nfe=9)
    a, b = classroom.at_equal_entropy(table)
    assert (a["model"], b["model"]) == ("a", "b")
    assert a["entropy"] == b["entropy"] == 2.5 and a["nfe"] == b["nfe"] == 4
    assert (a["gen_ppl"], a["energy"], a["energy_se"]) == pytest.approx((45, 0.3, 0.03))
    assert (b["gen_ppl"], b["energy"]) == pytest.approx((70, 0.1)) and "mauve" not in a
    lively = rows("lively", (4.0, 5.0, 0.4), (5.0, 4.0, 0.2))
    assert classroom.at_equal_entropy(table + lively) == [a, b]
    assert "lively does not write as dull as entropy 2.5" in capsys.readouterr().out
