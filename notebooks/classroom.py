"""What the notebooks share, and the command that draws the README's pictures.

    python notebooks/classroom.py                     # both, of out/maze
    python notebooks/classroom.py --log out/maze      # a run's log.jsonl, as out/maze/log.png
    python notebooks/classroom.py --judged out/judge  # the table of judge.py
    python notebooks/classroom.py --gif maze.gif --ckpt out/maze/mdlm.pt out/maze/gumbel.pt -n 5
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import PillowWriter

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "notebooks" / "figures"
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import gumbel_distill as gd  # noqa: E402
import sample  # noqa: E402

# Colours that the colour-blind can tell apart, too (Okabe and Ito).
RED, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#999999"
STYLE = {  # colour, marker and label of each model in all pictures
    "mdlm": (RED, "s", "MDLM"),
    "bd3lm": (RED, "s", "BD3-LM"),
    "gumbel": (BLUE, "o", "paper's map"),
    "gumbel-draft": (GREEN, "^", "ours (drafts)"),
    "teacher": ("black", "D", "AR teacher"),
}
MASK = data.MAZE_SIZE**2        # id of [MASK] in the maze


def label(model):
    """The label of a Teacher or Student in all pictures and tables."""
    return STYLE[model.name][2]


def where(name):
    """The settings that name a notebook's folder: out/NAME, which the commands use, too.

    The tests set GD_SMALL to a folder. Then the run is in that folder, and it is short.
    """
    folder = os.environ.get("GD_SMALL")
    if folder:
        return {"out_dir": f"{folder}/{name}", "max_steps": 4, "eval_every": 4, "batch_size": 8}
    return {"out_dir": os.path.relpath(ROOT / "out" / name)}


def size(n):
    """The number of samples: n, or a few in the tests."""
    return min(n, 60) if os.environ.get("GD_SMALL") else n


def check(answer, is_right, hint):
    """Print the verdict on an answer. A wrong answer raises AssertionError with the hint."""
    if answer is None:
        print("no answer yet")
        return
    assert is_right(answer), hint
    print("right!")


# -----------------------------------------------------------------------------
# Mazes

def draw_walls(axis, title=""):
    """The walls of the maze, with S at the start and G at the goal."""
    n = data.MAZE_SIZE
    for row, line in enumerate(data.MAZE):
        y = row // 2
        for col in range(n + 1):
            if line[4 * col] == "|":
                axis.plot([col, col], [y, y + 1], color="black", lw=2)
        for col in range(n):
            if line[4 * col + 1] == "-":
                axis.plot([col, col + 1], [y, y], color="black", lw=2)
    axis.text(0.1, 0.38, "S", fontsize=8)
    axis.text(n - 0.4, n - 0.1, "G", fontsize=8)
    axis.set(xlim=(-0.1, n + 0.1), ylim=(n + 0.1, -0.1), aspect="equal")
    axis.set_title(title, fontsize=10)
    axis.axis("off")


def allowed_moves():
    """All moves (from, to) of the shortest paths, as a set of pairs of cells."""
    moves = set()
    for path in data.maze_paths():
        moves.update(zip([0, *path], path))
    return moves


def draw(path, axis, title=""):
    """Draw a path (10,) of cells. Masked cells are left out.

    A move that no shortest path makes is red and dotted.
    """
    draw_walls(axis, title)
    moves = allowed_moves()
    cells = [0] + [int(cell) for cell in path]
    x = [cell % data.MAZE_SIZE + 0.5 for cell in cells]
    y = [cell // data.MAZE_SIZE + 0.5 for cell in cells]
    for i in range(len(cells) - 1):
        move = (cells[i], cells[i + 1])
        if MASK in move:
            continue
        style = dict(color=RED, lw=2, ls=":")
        if move in moves:
            style = dict(color=BLUE, lw=3)
        axis.plot(x[i:i + 2], y[i:i + 2], solid_capstyle="round", **style)
    for i, cell in enumerate(cells):
        if cell != MASK:
            axis.plot(x[i], y[i], "o", color="black", ms=4)


def draw_all(paths, titles=None, columns=5, width=2.0):
    """Paths (n, 10) as rows of mazes."""
    n_rows = -(-len(paths) // columns)                          # rounded up
    figure, axes = plt.subplots(n_rows, columns, figsize=(width * columns, 1.1 * width * n_rows),
                                squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for i, path in enumerate(paths):
        draw(path, axes.flat[i], titles[i] if titles else "")
    return figure


def on_grid(p, axis, title=""):
    """Probabilities p (36,) of the cells, as shades of blue in the maze."""
    n = data.MAZE_SIZE
    axis.imshow(torch.as_tensor(p).view(n, n), cmap="Blues", vmin=0, vmax=1, extent=(0, n, n, 0))
    draw_walls(axis, title)


# -----------------------------------------------------------------------------
# Films: how texts unmask, as a moving picture

def draw_text(lines, axis, title, width, n_lines):
    """Lines of (piece, kind), on a grid for n_lines of `width` letters."""
    colours = {"masked": GREY, "new": GREEN, "old": "black"}
    axis.set(xlim=(0, width), ylim=(n_lines + 0.5, -0.5))
    axis.set_title(title, fontsize=10, loc="left")
    axis.axis("off")
    for y, line in enumerate(lines):
        x = 0
        for piece, kind in line:
            axis.text(x, y, piece, color=colours[kind], family="monospace", fontsize=11, va="top",
                      parse_math=False)
            x += len(piece)


def write_gif(texts, names, tokenizer, is_maze, path, width=sample.WIDTH):
    """An animated GIF that shows the films (one a model) of each of the texts, again and again.

    A frame stands for 0.7 seconds, the last one of a text three times as long.
    """
    plt.switch_backend("Agg")
    n = len(names)
    last_frames = [film[-1] for films in texts for film in films]
    n_lines = max(len(sample.lines_of(frame, frame, tokenizer, width)) for frame in last_frames)
    n_rows, n_columns, size = n, 1, (0.096 * width, n * (0.5 + 0.2 * n_lines))
    if is_maze:  # side by side
        n_rows, n_columns, size = 1, n, (2.6 * n, 3.0)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False,
                                layout="constrained")
    writer = PillowWriter(fps=1 / 0.7)
    with writer.saving(figure, path, dpi=100):
        for films in texts:
            for shown in sample.frames(films):
                for axis, name, (number, frame, before) in zip(axes.flat, names, shown):
                    axis.clear()
                    title = f"{name}, step {number}"
                    if is_maze:
                        draw(frame, axis, title)
                    else:
                        lines = sample.lines_of(frame, before, tokenizer, width)
                        draw_text(lines, axis, title, width, n_lines)
                writer.grab_frame()
            for _ in range(2):
                writer.grab_frame()
    plt.close(figure)


def draw_films(path, words):
    """The moving picture of what `sample.py --animate` with these flags (words) shows."""
    if not path.endswith(".gif"):
        raise gd.UserError(f"--gif {path}: must end in .gif")
    args = sample.parse([*words, "--animate"])
    names, models, tokenizer, _, cfg = sample.load_models(args)
    known = sample.checked_prompt(args, models, tokenizer, cfg)
    titles = [label(model) for model in models]
    if len(set(titles)) == len(titles):
        names = titles
    texts = list(sample.all_films(models, cfg, known))
    write_gif(texts, names, tokenizer, cfg.dataset == "maze", path)
    return path


# -----------------------------------------------------------------------------
# Curves

def curve(axis, rows, column, ylabel):
    """A column of result rows against the number of function evaluations, one line per model.

    A model with one number of function evaluations is a dashed horizontal line.
    """
    ticks = set()
    for model, (color, marker, name) in STYLE.items():
        points = {}                                             # nfe: value
        for row in rows:
            if row["model"] == model and column in row:
                ticks.add(row["nfe"])
                points.setdefault(row["nfe"], row[column])      # the first of several temperatures
        if len(points) > 1:
            axis.plot(*zip(*sorted(points.items())), color=color, marker=marker, label=name)
        elif points:
            axis.axhline(*points.values(), color=color, ls="--", label=name)
    label_axes(axis, ticks, ylabel)


def label_axes(axis, ticks, ylabel):
    """Numbers of function evaluations, on a log scale, against ylabel."""
    axis.set_xscale("log")
    axis.set_xticks(sorted(ticks), sorted(ticks))
    axis.minorticks_off()
    axis.set(xlabel="function evaluations per text", ylabel=ylabel)
    axis.grid(alpha=0.3)


def hero(folder, path):
    """The README's picture: a path of each student in one call, and quality against calls."""
    rows = json.loads((folder / "results.json").read_text())
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.3), layout="constrained",
                                width_ratios=(1, 1, 1, 1.25, 1.25))
    figure.get_layout_engine().set(h_pad=0.1)
    for axis, name in zip(axes, ("mdlm", "gumbel", "gumbel-draft")):
        student, _, _ = gd.load_model(f"{folder}/{name}.pt", "cpu")
        temperature = 0.0 if student.reads_noise else 1.0
        text = gd.generate(student, 1, student.seq_len, nfe=1, temperature=temperature)
        draw(text[0], axis, f"{label(student)}, one call")
    curve(axes[3], rows, "valid", "share of valid paths")
    curve(axes[4], rows, "tv", "total variation to the truth")
    for axis in axes[3:]:
        axis.set_ylim(0, 1.03)
    axes[3].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    return path


