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
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import gumbel_distill as gd  # noqa: E402
from sample import load_models, nucleus  # noqa: E402

MODELS = ["teacher", "mdlm", "gumbel", "gumbel-draft"]
N_FIRST, N_LAST = 2, 3              # known moves; the last one enters the goal in all paths


def prompts():
    """Known ends (T,), with V at masked moves, and the paths that have these ends (k, T), k > 1."""
    paths, found = gd.Maze().paths, []
    ends = paths.clone()
    ends[:, N_FIRST:-N_LAST] = gd.Maze.vocab_size
    for known in ends.unique(dim=0):
        has_ends = (ends == known).all(dim=1)
        if has_ends.sum() > 1:
            found.append((known, paths[has_ends]))
    return found


def scores(model, n, nfe=1):
    """A model writes n k texts with ends that k paths have.
    valid  share of the texts that are paths
    tv     mean distance of the texts with the same ends from the uniform distribution"""
    n_valid, n_texts, distance = 0.0, 0, 0.0
    for known, paths in prompts():
        k = len(paths)
        x = gd.generate(model, n * k, len(known), nfe=nfe, known=known)
        share = (x[:, None] == paths).all(dim=2).double().mean(dim=0)      # (k,)
        valid = share.sum().item()
        n_valid += n * k * valid
        n_texts += n * k
        distance += n * k * ((share - 1 / k).abs().sum().item() + 1 - valid) / 2
    return n_valid / n_texts, distance / n_texts


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", default=["out/maze"], help="of runs (out/maze)")
    parser.add_argument("-n", type=int, default=200, help="texts for each path (200)")
    args = parser.parse_args(words)
    table = []
    for name in MODELS:
        loaded = load_models([f"{folder}/{name}.pt" for folder in args.folders])
        for temperature, nfe in itertools.product((0.0, 1.0), (1, 3)):
            if name == "teacher":                               # it has one way to write
                temperature, nfe = 1.0, 10
            values = []
            for model, _, _ in loaded.values():
                model.draw = partial(nucleus, temperature=temperature)
                values.append(scores(model, args.n, nfe))
            row = dict(temperature=temperature, nfe=nfe)
            for score, of_runs in zip(("valid", "tv"), zip(*values)):
                error = f" ± {np.std(of_runs, ddof=1):.3f}" if len(of_runs) > 1 else ""
                row[score] = f"{np.mean(of_runs):.3f}{error}"
            table.append(dict(row, model=name))
            if name == "teacher":
                break
    gd.print_table(table)


if __name__ == "__main__":
    main()
