"""What the notebooks share, and the command that draws the README's pictures.

    python notebooks/classroom.py                     # both, of out/maze
    python notebooks/classroom.py --log out/maze      # a run's log.jsonl, as out/maze/log.png
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "notebooks" / "figures"
sys.path.insert(0, str(ROOT))
import gumbel_distill as gd  # noqa: E402

BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"     # safe for the colour-blind
STYLE = {"mdlm": (RED, "s", "MDLM"), "bd3lm": (RED, "s", "BD3-LM"),
         "gumbel": (BLUE, "o", "with Gumbel noise"), "teacher": ("black", "D", "AR teacher")}


def where(name, **small):
    """Settings that say where a notebook's run is kept: out/<name>, shared with the commands.

    The tests set GD_SMALL to a folder: then it is there, and trained with the settings `small`.
    """
    folder = os.environ.get("GD_SMALL")
    if folder:
        return {"out_dir": f"{folder}/{name}", "max_steps": 20, "eval_every": 20, **small}
    return {"out_dir": os.path.relpath(ROOT / "out" / name)}


def size(n):
    """Number of samples n, in tests a few."""
    return min(n, 60) if os.environ.get("GD_SMALL") else n


def check(answer, is_right, hint):
    """An exercise's verdict: silent about None, AssertionError with a hint for a wrong answer."""
    if answer is None:
        print("no answer yet")
        return
    assert is_right(answer), hint
    print("right!")


# -----------------------------------------------------------------------------
# Mazes

