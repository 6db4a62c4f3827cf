"""Sample from trained models.

    python sample.py                                       # the newest student under out/
    python sample.py --ckpt out/maze/gumbel-draft.pt --nfe 3 -n 4
    python sample.py --prompt "To be, ____" --animate      # each _ is one token to fill in
    python sample.py --exact -n 1000                       # the teacher's own texts, drafted
    python sample.py --apd 0.5                             # drafted, and verified less strictly

judge.py says how good the texts are. notebooks/classroom.py --gif makes a moving picture of them.
"""

import codecs
import dataclasses
import glob
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch

from config import Config, Parser, UserError, add_flags, resolve, run_cli, weights_id
from data import MAZE_WIDTH, draw_maze, maze_paths, show
from gumbel_distill import generate, load_model, load_teacher, open_text, sampler_settings
from gumbel_distill import sampling_batches, sequence_noise, serial_extraction


# -----------------------------------------------------------------------------
# Models and prompts
def newest_student():
    paths = [path for path in glob.glob("out/**/*.pt", recursive=True)
             if not path.endswith("teacher.pt")]
    if not paths:
        raise UserError("no student under out/: train one with `python gumbel_distill.py`, or name "
                        "one with --ckpt")
    return max(paths, key=os.path.getmtime)


def load_models(args):
    """The models of --ckpt (of the newest student without it), which must go together. Flags that
    have the name of a setting replace that setting of the first one.
    Returns: names like maze/gumbel;  models;  the first one's tokenizer and file;  a Config
    """
    args.ckpt = args.ckpt or [newest_student()]
    loaded = [load_model(path, "cpu") for path in args.ckpt]
    _, tokenizer, saved = loaded[0]
    given = {name: value for name, value in vars(args).items()
             if hasattr(Config, name) and value is not None}
    cfg = resolve(dataclasses.replace(saved["config"], grad_accum=1, init_from="scratch", **given))
    cfg.temperature = args.temperature                          # None: see settings_of
    names, models = [], []
    for path, (model, other, other_saved) in zip(args.ckpt, loaded):
        if other.state != tokenizer.state or other_saved["config"].seq_len != cfg.seq_len:
            raise UserError(f"{path}: does not compare with {args.ckpt[0]}, which has other tokens "
                            "or another length; name one of them only")
        names.append(f"{Path(path).absolute().parent.name}/{model.name}")
        models.append(model.to(cfg.device))
    if len(set(names)) < len(names):
        raise UserError(f"--ckpt: two of {', '.join(names)} have one name; rename a folder")
    return names, models, tokenizer, saved, cfg


def settings_of(model, cfg):
    """How `model` writes: the keyword arguments of its `write`. A teacher has tau only."""
    if model.name == "teacher":
        return {"tau": cfg.tau[0]}
    if cfg.temperature is None:  # the noise decides, or else a draw
        cfg = dataclasses.replace(cfg, temperature=[0.0 if model.reads_noise else 1.0])
    settings = next(sampler_settings(model, cfg))
    for name in ("nfe", "tau"):
        given, used = getattr(cfg, name)[0], settings[name]
        if given != used:
            print(f"note: --{name} {given:g} has no effect: {model.name} writes as with {used:g}",
                  file=sys.stderr)
    return settings


def teacher_of(path, saved, tokenizer, cfg):
    """The teacher named by --teacher, or the one that the student at `path` learned from."""
    name = cfg.teacher or os.path.join(os.path.dirname(path), "teacher.pt")
    teacher = load_teacher(name, tokenizer, cfg)
    if saved["settings"]["teacher"] not in (None, weights_id(teacher)):     # MDLM may need none
        print(f"note: {name} is not this student's teacher", file=sys.stderr)
    return teacher


