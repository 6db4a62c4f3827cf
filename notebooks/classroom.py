"""What the chapters share, and a command for those who teach, and for the README's pictures.

    python notebooks/classroom.py --hand-out FOLDER   # the chapters without outputs and answers
    python notebooks/classroom.py --models            # pack out/maze into notebooks/models/maze
    python notebooks/classroom.py --address https://github.com/you/project       # badges for Colab
    python notebooks/classroom.py                     # the README's two pictures, of out/maze
    python notebooks/classroom.py --log out/maze      # a run's log.jsonl, as out/maze/log.png
    python notebooks/classroom.py --judged out/judge  # the table of judge.py
    python notebooks/classroom.py --gif maze.gif --ckpt out/maze/mdlm.pt out/maze/gumbel.pt -n 5
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

try:
    import matplotlib.pyplot as plt
    from matplotlib.animation import PillowWriter
except ImportError:
    sys.exit('error: the chapters and their pictures need matplotlib: pip install -e ".[dev]"')

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
FIGURES = NOTEBOOKS / "figures"
MODELS = NOTEBOOKS / "models"
CHAPTERS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
sys.path.insert(0, str(ROOT))
import config  # noqa: E402
import data  # noqa: E402
import gumbel_distill as gd  # noqa: E402
import sample  # noqa: E402

# Colours that the colour-blind can tell apart, too (Okabe and Ito).
RED, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#999999"
STYLE = {  # colour, marker and label of each model in all pictures
    "mdlm": (RED, "s", "MDLM"),
    "bd3lm": (RED, "s", "BD3-LM"),
    "gumbel": (BLUE, "o", "the paper's student"),
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
    return min(n, 30) if os.environ.get("GD_SMALL") else n


def load_models(*names, of="maze"):
    """The models of these names that come with the course, in the folder models/OF."""
    return [gd.load_model(f"{MODELS}/{of}/{name}.pt", "cpu")[0] for name in names]


def load_tokenizer(of):
    """The Tokenizer of the models in the folder models/OF."""
    return gd.load_model(f"{MODELS}/{of}/teacher.pt", "cpu")[1]


def texts_of(teacher, tokenizer, n, seq_len):
    """n texts that a teacher writes, as data to train on; the last tenth is for validation."""
    n = size(n)
    tokens = gd.generate(teacher, n, seq_len, "texts of the teacher").numpy().astype("uint16")
    train, val = np.split(tokens, [n - n // 10])                # (n, T) in two
    return data.Data(train.ravel(), val.ravel(), seq_len, tokenizer, stride=seq_len)


def quietly(function, *args):
    """What a function returns, without its lines. The last one of them is printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = function(*args)
    print(*said.getvalue().splitlines()[-1:])
    return result


def print_error(shell, kind, error, traceback, tb_offset=None):
    print(f"error: {error}", file=sys.stderr)


if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
    # in a notebook, too, an error that the user can mend is one line without a traceback
    shell.set_custom_exc((gd.UserError,), print_error)


# -----------------------------------------------------------------------------
# Exercises: each has a test of the answer, by a hash or by a computed value, and a hint

def plain(answer):
    """An answer as text: numbers with three digits, a set in its order, small letters."""
    if hasattr(answer, "item"):                                 # a tensor of one number
        answer = answer.item()
    if isinstance(answer, set):
        return " ".join(sorted(map(plain, answer)))
    if isinstance(answer, (list, tuple)):
        return " ".join(map(plain, answer))
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return f"{answer:.3f}"
    return str(answer).strip().lower()


def digest(answer):
    """A hash of an answer, which nobody reads the answer from."""
    return hashlib.sha256(plain(answer).encode()).hexdigest()[:10]


def has_digest(right):
    return lambda answer: digest(answer) == right


FIVE = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05]).log()       # logp (V,) of chapter 1
THREE = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])        # p and q (V,) of chapter 6


def draws_colder(sampler, n=20_000):
    """1.1: the shares of a sampler's tokens are the softmax of twice logp."""
    xi = gd.sample_gumbel((n, 5), gd.rng("exercise"))
    share = sampler(FIVE, xi).bincount(minlength=5) / n
    return (share - (2 * FIVE).softmax(dim=-1)).abs().max() < 4 / n**0.5


def is_mean_of_maximum(number, n=100_000):
    """1.2: the mean of max(logp + xi), here with one token of probability 1."""
    mean = gd.sample_gumbel((n,), gd.rng("exercise")).mean().item()
    return abs(number - mean) < 0.015


