"""The maze, and what noise is for.   python -m pytest tests/test_maze.py"""

import itertools

import pytest
import torch

import gumbel_distill as gd
from conftest import STUDENTS, tiny_config


@pytest.mark.quick
def test_the_paths_are_all_shortest_walks_through_open_walls():
    """Counted once more, cell by cell: so many walks reach it from the left and from above."""
    walks = torch.zeros(7, 7).long()
    walks[1, 1] = 1
    for row, col in itertools.product(range(6), repeat=2):
        walks[row + 1, col + 2:col + 3] += walks[row + 1, col + 1] * (gd.MAZE[row][col] in ">+")
        walks[row + 2:row + 3, col + 1] += walks[row + 1, col + 1] * (gd.MAZE[row][col] in "v+")
    paths = gd.Maze().paths.tolist()
    assert len(paths) == len(set(map(tuple, paths))) == walks[6, 6] == 51
    for path in paths:
        for here, there in zip([0] + path, path):
            assert gd.MAZE[here // 6][here % 6] in {1: ">+", 6: "v+"}[there - here]


@pytest.mark.quick
def test_the_judge_measures_the_distance_to_the_uniform_distribution_on_the_paths():
    maze = gd.Maze()
    paths, wrong = maze.paths, torch.zeros(51, 10).long()
    for x, valid, distinct, tv in ((paths, 1, 51, 0), (paths[:1], 1, 1, 50 / 51), (wrong, 0, 0, 1),
                                   (torch.cat([paths, wrong]), 0.5, 51, 0.5),
                                   (torch.cat([paths, paths[:17]]), 1, 51, 17 / 68 * 34 / 51)):
        judged = maze.judge(x)
        assert judged["valid"] == pytest.approx(valid) and judged["distinct"] == distinct
        assert judged["tv"] == pytest.approx(tv)


class Pairs:
    """Texts of four tokens: half 0000, a third 1111, a sixth 2222. The first token decides."""
    vocab_size = bos_id = 3
    pretrained, tokenizer, fingerprint, n_train = None, {}, "pairs", 6
    val = torch.tensor([0, 0, 0, 1, 1, 2])[:, None].repeat(1, 4)

    def rows(self, index):
        return self.val[index]


def test_noise_carries_the_joint_that_independent_draws_lose(tmp_path):
    """In one step. The student that reads noise has the right shares, too, and writes what the
    teacher writes from the same noise."""
    data = Pairs()
    cfg = tiny_config(seq_len=4, n_embd=32, n_layer=1, batch_size=32, eval_every=120, lr=1e-2,
                      warmup=20, ema=0.98, out_dir=str(tmp_path))
    torch.manual_seed(0)
    teacher = gd.train("teacher", gd.Teacher(cfg, 3, 3), data, cfg, 120)
    truth = gd.generate(teacher, 1000, 4)
    valid, agree = {}, {}
    for name in STUDENTS:
        student = gd.train(name, STUDENTS[name](cfg, 3), data, cfg, 120, teacher)
        x = gd.generate(student, 1000, 4)
        is_whole = (x == x[:, :1]).all(dim=1)
        valid[name], agree[name] = is_whole.double().mean(), (x == truth).double().mean()
        if name != "mdlm":
            share = x[is_whole, 0].bincount(minlength=3) / is_whole.sum()
            assert (share - torch.tensor([1 / 2, 1 / 3, 1 / 6])).abs().max() < 0.08
    assert valid["mdlm"] < 0.3 and agree["mdlm"] < 0.6
    for name in ("gumbel", "gumbel-draft"):
        assert valid[name] > 0.7 and agree[name] > 0.8