def prompt_ids(prompt, tokenizer, seq_len):
    """Token ids (T,) long of the prompt, with gaps, vocab_size, at each _ and after the prompt. A
    token of GPT-2 begins with its space, so the space before a gap belongs to what fills the gap.
    """
    ids, gap_id = [], tokenizer.vocab_size
    for piece, gaps in re.findall(r"([^_]*)(_*)", prompt):
        if tokenizer.words is None:
            piece = piece.rstrip(" ")
        ids += tokenizer.encode(piece, "--prompt").tolist() + [gap_id] * len(gaps)
    n_given = len(ids)
    ids += [gap_id] * (seq_len - n_given)
    if n_given > seq_len or gap_id not in ids:
        raise UserError(f"--prompt has {n_given} tokens, gaps included, and a text has {seq_len}: "
                        "shorten it, so that something is left to fill in")
    return torch.tensor(ids)


# -----------------------------------------------------------------------------
# Exact mode and adaptive parallel decoding: student and teacher share the noise
@torch.no_grad()
def draft_and_verify(student, teacher, xi, xt=None, ratio=0.0, on_round=None):
    """The student drafts, the teacher verifies: exact mode, or adaptive parallel decoding (APD).

    Each round drafts all masked tokens in one call of the student: argmax(s) with s = logp + xi, or
    s = the logits of a student that has read xi. One call of the teacher gives the answer
    argmax(ratio s + (1 - ratio) (logp_teacher + xi)) at all positions. An answer is valid if all
    tokens before it are right. So the prefix where draft and answer agree is kept, and the next
    token of the answer. The rest is masked again.
    ratio 0: exact mode. The text equals serial_extraction(teacher, xi), up to rounding, in fewer
    rounds. Without a student the teacher's last answer is the next draft (predictive sampling,
    Wiggers & Hoogeboom 2020). ratio above 0: APD (Israel et al. 2025).
    Args:    xi (B, T, V) Gumbel noise;  xt (B, T) known tokens, at the left only, mask_id = V after
             on_round: called after each round with the numbers (b,) of the texts that were open,
             draft and answer (b, T), and n_keep (b,), how many tokens of the answer stand now
    Returns: x0 (B, T) long;  rounds (B,) long, each one student and one teacher call
    """
    if student is None and ratio > 0:
        raise ValueError(f"ratio {ratio}: without a student there is nothing to mix with")
    B, T, V = xi.shape
    x = open_text(xi, xt)
    if student is None:  # the first draft is the teacher's argmax text
        guess = serial_extraction(teacher, torch.zeros_like(xi[:1])).repeat(B, 1)          # (B, T)
    rounds = torch.zeros(B, dtype=torch.long, device=xi.device)
    live = (x == V).any(dim=1).nonzero()[:, 0]                  # numbers of the unfinished texts
    while len(live):
        draft, is_masked = x[live], x[live] == V                # (b, T)
        if student is None:
            draft[is_masked] = guess[live][is_masked]
        else:
            noise = xi[live][is_masked]                         # (M, V)
            score = student(draft, noise)                       # (M, V)
            if not student.reads_noise:
                score = score + noise
            draft[is_masked] = score.argmax(dim=-1)
        target = teacher(draft) + xi[live]                      # (b, T, V)
        if ratio > 0:
            target[is_masked] = ratio * score + (1 - ratio) * target[is_masked]
        answer = target.argmax(dim=-1)                          # (b, T)
        agree = (draft == answer) | ~is_masked
        n_agree = agree.long().cumprod(dim=1).sum(dim=1)        # (b,) length of the agreeing prefix
        n_keep = (n_agree + 1).clamp(max=T)
        is_kept = torch.arange(T, device=x.device) < n_keep[:, None]
        x[live] = torch.where(is_kept, torch.where(is_masked, answer, draft), V)
        if student is None:
            guess[live] = answer
        if on_round:
            on_round(live, draft, answer, n_keep)
        rounds[live] += 1
        live = live[n_keep < T]
    return x, rounds