def is_straight(inequality, n=5000):
    """1.4: it holds for all noise of Theorem 4.1, and for half of the noise that is independent."""
    g, rows = gd.rng("exercise"), FIVE.expand(n, 5)
    by_theorem = [gd.posterior_gumbel(rows, torch.full((n,), k), g) for k in (0, 3)]
    independent = gd.sample_gumbel((2, n, 5), g)
    share = inequality(*independent, 0, 3).double().mean()
    return inequality(*by_theorem, 0, 3).all() and 0.45 < share < 0.55


def is_share_of_abab(share):
    """2.1: A with probability a at positions 1 and 3, and with 1 - a at 2 and 4."""
    return all(abs(share(a) - a**4 - (1 - a)**4) < 1e-6 for a in (0.0, 0.5, 0.8))


def is_valid_by_chance(number):
    """2.2: ten independent draws, each from its own distribution, are a path."""
    paths = torch.tensor(data.maze_paths())                     # (51, 10)
    share = torch.stack([(paths == cell).double().mean(0) for cell in range(MASK)], dim=-1)
    right = share[torch.arange(10), paths].prod(dim=-1).sum()
    return abs(number - right) < 1e-6


def is_break_even(number):
    """3.4: what a call of the student may cost, in calls of the teacher."""
    teacher, ours = load_models("teacher", "gumbel-draft")
    xi, _ = gd.sequence_noise(0, torch.arange(size(1000)), 10, teacher)
    rounds = [sample.draft_and_verify(student, teacher, xi)[1].double().mean()
              for student in (None, ours)]
    return abs(number - (rounds[0] / rounds[1] - 1)) < 0.05


def reads_a_curve(nll_at):
    """4.3: the NLL at an entropy between two points of a curve."""
    points = (("a", 4, 3.0, 5.0), ("a", 4, 4.0, 7.0), ("a", 4, 3.5, 5.5), ("a", 1, 3.2, 9.0),
              ("b", 4, 3.2, 1.0))
    rows = [dict(zip(("model", "nfe", "entropy", "nll"), point)) for point in points]
    return abs(nll_at(rows, "a", 4, 3.2) - 5.2) + abs(nll_at(rows, "a", 4, 3.75) - 6.25) < 1e-5


def keeps_as_many(mean):
    """5.2: the mean number of tokens that stay, of acceptances."""
    cases = ([0.5, 0.5], [1, 0.9, 0.5])
    rights = [1 + sum(itertools.accumulate(case, lambda a, b: a * b)) for case in cases]
    return all(abs(mean(case) - right) < 1e-4 for case, right in zip(cases, rights))


def is_bound_of_borders(bound):
    """6.1: how often a shared u agrees at least, by the places of the borders."""
    p = torch.full((1, 10), 0.1)
    q = p + torch.tensor([-0.004, 0.004]).repeat_interleave(5)
    pairs = torch.rand(2, 50, 4, generator=gd.rng("exercise")).softmax(dim=-1)
    shift = (pairs[0].cumsum(dim=-1) - pairs[1].cumsum(dim=-1)).abs()
    is_right = (bound(*pairs) - 1 + shift.sum(dim=-1)).abs().max() < 1e-4
    return is_right and abs(bound(p, q) - 0.9) < 1e-4


def is_gumbel_agreement(number, n=40_000):
    """6.3: how often the argmax of two models with shared Gumbel noise is one token."""
    xi = gd.sample_gumbel((n, 3), gd.rng("exercise"))
    tokens = [(p.log() + xi).argmax(dim=-1) for p in THREE]
    return abs(number - (tokens[0] == tokens[1]).double().mean()) < 0.015


