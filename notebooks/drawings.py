"""Pictures: mazes, curves, and the drawings of single chapters."""

import sys
from pathlib import Path

import torch

try:
    import matplotlib.pyplot as plt
    from matplotlib.animation import PillowWriter
except ImportError:
    sys.exit('The chapters and their pictures need matplotlib: pip install -e ".[dev]"')

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gumbel_distill as gd  # noqa: E402

# Colours that the colour-blind can tell apart, too (Okabe and Ito). Red means wrong, and only that.
RED, BLUE, GREEN, GREY, PURPLE = "#D55E00", "#0072B2", "#009E73", "#999999", "#B8609A"
STYLE = {  # colour, marker, line and label of each model in all pictures
    "mdlm": (PURPLE, "s", "-", "MDLM"),
    "mdlm-argmax": (PURPLE, "x", ":", "MDLM, argmax"),
    "bd3lm": ("black", "v", "--", "BD3-LM"),
    "gumbel": (BLUE, "o", "-", "the paper's student"),
    "gumbel-draft": (GREEN, "^", "-", "ours (drafts)"),
    "teacher": ("black", "D", "--", "AR teacher"),
}
MASK = gd.Maze.vocab_size           # id of [MASK] in the maze


def label(model):
    """The label of a model of the course in all pictures and tables."""
    return STYLE[model.name][3]


