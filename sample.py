"""Write texts with trained models. Several after --ckpt write from the same noise.

    python sample.py                                       # the newest student under out/
    python sample.py --ckpt out/maze/gumbel.pt --nfe 3 -n 100 --out texts.jsonl
    python sample.py --prompt "To be, ____" --animate      # each _ is one token to fill in
"""

import argparse
import functools
import glob
import itertools
import json
import math
import os
import re
import shutil
import sys
import time

import torch

import gumbel_distill as gd
from couplings import COUPLINGS
from data import END, Tokenizer, load_pretrained
from drafts import DraftStudent
from shifted import SHIFTED_STUDENTS

# A checkpoint names its class by a name of this table. Your own student needs a line here.
MODELS = {"teacher": gd.Teacher, **gd.STUDENTS, "gumbel-draft": DraftStudent, **SHIFTED_STUDENTS,
          **COUPLINGS}
COLD = 1e-6                         # below this temperature a draw is the argmax
RANGES = ("n", 1, 1e9), ("nfe", 1, 1e9), ("tau", 0, 1e9), ("temperature", 0, 1e9), ("top_p", 0, 1)


@functools.cache                    # each once
def note(text):
    print(f"note: {text}", file=sys.stderr)


# --- Checkpoints ----------------------------------------------------------------------------------
def load_model(path, device="cpu"):
    """The Teacher or Student of a checkpoint, with averaged weights; its Tokenizer; and all that
    the checkpoint holds, a dict."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)    # code is refused
        name, cfg = saved["name"], argparse.Namespace(**saved["config"])
        if name not in MODELS:
            raise gd.UserError(f"{path}: no model is called {name!r}; known: {', '.join(MODELS)}")
        tokenizer = Tokenizer(**saved["tokenizer"])
        if name == "teacher":
            net = getattr(cfg, "teacher", None)                 # a model of transformers
            net = net and load_pretrained(net, tokenizer, cfg.seq_len)
            model = gd.Teacher(cfg, tokenizer.vocab_size, tokenizer.bos_id, net)
        else:
            model = MODELS[name](cfg, tokenizer.vocab_size)
        model.load_state_dict(saved["ema"])
    except Exception as e:  # files, zip, pickle, torch and dict have an error each
        raise gd.UserError(f"{path}: this version cannot read it ({type(e).__name__})") from e
    if not hasattr(model, "block_size"):  # so many tokens are written together, left to right
        model.block_size = 1 if name == "teacher" else cfg.seq_len
    return model.to(device).eval().requires_grad_(False), tokenizer, saved


def load_newest(device):
    """{path: load_model} of the newest checkpoint under out/ that loads, a student's if any."""
    paths = glob.glob("out/**/*.pt", recursive=True)
    for path in sorted(paths, key=lambda p: (p.endswith("teacher.pt"), -os.path.getmtime(p))):
        try:
            return {path: load_model(path, device)}
        except gd.UserError as e:
            note(f"passed over {e}")
    raise gd.UserError("no checkpoint under out/: run gumbel_distill.py, or name one with --ckpt")


def load_models(paths, device="cpu"):
    """{path: load_model} of checkpoints that go together, without a path of the newest one."""
    paths = {os.path.realpath(path): path for path in paths}.values()      # each file once
    loaded = {path: load_model(path, device) for path in paths} or load_newest(device)
    kinds = []
    for path, (_, _, saved) in loaded.items():
        step, n_steps = saved["step"], saved["about"]["n_steps"]
        if step < n_steps:
            note(f"{path} is half way, at step {step} of {n_steps}")
        kinds.append((saved["tokenizer"], saved["config"]["seq_len"]))
    if any(kind != kinds[0] for kind in kinds):
        raise gd.UserError(f"--ckpt {' '.join(paths)}: these differ in tokens or length: name one")
    return loaded


