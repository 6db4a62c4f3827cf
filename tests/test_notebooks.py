"""The chapters run, and tell right from wrong.   python -m pytest tests/test_notebooks.py"""

import contextlib
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, STUDENTS, TINY

sys.path.insert(0, str(ROOT / "notebooks"))
classroom = pytest.importorskip("classroom")
gd = classroom.gd
classroom.plt.switch_backend("Agg")

WRONG = {  # an answer to each exercise; the right ones are in notebooks/solutions
    "1.1": "lambda logp, xi: (2 * logp).softmax(-1).multinomial(len(xi), True)", "1.2": "0.0",
    "1.3": "[]",
    "1.4": "lambda one, two, k1, k2: one[:, k1] > -torch.inf",
    "2.1": "(lambda a: a**4 + (1 - a)**4, 0.0)", "2.2": "true_p[0].sum().item()", "2.3": "0.5",
    "3.1": "'t'", "3.2": "lambda logits, x0, xt, t: F.cross_entropy(logits, x0[xt == MASK])",
    "3.3": "lambda tau: 1 if tau == 0 else 6",
    "3.4": "(alone.double().mean() / rounds.double().mean()).item()",
    "4.1": "4", "4.2": "'nothing'", "4.3": "lambda rows, *_: rows[0]['nll']",
    "5.1": "[0, 1, 2]", "5.2": "lambda a: 1 + sum(a)", "5.3": "(0.5, 0.5)", "5.4": "{1}",
    "6.1": "lambda p, q: torch.minimum(p, q).sum(dim=-1)",
    "6.2": "{'valid', 'tv', 'agree_token'}", "6.3": "0.7",
}
WRONG_TYPES = ["object()", "'words'", "lambda: 1", "[None]"]


def cells_of(path, kind="code"):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | dict(source="".join(cell["source"])) for cell in cells
            if cell["cell_type"] == kind]


def solutions(path):
    """Code of the worked solutions to a chapter's exercises: number -> code."""
    text = (path.parent / "solutions" / f"{path.stem}.py").read_text()
    _, *parts = re.split(r"^# Exercise (\d\.\d)\. ", text, flags=re.M)
    return dict(zip(parts[::2], ["# " + code for code in parts[1::2]]))


@pytest.mark.parametrize("path", classroom.CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_runs_and_its_checks_tell_right_from_wrong(path, tmp_path, monkeypatch):
    """At a small size; each exercise without an answer, then answered rightly, then wrongly."""
    monkeypatch.setenv("GD_SMALL", str(tmp_path))
    here, said, expected = {}, io.StringIO(), []
    with contextlib.redirect_stdout(said):
        for cell in cells_of(path):
            exec(cell["source"], here)
            classroom.plt.close("all")
            for number in re.findall(r'^check\("(.*)", answer\)', cell["source"], re.M):
                expected += ["no answer", "right!"] + ["not yet"] * (1 + len(WRONG_TYPES))
                wrong = [f"answer = {code}" for code in [WRONG[number], *WRONG_TYPES]]
                for code in [solutions(path)[number], *wrong]:
                    exec(f'{code}\ncheck("{number}", answer)', here)
    verdicts = re.findall(r"^\d\.\d: (no answer|right!|not yet)", said.getvalue(), re.M)
    assert verdicts == expected
    assert "not yet (TypeError: " in said.getvalue()            # why a wrong type fails


@pytest.mark.parametrize("path", classroom.CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_has_stored_outputs_without_an_error(path):
    outputs = []
    for cell in cells_of(path):
        assert cell["execution_count"] and len(cell["source"].splitlines()) <= 20
        outputs += cell["outputs"]
    assert "error" not in [output["output_type"] for output in outputs]


def test_a_class_gets_chapters_without_answers_whose_links_and_imports_work(tmp_path):
    folder = classroom.hand_out(tmp_path / "class")
    chapters = sorted(folder.glob("*.ipynb"))
    assert [path.name for path in chapters] == [path.name for path in classroom.CHAPTERS]
    assert not list(folder.rglob("solutions")) and not (folder / "page.py").exists()
    assert [path.parent for path in folder.parent.rglob("*.md")] == [folder.parent]    # no tables
    for path, whole in zip(chapters, classroom.CHAPTERS):
        text = "\n".join(cell["source"] for cell in cells_of(path, "markdown"))
        assert not any(cell["outputs"] or cell["execution_count"] for cell in cells_of(path))
        printed = json.dumps([cell["outputs"] for cell in cells_of(whole)])
        shares = {f"{n}%" for n in re.findall(r"(\d[\d.]*) %", text)}
        known = {"1%", "5%", "69%", "93%", "98%"}               # asked for, or from before
        assert not [share for share in shares - known if share in printed]     # an answer
        answers = [cell["source"] for cell in cells_of(whole, "markdown")
                   if "answer" in cell["metadata"].get("tags", ())]
        assert "<details>" not in text and not [answer for answer in answers if answer in text]
        for link in re.findall(r"\]\(([^):]+)\)", text):
            assert (folder / link).resolve().exists(), (path, link)
    subprocess.run([sys.executable, "-c", "import classroom; classroom.load_models('mdlm')"],
                   cwd=folder, check=True)
    with pytest.raises(SystemExit, match="name a new folder"):
        classroom.hand_out(tmp_path / "class")


def test_one_command_packs_models_and_others_draw_the_pictures(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    gd.main(STUDENTS, words=[*TINY, "--out-dir", str(run)])
    monkeypatch.setattr(classroom, "MODELS", tmp_path / "packed")
    classroom.main(["--models", "--run", str(run)])
    teacher, student = classroom.load_models("teacher", "gumbel", of="run")
    saved = classroom.load_saved("gumbel", of="run")[1]
    assert saved["about"]["teacher"] == gd.fingerprint(teacher) and "optimizer" not in saved
    whole, = classroom.load_models("gumbel", of=run)
    assert torch.equal(student.net.head.weight, whole.net.head.weight.half().float())
    monkeypatch.setenv("GD_SMALL", str(tmp_path))
    classroom.main(["--run", str(run), "--to", str(tmp_path)])
    valid, tv = classroom.plt.gcf().axes
    assert len(valid.lines) == 4 and len(tv.lines) == 5
    assert classroom.RED not in [line.get_color() for line in valid.lines]
    assert (tmp_path / "hero.png").stat().st_size > 10_000
    classroom.write_gif([student, whole], 1, 3, tmp_path / "maze.gif")
    assert pytest.importorskip("PIL.Image").open(tmp_path / "maze.gif").n_frames >= 2


def test_forbidden_moves_are_told_from_allowed_ones():
    axis, path = classroom.plt.figure().add_subplot(), gd.Maze().paths[7].tolist()

    def colors(path):
        axis.clear()
        classroom.draw(path, axis)
        return [line.get_color() for line in axis.lines if line.get_color() != "black"]
    assert colors(path) == [classroom.BLUE] * 10
    assert colors([path[0], *path[2:], path[1]]).count(classroom.RED) >= 2
    assert colors([classroom.MASK] * 10) == []
