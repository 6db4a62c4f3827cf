"""The notebooks run, and tell right from wrong.   python -m pytest tests/test_notebooks.py"""

import ast
import os
import re
import shutil
import subprocess
import sys

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
    "1.1": "lambda logp, xi: (logp + 2 * xi).argmax(-1)", "1.2": "0.0", "1.3": "{'argmax'}",
    "1.4": "lambda one, two, k1, k2: one[:, k1] > -torch.inf",
    "2.1": "lambda a: 0.125", "2.2": "true_p[0].sum().item()", "2.3": "0.5",
    "3.1": "'t'", "3.2": "5", "3.3": "lambda tau: 51",
    "3.4": "(alone.double().mean() / rounds.double().mean()).item()",
    "4.1": "4", "4.2": "'nothing'", "4.3": "lambda rows, *_: rows[0]['nll']",
    "5.1": "{2}", "5.2": "lambda a: 1 + sum(a)", "5.3": "(0.5, 0.5)",
    "6.1": "lambda p, q: torch.minimum(p, q).sum(dim=-1)",
    "6.2": "{'valid', 'tv', 'agree_token'}", "6.3": "0.7",
}
WRONG_TYPES = ["object()", "'words'", "lambda: 1", "[None]"]


def solutions(path):
    """Code of the worked solutions to a chapter's exercises: number -> code."""
    text = (path.parent / "solutions" / f"{path.stem}.py").read_text()
    _, *parts = re.split(r"^# Exercise (\d\.\d)\. ", text, flags=re.M)
    return dict(zip(parts[::2], ["# " + code for code in parts[1::2]]))


COURSE = ROOT / "notebooks" / "README.md"


@pytest.fixture
def classroom(monkeypatch):
    """The module notebooks/classroom.py."""
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import classroom
    return classroom


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def printed(cell):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def names_of(path):
    """The functions and classes that a file defines."""
    return {node.name for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def exercise_of(cell):
    """The number of the exercise that a cell checks, or None."""
    call = re.search(r'^check\("(.*)", answer\)', cell.source, re.M)
    return call and call[1]


def run(book, folder):
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(folder)}}).execute()


