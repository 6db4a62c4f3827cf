"""Worked solutions of 02_why_parallel_decoding_breaks.ipynb. The tests run them there."""

# Exercise 2.1. ABAB needs A at the positions 1 and 3, and no A at 2 and 4: a^2 a^2. BABA needs the
# contrary: (1 - a)^2 (1 - a)^2. The sum is smallest at a = 1/2, with 1/8. At a = 1 every text is
# right, but every text is ABAB.
answer = (lambda a: a**4 + (1 - a)**4, 0.5)

# Exercise 2.2. true_p[i, c] is the share of paths with cell c at position i. The product along a
# path is the probability of this path under independent draws. The paths exclude each other, so
# their probabilities add up. What a trained student writes in one call is about as often valid, as
# long as it draws each move from its true distribution. More training does not change this.
answer = true_p[torch.arange(10), paths].prod(dim=-1).sum().item()

# Exercise 2.3. The share of that path is 1 instead of 1/51. The other 50 shares are 0 instead of
# 1/51. Half of (50/51 + 50 * 1/51) is 50/51.
answer = 1 - 1 / 51