@torch.no_grad()
def compare_exact(student, teacher, n, seq_len, seed, known=None, ratio=0.0):
    """draft_and_verify beside serial decoding on the same noise.
    Returns: the texts (n, T);  a dict: rounds per text; equal, the share of texts equal to those of
    serial decoding; near_ties, how many of these differ, but only from where the teacher's two best
    tokens lie within 1e-4, which float32 rounds either way; seconds and serial_seconds
    """
    texts, sums = [], dict(rounds=0, equal=0, near_ties=0, seconds=0.0, serial_seconds=0.0)
    for index in sampling_batches(n, seq_len, teacher.vocab_size):
        xi, _ = sequence_noise(seed, index, seq_len, teacher)
        xt = None if known is None else known.expand(len(index), seq_len)
        start = time.perf_counter()
        x, rounds = draft_and_verify(student, teacher, xi, xt, ratio)
        sums["rounds"] += rounds.sum().item() / n               # .item() waits for a GPU
        sums["seconds"] += time.perf_counter() - start
        start = time.perf_counter()
        serial = serial_extraction(teacher, xi, xt)
        differs = (x != serial).cpu()                           # (B, T); waits for a GPU
        sums["serial_seconds"] += time.perf_counter() - start
        best = (teacher(serial) + xi).topk(2, dim=-1).values    # (B, T, 2)
        gap = (best[..., 0] - best[..., 1]).cpu()
        first = differs.long().argmax(dim=1, keepdim=True)      # where a text begins to differ
        is_equal = ~differs.any(dim=1)                          # (B,)
        is_tie = ~is_equal & (gap.gather(1, first)[:, 0] < 1e-4)
        sums["near_ties"] += is_tie.sum().item()
        sums["equal"] += (is_equal | is_tie).sum().item() / n
        texts.append(x)
    return torch.cat(texts), sums


def verified(student, teacher, n, seed, known, ratio):
    """Run exact mode or APD, and print what it cost beside serial decoding; returns the texts."""
    x, report = compare_exact(student, teacher, n, len(known), seed, known, ratio)
    calls = {f"APD, R = {ratio:g}" if ratio else "exact mode": 2 * report["rounds"]}
    if not ratio:
        calls["no student"] = compare_exact(None, teacher, n, len(known), seed, known)[1]["rounds"]
    calls["serial teacher"] = (known == teacher.vocab_size).sum().item()
    for name, number in calls.items():
        print(f"{name:15} {number:.2f} calls per text")
    print("in {rounds:.2f} rounds per text and {seconds:.2f} s (serial: {serial_seconds:.2f} s)\n"
          "equal to serial {} of {} texts ({near_ties} of them but for a near-tie, which float32 "
          "rounds either way)\n".format(round(report["equal"] * n), n, **report))
    return x


# -----------------------------------------------------------------------------
# Films: how texts unmask, in the terminal
WIDTH = 76                          # letters of a line of text


@torch.no_grad()
def film(model, number, seed, known, **settings):
    """Text `number` of generate, step by step: a list of frames (T,). A frame has token ids, and
    mask_id where nothing stands yet. The first frame has the known tokens only."""
    steps = [known[None]]                                       # (1, T) each
    xi, u = sequence_noise(seed, torch.tensor([number]), len(known), model)
    if model.name == "teacher":
        text = model.write(xi, u, known[None], **settings)
        place = torch.arange(len(known), device=known.device)
        steps += [torch.where(place <= i, text, known) for i in range(len(known))]
    else:
        model.write(xi, u, xt=known[None], on_step=steps.append, **settings)
    return [frame[0].cpu() for frame in steps]


def all_films(models, cfg, known):
    """For each of n_samples texts the films of all models, a list."""
    settings = [settings_of(model, cfg) for model in models]
    for i in range(cfg.n_samples):
        yield [film(model, i, cfg.seed, known, **how) for model, how in zip(models, settings)]


def frames(films):
    """Frame after frame, of each film: (number, frame, frame before). A short film waits."""
    for number in range(max(map(len, films))):
        at = [min(number, len(steps) - 1) for steps in films]
        yield [(k, steps[k], steps[max(0, k - 1)]) for k, steps in zip(at, films)]


