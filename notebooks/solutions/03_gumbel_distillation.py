"""Worked solutions of 03_gumbel_distillation.ipynb. The tests run them there."""

# Exercise 3.1. Theorem 4.1 draws xi given the text, so xi tells the student about the text. A bound
# on -log p(text) must not use anything that was made from the masked tokens. xt has none of them,
# and t is drawn before.
answer = "xi"

# Exercise 3.2. The M logits belong to the masked tokens, row by row. So must the targets and the
# times. The sum is divided by all B T tokens, not by M: 1/t makes up for the tokens left out.
def answer(logits, x0, xt, t):
    is_masked = xt == gd.Maze.vocab_size                        # (B, T) bool
    nll = F.cross_entropy(logits, x0[is_masked], reduction="none")         # (M,)
    return (nll / t.expand_as(x0)[is_masked]).sum() / x0.numel()

# Exercise 3.3. At tau = 0 all noise is 0. Then all texts are the same text.
answer = lambda tau: len(gd.generate(ours, 1000, 10, nfe=1, tau=tau).unique(dim=0))

# Exercise 3.4. A round with a student costs 1 + c, and takes rounds.mean() of them. Without one a
# round costs 1. The costs are equal at (1 + c) rounds = alone.
answer = (alone.double().mean() / rounds.double().mean()).item() - 1
