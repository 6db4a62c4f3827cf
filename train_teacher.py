"""Train only the AR teacher, and save it as teacher.pt in the run's folder.

    python train_teacher.py                                         # the maze
    python train_teacher.py --dataset text --train-files input.txt

gumbel_distill.py with the same settings finds it there, and trains students only.
"""

from config import RANK, Config, Parser, add_flags, run_cli
from data import show, token_entropy
from gumbel_distill import generate, get_teacher, prepare

FIELDS = ("dataset train_files val_files tokenizer max_tokens seq_len n_layer n_head n_embd "
          "dropout batch_size grad_accum max_steps lr warmup schedule ema eval_every n_samples "
          "seed device dtype compile out_dir").split()


def main():
    parser = add_flags(Parser(description=__doc__.splitlines()[0]), *FIELDS)
    cfg, data = prepare(Config(**vars(parser.parse_args())))
    teacher = get_teacher(cfg, data)
    if RANK == 0:
        x = generate(teacher, cfg.n_samples, cfg.seq_len, cfg.seed)
        scores = {**data.judge(x), "entropy": token_entropy(x)}
        print(f"{cfg.n_samples} samples: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        print(show(x[0], cfg.dataset, data.tokenizer))


if __name__ == "__main__":
    run_cli(main)
