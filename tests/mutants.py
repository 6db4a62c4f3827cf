"""Breaks the code in small ways and says which test turns red. Run by hand:

    python tests/mutants.py                 # all of them, some minutes
    python tests/mutants.py posterior exact # those with one of these words in their names
    python tests/mutants.py --suite loss    # with the whole suite in place of the tests named here

A mutant that survives is a law without a test. The exit status is the number of survivors.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = "gumbel_distill.py"
# Tests, file, and for each mutant its name, the exact text and its broken form
MUTANTS = [
    ("gumbel", CORE, [
        ("noise in float32 from torch.rand", "E += 0.5", "E = torch.rand(shape) * 2**31"),
        ("posterior: E0 without p", "E += logp.exp() * E0", "E += E0"),
        ("posterior: winner without -log p", "- logp.gather(-1, winner)", "+ 0 * winner"),
        ("posterior: one E for all losers", "sample_exponential(logp.shape, generator, logp.dtype)",
         "sample_exponential((*x0.shape, 1), generator, logp.dtype) + 0 * logp"),
        ("a key of numpy is another key", "else int(part) for part", "else part for part"),
    ]),
    ("models drafts", CORE, [
        ("posterior: noise of another position", "xi = self.label(logp, target, generator)",
         "xi = self.label(logp, target, generator).roll(1, 0)"),
        ("posterior: logp of a softmax at temperature 2", "self.net.head(h).log_softmax",
         "(self.net.head(h) / 2).log_softmax"),
        ("teacher: BOS left out", "torch.full_like(x0[:, :1], self.bos_id)", "x0[:, :1]"),
        ("teacher: position i reads token i", "x = torch.cat([bos, x0[:, :-1]], dim=1)", "x = x0"),
        ("teacher: logits in bfloat16", "with torch.autocast(h.device.type, enabled=False):",
         "with torch.no_grad():"),
        ("teacher: the student's loss trains it", "with torch.no_grad():\n                # 2.",
         "if True:\n                # 2."),
        ("serial: noise shifted by one", "(logp + xi[:, i])", "(logp + xi[:, i - 1])"),
        ("serial: a cache at wrong positions", "torch.tensor([i],", "torch.tensor([0],"),
        ("student: noise at unmasked positions, too", "return x.masked_scatter(",
         "return self.read(xi).mean(0) + x.masked_scatter("),
        ("student: [MASK] as an output", "nn.Linear(cfg.n_embd, vocab_size,",
         "nn.Linear(cfg.n_embd, vocab_size + 1,"),
        ("student: softmax of the wrong axis", "xi.softmax(dim=-1)", "xi.softmax(dim=0)"),
        ("student: causal", "net or Transformer(cfg, vocab_size, causal=False)",
         "net or Transformer(cfg, vocab_size, causal=True)"),
        ("loss: no 1/t", " / t[is_masked])", ")"),
        ("loss: 1/t of the batch mean", " / t[is_masked])", " / t.mean())"),
        ("loss: mean over masked in place of all", "/ x0.numel()", "/ len(target)"),
        ("loss: t in [0, 1)", "return t_min + (1 - t_min) *", "return (1 - t_min) *"),
    ]),
    ("training", CORE, [
        ("loss: t shared by a batch", "stratified_times(torch.rand(n, 1, generator=g), cfg.t_min)",
         "torch.rand(1, 1, generator=g).expand(n, 1)"),
        ("training: EMA of step 0", "(1 + step) / (10 + step)", "1 / 10"),
        ("training: learning rate off by one after a resume", "math.pi * step / n_steps",
         "math.pi * (step + (bar.initial > 0)) / n_steps"),
        ("training: pieces weighted twice", "teacher) / cfg.grad_accum", "teacher) * 2"),
        ("training: dropout of another generator", "torch.manual_seed(g.initial_seed())", "pass"),
        ("training: validation rows from training", "mean_loss(ema, data.val[",
         "mean_loss(ema, data.rows(torch.arange(13))["),
        ("training: gradients are not added up", "dist.all_reduce(tensor)", "pass"),
        ("training: each process reads its own checkpoint", "dist.broadcast_object_list(saved)",
         "pass"),
        ("training: gradients as they are", "clip_grad_norm_(model.parameters(), 1.0)",
         "clip_grad_norm_(model.parameters(), 1e9)"),
        ("checkpoint: written in place", 'path + ".tmp"', "path"),
        ("checkpoint: code is run", "weights_only=True)]", "weights_only=False)]"),
        ("checkpoint: other settings go on", "if there != about[name]:", "if False:"),
        ("two runs write in one folder", "lock.acquire(timeout=0)", "pass"),
    ]),
    ("sampling", CORE, [
        ("tau on logp", "tau * xi, u", "xi / tau, u"),
        ("student: noise in the order of columns", "logits = student(xt, xi[is_masked])",
         "logits = student(xt, xi.transpose(0, 1)[is_masked.T])"),
        ("sampling: noise anew in each step", "logits = student(xt, xi[is_masked])",
         "logits = student(xt, torch.randn_like(xi)[is_masked])"),
        ("sampling: u of one token for all", "u[:, 1][is_masked]",
         "u[:, 1, :1].expand(xt.shape)[is_masked]"),
        ("sampling: each step fills one token", "is_filled = is_masked & (fill_step == k)",
         "is_filled = is_masked & (is_masked.cumsum(1) == 1)"),
        ("sampling: known tokens redrawn", "for k in range(1, steps + 1):",
         "xt = torch.full_like(xt, student.mask_id)\n    for k in range(1, steps + 1):"),
        ("sampling: inverse CDF off by one", "return (cdf <= point).sum(dim=-1)",
         "return ((cdf <= point).sum(dim=-1) - 1).clamp(min=0)"),
        ("sampling: the steps are not of equal time", "(steps * (1 - u)).ceil()",
         "(steps * (1 - u)**2).ceil()"),
        ("sampling: a text depends on its batch", '"sequence", i,', '"sequence", len(index),'),
    ]),
    ("sample", "sample.py", [
        ("sampling: nucleus without its last token", "before > top_p",
         "likeliest.cumsum(dim=-1) > top_p")]),
    ("blocks", "blocks.py", [
        ("blocks: a block sees its own clean tokens", "(block[:, None] > block) &",
         "(block[:, None] >= block) &"),
        ("blocks: a block sees a later block", "(block[:, None] > block) &",
         "(block[:, None] != block) &"),
        ("blocks: steps shared unequally", "max(1, nfe * L // T)",
         "max(1, nfe * L // T + (self.start == 0))"),
        ("blocks: one time for all blocks", "t.roll(-(block * B // n_blocks), dims=0)", "t"),
        ("blocks: the cache keeps unfinished blocks", "KVCache(self) ", "self ")]),
    ("blocks", "shifted.py", [
        ("shifted: a draft at its own position", "drafts.roll(1, dims=1)", "drafts"),
        ("shifted: a draft beside the known token", "index_fill(1, starts.to(xt.device), False)",
         "clone()"),
        ("shifted: the output without the noise", "(super().forward(xt, xi) + xi)",
         "super().forward(xt, xi)"),
        ("shifted: a masked token before a block", "before[:, of_xt] =", "unused =")]),
    ("judge", "judge.py", [
        ("probe: one draw in place of the average", "for _ in range(n_fresh):",
         "for _ in range(1):"),
        ("probe: fresh noise at the guessed token, too",
         "alone = torch.where(is_guessed[:, None], true, fresh)", "alone = fresh")]),
    ("drafts", "drafts.py", [
        ("drafts: without the noise", "self.head.weight.detach()) + self.xi",
         "self.head.weight.detach())"),
        ("drafts: at unmasked positions, too", "masked_scatter(is_masked, draft",
         "masked_scatter(is_masked, draft[:1].expand(draft.shape)")]),
    ("maze", CORE, [
        ("data: total variation without the outside", "+ 1 - valid", "+ 0 * valid")]),
    ("data", "data.py", [
        ("data: validation text trained on", " if identity not in held_out]", "]"),
        ("data: validation rows from training", "train, val = tokens[:start], tokens[start:]",
         "train, val = tokens[:start], tokens[:len(tokens) - start]"),
        ("data: LM1B's \"n't\" torn", "(?:t|s|re|ve", "(?:s|re|ve")]),
    ("exact", "exact.py", [
        ("exact: prefix one too long", "n_keep = (n_agree + 1)", "n_keep = (n_agree + 2)")]),
]


def copied(folder):
    """A copy of the working tree, without what is ignored."""
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout.splitlines()
    for name in files:
        if (ROOT / name).exists():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(folder) / name)


def first_red(folder, tests):
    """The first test that fails in a folder with its error, or None."""
    files = [f"tests/test_{name}.py" for name in tests.split()]
    call = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n0", *files]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return None
    red = re.search(r"^(?:FAILED|ERROR) tests/(.*)", done.stdout, re.M)
    return red[1] if red else done.stdout[-300:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--suite", action="store_true", help="the whole suite for each")
    args = parser.parse_args()
    n = n_alive = 0
    with tempfile.TemporaryDirectory() as folder:
        copied(folder)
        for tests, file, mutants in MUTANTS:
            path = Path(folder) / file
            whole = path.read_text(encoding="utf-8")
            chosen = [mutant for mutant in mutants
                      if not args.words or any(word in mutant[0] for word in args.words)]
            assert not chosen or args.suite or not first_red(folder, tests), f"red: {tests}"
            for name, old, new in chosen:
                assert old in whole, f"{file} has no {old!r}"
                path.write_text(whole.replace(old, new), encoding="utf-8")
                red = first_red(folder, "" if args.suite else tests)
                n, n_alive = n + 1, n_alive + (red is None)
                print(f"{name:52} {red or 'SURVIVES'}", flush=True)
            path.write_text(whole, encoding="utf-8")
    print(f"{n - n_alive} of {n} turn a test red")
    sys.exit(n_alive)


if __name__ == "__main__":
    main()
