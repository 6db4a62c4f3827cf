"""Train only the AR teacher, and save it as teacher.pt in the run's folder.

    python train_teacher.py                                         # the maze
    python train_teacher.py --dataset text --train-files input.txt

gumbel_distill.py with the same --dataset (or --out-dir) finds it there, and trains students only.
"""

import argparse

from gumbel_distill import (Config, add_flags, generate, prepare, run_cli, show, token_entropy,
                            train_teacher, validation_loss)

FLAGS = ("dataset train_files val_files tokenizer seq_len max_tokens n_layer n_head n_embd dropout "
         "batch_size grad_accum max_steps teacher_steps lr warmup schedule ema eval_every "
         "n_samples seed device dtype compile resume out_dir").split()


def main():
    parser = add_flags(argparse.ArgumentParser(description=__doc__.splitlines()[0]), *FLAGS)
    cfg, data = prepare(Config(**vars(parser.parse_args())))
    teacher = train_teacher(cfg, data)
    x = generate(teacher, cfg.n_samples, cfg.seq_len, cfg.seed)
    scores = {"val_loss": validation_loss(teacher, None, data, cfg), **data.judge(x),
              "entropy": token_entropy(x)}
    print(f"{cfg.n_samples} samples: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
    print(show(x[0], cfg.dataset, data.tokenizer))


if __name__ == "__main__":
    run_cli(main)
