"""The table on infilling in docs/results.md: both ends of a path are known, the middle is not.

    python docs/infilling.py                          # the models of out/maze
    python docs/infilling.py out/maze out/1 out/2     # the mean over runs, and their deviation

The noise of the masked moves is drawn as for a whole path. It knows nothing of the end that is
given, so it can point to a path that does not lead there. The truth is known: the paths with these
two ends, all equally likely.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from config import print_table, run_cli  # noqa: E402
from data import MAZE_SIZE, maze_paths, total_variation  # noqa: E402
from gumbel_distill import generate, load_model  # noqa: E402

MODELS = ["teacher", "mdlm", "gumbel", "gumbel-draft"]
N_FIRST, N_LAST = 2, 3              # known moves; the last one enters the goal in all paths
COLUMNS = {"model": "", "temperature": "g", "nfe": "d", "valid": ".1%", "tv": ".3f"}


def prompts():
    """Known ends, with MAZE_SIZE^2 at masked moves -> the paths that have these ends, all tuples.
    Ends that leave one path are left out."""
    groups = {}
    for path in maze_paths():
        n_open = len(path) - N_FIRST - N_LAST
        known = (*path[:N_FIRST], *[MAZE_SIZE**2] * n_open, *path[-N_LAST:])
        groups.setdefault(known, []).append(tuple(path))
    return {known: paths for known, paths in groups.items() if len(paths) > 1}


def scores(model, n, **settings):
    """A model writes n k texts with ends that k paths have; settings go to its method write.
    valid  share of the texts that are paths
    tv     mean distance of the texts with the same ends from the uniform distribution"""
    n_valid, n_texts, distance = 0, 0, 0.0
    for known, paths in prompts().items():
        x = generate(model, n * len(paths), len(known), known=torch.tensor(known), **settings)
        number = {path: k for k, path in enumerate(paths)}
        hits = [number[row] for row in map(tuple, x.tolist()) if row in number]
        counts = np.bincount(hits, minlength=len(paths))
        n_valid += len(hits)
        n_texts += len(x)
        distance += len(x) * total_variation(counts, len(x) - len(hits))
    return {"valid": n_valid / n_texts, "tv": distance / n_texts}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", default=["out/maze"], help="of runs (out/maze)")
    parser.add_argument("-n", type=int, default=200, help="texts for each path (200)")
    args = parser.parse_args()
    table = []
    for name in MODELS:
        models = [load_model(f"{folder}/{name}.pt", "cpu")[0] for folder in args.folders]
        draws = [{}]                                            # the teacher has one
        if name != "teacher":
            draws = [dict(temperature=t, nfe=nfe) for t, nfe in itertools.product((0., 1.), (1, 3))]
        for how in draws:
            rows = [scores(model, args.n, **how) for model in models]
            table.append(dict(model=name, **how))
            for score in rows[0]:
                values = [row[score] for row in rows]
                table[-1][score] = float(np.mean(values))
                if len(rows) > 1:
                    table[-1][score + "_se"] = float(np.std(values, ddof=1))
    print_table(table, COLUMNS)


if __name__ == "__main__":
    run_cli(main)
