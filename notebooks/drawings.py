"""The drawings of single chapters. What several of them share is in classroom.py."""

import json
import math

import matplotlib.pyplot as plt
import torch

from classroom import BLUE, GREEN, GREY, MODELS, RED, STYLE


# -----------------------------------------------------------------------------
# Chapter 1
def draw_race(T, words):
    """Races of clocks: T (n, V) are the times of the rings. The first ring of a race is red."""
    figure, axes = plt.subplots(1, len(T), figsize=(10, 1.9), sharey=True, layout="constrained")
    for axis, times in zip(axes, T):
        winner = times.argmin()
        for k, time in enumerate(times):
            color = RED if k == winner else BLUE
            axis.plot([0, time], [k, k], color=color, lw=1)
            axis.plot(time, k, "o", color=color)
        axis.axvline(times[winner], color=RED, ls=":", lw=1)
        axis.set(xlabel="time of the ring", xlim=(0, 1.05 * T.max()), ylim=(len(words) - 0.5, -0.5))
        axis.set_title(f"{words[winner]} rings first", fontsize=10)
    axes[0].set_yticks(range(len(words)), words)


# -----------------------------------------------------------------------------
# Chapter 3
def box(axis, x, y, text, color="white"):
    axis.text(x, y, text, ha="center", va="center", fontsize=9,
              bbox=dict(boxstyle="round,pad=0.45", facecolor=color, edgecolor="black"))


def arrow(axis, start, end, color="black"):
    axis.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=color, lw=1.5,
                                                  shrinkA=4, shrinkB=4))


def draw_method():
    """The whole method: training above, writing below."""
    figure, axis = plt.subplots(figsize=(10, 3.4), layout="constrained")
    axis.set(xlim=(0, 10), ylim=(-0.3, 3.6))
    axis.axis("off")
    axis.text(0.1, 3.4, "training", fontsize=10, weight="bold")
    axis.text(0.1, 1.0, "writing", fontsize=10, weight="bold")
    blue, green, orange = "#CFE3F1", "#CDEBE1", "#F9DEC9"
    box(axis, 1.0, 2.6, "a real text\nx0")
    box(axis, 3.1, 3.1, "teacher\none pass", blue)
    box(axis, 5.4, 3.1, "posterior noise xi:\nthe teacher would\nhave written x0", orange)
    box(axis, 3.1, 2.05, "masked text xt")
    box(axis, 7.7, 2.6, "student", green)
    box(axis, 9.3, 2.6, "x0 again\n(the loss)")
    for start, end in (((1.5, 2.75), (2.6, 3.05)), ((3.6, 3.1), (4.5, 3.1)),
                       ((6.35, 3.0), (7.3, 2.7)), ((1.5, 2.45), (2.45, 2.1)),
                       ((3.8, 2.05), (7.3, 2.5)), ((8.1, 2.6), (8.75, 2.6))):
        arrow(axis, start, end)
    box(axis, 5.4, 0.5, "fresh noise xi", orange)
    box(axis, 3.1, 0.5, "all masked")
    box(axis, 7.7, 0.5, "the same student", green)
    box(axis, 9.3, 0.5, "a new text")
    arrow(axis, (6.1, 0.5), (6.95, 0.5))
    axis.annotate("", (7.3, 0.3), (3.5, 0.3), arrowprops=dict(
        arrowstyle="-|>", lw=1.5, connectionstyle="arc3,rad=0.15"))
    arrow(axis, (8.45, 0.5), (8.8, 0.5))
    arrow(axis, (7.7, 2.25), (7.7, 0.85), GREY)
    return figure


