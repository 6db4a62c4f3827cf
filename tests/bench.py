"""How fast a card trains, and how good its texts are, at V = 50,257.

    python tests/bench.py                                   # seconds a step, share of the peak
    python tests/bench.py --train-files 'lm1b/*'            # and the table "card" of docs/tables.py
    python tests/bench.py --tiny                            # the program itself, on a CPU

The steps are those of gumbel_distill.py at 12 x 768 and LM1B's length, on random texts. The share
of the peak counts 6 N FLOPs a token for the model that is trained and 2 N for a teacher that
labels. N is the number of weights that are multiplied with a token: no table of embeddings.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import gumbel_distill as gd  # noqa: E402
from drafts import DraftStudent  # noqa: E402

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}     # FLOP/s, dense bfloat16
STUDENTS = {**gd.STUDENTS, "gumbel-draft": DraftStudent}
LARGE = dict(n_layer=12, n_head=12, n_embd=768, seq_len=128, batch_size=256)
SMALL = dict(n_layer=2, n_head=2, n_embd=32, seq_len=16, batch_size=4)


class Words:
    """Random texts of a vocabulary of GPT-2's size, or a small one."""
    n_train = 10_000

    def __init__(self, seq_len, vocab_size):
        self.vocab_size, self.bos_id = vocab_size, vocab_size - 1
        self.texts = torch.randint(vocab_size, (self.n_train, seq_len), generator=gd.rng("words"))

    def rows(self, index):
        return self.texts[index]


def n_multiplied(model):
    """The number of weights that are multiplied with each token."""
    if model is None:
        return 0
    tables = ("net.embed.weight", "embed_pos.weight")
    return sum(p.numel() for name, p in model.named_parameters() if name not in tables)


def measure(name, model, data, cfg, n_steps, teacher=None):
    """Train for n_steps steps after three others: a row of the table."""
    is_card = cfg.device == "cuda"
    model.to(cfg.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
    if is_card:
        torch.cuda.reset_peak_memory_stats()
    if cfg.compile:                                             # as gd.train does
        model.net.nll = torch.compile(model.net.nll, dynamic=True)
        for layer in model.net.layers:
            layer.compile()
    times = []
    for step in range(3 + n_steps):
        start = time.perf_counter()
        loss = gd.backward(model, data, cfg, step, teacher)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()                                             # waits for a card
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[3:])
    n_tokens = cfg.batch_size * cfg.seq_len
    labeller = teacher if model.reads_noise else None
    flops = n_tokens * (6 * n_multiplied(model) + 2 * n_multiplied(labeller))
    card = torch.cuda.get_device_name() if is_card else "CPU"
    peak = next((peak for name, peak in PEAK.items() if name in card), None)
    return dict(model=name, seconds=seconds, tokens_s=n_tokens / seconds,
                share=flops / seconds / peak if peak else "", loss=loss.item(),
                GiB=torch.cuda.max_memory_allocated() / 2**30 if is_card else "")


def speed(cfg, vocab_size, n_steps):
    """Print the seconds a step of the teacher and of each student."""
    data = Words(cfg.seq_len, vocab_size)
    torch.manual_seed(0)
    teacher = gd.Teacher(cfg, vocab_size, data.bos_id)
    rows = [measure("teacher", teacher, data, cfg, n_steps)]
    teacher.eval().requires_grad_(False)
    for name, kind in STUDENTS.items():
        rows.append(measure(name, kind(cfg, vocab_size), data, cfg, n_steps, teacher))
    gd.print_table(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each model (20)")
    parser.add_argument("--train-files", help="text for the judged table: a quoted glob")
    parser.add_argument("--val-files", default="", help="those of it to validate on")
    parser.add_argument("-n", type=int, default=200, help="texts of a row of that table (200)")
    parser.add_argument("--max-steps", type=int, help="fewer training steps for that table")
    parser.add_argument("--out-dir", default="out/card", help="of that table (out/card)")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on a CPU")
    args = parser.parse_args()
    if args.tiny:
        cfg = gd.Config(dataset="random", device="cpu", compile=False, **SMALL)
        speed(cfg, 512, n_steps=2)
    elif torch.cuda.is_available():
        print(torch.cuda.get_device_name(), "| torch", torch.__version__)
        torch.backends.cuda.matmul.allow_tf32 = True            # as gd.main does
        speed(gd.Config(dataset="random", **LARGE), 50257, args.steps)
    else:
        sys.exit("no CUDA card here; --tiny tries the program on a CPU")
    if args.train_files:
        call = [sys.executable, ROOT / "docs" / "tables.py", "card", "--jobs", "1", "-n",
                str(args.n), "--train-files", args.train_files, "--val-files", args.val_files,
                "--out-dir", args.out_dir]
        if args.max_steps:
            call += ["--max-steps", str(args.max_steps)]
        subprocess.run(call, check=True)


if __name__ == "__main__":
    main()
