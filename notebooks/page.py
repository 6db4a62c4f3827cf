"""Write docs/index.html: the maze's four models in the browser, to change their noise and watch.

    python notebooks/page.py                      # of the models that come with the course
    python notebooks/page.py out/maze --to page.html

The page is one file. It needs no network and no server. notebooks/page.html is its template: text,
style, the method in JavaScript, and a place for the data that this program puts in.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gumbel_distill as gd  # noqa: E402
import sample  # noqa: E402

MODELS = ["teacher", "mdlm", "gumbel", "gumbel-draft"]
LEVELS = 44                     # a weight is one of -44..44 times the scale of its row
FLOOR_AT = [10, 20, 50, 100, 200, 300, 500, 700, 1000]


def load_models(folder):
    """The maze's four models of a run's folder, {name: model}, and their settings."""
    models = {}
    for name in MODELS:
        path = f"{folder}/{name}.pt"
        models[name], _, saved = sample.load_model(path)
        if saved["config"]["dataset"] != "maze":
            raise gd.UserError(f"{path} is trained on {saved['config']['dataset']}: the page shows "
                               "the maze")
        if name != "teacher" and saved["about"]["teacher"] != gd.fingerprint(models["teacher"]):
            raise gd.UserError(f"{path} had another teacher than {folder}/teacher.pt: the page "
                               "shows a teacher and its own students")
    return models, saved["config"]


def round_weights(w):
    """Weights (R, n) as scales (R,), floats of 3 digits, and levels (R, n), long in -44..44."""
    largest = w.abs().amax(dim=1) / LEVELS
    scales = [float(f"{value:.3g}") or 1.0 for value in largest.tolist()]
    levels = (w / w.new_tensor(scales)[:, None]).round().clamp(-LEVELS, LEVELS).long()
    return scales, levels


def encode(levels):
    """Levels as text, a printable character each; none has a meaning in HTML or JSON."""
    text = "".join(chr(80 + level) for level in levels.flatten().tolist())  # "$" to "|"
    return text.replace("<", "}").replace("\\", "~")


def pack(model, config):
    """A model as plain values: its shape, and {name: [scales, text]}; a vector is one row."""
    weights = {}
    for name, w in model.state_dict().items():
        scales, levels = round_weights(torch.atleast_2d(w))
        weights[name] = [scales, encode(levels)]
    return {"n_layer": config["n_layer"], "n_head": config["n_head"], "weights": weights}


def mean_tv(n, n_paths):
    """The mean total variation between n exact draws and the truth, n_paths equally likely paths:
    the mean distance of a binomial number from its mean (de Moivre)."""
    m, p = n // n_paths + 1, 1 / n_paths
    return n_paths / n * m * math.comb(n, m) * p**m * (1 - p)**(n - m + 1)


def build(folder):
    """The page of a run's folder, as text."""
    models, config = load_models(folder)
    paths = gd.shortest_paths()
    content = {
        "maze": gd.MAZE, "words": gd.Maze.tokenizer["words"], "paths": paths,
        "floor": [[n, round(mean_tv(n, len(paths)), 4)] for n in FLOOR_AT],
        "max_steps": config["max_steps"],
        "models": {name: pack(model, config) for name, model in models.items()},
    }
    template = (ROOT / "notebooks" / "page.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", json.dumps(content, separators=(",", ":")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=ROOT / "notebooks" / "models" / "maze",
                        help="of a run of gumbel_distill.py (notebooks/models/maze)")
    parser.add_argument("--to", default=ROOT / "docs" / "index.html", type=Path,
                        help="the file to write (docs/index.html)")
    args = parser.parse_args()
    page = build(args.folder)
    args.to.write_text(page, encoding="utf-8")
    print(f"{args.to}: {len(page.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