def judged(folder, path):
    """The README's other picture: what judge.py says of the run's three students."""
    students = [folder / f"{name}.pt" for name in ("mdlm", "gumbel", "gumbel-draft")]
    subprocess.run([sys.executable, ROOT / "judge.py", "--ckpt", *students, "--nfe", "1", "3", "10",
                    "-n", str(size(1000)), "--out-dir", folder / "judge"], check=True)
    return draw_judged(folder / "judge", path)


def judged_table(folder):
    """The rows that judge.py left in a folder; there must be a student's among them."""
    table = json.loads((folder / "judged.json").read_text())
    if not any("tau" in row and "gen_ppl" in row for row in table):
        raise gd.UserError(f"{folder / 'judged.json'}: no student is judged in it; name the folder "
                           "of judge.py with a student")
    return table


def draw_judged(folder, path=None):
    """The table of judge.py as curves; saved as quality_vs_nfe.png in its folder.

    Real text and the teacher are horizontal lines. Students of one name differ in the line style.
    """
    path = path or folder / "quality_vs_nfe.png"
    table = judged_table(folder)
    real, teacher = table[0], next(row for row in table if row["model"] == "teacher")
    rows = [row for row in table if "tau" in row]               # those of students
    lines = {}                                                  # label: rows
    for row in rows:
        name = "{model}, tau {tau:g}, temperature {temperature:g}".format(**row)
        lines.setdefault(name, []).append(row)
    panels = {"gen_ppl": "generative perplexity", "mauve": "MAUVE", "entropy": "entropy, nats",
              "agree_token": "agreement with the teacher"}
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    for axis, (column, ylabel) in zip(axes, panels.items()):
        for row, style in ((real, ":"), (teacher, "--")):
            if column in row:
                axis.axhline(row[column], color="black", ls=style, label=row["model"])
        n_before = {}                                           # lines of each student so far
        for i, (name, line) in enumerate(lines.items()):
            student = line[0]["model"].split("/")[-1]
            color, marker, title = STYLE.get(student, (f"C{i}", "v", student))
            ls = ("-", "--", ":", "-.")[n_before.get(student, 0) % 4]
            n_before[student] = n_before.get(student, 0) + 1
            points = sorted((row["nfe"], row[column]) for row in line if column in row)
            axis.plot([nfe for nfe, _ in points], [y for _, y in points], color=color,
                      marker=marker, ls=ls, label=f"{title}: {name}")
        label_axes(axis, {row["nfe"] for row in rows}, ylabel)
    axes[0].set_yscale("log", base=2)
    axes[0].yaxis.set_major_formatter("{x:g}")
    for axis in axes[1:]:  # from zero, or differences look larger than they are
        axis.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  fontsize=8)
    figure.savefig(path, dpi=150)
    return path


