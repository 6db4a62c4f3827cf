"""Write docs/index.html: the maze's four models in the browser, to change their noise and watch.

    python notebooks/page.py                      # of out/maze
    python notebooks/page.py out/other --to page.html

The page is one file. It needs no network and no server. notebooks/page.html is its template: text,
style, the method in JavaScript, and a place for the data that this program puts in.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import gumbel_distill as gd  # noqa: E402
from config import UserError, check_equal, run_cli, weights_id  # noqa: E402

MODELS = ["teacher", "mdlm", "gumbel", "gumbel-draft"]
MAX_BYTES = 1_000_000
LEVELS = 44                     # a weight is one of -44..44 times the scale of its row
FLOOR_AT = [10, 20, 50, 100, 200, 300, 500, 700, 1000]


def load_models(folder):
    """The maze's four models of a run's folder; UserError for one that does not belong there."""
    models = []
    for name in MODELS:
        path = f"{folder}/{name}.pt"
        model, tokenizer, saved = gd.load_model(path, "cpu")
        cfg = saved["config"]
        check_equal(path, vars(cfg), {"dataset": "maze", "block_size": cfg.seq_len},
                    "the page shows the maze, each path in one block")
        if models and saved["settings"].get("teacher"):         # MDLM needs none
            check_equal(path, saved["settings"], {"teacher": weights_id(models[0])},
                        "the page shows a teacher and its own students")
        model.cfg, model.words = cfg, tokenizer.words
        models.append(model)
    return models


def round_weights(w):
    """Weights (R, n) as scales (R,), floats of 3 digits, and levels (R, n), long in -44..44."""
    largest = w.abs().amax(dim=1) / LEVELS
    scales = [float(f"{value:.3g}") or 1.0 for value in largest.tolist()]
    levels = (w / w.new_tensor(scales)[:, None]).round().clamp(-LEVELS, LEVELS).long()
    return scales, levels


def encode(levels):
    """Levels as text, a printable character each; none has a meaning in HTML or JSON.

    Half precision in base64 would need 2.2 MB, and the models write the same paths with these.
    """
    text = "".join(chr(80 + level) for level in levels.flatten().tolist())  # "$" to "|"
    return text.replace("<", "}").replace("\\", "~")


def pack(model):
    """A model as plain values: its shape, and {name: [scales, text]}; a vector is one row."""
    weights = {}
    for name, w in model.state_dict().items():
        scales, levels = round_weights(torch.atleast_2d(w))
        weights[name] = [scales, encode(levels)]
    return {"n_layer": model.cfg.n_layer, "n_head": model.cfg.n_head, "weights": weights}


def build(folder):
    """The page of a run's folder, as text."""
    models = load_models(folder)
    paths = data.maze_paths()
    content = {
        "maze": data.MAZE, "words": models[0].words, "paths": paths,
        "floor": [[n, round(data.tv_exact_sampler(len(paths), n), 4)] for n in FLOOR_AT],
        "max_steps": models[0].cfg.max_steps,
        "models": {model.name: pack(model) for model in models},
    }
    text = json.dumps(content, separators=(",", ":"))
    page = (ROOT / "notebooks" / "page.html").read_text(encoding="utf-8").replace("{{data}}", text)
    if len(page.encode()) > MAX_BYTES:
        raise UserError(f"{folder}: the page would have {len(page.encode()):,} bytes, and at most "
                        f"{MAX_BYTES:,} load fast; take models with a smaller --n-embd")
    return page


def main():
    parser = argparse.ArgumentParser(description="Write the page that runs the maze's models.")
    parser.add_argument("folder", nargs="?", default=ROOT / "out" / "maze",
                        help="of a run of gumbel_distill.py (out/maze)")
    parser.add_argument("--to", default=ROOT / "docs" / "index.html", type=Path,
                        help="the file to write (docs/index.html)")
    args = parser.parse_args()
    page = build(args.folder)
    args.to.write_text(page, encoding="utf-8")
    print(f"{args.to}: {len(page.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    run_cli(main)
