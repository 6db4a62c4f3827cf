"""Worked solutions of 06_other_couplings.ipynb. The tests run them there."""

# Exercise 6.1. Under q token 0 gives 0.1 to token 2. Put these two beside each other. Then only the
# border between them moves, by 0.1, and nothing else is lost. Token 1 stands at one end.
answer = [0, 2, 1]

# Exercise 6.2. 1 - u is as uniform as u. So the student's texts have the same distribution, and
# with it the same validity and spread. But the teacher at u picks another token than at 1 - u.
answer = {"valid", "tv"}

# Exercise 6.3. The formula as a table of ratios: row k holds max(p_j / p_k, q_j / q_k) for all j.
answer = lambda p, q: (1 / torch.maximum(p[None, :] / p[:, None],
                                           q[None, :] / q[:, None]).sum(dim=1)).sum()