EXERCISES = {
    "1.1": (draws_colder, "These are not the probabilities softmax(2 logp). What must be doubled, "
            "and what must not? The answer is a function of logp and xi."),
    "1.2": (is_mean_of_maximum, "Average (logp + xi).amax(-1) over the draws above. The number is "
            "named after Euler."),
    "1.3": (has_digest("e3b0c44298"), "A likely loser must have smaller noise than a rare one. "
            "Does the winner stay on top?"),
    "1.4": (is_straight, "Write down that k1 beats k2 in the first row, and that k2 beats k1 in "
            "the second. Add the two. The answer is a function of one, two, k1, k2."),
    "2.1": (is_share_of_abab, "Write down the probability of ABAB, and that of BABA. Add the two. "
            "The answer is a function of a."),
    "2.2": (is_valid_by_chance, "Multiply true_p[i, path[i]] along each path. Then add up over the "
            "paths."),
    "2.3": (has_digest("b07c03b413"), "Half the sum of |share - 1/51| over the 51 paths."),
    "3.1": (has_digest("1705701365"), "Which of them does Theorem 4.1 make, and from what?"),
    "3.2": (has_digest("2a1558ac34"), "The noise of the moves 1 to i decides move i."),
    "3.3": (lambda count: count(0.0) == 1 and count(1.0) > 5, "A function of tau: generate with "
            "gd.generate(ours, 1000, 10, nfe=1, tau=tau), and count the rows of unique(dim=0)."),
    "3.4": (is_break_even, "A round with a student costs 1 + c, a round without one costs 1. "
            "Multiply by the mean numbers of rounds."),
    "4.1": (has_digest("399d0c7e69"), "How many blocks are there? Each takes its own steps."),
    "4.2": (has_digest("ec7eb527d8"), "Each block is one token. Which tokens does the "
            "model see?"),
    "4.3": (reads_a_curve, "Keep the rows of this model and nfe, sort them by entropy, and "
            "interpolate (numpy.interp). The answer is a function of rows, model, nfe, entropy."),
    "5.1": (has_digest("3e351a7306"), "Token i + 2 depends on the tokens i and i + 1. What "
            "decides these?"),
    "5.2": (keeps_as_many, "The guess of head k stays if the heads 1 to k are all right: multiply. "
            "The answer is a function of a list."),
    "5.3": (has_digest("baada11eca"), "What does a guess without noise do? And what does the "
            "teacher do with xi? The answer is two numbers."),
    "6.1": (is_bound_of_borders, "F is p.cumsum(dim=-1). Take the distance of the two places of "
            "each border, and add up over the borders."),
    "6.2": (has_digest("0db1a2957f"), "Which distribution has 1 - u? And which token does "
            "the teacher pick at 1 - u?"),
    "6.3": (is_gumbel_agreement, "1 / sum_j max(p_j / p_k, q_j / q_k) is the share of token k. Add "
            "up over the three."),
}


def check(number, answer):
    """Say if an answer to an exercise is right. A wrong one, of whatever type, gets the hint."""
    is_right, hint = EXERCISES[number]
    if answer is None:
        print(f"{number}: no answer yet")
        return
    try:
        verdict = bool(is_right(answer))
    except Exception:                                           # a wrong type fails in many ways
        verdict = False
    print(f"{number}: right!" if verdict else f"{number}: not yet. {hint}")


# -----------------------------------------------------------------------------
# For those who teach: what goes to the class, the models, the badges

