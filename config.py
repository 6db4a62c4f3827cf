"""What surrounds the method: settings, errors, checkpoints, tables.

Every field of Config is a command-line flag of the same name.
"""

import argparse
import dataclasses
import datetime
import difflib
import hashlib
import json
import math
import os
import re
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np
import torch
import torch.distributed as dist

# torchrun starts WORLD processes with numbers RANK from 0; without it there is one, even where a
# cluster has set these variables.
IS_LAUNCHED = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if IS_LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if IS_LAUNCHED else 1
HAS_GPU = torch.cuda.is_available()
TOKENIZERS = ["char", "gpt2", "gpt2-1024", "gpt2-4096"]
STUDENTS = ["mdlm", "bd3lm", "gumbel", "gumbel-draft"]

# -----------------------------------------------------------------------------
# Settings
# The settings that a run takes by default, for each dataset: flags of gumbel_distill.py.
SMALL = dict(n_layer=4, n_head=2, n_embd=64, dropout=0.0, batch_size=64, grad_accum=1, lr=3e-3,
             warmup=100, schedule="cosine", ema=0.999, eval_every=500, init_from="scratch",
             t_min=1e-3)
TEXT = dict(SMALL, init_from="teacher", t_min=0.1)
WEB = dict(tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, dropout=0.1, grad_accum=1, lr=3e-4,
           warmup=2500, schedule="constant", ema=0.9999, eval_every=1000, max_steps=20_000,
           init_from="teacher", t_min=0.1)
PRESETS = {
    "maze": dict(SMALL, seq_len=10, max_steps=2000, nfe=[1, 3, 10], n_samples=3000),
    "cities": dict(SMALL, seq_len=19, lr=2e-3, max_steps=4000, nfe=[1, 2, 4, 19], n_samples=1000),
    "text": dict(TEXT, tokenizer="char", seq_len=64, n_head=4, n_embd=128, batch_size=32, lr=2e-3,
                 max_steps=1500, nfe=[1, 4, 16, 64], n_samples=200),
    "tinystories": dict(TEXT, tokenizer="gpt2-1024", seq_len=64, n_head=4, n_embd=128,
                        batch_size=32, lr=2e-3, max_steps=4000, nfe=[1, 4, 16, 64], n_samples=200),
    "lm1b": dict(WEB, seq_len=128, batch_size=256, nfe=[1, 4, 16, 32, 128], n_samples=256),
    "owt": dict(WEB, seq_len=1024, batch_size=32, nfe=[16, 128, 512], n_samples=32),
}


# What decides a trained model, beside its data
SHAPE = ["seq_len", "n_layer", "n_head", "n_embd"]
TEACHER_SETTINGS = SHAPE + ["dropout", "batch_size", "grad_accum", "max_steps", "lr", "warmup",
                            "schedule", "ema", "seed"]
STUDENT_SETTINGS = TEACHER_SETTINGS + ["block_size", "labels", "init_from", "t_min"]
EXAMPLES = """
python gumbel_distill.py                                        the maze, in minutes
python gumbel_distill.py --dataset cities --students gumbel --nfe 1 4
python gumbel_distill.py --dataset text --train-files 'texts/*.txt' --out-dir out/mine
"""


class UserError(Exception):
    """Something the user can mend; the message names the value and the cure."""