def visible(text):
    """The text with all control characters but line breaks written out: no terminal obeys them."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def lines_of(frame, before, tokenizer, width=WIDTH):
    """A frame as lines of at most `width` letters, lists of (piece, kind). The kind is "masked",
    "new" or "old". A line break of the text is shown as an arrow. A character of which several
    tokens of BPE have a part is shown where its last byte stands."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    lines, column = [[]], 0
    for i, id_before in zip(frame.tolist(), before.tolist()):
        kind = "old" if i == id_before else "new"
        if i == tokenizer.vocab_size:
            kind, piece = "masked", decoder.decode(b"", final=True) + "_" + tokenizer.sep
        elif tokenizer.words is None:
            piece = decoder.decode(tokenizer.bpe.decode_single_token_bytes(i))
        else:
            piece = tokenizer.words[i] + tokenizer.sep
        piece = visible(piece).replace("\n", "\u21b5")
        if column + len(piece) > width:
            lines.append([])
            column = 0
        lines[-1].append((piece, kind))
        column += len(piece)
    lines[-1].append((decoder.decode(b"", final=True), "old"))  # half a character at the end
    return lines


def panels(shown, names, tokenizer, is_maze, is_colour):
    """The lines of one frame of all films: mazes side by side, texts one below the other."""
    blocks = []
    for name, (number, frame, before) in zip(names, shown):
        block = [f"{name}, step {number}"]
        if is_maze:
            block += draw_maze(frame).split("\n")
        else:
            colour = {"new": "\033[32m{}\033[0m"} if is_colour else {}
            for line in lines_of(frame, before, tokenizer):
                block.append("".join(colour.get(kind, "{}").format(piece) for piece, kind in line))
            block.append("")
        blocks.append(block)
    if is_maze:
        return ["   ".join(line.ljust(MAZE_WIDTH) for line in row) for row in zip(*blocks)]
    return sum(blocks, [])


def play(films, names, tokenizer, is_maze, pause=0.8):
    """Print films. On a terminal each frame takes the place of the last, if it fits; elsewhere the
    frames stand one below the other."""
    is_terminal = sys.stdout.isatty()
    columns, rows = shutil.get_terminal_size()
    n_lines = 0                                                 # of the frame on the screen
    for shown in frames(films):
        lines = panels(shown, names, tokenizer, is_maze, is_terminal)
        width = len(names) * (MAZE_WIDTH + 3) if is_maze else WIDTH
        fits = len(lines) < rows and width <= columns
        if n_lines:
            time.sleep(pause)
            print(f"\033[{n_lines}A\033[J", end="")             # up, and clear what is below
        n_lines = len(lines) if is_terminal and fits else 0
        print("\n".join(lines), flush=True)
    print()


