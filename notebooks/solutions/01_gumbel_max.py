"""Worked solutions of 01_gumbel_max.ipynb. The tests run them in the notebook."""

# Exercise 1. Probabilities proportional to p^2 have the log-probabilities 2 log p, up to a
# constant. A constant moves no argmax. The noise stays as it is: doubled noise would undo the
# change, because argmax(2 logp + 2 xi) = argmax(logp + xi).
answer_1 = lambda logp, xi: (2 * logp + xi).argmax(dim=-1)

# Exercise 2. The maximum of log p_k + xi_k is a Gumbel variable again. Its location is the
# logarithm of the sum of all p_k, which is 0. The mean of a standard Gumbel variable is Euler's
# constant, 0.577.
answer_2 = (logp + xi).amax(dim=-1).mean().item()

# Exercise 3. None. The bound that a loser's noise must keep is different for each token: a likely
# token needs smaller noise to lose. Shuffled noise can put a likely loser above the winner. So the
# argmax breaks, and with it the inequality, and the distribution is wrong as well.
answer_3 = set()