def draw_noise(logp, before, after, x0, words):
    """One position: log-probabilities (V,), and the sums with noise (V,) before Theorem 4.1, when
    it knows no token, and after, when it knows x0. Tokens of probability below 1e-3 are left out.
    """
    likely = (logp > -6.9).nonzero()[:, 0]
    names = [words[i] for i in likely]
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.4), sharey=True, layout="constrained")
    panels = {"logp of the teacher": logp, "logp + fresh noise": logp + before,
              "logp + noise of Theorem 4.1": logp + after}
    low = min(values[likely].min() for values in panels.values()) - 0.3    # where the bars begin
    for axis, (title, values) in zip(axes, panels.items()):
        values = values[likely]
        colors = [GREY] * len(likely)
        if title != "logp of the teacher":
            colors[values.argmax()] = RED
        axis.bar(range(len(likely)), values - low, bottom=low, color=colors)
        axis.set_xticks(range(len(likely)), names)
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("nats")
    axes[1].set_xlabel("red: the argmax")
    axes[2].set_xlabel(f"the text has {words[x0]}")
    return figure


def draw_loss(nll, is_masked):
    """The loss of each student (name -> nll (M,)) at the masked positions of the texts (B, T)."""
    figure, axis = plt.subplots(figsize=(10, 2.6), layout="constrained")
    place = torch.arange(len(next(iter(nll.values()))))
    for k, (name, values) in enumerate(nll.items()):
        color, _, title = STYLE[name]
        axis.bar(place + 0.27 * (k - 1), values, 0.27, color=color, label=title)
    text, move = is_masked.nonzero(as_tuple=True)
    axis.set_xticks(place, [i + 1 for i in move.tolist()], fontsize=8)
    for start in range(1, len(is_masked)):
        axis.axvline((text < start).sum() - 0.5, color="black", lw=0.8, ls=":")
    axis.set(xlabel="masked moves; dotted lines part the texts", ylabel="loss, nats")
    axis.legend(fontsize=8)
    return figure


def draw_training(of="maze"):
    """Validation loss of the models in the folder models/OF, against the step."""
    figure, axis = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
    rows = [json.loads(line) for line in (MODELS / of / "log.jsonl").read_text().splitlines()]
    for name, (color, marker, title) in STYLE.items():
        points = [(row["step"], row["val"]) for row in rows if row["model"] == name]
        if points:
            axis.plot(*zip(*points), color=color, marker=marker, label=title)
    if of == "maze":
        axis.axhline(math.log(51) / 10, color="black", lw=0.8, ls=":", label="entropy of the paths")
    axis.set(xlabel="step", ylabel="validation loss,\nnats per token", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


# -----------------------------------------------------------------------------
# Chapter 4
def draw_pieces(rows, names, right, tokenizer, width=105):
    """Texts (T,) as pieces of words, one text a line, `width` letters of it: green where they equal
    `right` (T,), else red. A masked piece is a grey line, the end of a line is /.
    """
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
    return figure


def draw_frontiers(rows, real):
    """NLL against entropy; a panel for each number of steps, a curve for each student. A dotted
    line is the entropy in `real`, the row of the texts to be like."""
    steps = sorted({row["nfe"] for row in rows})
    figure, axes = plt.subplots(1, len(steps), figsize=(11, 3.2), layout="constrained")
    for axis, nfe in zip(axes, steps):
        for name, (color, marker, title) in STYLE.items():
            points = [(row["entropy"], row["nll"]) for row in rows
                      if (row["model"], row["nfe"]) == (name, nfe)]
            if points:
                axis.plot(*zip(*points), color=color, marker=marker, ms=5, label=title)
        axis.axvline(real["entropy"], color="black", ls=":", label="the teacher's entropy")
        axis.set(title=f"steps: {nfe}", xlabel="entropy, nats")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("NLL, nats per token")
    axes[0].legend(fontsize=8)
    return figure


# -----------------------------------------------------------------------------
# Chapter 6
def gumbel_agreement(p, q):
    """P(same token) with shared Gumbel noise, of p and q (N, V): (N,), by the exact formula."""
    p, q = p.double().clamp(min=1e-30), q.double().clamp(min=1e-30)
    total = torch.zeros(len(p), dtype=torch.float64)
    for k in range(p.size(1)):
        ratios = torch.maximum(p / p[:, k:k + 1], q / q[:, k:k + 1])        # (N, V)
        total += 1 / ratios.sum(dim=1)
    return total
