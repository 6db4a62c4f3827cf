"""Worked solutions of 01_gumbel_max.ipynb. The tests run them there."""

# Exercise 1.1. Probabilities proportional to p^2 have the log-probabilities 2 log p, up to a
# constant. A constant moves no argmax. The noise stays as it is: doubled noise would undo the
# change, because argmax(2 logp + 2 xi) = argmax(logp + xi).
answer = lambda logp, xi: (2 * logp + xi).argmax(dim=-1)

# Exercise 1.2. The maximum of log p_k + xi_k is a Gumbel variable again. Its location is the
# logarithm of the sum of all p_k, which is 0. The mean of a standard Gumbel variable is Euler's
# constant, 0.577.
answer = (logp + xi).amax(dim=-1).mean().item()

# Exercise 1.3. None. The bound that a loser's noise must keep is different for each token: a likely
# token needs smaller noise to lose. Shuffled noise can put a likely loser above the winner. So the
# argmax breaks, and the distribution is wrong as well.
answer = set()

# Exercise 1.4. k1 wins in the first row: log p[k1] + one[k1] > log p[k2] + one[k2]. k2 wins in the
# second: log p[k2] + two[k2] > log p[k1] + two[k1]. Added up, the log p cancel. Only the argmax was
# used. So the inequality holds for every construction that picks the given tokens, for A, too: it
# proves that the tokens are right, and nothing about the distribution.
answer = lambda one, two, k1, k2: one[:, k1] + two[:, k2] > one[:, k2] + two[:, k1]
print("holds for the noise of A:", answer(lifted(g, x=0), lifted(g, x=3), 0, 3).all().item())