def draw_log(folder):
    """Training and validation loss of each model in a run's log.jsonl, as log.png beside it."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = list(dict.fromkeys(row["model"] for row in rows))   # each once, in their order
    if not names:
        raise gd.UserError(f"{folder / 'log.jsonl'} is empty: the run has no validation yet")
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3), squeeze=False,
                                layout="constrained")
    for axis, name in zip(axes[0], names):
        own = [row for row in rows if row["model"] == name]
        steps = [row["step"] for row in own]
        for column, color, kind in (("loss", GREY, "training"), ("val", BLUE, "validation")):
            axis.plot(steps, [row[column] for row in own], color=color, marker="o", ms=3,
                      label=kind)
        axis.set(title=name, xlabel="step", ylabel="loss in nats per token")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(folder / "log.png", dpi=150)
    return folder / "log.png"


def draw_frontier(folder):
    """The table of judge.py with several --tau or --temperature: the judge's negative
    log-likelihood against entropy; saved as frontier.png in its folder.

    A panel has one number of steps, a curve one student. Texts to the right and below are better,
    but a floor, which no model wrote, may lie there as well."""
    table = judged_table(folder)
    rows = [row for row in table if "tau" in row]               # those of students
    steps = sorted({row["nfe"] for row in rows})
    figure, axes = plt.subplots(1, len(steps), figsize=(2.7 * len(steps), 3.3), squeeze=False,
                                sharex=True, sharey=True, layout="constrained")
    floors = [row["model"] for row in table if row["model"].startswith("floor")]
    for axis, nfe in zip(axes[0], steps):
        for name in dict.fromkeys(row["model"] for row in rows):
            curve = [row for row in rows if (row["model"], row["nfe"]) == (name, nfe)]
            curve.sort(key=lambda row: row["entropy"])
            color, marker, title = STYLE.get(name.split("/")[-1], (None, "v", name))
            axis.plot([row["entropy"] for row in curve],
                      [math.log(row["gen_ppl"]) for row in curve], color=color, marker=marker,
                      label=title)
        for row in table:
            if "tau" in row:
                continue
            color, marker = "black", "*" if row["model"].startswith("real") else "D"
            if row["model"] in floors:
                color, marker = GREY, "x+1"[floors.index(row["model"])]
            axis.plot(row["entropy"], math.log(row["gen_ppl"]), color=color, marker=marker, ls="",
                      label=row["model"])
        axis.set(title=f"{nfe} step{'s' * (nfe > 1)}", xlabel="entropy of a text, nats")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("NLL under the judge,\nnats per token")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  fontsize=8)
    figure.savefig(folder / "frontier.png", dpi=150)
    return folder / "frontier.png"


EQUAL = {"gen_ppl": ".2f", "mauve": ".3f", "energy": ".4f", "words": ".1%", "pairs": ".1%"}


def at_equal_entropy(rows):
    """A model writes duller text at a lower temperature or tau, and its perplexity falls. So the
    models with one nfe are compared at one entropy, the highest that all reach.

    Returns: a row for each model that has rows above and below this entropy, linear between them
    """
    curves = {}                                                 # nfe: model: rows by entropy
    for row in sorted(rows, key=lambda row: row["entropy"]):
        if "tau" in row:
            of_models = curves.setdefault(row["nfe"], {})
            of_models.setdefault(row["model"], []).append(row)
    result = []
    for nfe, of_models in sorted(curves.items()):
        entropy = min(curve[-1]["entropy"] for curve in of_models.values())
        found = []
        for model, curve in sorted(of_models.items()):
            entropies = [row["entropy"] for row in curve]
            if entropy < entropies[0]:
                print(f"nfe {nfe}: {model} does not write as dull as entropy {entropy:.3f}")
                continue
            found.append({"model": model, "nfe": nfe, "entropy": entropy})
            for score in EQUAL:
                for name in (score, score + "_se"):
                    if all(name in row for row in curve):
                        values = [row[name] for row in curve]
                        found[-1][name] = float(np.interp(entropy, entropies, values))
        if len(found) > 1:
            result += found
    return result


def print_equal_entropy(folder):
    rows = at_equal_entropy(judged_table(folder))
    if rows:
        print("At equal entropy, between the nearest settings of the sampler:")
        gd.print_table(rows, dict(model="", nfe="d", entropy=".3f", **EQUAL))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", metavar="folder", help="draw this run's log.jsonl instead")
    parser.add_argument("--judged", metavar="folder", help="draw the table of judge.py in this "
                        "folder instead")
    parser.add_argument("--gif", metavar="file", help="draw how texts unmask instead; all flags of "
                        "sample.py go with it, like --ckpt, -n and --prompt")
    parser.add_argument("--run", default="out/maze", metavar="folder",
                        help="the maze run to draw (out/maze)")
    args, others = parser.parse_known_args()
    if others and not args.gif:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    plt.switch_backend("Agg")
    try:
        if args.gif:
            paths = [draw_films(args.gif, others)]
        elif args.log:
            paths = [draw_log(Path(args.log))]
        elif args.judged:
            paths = [draw_judged(Path(args.judged)), draw_frontier(Path(args.judged))]
            print_equal_entropy(Path(args.judged))
        else:
            paths = [hero(Path(args.run), FIGURES / "hero.png"),
                     judged(Path(args.run), FIGURES / "maze_quality_vs_nfe.png")]
    except FileNotFoundError as e:
        raise gd.UserError(f"{e.filename}: not there; name the folder of a finished run, or make "
                           "one with `python gumbel_distill.py`") from e
    print(*paths, "drawn")


if __name__ == "__main__":
    gd.run_cli(main)
