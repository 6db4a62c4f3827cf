"""Data sets and tokenizers.   python -m pytest tests/test_data.py"""

import collections

import numpy as np
import pytest
import torch

import data
import gumbel_distill as gd


def load(**given):
    return data.load_data(gd.resolve(gd.Config(**given)))


def test_maze_paths_are_all_the_shortest_paths():
    """Against a breadth-first search over the drawing."""
    size, queue = data.MAZE_SIZE, collections.deque([(0, ())])
    found = []
    while queue:
        cell, path = queue.popleft()
        if cell == size**2 - 1:
            if not found or len(path) == len(found[0]):
                found.append(path)
            continue
        if len(path) >= 10:
            continue
        row, col = divmod(cell, size)
        for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            if data.MAZE[2 * row + 1 + down][4 * col + 2 + 2 * right] == " ":
                after = cell + size * down + right
                queue.append((after, path + (after,)))
    assert 50 <= len(found) <= 60
    assert sorted(found) == sorted(map(tuple, data.maze_paths()))


def test_maze_judge_tells_valid_from_invalid_and_measures_spread():
    maze = load()
    assert maze.judge(torch.tensor(data.maze_paths()))["tv"] == pytest.approx(0)
    uniform = maze.judge(maze.rows(np.arange(4000)))
    assert uniform["valid"] == 1 and uniform["distinct"] == 51
    assert uniform["tv"] == pytest.approx(uniform["tv_exact_sampler"], abs=0.015)
    assert uniform["tv_exact_sampler"] == pytest.approx(0.05, abs=0.01)
    one = maze.rows([0] * 100)
    scores = maze.judge(one)
    assert (scores["valid"], scores["distinct"]) == (1, 1)
    assert scores["tv"] == pytest.approx(1 - 1 / 51)
    one[:, 4] = 0
    assert maze.judge(one)["valid"] == 0 and maze.judge(one)["tv"] == 1


def cells_of(drawn):
    """The lines of a drawing without the numbers and letters beside it, and its last line."""
    lines = drawn.split("\n")
    return [line[2:] for line in lines[1:-1]], lines[-1].strip()


def test_maze_drawing_marks_the_path_and_says_that_it_is_valid():
    path = data.maze_paths()[0]
    lines, verdict = cells_of(data.draw_maze(path))
    cells = [divmod(cell, data.MAZE_SIZE) for cell in [0, *path]]
    assert all(lines[2 * row + 1][4 * col + 2] == "o" for row, col in cells)
    assert "\n".join(lines).count("o") == 11 and verdict == "valid"
    assert "\n".join(lines).replace("o", " ") == "\n".join(data.MAZE)


@pytest.mark.parametrize("place", [0, 4, 9])
def test_the_first_move_that_no_path_makes_is_named_and_marked(place):
    path = list(data.maze_paths()[0])
    path[place] = 30 if path[place] != 30 else 31               # far from its neighbours
    assert data.broken_move(path) == place + 1
    lines, verdict = cells_of(data.draw_maze(path))
    row, col = divmod(path[place], data.MAZE_SIZE)
    assert lines[2 * row + 1][4 * col + 2] == "x" and verdict == f"broken at move {place + 1}"


def test_every_shortest_path_is_whole_and_masked_cells_are_not_judged():
    for path in data.maze_paths():
        assert data.broken_move(path) is None
        masked = [*path[:3], data.MAZE_SIZE**2, *path[4:]]
        assert data.broken_move(masked) is None
        assert cells_of(data.draw_maze(masked))[1] == "open"


def test_a_whole_path_is_shown_as_a_drawing_and_other_text_without_what_fills_it_up():
    maze, cities = load(), load(dataset="cities")
    path = maze.rows([0])[0]
    assert data.show(path, "maze", maze.tokenizer) == data.draw_maze(path)
    assert data.show(path[:3], "maze", maze.tokenizer) == maze.tokenizer.decode(path[:3])
    shown = data.show(cities.rows([0])[0], "cities", cities.tokenizer)
    assert cities.tokenizer.decode(cities.rows([0])[0]).startswith(shown + " " + data.END)
    assert data.END not in shown


