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
LEVELS = 7                      # a weight is one of -7..7 times the scale of its row
UNIT = 1e-6                     # a scale is a whole number of these
# Characters that mean nothing in HTML or JSON: three of them hold a scale, or five weights
ALPHABET = "".join(chr(k) for k in range(32, 127) if chr(k) not in '<"\\')
FLOOR_AT = [10, 20, 50, 100, 200, 300, 500, 700, 1000]


def load_models(folder):
    """The maze's four models of a run's folder, {name: model}, and their settings."""
    models = {}
    for name in MODELS:
        path = f"{folder}/{name}.pt"
        models[name], _, saved = sample.load_model(path)
        if saved["config"]["dataset"] != "maze":
            raise gd.UserError(f"{path} is trained on {saved['config']['dataset']}, not a maze")
        if name != "teacher" and saved["about"]["teacher"] != gd.fingerprint(models["teacher"]):
            raise gd.UserError(f"{path} had another teacher than {folder}/teacher.pt")
    return models, saved["config"]


def round_weights(w):
    """Weights (R, n) as scales (R,), whole numbers of UNIT, and levels (R, n), long in -7..7. Of
    some scales a row gets that of the least squared error."""
    largest = w.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / LEVELS   # (R, 1)
    scales = largest * torch.linspace(0.5, 1, 26)               # (R, 26)
    levels = (w[:, None] / scales[..., None]).round().clamp(-LEVELS, LEVELS)           # (R, 26, n)
    error = (levels * scales[..., None] - w[:, None]).square().sum(dim=2)
    scales = scales.gather(1, error.argmin(dim=1, keepdim=True))           # (R, 1)
    scales = (scales / UNIT).round().clamp(min=1) * UNIT
    return scales[:, 0], (w / scales).round().clamp(-LEVELS, LEVELS).long()


def encode(numbers):
    """Whole numbers (n,) below 92^3 as text: three characters each."""
    base = len(ALPHABET)
    assert numbers.max() < base**3
    return "".join(ALPHABET[n // base**k % base] for n in numbers.tolist() for k in range(3))


def pack(model, config):
    """A model as plain values: its shape, and {name: [rows, columns, text]}. The text holds the
    scales of the rows, then all levels, five as one number of base 15. A vector is one row."""
    weights = {}
    for name, w in model.state_dict().items():
        scales, levels = round_weights(torch.atleast_2d(w))
        digits = torch.nn.functional.pad(levels.flatten() + LEVELS, (0, -levels.numel() % 5))
        fives = (digits.view(-1, 5) * (2 * LEVELS + 1) ** torch.arange(5)).sum(dim=1)
        text = encode((scales / UNIT).round().long()) + encode(fives)
        weights[name] = [*levels.shape, text]
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
        "alphabet": ALPHABET, "maze": gd.MAZE, "words": gd.Maze.tokenizer["words"], "paths": paths,
        "floor": [[n, round(mean_tv(n, len(paths)), 4)] for n in FLOOR_AT],
        "max_steps": config["max_steps"],
        "models": {name: pack(model, config) for name, model in models.items()},
    }
    template = (ROOT / "notebooks" / "page.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", json.dumps(content, separators=(",", ":")))


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("folder", nargs="?", default=ROOT / "notebooks" / "models" / "maze")
    parser.add_argument("--to", default=ROOT / "docs" / "index.html", type=Path)
    args = parser.parse_args()
    page = build(args.folder)
    args.to.write_text(page, encoding="utf-8")
    print(f"{args.to}: {len(page.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
