"""Sample from a trained student.

    python sample.py                        # the newest student under out/
    python sample.py --ckpt out/maze/student-gumbel.pt --nfe 3 -n 4
    python sample.py --exact -n 1000        # the teacher's own texts, drafted by the student
"""

import argparse
import glob
import os
from dataclasses import replace

import torch

from gumbel_distill import (Config, UserError, add_flags, compare_exact, default_temperatures,
                            flag, generate, load_checkpoint, load_student, load_teacher, numbers,
                            resolve, run_cli, show, weights_id)

FLAGS = "teacher nfe tau temperature top_p order seed device".split()


def newest_student():
    paths = glob.glob("out/**/student-*.pt", recursive=True)
    if not paths:
        raise UserError("no student under out/: train one with `python gumbel_distill.py`, or name "
                        "one with --ckpt")
    return max(paths, key=os.path.getmtime)


def prompt_ids(prompt, tokenizer, seq_len):
    """The prompt's tokens at the left of an otherwise masked sequence, (T,) long."""
    known = torch.full((seq_len,), tokenizer.vocab_size)
    ids = torch.from_numpy(tokenizer.encode(prompt, "--prompt").astype("int64"))
    if len(ids) > seq_len:
        raise UserError(f"--prompt has {len(ids)} tokens, the model only {seq_len}; shorten it")
    known[:len(ids)] = ids
    return known


def exact(student, teacher, n, seq_len, seed, known):
    """Run exact mode, print what it cost beside serial decoding; returns the texts."""
    x, report = compare_exact(student, teacher, n, seq_len, seed, known)
    _, alone = compare_exact(None, teacher, n, seq_len, seed, known)
    rounds, serial = report["rounds"], (known == teacher.vocab_size).sum().item()
    print(f"exact mode      {rounds:.2f} rounds per text: {rounds:.2f} student + {rounds:.2f} "
          f"teacher calls, {report['seconds']:.2f} s for {n} texts")
    print(f"no student      {alone['rounds']:.2f} rounds per text: {alone['rounds']:.2f} teacher "
          f"calls, {alone['seconds']:.2f} s")
    print(f"serial teacher  {serial} calls per text, {report['serial_seconds']:.2f} s")
    print(f"speed-up        {serial / (2 * rounds):.2f}x in calls of both models, "
          f"{report['serial_seconds'] / report['seconds']:.2f}x in time")
    print(f"equal to serial {round(report['equal'] * n)} of {n} texts ({report['near_ties']} of "
          "them but for a near-tie, which float32 rounds either way)\n")
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", help="student checkpoint (the newest under out/)")
    parser.add_argument("-n", "--n-samples", type=int, default=4, metavar="int", help="texts (4)")
    parser.add_argument("--prompt", default="", help="text to begin with")
    parser.add_argument("--exact", action="store_true", help="the student drafts, the teacher "
                        "verifies: what the teacher alone would write, in fewer calls")
    add_flags(parser, *FLAGS)
    parser.set_defaults(nfe="8")
    args = parser.parse_args()
    path = args.ckpt or newest_student()
    saved = load_checkpoint(path, "student")
    given = {name: getattr(args, name) for name in FLAGS}
    cfg = resolve(replace(Config(**saved["config"]), n_samples=args.n_samples, **given))
    student, tokenizer = load_student(saved, cfg.device)
    known = prompt_ids(args.prompt, tokenizer, cfg.seq_len).to(cfg.device)
    print(f"{path}: {student.name}, step {saved['step']}, {cfg.dataset}")
    if args.exact:
        if (numbers(cfg, "tau"), cfg.top_p, numbers(cfg, "temperature") or [0]) != ([1], 1, [0]):
            raise UserError("--exact goes with --tau 1, --top-p 1 and --temperature 0: it writes "
                            "the teacher's text for the noise as it is; leave these flags out")
        teacher_path = (args.teacher or saved["config"]["teacher"]
                        or os.path.join(os.path.dirname(path), "teacher.pt"))
        teacher = load_teacher(teacher_path, tokenizer, cfg.seq_len, cfg.device)
        if weights_id(teacher) != saved["settings"].get("teacher"):
            print(f"note: {teacher_path} is not this student's teacher: as exact, but slower")
        x = exact(student, teacher, cfg.n_samples, cfg.seq_len, cfg.seed, known)[:4]
    else:
        for name in ("nfe", "tau", "temperature"):
            if len(numbers(cfg, name)) > 1:
                raise UserError(f"{flag(name)} {getattr(cfg, name)}: give one number here")
        x = generate(student, cfg.n_samples, cfg.seq_len, cfg.seed, known, order=cfg.order,
                     nfe=numbers(cfg, "nfe")[0], tau=numbers(cfg, "tau")[0], top_p=cfg.top_p,
                     temperature=default_temperatures(student, cfg)[0])
    for row in x.cpu():
        print(show(row, cfg.dataset, tokenizer) + "\n")


if __name__ == "__main__":
    run_cli(main)