# --- Prompts and draws ----------------------------------------------------------------------------
def prompt_ids(prompt, tokenizer, seq_len):
    """Token ids (T,) of the prompt, with gaps, vocab_size, at each _ and after the prompt. A token
    of GPT-2 begins with its space, so the space before a gap belongs to what fills the gap."""
    ids, gap_id = [], tokenizer.vocab_size
    for piece, gaps in re.findall(r"([^_]*)(_*)", prompt):
        if tokenizer.words is None:
            piece = piece.rstrip(" ")
        ids += map(int, tokenizer.encode(piece))
        ids += [gap_id] * len(gaps)
    n_given = len(ids)
    ids += [gap_id] * (seq_len - n_given)
    if n_given > seq_len or gap_id not in ids:
        raise gd.UserError(f"--prompt {prompt!r} has {n_given} tokens with its gaps, a text has "
                           f"{seq_len}: shorten it, so that something is left to fill in")
    return torch.tensor(ids)


def nucleus(logits, u, temperature=1.0, top_p=1.0):
    """Tokens (M,) of logits (M, V) at u (M,), a `draw` of Student: at a temperature, and from the
    likeliest tokens only, up to and with the one that passes top_p. Near 0 it is the argmax."""
    if temperature < COLD:
        return logits.argmax(dim=-1)
    logits = logits.double() / temperature
    if top_p < 1:
        likeliest, token = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = likeliest.cumsum(dim=-1) - likeliest           # probability of likelier tokens
        is_out = torch.empty_like(token, dtype=torch.bool).scatter(-1, token, before > top_p)
        logits = logits.masked_fill(is_out, -math.inf)
    return gd.Student.draw(None, logits, u)


