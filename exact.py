"""Exact mode: the teacher's own texts in fewer calls, because a student drafts them. And adaptive
parallel decoding (APD, Israel et al. 2025), which verifies the drafts less strictly.

    python exact.py --ckpt out/maze/gumbel.pt -n 1000
    python exact.py --ckpt out/maze/gumbel.pt -n 1000 --ratio 0.5

The noise decides the teacher's text. The student sees the noise, so it can guess what the teacher
will write, and the teacher verifies many tokens in one call.
"""

import argparse
import os
import time

import torch

import gumbel_distill as gd
from blocks import BlockStudent
from sample import load_models, note, show


@torch.no_grad()
def draft_and_verify(student, teacher, xi, xt=None, ratio=0.0, on_round=None):
    """Each round the student drafts the rest of the text, and one pass of the teacher verifies it.
    Tokens are kept as far as draft and answer agree, and one more: the answer itself. The teacher
    has read only kept tokens before it. So the text is that of serial_extraction, up to rounding.
    Without a student the teacher's last answer is the next draft (predictive sampling, Wiggers &
    Hoogeboom 2020). With ratio R above 0, APD, the answer is argmax(R student + (1 - R) teacher).
    Args:    xi (B, T, V) Gumbel noise;  xt (B, T) known tokens, at the left only, V elsewhere
             on_round: called after each round with the numbers (b,) of the texts that were open,
             draft and answer (b, T), and n_keep (b,), how many tokens of the answer stand now
    Returns: x0 (B, T) long;  rounds (B,) long, each one student and one teacher call"""
    B, T, V = xi.shape
    x = torch.full((B, T), V, device=xi.device) if xt is None else xt.clone()
    if student is None:  # the first draft is the teacher's argmax text
        if ratio > 0:
            raise ValueError(f"ratio {ratio}: without a student there is nothing to mix with")
        guess = gd.serial_extraction(teacher, torch.full_like(x, V), torch.zeros_like(xi))
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
        target = teacher.logp(teacher.hidden(draft)) + xi[live]            # (b, T, V)
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
    tokens lie within 1e-4, which float32 rounds either way; seconds and serial_seconds"""
    texts, sums = [], dict(rounds=0, equal=0, near_ties=0, seconds=0, serial_seconds=0)
    if known is None:
        known = torch.full((seq_len,), teacher.vocab_size)
    limit = 1 + 2**26 // (seq_len * teacher.vocab_size)         # 256 MiB of noise, as in generate
    for index in torch.arange(n).split(min(1000, limit)):
        xi, _ = gd.sequence_noise(seed, index, seq_len, teacher)
        xt = known.to(xi.device).expand(len(index), seq_len)
        start = time.perf_counter()
        x, rounds = draft_and_verify(student, teacher, xi, xt, ratio)
        sums["rounds"] += rounds.sum().item() / n               # .item() waits for a GPU
        sums["seconds"] += time.perf_counter() - start
        start = time.perf_counter()
        serial = gd.serial_extraction(teacher, xt, xi)
        differs = (x != serial).cpu()                           # (B, T); waits for a GPU
        sums["serial_seconds"] += time.perf_counter() - start
        scores = teacher.logp(teacher.hidden(serial)) + xi      # (B, T, V)
        gap = -scores.topk(2, dim=-1).values.diff()[..., 0].cpu()          # (B, T)
        first = differs.long().argmax(dim=1, keepdim=True)      # where a text begins to differ
        is_equal = ~differs.any(dim=1)                          # (B,)
        is_tie = ~is_equal & (gap.gather(1, first)[:, 0] < 1e-4)
        sums["near_ties"] += is_tie.sum().item()
        sums["equal"] += (is_equal | is_tie).sum().item() / n
        texts.append(x)
    return torch.cat(texts), sums


def main(words=None):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", required=True, help="a student of whole texts; teacher.pt stands beside it")
    add("-n", type=int, default=1000, help="number of texts (1000)")
    add("--ratio", type=float, default=0.0, help="R of APD, 0 to 1; 1 is the student alone (0)")
    add("--seed", type=int, default=0, help="seed of all draws (0)")
    add("--device", default=gd.Config.device, choices={"cpu", gd.Config.device})
    args = parser.parse_args(words)
    if args.n < 1 or not 0 <= args.ratio <= 1:
        raise gd.UserError(f"-n {args.n}, --ratio {args.ratio}: give 1 or more, and 0 to 1")
    beside = os.path.join(os.path.dirname(args.ckpt), "teacher.pt")
    loaded = load_models([args.ckpt, beside], args.device)
    student, tokenizer, saved = loaded[args.ckpt]
    teacher, T = loaded[beside][0], saved["config"]["seq_len"]
    if isinstance(student, (gd.Teacher, BlockStudent)):
        raise gd.UserError(f"{args.ckpt}: it must draft a whole text: no teacher, no blocks")
    if gd.fingerprint(teacher) != saved["about"]["teacher"]:
        note(f"{beside} is not the teacher that {args.ckpt} learned from")
    x, said = compare_exact(student, teacher, args.n, T, args.seed, ratio=args.ratio)
    _, alone = compare_exact(None, teacher, args.n, T, args.seed)
    print(f"calls per text: {2 * said['rounds']:.2f} with {args.ckpt} and teacher; "
          f"{alone['rounds']:.2f} with the teacher's last answer as draft; {T} one by one")
    print("equal to serial: {equal:.1%}, {near_ties} texts of them but for a near-tie; in "
          "{seconds:.2f} s (serial: {serial_seconds:.2f} s)\n".format(**said))
    print(show(x[:4].cpu(), tokenizer, saved["config"]["dataset"]))


if __name__ == "__main__":
    main()
