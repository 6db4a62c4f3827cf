"""Worked solutions of 06_other_couplings.ipynb. The tests run them there."""

# Exercise 6.1. If u lies between the two places of no border, it lies on the same side of each
# border for both models, so in the same interval. It lies between the places of border k with
# probability |F_p(k) - F_q(k)|, and between those of any border at most with the sum. On the
# flat pair the sum is 0.01 V. It is exact while no other border lies between a border's two places:
# up to V = 40 in the table. With one border, V = 2, it is 1 - TV.
answer = lambda p, q: 1 - (p.cumsum(dim=-1) - q.cumsum(dim=-1)).abs().sum(dim=-1)

# Exercise 6.2. 1 - u is as uniform as u. So the student's texts have the same distribution, and
# with it the same validity and spread. But the teacher at u picks another token than at 1 - u.
answer = {"valid", "tv"}

# Exercise 6.3. For token 0 the ratios p_j / p_0 are 1, 0.6, 0.4, and q_j / q_0 are 1, 1.5, 2.5. The
# larger ones add up to 5, so both draw token 0 in 0.2 of the draws. Token 2 has 0.2 as well, by
# symmetry, and token 1 has 1 / (5/3 + 1 + 5/3) = 0.23.
answer = 0.2 + 0.2 + 3 / 13