def run_cli(main):
    """Call main(); what a user can mend becomes one line on stderr, without a traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")                # a terminal that lacks a letter
    try:
        main()
        sys.stdout.flush()
        leave_group()
    except BrokenPipeError:  # `| head` has enough; the interpreter flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as e:  # OSError: a full disk, a folder of somebody else
        sys.exit(f"error: {e}")
    except (MemoryError, RuntimeError) as e:  # on a CPU torch raises a bare RuntimeError
        types = MemoryError, torch.OutOfMemoryError
        if not isinstance(e, types) and "DefaultCPUAllocator" not in str(e):
            raise
        sys.exit("error: out of memory: lower --batch-size, or split the batch into more pieces "
                 f"with --grad-accum ({e!r:.99})")
    except KeyboardInterrupt:
        goes_on = f"; the same command goes on from {SAVED[-1]}" if SAVED else ""
        print("stopped" + goes_on, file=sys.stderr)
        sys.exit(130)


def learning_rate(cfg, step):
    """Linear warm-up to cfg.lr. The schedule "cosine" multiplies it by a factor that falls from 1
    at step 0 to 0 at the end."""
    rate = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1))
    if cfg.schedule == "cosine":
        rate *= 0.5 + 0.5 * math.cos(math.pi * step / cfg.max_steps)
    return rate


STOP = threading.Event()            # set: trainings in other threads end after their step


def side_by_side(jobs, cfg):
    """Run jobs (functions), and return what they return. Small models leave cores of a CPU idle, so
    there each job has a thread of its own. With dropout the jobs run one by one, because its random
    numbers come from the generator of the process."""
    is_plain = cfg.device == "cpu" and not cfg.compile and cfg.dropout == 0 and WORLD == 1
    if len(jobs) < 2 or not is_plain:
        return [job() for job in jobs]
    n_cores = torch.get_num_threads()
    torch.set_num_threads(max(1, n_cores // len(jobs)))
    pool = ThreadPoolExecutor(n_cores)
    running = [pool.submit(job) for job in jobs]
    try:
        wait(running, return_when=FIRST_EXCEPTION)
        for job in running:
            if job.done():
                job.result()                                    # raises its error
        return [job.result() for job in running]
    finally:  # after an error or Ctrl-C the other trainings stop, too
        STOP.set()
        pool.shutdown(cancel_futures=True)
        STOP.clear()
        torch.set_num_threads(n_cores)


def join_group(cfg):
    """Join the processes of torchrun, where it started some, into a group; each has its GPU."""
    if not IS_LAUNCHED and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torchrun started nothing: "
                        "use torchrun --nproc_per_node N, or unset WORLD_SIZE")
    if cfg.grad_accum < WORLD:
        raise UserError(f"--grad-accum {cfg.grad_accum}: must be {WORLD} or more for {WORLD} "
                        "processes, which share the pieces of a batch")
    if WORLD > 1:
        if cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=datetime.timedelta(days=1))        # tokenising takes long
    if RANK > 0:  # process 0 speaks for all
        sys.stdout = open(os.devnull, "w")


def leave_group():
    """Leave the group of processes together. Then end without the interpreter's clean-up, in which
    a thread of gloo that is still alive would abort the process."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)


def option(default, help, **how):
    """A field of Config; `how` goes to argparse's add_argument. With nargs it is a list."""
    return dataclasses.field(default=default, metadata=dict(how, help=help))


@dataclasses.dataclass
class Config:
    """Settings of a run. None means: as PRESETS says for the dataset."""
    dataset: str = option("maze", "what to learn", choices=PRESETS)
    train_files: str = option(None, "text, .jsonl or .parquet, packed or not: a file or a "
                              "quoted glob; without it the Hugging Face hub")
    val_files: str = option(None, "files to validate on, which are left out of training; without "
                            "it the last 10%% of the training text")
    tokenizer: str = option(None, "gpt2-N: the first N - 1 tokens of GPT-2's BPE and "
                            "<|endoftext|>", choices=TOKENIZERS)
    max_tokens: int = option(None, "use at most this many training tokens")
    seq_len: int = option(None, "tokens per sequence")
    n_layer: int = option(None, "layers of the Transformer")
    n_head: int = option(None, "attention heads")
    n_embd: int = option(None, "width")
    dropout: float = option(None, "dropout probability")
    block_size: int = option(None, "BD3-LM's block length; seq_len, the default, is MDLM")
    students: str = option(None, "one or more of mdlm, in blocks bd3lm, and gumbel, "
                           "gumbel-draft; without it all", nargs="+", choices=STUDENTS)
    labels: str = option("data", "real text or the teacher's own", choices=["data", "teacher"])
    teacher: str = option(None, "a checkpoint, gpt2, gpt2-large or a folder; or --out-dir's own")
    init_from: str = option(None, "weights of the students at the start: scratch, teacher, or a "
                            "checkpoint of their shape")
    batch_size: int = option(None, "sequences per optimiser step; of sample.py: texts at once")
    grad_accum: int = option(None, "pieces to split a batch into, to save memory")
    max_steps: int = option(None, "optimiser steps of each model")
    lr: float = option(None, "learning rate of AdamW, before warm-up and schedule")
    warmup: int = option(None, "steps of linear warm-up")
    schedule: str = option(None, "of the learning rate", choices=["cosine", "constant"])
    t_min: float = option(None, "smallest time t that a student sees in training")
    ema: float = option(None, "decay per step of the averaged weights; 0: none")
    eval_every: int = option(None, "steps between validations; each writes the checkpoint")
    nfe: int = option(None, "function evaluations of a text, one or more numbers", nargs="+")
    tau: float = option((1.0,), "scale of the noise, one or more numbers", nargs="+")
    temperature: float = option((0.0, 1.0), "to draw tokens with, one or more numbers; 0: argmax",
                                nargs="+")
    top_p: float = option(1.0, "nucleus: the likeliest tokens of this total")
    n_samples: int = option(None, "texts per row of the table")
    seed: int = option(0, "seed of every random draw")
    device: str = option("cuda" if HAS_GPU else "cpu", "cpu or cuda", choices=["cpu", "cuda"])
    dtype: str = option("bfloat16" if HAS_GPU else "float32", "of the training",
                        choices=["float32", "bfloat16"])
    compile: bool = option(HAS_GPU, "torch.compile", action=argparse.BooleanOptionalAction)
    out_dir: str = option("out/<dataset>", "folder of this run")

    @property
    def piece_size(self):
        return self.batch_size // self.grad_accum               # sequences

    @property
    def n_blocks(self):
        return self.seq_len // self.block_size                  # of a text