def test_every_exercise_has_a_check_a_worked_solution_and_a_wrong_answer(classroom):
    solved = {}
    for path in NOTEBOOKS:
        own = solutions(path)
        numbers = [exercise_of(cell) for cell in code_cells(path) if exercise_of(cell)]
        assert list(own) == numbers and len(numbers) >= 3
        assert {number[0] for number in numbers} == {path.stem[1]}
        solved.update(own)
    assert list(solved) == list(WRONG) == list(classroom.EXERCISES)
    for code in solved.values():
        assert "\nanswer = " in code and len(code.split("\nanswer")[0]) > 60


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_runs_and_its_checks_tell_right_from_wrong(path, tmp_path, monkeypatch):
    """At a small size; each exercise without an answer, then answered rightly, then wrongly, and
    with answers of wrong types, which get the hint as well."""
    monkeypatch.setenv("GD_SMALL", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(path, as_version=4)
    cells, expected = [], []
    for cell in book.cells:
        cells.append(cell)
        number = exercise_of(cell)
        if number is None:
            continue
        expected += ["no answer", "right!"] + ["not yet."] * (1 + len(WRONG_TYPES))
        wrong = [f"answer = {code}" for code in [WRONG[number], *WRONG_TYPES]]
        for code in [solutions(path)[number], *wrong]:
            cells.append(nbformat.v4.new_code_cell(f'{code}\ncheck("{number}", answer)'))
    book.cells = cells
    run(book, path.parent)
    said = "".join(printed(c) for c in book.cells if c.cell_type == "code")
    verdicts = re.findall(r"^\d\.\d: (no answer|right!|not yet\.)", said, re.M)
    assert verdicts == expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_is_short_cells_with_stored_outputs_and_redefines_nothing(path):
    book = nbformat.read(path, as_version=4)
    for word in ("**Goal.**", "**In the paper.**", "**In the code.**", "**Time.**"):
        assert word in book.cells[0].source
    own = set().union(*(names_of(ROOT / f) for f in ("data.py", "gumbel_distill.py", "sample.py",
                                                   "judge.py")))
    for name in re.findall(r"`([\w-]+)`", book.cells[0].source.split("**Time.**")[0]):
        assert name in own or name in ["block_size", *gd.STUDENTS], name
    cells = code_cells(path)
    assert cells[0].source == code_cells(NOTEBOOKS[0])[0].source     # it finds the project
    assert len(cells[0].source.splitlines()) == 3
    questions = [i for i, c in enumerate(book.cells) if c.cell_type == "markdown"
                 and "**Predict before you run.**" in c.source]
    assert len(questions) >= 2
    for i in questions:  # the next cell shows what happens, the one after it says why
        assert book.cells[i + 1].cell_type == "code" and book.cells[i + 1].outputs
        assert book.cells[i + 2].source.startswith("<details>")
    assert "## Summary" in book.cells[-1].source and "**Next:**" in book.cells[-1].source
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


def test_a_class_gets_chapters_without_outputs_and_answers_that_run(cli, tmp_path, classroom):
    folder = tmp_path / "class"
    status, _, err = cli(classroom.main, "--hand-out", folder)
    assert status == 0, err
    assert sorted(p.name for p in folder.glob("*.ipynb")) == [p.name for p in NOTEBOOKS]
    assert not list(folder.rglob("solutions"))
    n_open = 0
    for path in folder.glob("*.ipynb"):
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        assert not any(c.source.startswith("<details>") for c in book.cells)
        assert not any(c.outputs or c.execution_count for c in code_cells(path))
        n_open += sum("**Predict before you run.**" in c.source for c in book.cells)
    assert n_open >= 2 * len(NOTEBOOKS)
    book = nbformat.read(folder / NOTEBOOKS[0].name, as_version=4)
    run(book, folder)                                           # with the project beside it
    status, _, err = cli(classroom.main, "--hand-out", folder)
    assert status == 1 and "not empty" in err


def test_the_models_of_the_course_are_small_and_write_as_those_of_the_run(
        cli, maze_run, tmp_path, monkeypatch, classroom):
    def sizes(folder):
        return [path.stat().st_size for path in folder.rglob("*.pt")]
    folders = {path.name for path in classroom.MODELS.iterdir()}
    assert folders == {"maze", "cities", "stories", "letters"}
    assert max(sizes(classroom.MODELS)) < 900_000
    assert [m.name for m in classroom.load_models("teacher", "gumbel")] == ["teacher", "gumbel"]
    monkeypatch.setattr(classroom, "MODELS", tmp_path)
    status, _, err = cli(classroom.main, "--models", "--run", maze_run[0])
    assert status == 0 and max(sizes(tmp_path)) < 500_000, err
    whole, _, _ = gd.load_model(f"{maze_run[0]}/gumbel.pt", "cpu")
    half, = classroom.load_models("gumbel", of=maze_run[0].name)
    texts = [gd.generate(model, 200, 10, nfe=1) for model in (whole, half)]
    assert (texts[0] == texts[1]).double().mean() > 0.98
    torch.save({"format": 1}, tmp_path / maze_run[0].name / "mdlm.pt")
    with pytest.raises(gd.UserError, match="no checkpoint of this version"):
        classroom.load_models("mdlm", of=maze_run[0].name)


def test_a_model_of_bpe_is_packed_with_its_pieces_and_needs_no_network(real_data, classroom):
    bpe = data.Tokenizer(size=300)
    cfg = gd.resolve(gd.Config(seq_len=8, n_layer=1))
    teacher = gd.Teacher(cfg, bpe).eval()
    x0 = torch.randint(300, (5, 8), generator=gd.rng("pieces"))
    before = teacher(x0)
    saved = dict(name="teacher", tokenizer=bpe.state, ema=teacher.state_dict(),
                 settings=dict(tokens=bpe.fingerprint))
    packed = classroom.without_bpe(saved)
    pieces = data.Tokenizer(**packed["tokenizer"])
    assert packed["settings"]["tokens"] == pieces.fingerprint != bpe.fingerprint
    assert pieces.decode(range(32, 99)) == bpe.decode(range(32, 99))
    other = gd.Teacher(cfg, pieces).eval()
    other.load_state_dict(packed["ema"])
    assert other.bos_id != teacher.bos_id and torch.equal(other(x0), before)


def test_one_command_gives_the_chapters_a_badge_and_takes_the_older_one_away(
        cli, tmp_path, monkeypatch, classroom):
    chapter = tmp_path / NOTEBOOKS[0].name
    shutil.copy(NOTEBOOKS[0], chapter)
    monkeypatch.setattr(classroom, "CHAPTERS", [chapter])
    n_cells = len(nbformat.read(chapter, as_version=4).cells)
    for owner in ("you", "somebody"):
        status, _, err = cli(classroom.main, "--address", f"https://github.com/{owner}/project")
        assert status == 0, err
        book = nbformat.read(chapter, as_version=4)
        nbformat.validate(book)
        assert len(book.cells) == n_cells + 2 and f"github/{owner}/project" in book.cells[1].source
        assert f"git clone -q https://github.com/{owner}/project project" in book.cells[2].source
    status, _, err = cli(classroom.main, "--address", "my project")
    assert status == 1 and "my project" in err and "https://github.com/you/project" in err


def test_an_error_that_the_user_can_mend_is_one_line_in_a_chapter():
    book = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell("from classroom import load_models"),
        nbformat.v4.new_code_cell("load_models('mdlm', of='nowhere')")])
    client = nbclient.NotebookClient(book, timeout=300, kernel_name="python3", allow_errors=True,
                                     resources={"metadata": {"path": str(ROOT / "notebooks")}})
    client.execute()
    assert len(printed(book.cells[1]).splitlines()) == 1
    assert re.match("error: .*nowhere/mdlm.pt", printed(book.cells[1]))
    assert not [o for o in book.cells[1].outputs if o.output_type == "error"]