def draw(path, axis, title=""):
    """A path (10,) of cells in the maze, MASK cells left out; forbidden moves dotted and red."""
    for row, line in enumerate(gd.MAZE):
        for col in range(0, len(line), 4):
            if row % 2 and line[col] == "|":
                axis.plot([col // 4] * 2, [row // 2, row // 2 + 1], color="black", lw=2)
            if row % 2 == 0 and line[col:col + 4][1:2] == "-":
                axis.plot([col // 4, col // 4 + 1], [row // 2] * 2, color="black", lw=2)
    moves = {(a, b) for p in gd.maze_paths() for a, b in zip([0, *p], p)}
    cells = [0, *[int(c) for c in path]]
    xy = [(c % gd.MAZE_SIZE + 0.5, c // gd.MAZE_SIZE + 0.5) for c in cells]
    for (a, b), p, q in zip(zip(cells, cells[1:]), xy, xy[1:]):
        if gd.MAZE_SIZE**2 in (a, b):
            continue
        style = dict(color=BLUE, lw=3) if (a, b) in moves else dict(color=RED, lw=2, ls=":")
        axis.plot(*zip(p, q), solid_capstyle="round", **style)
    for c, (x, y) in zip(cells, xy):
        if c < gd.MAZE_SIZE**2:
            axis.plot(x, y, "o", color="black", ms=4)
    axis.text(0.1, 0.38, "S", fontsize=8)
    axis.text(gd.MAZE_SIZE - 0.4, gd.MAZE_SIZE - 0.1, "G", fontsize=8)
    axis.set(xlim=(-0.1, 6.1), ylim=(6.1, -0.1), aspect="equal")
    axis.set_title(title, fontsize=10)
    axis.axis("off")


def draw_all(paths, titles=None, columns=5, width=2.0):
    """Paths (n, 10) as a row, or rows, of mazes."""
    n_rows = -(-len(paths) // columns)
    figure, axes = plt.subplots(n_rows, columns, figsize=(width * columns, 1.1 * width * n_rows),
                                squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for i, path in enumerate(paths):
        draw(path, axes.flat[i], titles[i] if titles else "")
    return figure


def on_grid(p, axis, title=""):
    """Probabilities p (36,) of the cells, as shades of blue in the maze."""
    axis.imshow(torch.as_tensor(p).view(gd.MAZE_SIZE, gd.MAZE_SIZE), cmap="Blues", vmin=0, vmax=1,
                extent=(0, gd.MAZE_SIZE, gd.MAZE_SIZE, 0))
    draw([gd.MAZE_SIZE**2] * 10, axis, title)


# -----------------------------------------------------------------------------
# Curves

def curve(axis, rows, column, label):
    """A column of result rows against the number of function evaluations, a line for each model."""
    for model, (color, marker, name) in STYLE.items():
        points = {}
        for row in rows:
            if row["model"] == model and column in row:
                points.setdefault(row["nfe"], row[column])      # the first of several temperatures
        if len(points) > 1:
            axis.plot(*zip(*sorted(points.items())), color=color, marker=marker, label=name)
        elif points:
            axis.axhline(*points.values(), color=color, ls="--", label=name)
    ticks = sorted({row["nfe"] for row in rows if row["model"] in STYLE and row["nfe"] > 0})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set(xlabel="function evaluations per text", ylabel=label)
    axis.grid(alpha=0.3)


def hero(folder, path):
    """The README's picture: paths written in one call, and quality against the number of calls."""
    rows = json.loads((folder / "results.json").read_text())
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.3), layout="constrained",
                                width_ratios=(1, 1, 1.25, 1.25))
    figure.get_layout_engine().set(h_pad=0.1)
    for axis, noise, title in ((axes[0], "none", "MDLM, one call"),
                               (axes[1], "gumbel", "with Gumbel noise, one call")):
        saved = gd.load_checkpoint(str(folder / f"student-{noise}.pt"), "student")
        student, _ = gd.load_student(saved, "cpu")
        draw(gd.generate(student, 1, 10, nfe=1, temperature=float(noise == "none"))[0], axis, title)
    curve(axes[2], rows, "valid", "share of valid paths")
    curve(axes[3], rows, "tv", "total variation to the truth")
    for axis in axes[2:]:
        axis.set_ylim(0, 1.03)
    axes[2].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    return path


def judged(folder, path):
    """The README's other picture: what `sample.py --eval` says of the run's students."""
    students = [folder / f"student-{noise}.pt" for noise in ("gumbel", "none")]
    subprocess.run([sys.executable, ROOT / "sample.py", "--ckpt", *students, "--eval",
                    "--nfe", "1,3,10", "-n", str(size(1000)), "--judge", "teacher",
                    "--featurizer", "teacher", "--out-dir", folder / "eval"], check=True)
    return Path(shutil.copy(folder / "eval" / "quality_vs_nfe.png", path))


def draw_log(folder):
    """Training and validation loss of every model in a run's log.jsonl, as log.png beside it."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = list(dict.fromkeys(row["model"] for row in rows))
    if not names:
        raise gd.UserError(f"{folder / 'log.jsonl'} is empty: the run has no validation yet")
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3), squeeze=False,
                                layout="constrained")
    for axis, name in zip(axes[0], names):
        steps = [row["step"] for row in rows if row["model"] == name]
        for column, color in (("loss", GREY), ("val", BLUE)):
            label = {"loss": "training", "val": "validation"}[column]
            axis.plot(steps, [row[column] for row in rows if row["model"] == name], color=color,
                      marker="o", ms=3, label=label)
        axis.set(title=name, xlabel="step", ylabel="loss in nats per token")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(folder / "log.png", dpi=150)
    return folder / "log.png"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", metavar="folder", help="draw this run's log.jsonl instead")
    parser.add_argument("--run", default="out/maze", metavar="folder",
                        help="the maze run to draw (out/maze)")
    args = parser.parse_args()
    plt.switch_backend("Agg")
    try:
        if args.log:
            paths = [draw_log(Path(args.log))]
        else:
            paths = [hero(Path(args.run), FIGURES / "hero.png"),
                     judged(Path(args.run), FIGURES / "maze_quality_vs_nfe.png")]
    except FileNotFoundError as e:
        raise gd.UserError(f"{e.filename}: not there; name the folder of a finished run, or make "
                           "one with `python gumbel_distill.py`") from e
    print(*paths, "drawn")


if __name__ == "__main__":
    gd.run_cli(main)