# The first flag of each group of the help text
GROUPS = {"dataset": "data", "seq_len": "model: teacher and students have one shape",
          "block_size": "students", "batch_size": "training", "nfe": "sampling",
          "seed": "machine"}


def flag(name):
    return "--" + name.replace("_", "-")


def resolve(cfg):
    """Fill in the dataset's preset, and check what argparse cannot; returns a new Config."""
    preset = dict(PRESETS[cfg.dataset])
    if cfg.teacher and not cfg.teacher.endswith(".pt"):         # of transformers: another shape
        preset["init_from"] = "scratch"
    missing = {name: value for name, value in preset.items() if getattr(cfg, name) is None}
    cfg = dataclasses.replace(cfg, **missing)
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)                            # a number, or several
        if f.type not in (int, float) or value is None:
            continue
        least = 0 if f.type is float or f.name in ("seed", "warmup") else 1
        most = 1e38 if f.type is float else 2**62               # what torch can hold
        if f.name in ("dropout", "ema", "top_p", "t_min"):
            most = 1
        if not least <= np.min(value) <= np.max(value) <= most:
            raise UserError(f"{flag(f.name)} {value}: must lie between {least} and {most}")
    cfg.out_dir = cfg.out_dir.replace("<dataset>", cfg.dataset)
    cfg.block_size = cfg.block_size or cfg.seq_len
    for whole, part, message in [
            (cfg.seq_len, cfg.block_size, "--seq-len {}: must be a multiple of --block-size {}"),
            (cfg.n_embd, 2 * cfg.n_head, "--n-embd {}: must be a multiple of {}, twice --n-head"),
            (cfg.batch_size, cfg.grad_accum, "--batch-size {}: must be a multiple of {}, the "
             "--grad-accum")]:
        if whole % part:
            raise UserError(message.format(whole, part))
    if cfg.init_from == "teacher" and not (cfg.teacher or ".pt").endswith(".pt"):
        raise UserError(f"--teacher {cfg.teacher}: a model of transformers has another shape than "
                        "the students, so they cannot begin with it; use --init-from scratch")
    if cfg.device == "cuda" and not HAS_GPU:
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    cfg.students = cfg.students or ["mdlm", "gumbel", "gumbel-draft"]
    if cfg.block_size < cfg.seq_len:  # MDLM in blocks is BD3-LM
        cfg.students = [name.replace("mdlm", "bd3lm") for name in cfg.students]
    cfg.students = list(dict.fromkeys(cfg.students))            # each once
    if os.path.abspath(cfg.init_from) == os.path.abspath(f"{cfg.out_dir}/teacher.pt"):
        cfg.init_from = "teacher"                               # by its other name
    return cfg


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with the cure."""

    def error(self, message):
        wrong = re.search(r"invalid .*?'(.*?)'(?: \(choose from (.*)\))?", message)
        cure = ""
        if wrong and "," in wrong[1]:
            cure = f"; separate by spaces: {wrong[1].replace(',', ' ')}"
        elif wrong and wrong[2]:
            choices = re.findall(r"[\w-]+", wrong[2])
            near = [name for name in choices if wrong[1] in name]
            near = near or difflib.get_close_matches(wrong[1], choices, 1, 0.5)
            cure = "".join(f"; did you mean {name}?" for name in near[:1])
        raise UserError(message.removeprefix("argument ") + cure)

    def parse_args(self, args=None, namespace=None):
        given, others = self.parse_known_args(args, namespace)
        if others and others[0].startswith("-"):
            flags = map(flag, vars(given))
            near = difflib.get_close_matches(others[0].split("=")[0], flags, 1, 0.58)
            raise UserError(f"{others[0]}: no flag of this program, --help lists them"
                            + "".join(f"; did you mean {name}?" for name in near))
        if others:
            raise UserError(f"{others[0]} is one value too many: quote a glob, as in --train-files "
                            "'texts/*.txt', lest the shell makes many of it")
        return given


def words(value):
    """A setting as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def add_flags(parser, *names, **defaults):
    """A flag for each named field of Config, or for all; `defaults` replace those of Config.
    What differs between the datasets goes into a table below the help text."""
    table = ["by --dataset " + "".join(f"{name:>14}" for name in PRESETS)]
    for f in dataclasses.fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        if names and f.name not in names:
            continue
        how = dict(f.metadata, default=defaults.get(f.name, f.default))
        if f.type is not bool:
            how["type"] = f.type
        if how["default"] is not None:
            how["help"] += f" ({words(how['default'])})"
        elif any(f.name in preset for preset in PRESETS.values()):
            cells = [words(preset.get(f.name, "")) for preset in PRESETS.values()]
            table.append(f"{flag(f.name):13}" + "".join(f"{cell:>14}" for cell in cells))
        if f.type is not bool and ("nargs" in how or "choices" not in how):
            how["metavar"] = f.name.split("_")[-1].upper()
        group.add_argument(flag(f.name), **how)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter          # the lines stay lines
    parser.usage = "%(prog)s [--flag value ...]"
    if table[1:]:
        parser.epilog = "\n".join([parser.epilog or "", *table]).lstrip()
    return parser