# -----------------------------------------------------------------------------
# Mazes
def is_move(start, end):
    """Whether a shortest path may go from one cell to another."""
    where = gd.MAZE[start // 6][start % 6]
    return (end == start + 1 and where in ">+") or (end == start + 6 and where in "v+")


def draw_walls(axis, title=""):
    """The walls of the maze, with S at the start and G at the goal."""
    axis.plot([0, 0, 6], [6, 0, 0], color="black", lw=2)
    for cell in range(36):
        x, y = cell % 6, cell // 6
        if not is_move(cell, cell + 1):
            axis.plot([x + 1, x + 1], [y, y + 1], color="black", lw=2)
        if not is_move(cell, cell + 6):
            axis.plot([x, x + 1], [y + 1, y + 1], color="black", lw=2)
    axis.text(0.1, 0.38, "S", fontsize=8)
    axis.text(5.6, 5.9, "G", fontsize=8)
    axis.set(xlim=(-0.1, 6.1), ylim=(6.1, -0.1), aspect="equal")
    axis.set_title(title, fontsize=10)
    axis.axis("off")


def draw(path, axis, title=""):
    """A path (10,) without masked cells. A move that no shortest path makes is red and dotted."""
    draw_walls(axis, title)
    cells = [0] + [int(cell) for cell in path]
    for start, end in zip(cells, cells[1:]):
        if MASK in (start, end):
            continue
        style = dict(color=BLUE, lw=3) if is_move(start, end) else dict(color=RED, lw=2, ls=":")
        axis.plot([start % 6 + 0.5, end % 6 + 0.5], [start // 6 + 0.5, end // 6 + 0.5],
                  solid_capstyle="round", **style)
    for cell in cells:
        if cell != MASK:
            axis.plot(cell % 6 + 0.5, cell // 6 + 0.5, "o", color="black", ms=4)


def draw_all(paths, titles=None, columns=5, width=2.0):
    """Paths (n, 10) as rows of mazes."""
    n_rows = -(-len(paths) // columns)                          # rounded up
    figure, axes = plt.subplots(n_rows, columns, figsize=(width * columns, 1.1 * width * n_rows),
                                squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for i, path in enumerate(paths):
        draw(path, axes.flat[i], titles[i] if titles else "")


def on_grid(p, axis, title=""):
    """Probabilities p (36,) of the cells, as shades of blue in the maze."""
    axis.imshow(torch.as_tensor(p).view(6, 6), cmap="Blues", vmin=0, vmax=1, extent=(0, 6, 6, 0))
    draw_walls(axis, title)


def write_gif(models, n, nfe, path):
    """A moving picture: how students fill in n paths, side by side, from the same noise. A frame
    stands for 0.7 seconds, the last one of a path three times as long."""
    xi, u = gd.sequence_noise(0, torch.arange(n), 10, models[0])
    masked = torch.full((n, 10), MASK)
    texts = [model.write(masked, xi, u, nfe) for model in models]
    fill_step = gd.fill_steps(u[:, 0], nfe)                     # (n, 10)
    figure, axes = plt.subplots(1, len(models), figsize=(2.6 * len(models), 3.0),
                                layout="constrained")
    writer = PillowWriter(fps=1 / 0.7)
    with writer.saving(figure, path, dpi=100):
        for i in range(n):
            for k in range(nfe + 1):
                for axis, model, x in zip(axes, models, texts):
                    axis.clear()
                    shown = torch.where(fill_step[i] <= k, x[i], MASK)
                    draw(shown, axis, f"{STYLE[model.name][3]}, step {k}")
                for _ in range(3 if k == nfe else 1):
                    writer.grab_frame()
    plt.close(figure)


# -----------------------------------------------------------------------------
# Curves
def curve(axis, rows, column, ylabel, against="nfe"):
    """A column of rows against another, the number of steps of a text, one line per model."""
    for model, (color, marker, ls, name) in STYLE.items():
        points = [(row[against], row[column]) for row in rows if row["model"] == model]
        if points:
            axis.plot(*zip(*sorted(points)), color=color, marker=marker, ls=ls, lw=2, label=name)
    ticks = sorted({row[against] for row in rows})
    axis.set_xscale("log")
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    axis.set(xlabel="steps of a text", ylabel=ylabel)
    axis.grid(alpha=0.3)


# -----------------------------------------------------------------------------
# Drawings of single chapters, in their order
def draw_race(T, words, end=3.0):
    """Races of clocks: T (n, V) are the times of the rings. The first ring of a race is blue. A
    clock that rings after `end` has an arrow."""
    figure, axes = plt.subplots(1, len(T), figsize=(10, 1.9), sharey=True, layout="constrained")
    for axis, times in zip(axes, T):
        winner = times.argmin()
        for k, time in enumerate(times):
            color = BLUE if k == winner else GREY
            axis.plot([0, min(time, end)], [k, k], color=color, lw=1)
            axis.plot(min(time, end), k, "o" if time < end else ">", color=color, clip_on=False)
        axis.axvline(times[winner], color=BLUE, ls=":", lw=1)
        axis.set(xlabel="time of the ring", xlim=(0, end), ylim=(len(words) - 0.5, -0.5))
        axis.set_title(f"{words[winner]} rings first", fontsize=10)
    axes[0].set_yticks(range(len(words)), words)


def draw_method():
    """The whole method: training above, writing below."""
    figure, axis = plt.subplots(figsize=(10, 3.4), layout="constrained")
    axis.set(xlim=(0, 10), ylim=(-0.3, 3.6))
    axis.axis("off")
    axis.text(0.1, 3.4, "training", weight="bold")
    axis.text(0.1, 1.0, "writing", weight="bold")
    blue, green, yellow = "#CFE3F1", "#CDEBE1", "#F7EFC2"
    boxes = [(1.0, 2.6, "a real text\nx0", "white"), (3.1, 3.1, "teacher\none pass", blue),
             (5.4, 3.1, "posterior noise xi:\nthe teacher would\nhave written x0", yellow),
             (3.1, 2.05, "masked text xt", "white"), (7.7, 2.6, "student", green),
             (9.3, 2.6, "x0 again\n(the loss)", "white"), (5.4, 0.5, "fresh noise xi", yellow),
             (3.1, 0.5, "all masked", "white"), (7.7, 0.5, "the same student", green),
             (9.3, 0.5, "a new text", "white")]
    for x, y, text, color in boxes:
        axis.text(x, y, text, ha="center", va="center", fontsize=9,
                  bbox=dict(boxstyle="round,pad=0.45", facecolor=color, edgecolor="black"))
    arrows = [(1.5, 2.75, 2.6, 3.05), (3.6, 3.1, 4.5, 3.1), (6.35, 3.0, 7.3, 2.7),
              (1.5, 2.45, 2.45, 2.1), (3.8, 2.05, 7.3, 2.5), (8.1, 2.6, 8.75, 2.6),
              (6.1, 0.5, 6.95, 0.5), (8.45, 0.5, 8.8, 0.5), (7.7, 2.25, 7.7, 0.85)]
    for x1, y1, x2, y2 in arrows:
        axis.annotate("", (x2, y2), (x1, y1), arrowprops=dict(arrowstyle="-|>", lw=1.5))
    axis.annotate("", (7.3, 0.3), (3.5, 0.3), arrowprops=dict(
        arrowstyle="-|>", lw=1.5, connectionstyle="arc3,rad=0.15"))


def draw_noise(logp, noises, x0):
    """One position: logp (36,), noise (36,) and their sum, a row for each of `noises`, a dict. Blue
    is the best cell of the sum, a star the cell x0 of the text. Cells below -8 are left empty."""
    figure, axes = plt.subplots(len(noises), 3, figsize=(8.4, 3.0 * len(noises)),
                                layout="constrained")
    for row, (name, noise) in zip(axes, noises.items()):
        panels = {"logp of the teacher": logp, name: noise, "their sum": logp + noise}
        for axis, (title, values) in zip(row, panels.items()):
            draw_walls(axis, title)
            for cell in (values > -8).nonzero()[:, 0].tolist():
                axis.text(cell % 6 + 0.5, cell // 6 + 0.5, f"{values[cell]:.1f}", ha="center",
                          va="center", fontsize=7)
            if title == "their sum":
                y, x = divmod(values.argmax().item(), 6)
                axis.add_patch(plt.Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, fc=BLUE, alpha=0.4))
                axis.text(x0 % 6 + 0.72, x0 // 6 + 0.4, "*", color="black", fontsize=10)


def draw_loss(nll, is_masked):
    """The loss of each student (name -> nll (M,)) at the masked positions of the texts (B, T)."""
    figure, axis = plt.subplots(figsize=(10, 2.6), layout="constrained")
    place = torch.arange(len(next(iter(nll.values()))))
    for k, (name, values) in enumerate(nll.items()):
        axis.bar(place + 0.27 * (k - 1), values, 0.27, color=STYLE[name][0], label=STYLE[name][3])
    text, move = is_masked.nonzero(as_tuple=True)
    axis.set_xticks(place, [i + 1 for i in move.tolist()], fontsize=8)
    for b in range(len(is_masked)):
        start = (text < b).sum() - 0.5
        axis.axvline(start, color="black", lw=0.8, ls=":")
        axis.text(start, 1.02, f"text {b}", fontsize=8, transform=axis.get_xaxis_transform())
    axis.set(xlabel="masked moves; dotted lines part the texts", ylabel="loss, nats")
    axis.legend(fontsize=8)


def draw_pieces(rows, names, right, tokenizer, width=105):
    """Texts (T,) as pieces of words, one text a line, `width` letters of it: green where they equal
    `right` (T,), else red. A masked piece is a grey line, the end of a line is /."""
    figure, axis = plt.subplots(figsize=(12, 0.3 * len(rows) + 0.1))
    axis.set(xlim=(-24, width), ylim=(len(rows) - 0.5, -0.5))
    axis.axis("off")
    for y, (ids, name) in enumerate(zip(rows, names)):
        axis.text(-24, y, name, fontsize=9, va="center")
        x = 0
        for i, wanted in zip(ids.tolist(), right.tolist()):
            piece, color = "__", GREY
            if i < tokenizer.vocab_size:
                piece = tokenizer.decode([i]).replace("\n", "/")
                color = GREEN if i == wanted else RED
            if x + len(piece) > width:
                break
            axis.text(x, y, piece, fontsize=8.5, va="center", family="monospace", color=color,
                      parse_math=False)
            x += len(piece)


def draw_frontiers(rows, real, sharey=False):
    """NLL against entropy; a panel for each number of steps, a curve for each student. A dotted
    line is the entropy in `real`, the row of the texts to be like. A large mark is the setting in
    which the student usually writes."""
    steps = sorted({row["nfe"] for row in rows})
    figure, axes = plt.subplots(1, len(steps), figsize=(11, 3), sharey=sharey, layout="constrained")
    for axis, nfe in zip(axes, steps):
        for name, (color, marker, ls, title) in STYLE.items():
            here = [row for row in rows if (row["model"], row["nfe"]) == (name, nfe)]
            if here:
                axis.plot([row["entropy"] for row in here], [row["nll"] for row in here],
                          color=color, marker=marker, ls=ls, ms=4, label=title)
            for row in (row for row in here if row["is_usual"]):
                axis.plot(row["entropy"], row["nll"], marker, color=color, ms=10)
        axis.axvline(real["entropy"], color="black", ls=":", label="the teacher's entropy")
        axis.set(title=f"steps: {nfe}", xlabel="entropy, nats")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("NLL, nats per token")
    axes[0].legend(fontsize=8)


def draw_gains(rows):
    """What a student learns from the noise. rows: (name, share masked) -> the NLL of a token with
    all noise known, its own alone, none (MDLM). A bar is the NLL of MDLM, 100 per cent."""
    shares = sorted({t for _, t in rows}, reverse=True)
    figure, axes = plt.subplots(1, len(shares), figsize=(11, 3), sharey=True,
                                layout="constrained")
    for axis, t in zip(axes, shares):
        names = [name for name, share in rows if share == t]
        for y, name in enumerate(names):
            everything, own, none = [value / rows[name, t][2] for value in rows[name, t]]
            parts = {"learned from the noise of others": (own - everything, GREEN),
                     "from its own": (none - own, BLUE), "not learned": (everything, "#DDDDDD")}
            left = 0
            for title, (width, color) in parts.items():
                axis.barh(y, max(0, width), left=left, color=color, label=title if y == 0 else None)
                left += max(0, width)
        axis.set_yticks(range(len(names)), names)
        axis.set(title=f"masked: {t:.0%}", xlim=(0, 1), ylim=(len(names) - 0.4, -0.6))
        axis.xaxis.set_major_formatter("{x:.0%}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