def settings_of(path, model, saved, known, given):
    """How a model of load_model writes, a dict: nfe, tau, temperature, top_p. `given`, a dict, has
    what flags say of these, or None. Flags without effect are named on stderr."""
    T, nfe = len(known), saved["config"]["nfe"]
    # without a flag: the steps of the run's example texts; the noise decides, or else a draw
    how = dict(nfe=nfe[len(nfe) // 2], tau=1.0, temperature=float(not model.reads_noise), top_p=1.0)
    how.update({name: given[name] for name in how if given[name] is not None})
    if isinstance(model, gd.Teacher):
        how.update(nfe=T, temperature=1.0, top_p=1.0)
    elif not model.reads_noise:
        how["tau"] = 1.0
    if how["temperature"] < COLD:
        how["top_p"] = 1.0
    n_blocks = T // model.block_size
    how["nfe"] = n_blocks * max(1, how["nfe"] // n_blocks)      # blocks have equal shares
    for name, value in how.items():
        if given[name] not in (None, value):
            note(f"{name} {given[name]:g} has no effect: {path} writes as with {value:g}")
    if how["nfe"] > T:
        note(f"nfe {how['nfe']}: at most {T} of the steps fill one of the {T} tokens")
    is_gap = known == model.vocab_size
    block = torch.arange(T) // model.block_size
    if (block[~is_gap] > block[is_gap].min()).any():
        note(f"{path} writes from left to right: a gap is filled without what comes after it")
    return how


# --- Texts and films for the terminal -------------------------------------------------------------
def show(x, tokenizer, dataset):
    """Texts (n, T), with _ for a gap, to print. A toy sentence goes as far as its words. Control
    characters but line breaks are written out: no terminal obeys them."""
    if dataset == "maze":
        return "\n\n".join(gd.Maze().show(row) for row in x.split(6))
    texts = []
    for ids in x.tolist():
        pieces = []
        for is_gap, run in itertools.groupby(ids, lambda i: i == tokenizer.vocab_size):
            run = list(run)                                     # tokens may share a character
            pieces.append(tokenizer.sep.join("_" * len(run)) if is_gap else tokenizer.decode(run))
        text = tokenizer.sep.join(pieces)
        texts.append(text.split(" " + END)[0] if dataset == "cities" else text)
    shown = "\n\n".join(texts)
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in shown)


def film_steps(model, n, nfe, known, seed):
    """The step (n, T) in which `generate` fills each token, 0 where it is known."""
    T, size = len(known), model.block_size
    steps = nfe * size // T                                     # of a block
    _, u = gd.sequence_noise(seed, torch.arange(n), T, model)
    step = gd.fill_steps(u[:, 0].cpu(), steps) + torch.arange(T) // size * steps
    return torch.where(known == model.vocab_size, step, 0).long()


def play(title, x, step, tokenizer, dataset, pause=0.8):
    """Print how texts x (n, T) fill in the steps `step` (n, T). On a terminal a frame takes the
    place of the last one, if it fits; elsewhere the frames stand one below the other."""
    columns, rows = shutil.get_terminal_size()
    n_lines = 0                                                 # of the frame to be replaced
    for k in sorted({0, *step.flatten().tolist()}):
        frame = torch.where(step <= k, x, tokenizer.vocab_size)
        lines = [f"{title}, step {k}"]
        for line in show(frame, tokenizer, dataset).split("\n"):
            lines += [line[i:i + columns] for i in range(0, len(line), columns)] or [""]
        if n_lines:
            time.sleep(pause)
            print(f"\033[{n_lines}A\033[J", end="")             # up, and clear what is below
        n_lines = len(lines) if len(lines) < rows and sys.stdout.isatty() else 0
        print("\n".join(lines), flush=True)
    print()


# --- Command line ---------------------------------------------------------------------------------
def parse(words=None):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[], help="checkpoints (the newest student under out/)")
    add("-n", type=int, default=4, help="number of texts (4)")
    add("--prompt", default="", help="text to begin with; each _ is one token to fill in")
    add("--animate", action="store_true", help="show how the texts fill")
    add("--out", help="file to write the texts to, one JSON object a line")
    add("--nfe", type=int, help="steps (those of the run's example texts)")
    add("--tau", type=float, help="scale of the noise (1)")
    add("--temperature", type=float, help="of draws; 0: argmax (0 where noise is read, else 1)")
    add("--top-p", type=float, help="draw from the likeliest tokens of this probability (1)")
    add("--seed", type=int, default=0, help="seed of all draws (0)")
    add("--device", default=gd.Config.device, choices={"cpu", gd.Config.device})
    return check_ranges(parser.parse_args(words))


def check_ranges(args):
    """The flags, if no number is out of its range: one number, or a list of them."""
    for name, low, high in RANGES:
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not low <= value <= high:
                raise gd.UserError(f"{name} is {value}: give a number from {low} to {high:g}")
    return args


def main(words=None):
    args = parse(words)
    loaded = load_models(args.ckpt, args.device)
    _, tokenizer, saved = next(iter(loaded.values()))
    dataset, T = saved["config"]["dataset"], saved["config"]["seq_len"]
    known = prompt_ids(args.prompt, tokenizer, T)
    try:  # before the work, not after it; the file is whole or not there
        out = open(args.out + ".tmp" if args.out else os.devnull, "w")
    except OSError as e:
        raise gd.UserError(f"--out {args.out}: {e.strerror}") from e
    films = []                                                  # of each model: texts and steps
    for path, (model, _, saved) in loaded.items():
        how = settings_of(path, model, saved, known, vars(args))
        model.draw = functools.partial(nucleus, temperature=how["temperature"], top_p=how["top_p"])
        x = gd.generate(model, args.n, T, args.seed, how["nfe"], known, how["tau"]).cpu()
        for i, ids in enumerate(x.tolist()):
            text = dict(ckpt=path, index=i, seed=args.seed, prompt=args.prompt, **how,
                        text=tokenizer.decode(ids), ids=ids)
            print(json.dumps(text), file=out, flush=True)
        print(path, *(f"{name} {value:g}" for name, value in how.items()), sep=", ")
        if args.animate:
            films.append((x, film_steps(model, args.n, how["nfe"], known, args.seed)))
        elif not args.out:
            print(show(x, tokenizer, dataset) + "\n")
    if args.out:
        os.replace(out.name, args.out)
    for i in range(args.n if films else 0):
        x, step = (torch.stack(part)[:, i] for part in zip(*films))        # (models, T)
        play(f"text {i}", x, step, tokenizer, dataset)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError):                # Ctrl-C, or `| head` has enough
        os._exit(1)                                             # no second try to flush