def read_chapter(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write_chapter(book, path):
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def text_of(cell):
    """The source of a cell, which a notebook holds as one string or as lines."""
    return "".join(cell["source"])


def hand_out(folder):
    """Write the chapters as a class gets them: no outputs, no answers to what is to be predicted.

    A copy of the project, in the folder project beside them, has all that they import.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise gd.UserError(f"--hand-out {folder}: not empty; name a new folder")
    for path in CHAPTERS:
        book = read_chapter(path)
        book["cells"] = [c for c in book["cells"] if not text_of(c).startswith("<details>")]
        for cell in book["cells"]:
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)
        write_chapter(book, folder / path.name)
    project = folder / "project"
    shutil.copytree(MODELS, project / "notebooks" / "models")
    to_install = [ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"]
    for path in [*NOTEBOOKS.glob("*.py"), *ROOT.glob("*.py"), *to_install]:
        shutil.copy(path, project / path.relative_to(ROOT))
    return folder


def pack_models(folder):
    """The models of a run's folder out/NAME into notebooks/models/NAME: the averaged weights alone,
    in half precision, half a megabyte each; and the log of their training."""
    packed = MODELS / folder.name
    packed.mkdir(parents=True, exist_ok=True)
    students = sorted(path.stem for path in folder.glob("*.pt") if path.stem != "teacher")
    for name in ("teacher", *students):
        saved = without_bpe(config.load_checkpoint(f"{folder}/{name}.pt"))
        weights = {key: weight.half() for key, weight in saved["ema"].items()}
        settings = dict(vars(saved["config"]), train_files=None, out_dir=f"out/{folder.name}")
        about = {key: saved[key] for key in ("name", "step", "settings", "tokenizer")}
        if name != "teacher":  # the students belong to the teacher as it is rounded here
            teacher, = load_models("teacher", of=folder.name)
            about["settings"]["teacher"] = config.weights_id(teacher)
        config.save_checkpoint(f"{packed}/{name}.pt", {}, ema=weights, config=settings, **about)
    shutil.copy(folder / "log.jsonl", packed)
    return packed


def without_bpe(saved):
    """A checkpoint that has a list of its pieces in place of GPT-2's BPE: it opens without a
    network. With such a list BOS has an input row of its own, the last one of a teacher; it gets
    the weights of <|endoftext|>, which was BOS."""
    tokenizer = data.Tokenizer(**saved["tokenizer"])
    if tokenizer.words is None:
        pieces = data.Tokenizer([tokenizer.decode([i]) for i in range(tokenizer.vocab_size)])
        saved.update(tokenizer=pieces.state)
        saved["settings"]["tokens"] = pieces.fingerprint
        if saved["name"] == "teacher":
            embedding = saved["ema"]["net.embed.weight"]        # (V + 1, C)
            embedding[-1] = embedding[tokenizer.bos_id]
    return saved


def add_badges(address):
    """Give each chapter a badge that opens it in Colab, and a cell that fetches the project there.

    address: the project's on GitHub. An older badge and cell are replaced.
    """
    place = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if not place:
        raise gd.UserError(f"--address {address}: must look like https://github.com/you/project")
    colab = "https://colab.research.google.com"
    for path in CHAPTERS:
        book = read_chapter(path)
        cells = [c for c in book["cells"] if "hosted" not in c["metadata"]]
        link = f"{colab}/github/{place[1]}/blob/main/notebooks/{path.name}"
        badge = f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({link})"
        fetch = f"![ -e classroom.py ] || git clone -q {address} project"
        install = "![ -e classroom.py ] || pip install -q -e project"
        hosted = {"metadata": {"hosted": True}}
        cells[1:1] = [
            dict(hosted, id="badge", cell_type="markdown", source=badge),
            dict(hosted, id="fetch", cell_type="code", source=f"{fetch}\n{install}", outputs=[],
                 execution_count=None)]
        write_chapter(dict(book, cells=cells), path)
    return NOTEBOOKS


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


def draw(path, axis, title=""):
    """Draw a path (10,) of cells. Masked cells are left out.

    A move that no shortest path makes is red and dotted.
    """
    draw_walls(axis, title)
    moves = data.maze_moves()
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
    """A column of result rows against the number of steps, one line per model.

    A model with one number of steps is a dashed horizontal line.
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
    """Numbers of steps, on a log scale, against ylabel."""
    axis.set_xscale("log")
    axis.set_xticks(sorted(ticks), sorted(ticks))
    axis.minorticks_off()
    axis.set(xlabel="steps per text", ylabel=ylabel)
    axis.grid(alpha=0.3)


def hero(folder, path):
    """The README's picture: a path of each student in one step, and quality against steps."""
    rows = json.loads((folder / "results.json").read_text())
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.3), layout="constrained",
                                width_ratios=(1, 1, 1, 1.25, 1.25))
    figure.get_layout_engine().set(h_pad=0.1)
    for axis, name in zip(axes, ("mdlm", "gumbel", "gumbel-draft")):
        student, _, _ = gd.load_model(f"{folder}/{name}.pt", "cpu")
        temperature = 0.0 if student.reads_noise else 1.0
        text = gd.generate(student, 1, student.seq_len, nfe=1, temperature=temperature)
        draw(text[0], axis, f"{label(student)}, one step")
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
    table = [row for row in judged_table(folder) if "gen_ppl" in row]
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
    parser.add_argument("--hand-out", metavar="folder", help="write the chapters without outputs "
                        "and answers, for a class, into this new folder")
    parser.add_argument("--models", action="store_true", help="pack the models of --run into a "
                        "folder of notebooks/models, small enough to come with the course")
    parser.add_argument("--address", help="of this project on GitHub: give each chapter a badge "
                        "that opens it in Colab")
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
        if args.hand_out:
            paths = [hand_out(Path(args.hand_out))]
        elif args.models:
            paths = [pack_models(Path(args.run))]
        elif args.address:
            paths = [add_badges(args.address)]
        elif args.gif:
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
    print(*paths, "written")


if __name__ == "__main__":
    gd.run_cli(main)