# -----------------------------------------------------------------------------
# Command line
def parse(words=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", nargs="+", help="checkpoints (the newest student under out/)")
    parser.add_argument("-n", "--n-samples", type=int, default=4, metavar="N",
                        help="number of texts (4)")
    parser.add_argument("--prompt", default="", help="text to begin with; each _ is one token")
    parser.add_argument("--apd", type=float, metavar="R", help="adaptive parallel decoding: the "
                        "student drafts, the teacher verifies; 1 is the student alone")
    parser.add_argument("--exact", dest="apd", action="store_const", const=0.0, help="--apd 0: "
                        "what the teacher alone would write, in fewer calls")
    parser.add_argument("--animate", action="store_true", help="show how each --ckpt fills texts")
    parser.add_argument("--out", help="write the texts to this file, one JSON object a line")
    add_flags(parser, "teacher", "nfe", "tau", "temperature", "top_p", "seed", "device",
              "batch_size", nfe=[8], batch_size=1000, temperature=None)
    return parser.parse_args(words)


def checked_prompt(args, models, tokenizer, cfg):
    """The known tokens (T,) of --prompt; UserError for flags and models that do not go with it."""
    known = prompt_ids(args.prompt, tokenizer, cfg.seq_len)
    is_open = (known == tokenizer.vocab_size).tolist()
    first_gap = is_open.index(True)
    last_known = max((i for i in range(cfg.seq_len) if not is_open[i]), default=0)
    is_verified = args.apd is not None
    is_plain = (args.tau[0], args.top_p, args.temperature or [0]) == (1, 1, [0])
    # how many tokens each model sees at once; a teacher goes token by token
    sizes = [getattr(model, "block_size", 1) for model in models]
    is_drafter = models[0].name != "teacher" and sizes[0] == cfg.seq_len
    cells = zip(*maze_paths()) if cfg.dataset == "maze" else []            # of all paths, by place
    is_lost = any(cell not in (*at_place, tokenizer.vocab_size)
                  for cell, at_place in zip(known.tolist(), cells))
    for is_wrong, message in [
            (is_lost, f"--prompt {args.prompt!r}: no path has these cells there. A path is ten "
             "moves from a1, which is no token, to f6: begin with a2 or b1, and write _ for a gap"),
            (len(models) > 1 and not args.animate,
             "--ckpt: give one checkpoint without --animate; judge.py compares several"),
            (args.animate and (is_verified or args.out),
             "--animate shows how models write: leave --exact, --apd and --out out"),
            (max(map(len, (args.nfe, args.tau, args.temperature or []))) > 1,
             "--nfe, --tau, --temperature: give one number each; judge.py takes several"),
            (is_verified and not 0 <= args.apd <= 1, f"--apd {args.apd}: must lie between 0 and 1"),
            (is_verified and not is_drafter, f"{args.ckpt[0]}: --exact and --apd need a student "
             "that drafts a whole text: no teacher, no blocks"),
            (is_verified and not is_plain, "--exact and --apd read the noise as it is: leave "
             "--tau, --top-p and --temperature out"),
            (any(last_known // size > first_gap // size for size in sizes + [1] * is_verified),
             f"--prompt {args.prompt!r}: what comes after the gap is not seen when text is written "
             "from left to right; end the prompt before the gap")]:
        if is_wrong:
            raise UserError(message)
    return known.to(cfg.device)


def write(args, model, tokenizer, saved, cfg, known):
    """Texts of one model, printed or written to a file."""
    n, path = cfg.n_samples, args.ckpt[0]
    print(f"{path}: {model.name}, step {saved['step']}, {cfg.dataset}")
    if args.apd is not None:
        settings = {"apd": args.apd}
        teacher = teacher_of(path, saved, tokenizer, cfg)
        x = verified(model, teacher, n, cfg.seed, known, args.apd)
    else:
        settings = settings_of(model, cfg)
        x = generate(model, n, len(known), cfg.seed, known, cfg.batch_size, "texts", **settings)
    if args.out:
        with open(args.out, "w") as f:
            for i, row in enumerate(x.tolist()):
                text = dict(index=i, seed=cfg.seed, text=tokenizer.decode(row), ids=row, **settings)
                f.write(json.dumps(text) + "\n")
        print(f"{n} texts written to {args.out}")
        return
    if "apd" in settings and n > 4:  # the numbers above are the answer: keep them in sight
        print(f"the first 4 of {n} texts (--out FILE writes all):\n")
        x = x[:4]
    for row in x:
        print(visible(show(row.cpu(), cfg.dataset, tokenizer)) + "\n")


def main():
    if "--eval" in sys.argv:
        raise UserError("--eval: judge.py does this now, with the same flags: python judge.py")
    args = parse()
    names, models, tokenizer, saved, cfg = load_models(args)
    known = checked_prompt(args, models, tokenizer, cfg)
    if not args.animate:
        write(args, models[0], tokenizer, saved, cfg, known)
        return
    for films in all_films(models, cfg, known):
        play(films, names, tokenizer, cfg.dataset == "maze")


if __name__ == "__main__":
    run_cli(main)