# -----------------------------------------------------------------------------
# Checkpoints: a file that needs nothing else, and what it must agree with
FORMAT = 3                          # another format is not read
SAVED = []                          # paths of what this process has written


def load_checkpoint(path):
    """A checkpoint as a dict of tensors and plain values; code in the file is refused."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}, not {FORMAT}")
        return dict(saved, config=Config(**saved["config"]))
    except Exception as e:  # torch raises many types for cut-off and foreign files
        raise UserError(f"{path}: missing, cut off, or no checkpoint of this version ({e!r:.99}); "
                        "name another file like out/maze/teacher.pt, or train it again") from e


def save_checkpoint(path, parts, **about):
    """Write a checkpoint: the state of the parts (name -> model or optimizer), and plain values.
    A write that is cut off leaves the last checkpoint whole."""
    state = {name: part.state_dict() for name, part in parts.items()}
    try:
        torch.save(dict(state, format=FORMAT, **about), path + ".tmp")
    except RuntimeError as e:  # so torch reports a full disk
        raise UserError(f"{path}: cannot be written ({e!r:.99}), the last checkpoint stands; make "
                        "room, or use another --out-dir") from e
    os.replace(path + ".tmp", path)
    SAVED.append(path)


def resume(path, settings, parts):
    """Read a checkpoint of these settings into the parts; returns its step. 0 where none is."""
    if not os.path.exists(path):
        return 0
    saved = load_checkpoint(path)
    check_equal(path, saved["settings"], settings, "use the same settings or another --out-dir, or "
                "delete that file")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"]


def check_equal(path, there, here, cure):
    """UserError unless the checkpoint's dict `there` has every value of the dict `here`."""
    for name, value in here.items():
        if there.get(name) != value:
            raise UserError(f"{path} was trained with {name} {there.get(name)}, not {value}; "
                            f"{cure}")


def weights_id(model):
    """A hash of the weights: equal models have equal hashes."""
    digest = hashlib.sha1()
    for p in model.parameters():
        digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# Tables
# The columns of the tables and their formats. docs/columns.md says what each means.
COLUMNS = {"model": "", "nfe": "d", "tau": "g", "temperature": "g", "valid": ".1%", "distinct": "d",
           "tv": ".3f", "wrong_names": ".1%", "teacher_nll": ".3f", "entropy": ".3f",
           "agree_token": ".3f", "agree_seq": ".3f", "seconds": ".2f"}


LOG_LINE = ("{model:12} step {step:6d} | loss {loss:.4f} | val {val:.4f} nats/token | "
            "lr {lr:.1e} | grad {grad:.2f} | {tok_s:,.0f} tok/s | {left:.0f} s left")


def report(row, folder):
    """Print a line of the log of training, and append it to log.jsonl."""
    print(LOG_LINE.format(**row), flush=True)
    with open(f"{folder}/log.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")


def print_table(rows, columns=COLUMNS):
    """Rows (dicts) as aligned text, with those of the columns that any row has. Where a row has a
    NAME_se, too, it stands behind NAME."""
    names = [name for name in columns if any(name in row for row in rows)]
    lines = [names]
    for row in rows:
        lines.append([])
        for name in names:
            cell = format(row[name], columns[name]) if name in row else ""
            if name + "_se" in row:
                cell += " ± " + format(row[name + "_se"], columns[name])
            lines[-1].append(cell)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