def test_without_matplotlib_the_command_says_what_to_install(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done = subprocess.run([sys.executable, ROOT / "notebooks" / "classroom.py"], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.startswith("error:")
    assert "pip install" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_pictures_of_the_readme_are_drawn_by_one_command(
        cli, maze_run, tmp_path, monkeypatch, classroom):
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


def test_pictures_tell_the_students_apart(maze_run, tmp_path, monkeypatch, classroom):
    """Each model has its own colour, marker and label; the hero shows all three students."""
    folder, rows = maze_run
    names = [*gd.resolve(gd.Config()).students, "teacher"]
    for kind in zip(*[classroom.STYLE[name] for name in names]):
        assert len(set(kind)) == len(names)
    classroom.plt.switch_backend("Agg")
    classroom.plt.close("all")
    classroom.hero(folder, tmp_path / "hero.png")
    *mazes, valid, tv = classroom.plt.gcf().axes
    labels = [classroom.STYLE[name][2] for name in names]
    assert [axis.get_title() for axis in mazes] == [f"{name}, one step" for name in labels[:3]]
    for axis in (valid, tv):
        assert [line.get_label() for line in axis.lines] == labels
    by_paper = next(row for row in rows if row["model"] == "gumbel")
    assert valid.lines[1].get_ydata()[0] == by_paper["valid"]


def test_forbidden_moves_are_told_from_allowed_ones(monkeypatch, classroom):
    axis = classroom.plt.figure().add_subplot()
    path = data.maze_paths()[7]

    def colours(path):
        axis.clear()
        classroom.draw(path, axis)
        return [line.get_color() for line in axis.lines if line.get_color() != "black"]
    assert colours(path) == [classroom.BLUE] * 10
    assert colours([path[0], *path[2:], path[1]]).count(classroom.RED) >= 2
    assert colours([classroom.MASK] * 10) == []


def test_a_moving_picture_has_the_frames_of_the_film(
        maze_run, cli, tmp_path, monkeypatch, classroom):
    image = pytest.importorskip("PIL.Image")
    folder, _ = maze_run
    given = ["--ckpt", folder / "mdlm.pt", folder / "gumbel.pt", "--nfe", 10, "-n", 2]
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


def test_models_are_compared_at_the_entropy_that_all_reach(monkeypatch, capsys, classroom):

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
