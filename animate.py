"""A text that unmasks step by step, in the terminal or as a moving picture. sample.py calls it:

    python sample.py --ckpt out/maze/mdlm.pt out/maze/gumbel-draft.pt --nfe 3 --animate
    python sample.py --ckpt out/maze/mdlm.pt out/maze/gumbel-draft.pt --nfe 3 --gif maze.gif

A film is a list of frames. A frame is the token ids (T,) of a text after a step, vocab_size where
nothing stands yet. The films of several models are shown together, frame by frame.
"""

import shutil
import sys
import time

from data import MAZE, MAZE_SIZE, UserError, draw_maze, maze_paths

LABELS = {"mdlm": "MDLM", "bd3lm": "BD3-LM", "gumbel": "paper's map",
          "gumbel-draft": "ours (drafts)", "teacher": "AR teacher"}
WIDTH = 76                          # letters of a line of text
# Colours that the colour-blind can tell apart, too (Okabe and Ito).
RED, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#999999"


def frames(films):
    """Frame by frame, for each film: (number, frame, frame before). A short film waits at its end.
    """
    for number in range(max(map(len, films))):
        numbers = [min(number, len(film) - 1) for film in films]
        yield [(k, film[k], film[max(0, k - 1)]) for k, film in zip(numbers, films)]


def lines_of(frame, before, tokenizer, width):
    """A frame as lines of at most `width` letters; a line is a list of (piece, kind). The kind is
    "masked", "new" or "old"; a line break of the text is shown as an arrow."""
    lines, column = [[]], 0
    for i, id_before in zip(frame.tolist(), before.tolist()):
        kind = "masked" if i == tokenizer.vocab_size else "old" if i == id_before else "new"
        piece = "_" if kind == "masked" else tokenizer.decode([i]).replace("\n", "\u21b5")
        piece += tokenizer.sep
        if column + len(piece) > width:
            lines.append([])
            column = 0
        lines[-1].append((piece, kind))
        column += len(piece)
    return lines


# -----------------------------------------------------------------------------
# In the terminal
def panels(shown, names, tokenizer, is_maze, is_colour):
    """The lines of one frame of all films: mazes side by side, texts one below the other."""
    blocks = []
    for name, (number, frame, before) in zip(names, shown):
        block = [f"{LABELS.get(name, name)}, step {number}"]
        if is_maze:
            block += draw_maze(frame[frame != tokenizer.vocab_size]).split("\n")
        else:
            colour = {"new": "\033[32m{}\033[0m"} if is_colour else {}
            for line in lines_of(frame, before, tokenizer, WIDTH):
                block.append("".join(colour.get(kind, "{}").format(piece) for piece, kind in line))
            block.append("")
        blocks.append(block)
    if is_maze:
        return ["   ".join(line.ljust(len(MAZE[0])) for line in row) for row in zip(*blocks)]
    return sum(blocks, [])


def play(films, names, tokenizer, is_maze, pause=0.8):
    """Print films. On a terminal each frame takes the place of the last, if it fits; elsewhere the
    frames stand one below the other."""
    is_terminal = sys.stdout.isatty()
    columns, rows = shutil.get_terminal_size()
    n_lines = 0                                                 # of the frame on the screen
    for shown in frames(films):
        lines = panels(shown, names, tokenizer, is_maze, is_terminal)
        width = len(names) * (len(MAZE[0]) + 3) if is_maze else WIDTH
        fits = len(lines) < rows and width <= columns
        if n_lines:
            time.sleep(pause)
            print(f"\033[{n_lines}A\033[J", end="")             # up, and clear what is below
        n_lines = len(lines) if is_terminal and fits else 0
        print("\n".join(lines), flush=True)
    print()


# -----------------------------------------------------------------------------
# As a picture
def draw_walls(axis, title=""):
    """The walls of the maze, with S at the start and G at the goal."""
    n = MAZE_SIZE
    for row, line in enumerate(MAZE):
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
    for path in maze_paths():
        moves.update(zip([0, *path], path))
    return moves


def draw(path, axis, title=""):
    """Draw a path (10,) of cells. Masked cells are left out.

    A move that no shortest path makes is red and dotted.
    """
    draw_walls(axis, title)
    moves, mask_id = allowed_moves(), MAZE_SIZE**2
    cells = [0] + [int(cell) for cell in path]
    x = [cell % MAZE_SIZE + 0.5 for cell in cells]
    y = [cell // MAZE_SIZE + 0.5 for cell in cells]
    for i in range(len(cells) - 1):
        move = (cells[i], cells[i + 1])
        if mask_id in move:
            continue
        style = dict(color=RED, lw=2, ls=":")
        if move in moves:
            style = dict(color=BLUE, lw=3)
        axis.plot(x[i:i + 2], y[i:i + 2], solid_capstyle="round", **style)
    for i, cell in enumerate(cells):
        if cell != mask_id:
            axis.plot(x[i], y[i], "o", color="black", ms=4)


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


def write_gif(texts, names, tokenizer, is_maze, path, width=WIDTH):
    """An animated GIF that shows the films (one a model) of each of the texts, again and again.

    A frame stands for 0.7 seconds, the last one of a text three times as long. Needs matplotlib.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.animation import PillowWriter
    except ImportError as e:
        raise UserError(f"--gif {path}: needs matplotlib; pip install matplotlib") from e
    plt.switch_backend("Agg")
    n = len(names)
    n_lines = max(len(lines_of(film[-1], film[0], tokenizer, width)) for films in texts
                  for film in films)
    size = (2.6 * n, 3.0) if is_maze else (0.096 * width, n * (0.5 + 0.2 * n_lines))
    figure, axes = plt.subplots(*((1, n) if is_maze else (n, 1)), figsize=size, squeeze=False,
                                layout="constrained")
    writer = PillowWriter(fps=1 / 0.7)
    with writer.saving(figure, path, dpi=100):
        for films in texts:
            for shown in frames(films):
                for axis, name, (number, frame, before) in zip(axes.flat, names, shown):
                    axis.clear()
                    title = f"{LABELS.get(name, name)}, step {number}"
                    if is_maze:
                        draw(frame, axis, title)
                    else:
                        lines = lines_of(frame, before, tokenizer, width)
                        draw_text(lines, axis, title, width, n_lines)
                writer.grab_frame()
            for _ in range(2):
                writer.grab_frame()
    plt.close(figure)