def test_every_sentence_of_the_grammar_parses_and_broken_ones_do_not():
    cities = load(dataset="cities")
    scores = cities.judge(cities.rows(np.arange(1000)))
    assert scores["valid"] == 1 and scores["wrong_names"] == 0 and scores["distinct"] > 990
    assert scores["tv"] == pytest.approx(scores["tv_exact_sampler"], abs=0.02)
    assert 100 <= cities.tokenizer.vocab_size <= 200
    whole = "the pilots fly from San Diego to New York on Monday the 7th with Ben and two lamps"
    other = "Anna flies from San Diego to New York on Monday the 7th and Ida follows Anna"
    for text in (whole, other, whole.replace("San Diego", "San Angeles"),
                 whole.replace("lamps", "lamp"), whole.replace("fly", "flies"),
                 whole.replace("7th", "8th"), whole.replace(" from", ""),
                 other.replace("follows Anna", "follows Ben")):
        ids = cities.tokenizer.encode(text + f" {data.END}" * (19 - len(text.split())))
        scores = cities.judge(torch.tensor(ids.astype(int))[None])
        assert scores["valid"] == (text in (whole, other)), text
        assert scores["wrong_names"] == (0.5 if "San Angeles" in text else 0)


def test_training_sequences_are_read_at_their_stride_and_validation_without_overlap():
    letters = gd.Tokenizer(list("abcdefg"))
    tokens = np.arange(20, dtype=np.uint16) % 7
    running = gd.Data(tokens, tokens[:11], 4, letters)
    apart = gd.Data(tokens, tokens[:11], 4, letters, stride=4)
    assert (running.n_train, apart.n_train) == (17, 5)
    assert running.rows([0, 16]).tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert apart.rows([1, 4]).tolist() == [[4, 5, 6, 0], [2, 3, 4, 5]]
    assert running.val_rows(9).tolist() == [[0, 1, 2, 3], [4, 5, 6, 0]]
    assert running.val_rows(1).tolist() == [[0, 1, 2, 3]]


def test_the_fingerprint_tells_other_data_from_this():
    letters, others = gd.Tokenizer(list("abcdefg")), gd.Tokenizer(list("abcdefh"))
    tokens = np.arange(20, dtype=np.uint16) % 7
    changed = tokens.copy()
    changed[3] += 1

    def fingerprint(train, tokenizer):
        return gd.Data(train, tokens, 4, tokenizer).fingerprint
    assert fingerprint(tokens, letters) == fingerprint(tokens.copy(), letters)
    kinds = [(tokens, letters), (tokens, others), (tokens[:-1], letters), (changed, letters)]
    assert len({fingerprint(*kind) for kind in kinds}) == 4


def test_text_is_split_encoded_and_decoded(tmp_path):
    (tmp_path / "a.txt").write_text("hello world, grüße!\n" * 50, encoding="utf-8")
    given = dict(dataset="text", train_files=str(tmp_path / "*.txt"), seq_len=8)
    text = load(**given)
    assert len(text.train) == 901 and len(text.val) == 100      # a line end closes the file
    assert text.tokenizer.decode(text.rows([4])[0]) == "o world,"
    assert text.val_rows(1000).shape == (12, 8)
    limited = load(**given, max_tokens=100)
    assert len(limited.train) == 100 and limited.fingerprint != text.fingerprint


def test_tiny_shakespeare_by_character_and_by_bpe(real_data):
    path = str(real_data / "tinyshakespeare.txt")
    letters = load(dataset="text", train_files=path)
    assert letters.tokenizer.vocab_size == 65
    assert len(letters.train) + len(letters.val) == 1_115_394 + 1       # a line end closes the file
    bpe = load(dataset="text", train_files=path, tokenizer="gpt2")
    assert (bpe.tokenizer.vocab_size, bpe.tokenizer.bos_id) == (50257, 50256)
    assert bpe.tokenizer.encode("Hello world").tolist() == [15496, 995]
    text = bpe.tokenizer.decode(bpe.rows([0])[0])
    assert text.startswith("First Citizen:\nBefore we proceed")


def test_independent_draws_of_all_positions_are_far_from_the_paths():
    """In closed form, against draws; and where the positions are independent it is 0."""
    paths = np.array(data.maze_paths())
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.choice(column, 400_000) for column in paths.T], axis=1)
    number = {tuple(path): i for i, path in enumerate(paths.tolist())}
    hits = [number[path] for path in map(tuple, drawn.tolist()) if path in number]
    counts = np.bincount(hits, minlength=len(paths))
    tv = data.total_variation(counts, len(drawn) - len(hits))
    assert data.tv_independent(paths) == pytest.approx(tv, abs=2e-3)
    assert data.tv_independent(np.array([[0, 2], [0, 3], [1, 2], [1, 3]])) == pytest.approx(0)
    assert data.tv_independent(np.array([[0, 2], [1, 3]])) == pytest.approx(0.5)
