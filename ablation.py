"""The paper's ablation and its baselines, one table:   python gumbel_distill.py --ablate

Every row is a run of gumbel_distill.py whose settings differ from Gumbel Distillation's in what
ABLATION says. To ask a question of your own, add a line there: what is finished is not trained
again.
"""

import contextlib
import dataclasses
import json
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch

from gumbel_distill import Config, UserError, flag, print_table, resolve, run


# Name of a row, what differs from Gumbel Distillation, number of seeds. Noise that comes in by a
# map is shown with the paper's map and with the default one.
ABLATION = [
    ("MDLM", dict(noise="none"), 3),
    ("token-level KD", dict(noise="none", loss="kd"), 3),
    ("sequence-level KD", dict(noise="none", labels="teacher"), 3),
    ("Gumbel Distillation", dict(), 3),
    ("serial extraction", dict(labels="teacher"), 1),
    ("gaussian noise", dict(noise="gaussian"), 1),
    ("uniform noise", dict(noise="uniform"), 1),
    ("noise independent of the text", dict(noise="independent"), 1),
    ("noise added to [MASK]", dict(noise_map="softmax", inject="add"), 1),
    ("raw map", dict(noise_map="raw"), 1),
    ("learned map", dict(noise_map="learned"), 1),
    ("BD3-LM, L' = 5", dict(noise="none", block_size=5), 1),
    ("BD3-LM, L' = 5, Gumbel Distillation", dict(block_size=5), 1),
    ("BD3-LM, L' = 2", dict(noise="none", block_size=2), 1),
    ("BD3-LM, L' = 2, Gumbel Distillation", dict(block_size=2), 1),
    ("BD3-LM, L' = 1", dict(noise="none", block_size=1), 1),
    ("BD3-LM, L' = 1, Gumbel Distillation", dict(block_size=1), 1),
]
ABLATION_COLUMNS = {"model": "", "map": "", "seeds": "d", "nfe": ".3g", "valid": ".1%",
                    "valid_sd": ".1%", "tv": ".3f", "tv_sd": ".3f", "distinct": ".3g",
                    "agree_seq": ".3f", "agree_seq_sd": ".3f", "val_loss": ".3f",
                    "val_loss_sd": ".3f"}
# What the rows decide themselves, or what would make several of one.
OWN = ("dataset noise noise_map inject labels loss block_size init_from clip teacher tau "
       "temperature").split()


def run_alone(cfg):
    """run(cfg) on one core; what it prints goes to log.txt in its folder."""
    torch.set_num_threads(1)
    os.makedirs(cfg.out_dir, exist_ok=True)
    with open(os.path.join(cfg.out_dir, "log.txt"), "a") as f, contextlib.redirect_stdout(f):
        return run(cfg)


def ablate(cfg):
    """Train what is missing of ABLATION; print the table and write it to ablation.json.

    One row for each model and number of calls, and for APD: mean and standard deviation over seeds.
    On a CPU as many runs at once as there are cores: these models are too small for two threads.
    """
    for name in OWN:
        if getattr(cfg, name) != getattr(Config, name):
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: --ablate is the maze's table, "
                            "whose rows say this themselves; leave it out, or edit ABLATION")
    start, out = time.time(), cfg.out_dir or "out/maze-ablation"
    jobs = []
    for name, change, n_seeds in ABLATION:
        settings = {"noise": "gumbel", **change}
        maps = ["softmax", "draft"] if settings["noise"] != "none" else [None]
        for noise_map in [settings.pop("noise_map")] if "noise_map" in settings else maps:
            for seed in range(cfg.seed, cfg.seed + n_seeds):
                words = re.findall(r"\w+", f"{name} {noise_map or ''}")
                jobs.append((name, noise_map or "", dataclasses.replace(
                    cfg, ablate=False, resume=True, nfe=cfg.nfe or "1,3", seed=seed,
                    out_dir=f"{out}/{seed}/{'-'.join(words)}", noise_map=noise_map,
                    teacher=f"{out}/{seed}/MDLM/teacher.pt" if name != "MDLM" else None,
                    **settings)))
    devices = {resolve(job[-1]).device for job in jobs}         # bad settings end here, untrained
    n_workers = os.cpu_count() if devices == {"cpu"} else 1
    runs = {}                                                   # (name, map): rows of each seed
    with ProcessPoolExecutor(n_workers, get_context("spawn")) as pool:
        try:
            for wave in (True, False):                          # MDLM's runs train the teachers
                some = [job for job in jobs if (job[0] == "MDLM") == wave]
                futures = [pool.submit(run_alone, job[-1]) for job in some]
                for (name, noise_map, job), future in zip(some, futures):
                    rows = future.result()
                    print(f"{job.out_dir} done, {time.time() - start:.0f} s", flush=True)
                    # MDLM's rows by argmax are left out, APD's shown for the two main students
                    runs.setdefault((name, noise_map), []).append([
                        r for r in rows if r.get("temperature") == rows[2]["temperature"]
                        or name in ("MDLM", "Gumbel Distillation") and "apd" in r["model"]])
        except BaseException:  # Ctrl-C, too: runs under way save what they have, no other begins
            pool.shutdown(cancel_futures=True)
            raise
    table = []
    for (name, noise_map), of_seeds in runs.items():
        for same in zip(*of_seeds):                             # one row of each seed
            apd = " + APD" if "apd" in same[0]["model"] else ""
            table.append(dict(model=name + apd, map=noise_map, seeds=len(same)))
            for column in ("nfe", "valid", "tv", "distinct", "agree_seq", "val_loss"):
                values = [row[column] for row in same if column in row]
                if values:
                    table[-1][column] = float(np.mean(values))
                if len(values) > 1:
                    table[-1][column + "_sd"] = float(np.std(values, ddof=1))
    with open(f"{out}/ablation.json", "w") as f:
        json.dump(table, f, indent=1)
    print_table(table, ABLATION_COLUMNS)
    print(f"\n{out}/ablation.json written; {time.time() - start:.0f} s in all")
