"""judge.py: what its scores are worth, and the probe.   python -m pytest tests/test_judge.py"""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import gumbel_distill as gd
import judge
from conftest import ROOT, T, V, sharpened, tiny_config
from sample import MODELS, load_model

MAZE = ROOT / "notebooks/models/maze"


class Reader:
    """A causal model of transformers that reads 16 tokens, and its tokenizer of letters."""
    config, device = SimpleNamespace(max_position_embeddings=16), "cpu"
    eos_token, eos_token_id = "$", 36

    def __call__(self, ids, output_hidden_states=False):
        assert ids.size(1) <= 16
        h = torch.randn(37, 37, generator=gd.rng("reader"))[ids].cumsum(dim=1)
        return SimpleNamespace(logits=h, hidden_states=[None, h])

    def encode(self, text):
        return [ord(letter) % 36 if letter != "$" else 36 for letter in text]


def test_long_text_is_read_in_windows_each_token_once_without_the_first_and_ends_of_text():
    reader, texts = Reader(), ["to be, or not to be<|endoftext|>that is the question", "abc", "a"]
    words = SimpleNamespace(decode=texts.__getitem__)
    nll, counts, features = judge.hf_read(reader, reader, words, torch.arange(3))
    ids = torch.tensor(reader.encode(texts[0].replace("<|endoftext|>", "$")))
    expected = []
    for i in range(1, len(ids)):
        start = max(0, -(-(i - 15) // 8) * 8)                   # of the first window with token i
        logits = reader(ids[None, start:i]).logits[0, -1]
        expected.append(F.cross_entropy(logits, ids[i]).item() * (ids[i] != 36).item())
    assert counts.tolist() == [len(ids) - 2, 2, 0]
    assert nll[0] == pytest.approx(sum(expected), rel=1e-5) and nll[2] == 0
    assert np.allclose(features[1], reader(torch.tensor([reader.encode("abc")])).logits[0, -1])


@pytest.mark.parametrize("bos_id", [V, 3])                      # 7 stands in no text, 3 in some
def test_our_model_scores_all_but_the_first_token_and_ends_of_text(teacher, bos_id):
    x = torch.randint(V, (40, T), generator=gd.rng(1))
    teacher.bos_id = bos_id
    logp = teacher.logp(teacher.hidden(x)).gather(-1, x[..., None])[:, 1:, 0]
    is_scored = x[:, 1:] != bos_id
    nll, counts, features = judge.own_read(teacher, x)
    assert np.allclose(nll, -(logp * is_scored).sum(dim=1).detach())
    assert (counts == is_scored.sum(dim=1).numpy()).all()
    halves = teacher.hidden(x).view(40, 2, 3, 16).mean(dim=2)
    assert np.allclose(features, halves.flatten(1).detach(), atol=1e-5)


@pytest.mark.quick
def test_the_energy_distance_is_unbiased_grows_with_a_shift_and_knows_its_error():
    draw = np.random.default_rng(0).normal
    reference, mean = draw(size=(400, 3)), {}
    for shift in (0.0, 0.5, 1.0):
        pairs = [judge.energy_distance(draw(size=(40, 3)) + shift, reference) for _ in range(60)]
        distances, errors = np.array(pairs).T
        mean[shift] = distances.mean()
        assert 0.7 < errors.mean() / distances.std() < 1.6
    assert abs(mean[0.0]) < 0.03 and mean[0.0] + 0.1 < mean[0.5] < mean[1.0] - 0.1
    with pytest.raises(ValueError, match="10 texts"):
        judge.energy_distance(reference[:5], reference)


def test_the_bootstrap_knows_the_error_of_a_ratio():
    draw = np.random.default_rng(1)
    wholes = draw.integers(1, 9, size=(80, 300))
    parts = wholes * draw.normal(2, 1, size=(80, 300))
    ratios, errors = np.array([judge.ratio(*pair) for pair in zip(parts, wholes)]).T
    assert np.allclose(ratios, parts.sum(axis=1) / wholes.sum(axis=1))
    assert 0.8 < errors.mean() / ratios.std() < 1.25


def test_degenerate_features_get_no_mauve():
    fine = np.random.default_rng(0).normal(size=(100, 8))
    for bad in (np.ones((100, 8)), np.repeat(fine[:3], 40, 0), np.full((100, 8), np.nan)):
        for pair in (bad, fine), (fine, bad):
            with pytest.raises(ValueError, match="features are distinct"):
                judge.mauve(*pair)


def test_a_broken_library_costs_mauve_and_no_other_score(monkeypatch, capsys):
    class Broken:
        def __getattr__(self, name):
            raise OSError("libfaiss.so: not found")
    monkeypatch.setitem(sys.modules, "mauve", Broken())
    maze = gd.Maze()
    row = judge.Judge(maze, maze.val, load_model(MAZE / "teacher.pt")[0]).scores(maze.val, "these")
    assert {"gen_ppl", "energy_se", "rep_4", "entropy"} < row.keys() and "mauve" not in row
    assert "no mauve of these" in capsys.readouterr().err


def test_words_and_pairs_of_the_training_text_are_known_and_counted():
    every = [a + b + "'s" for a in "abcdefghijkl" for b in "mnopqrstuvwx"]     # each once
    tokenizer = data.Tokenizer(sorted(set(", ".join(every))))
    tokens = np.array(tokenizer.encode(", ".join(every)), dtype=np.uint16)
    story = data.Data(tokens, tokens, T, tokenizer)
    model = gd.Teacher(tiny_config(), story.vocab_size, story.bos_id).eval()
    scorer = judge.Judge(story, story.val, model, with_mauve=False)
    inner = every[1:-2]                                         # the end fills no text of T tokens
    assert scorer.known == {*inner, *zip(inner, inner[1:])}
    scorer.known = {"a", "don't", ("a", "don't")}
    scorer.tokenizer = SimpleNamespace(decode=lambda ids: "ut A, don't; x<|endoftext|>a 7 a en")
    counts = scorer.count([0, 1, 0, 1, 0, 1, 0, 1])
    assert counts["words"] == (4, 5) and counts["pairs"] == (1, 4) and counts["rep_4"] == (3, 5)
    assert counts["entropy"] == (pytest.approx(np.log(2)), 1)


def test_no_floor_beats_real_text_on_the_maze():
    maze, n = gd.Maze(), 200
    real = maze.rows(torch.randint(51, (2 * n,), generator=gd.rng(0)))
    scorer = judge.Judge(maze, real[:n], load_model(MAZE / "teacher.pt")[0], with_mauve=False)
    texts = {"other real text": real[n:], **judge.floors(maze, n, 0)}
    rows = [dict(model=name, **scorer.scores(x, name)) for name, x in texts.items()]
    assert abs(rows[0]["energy"]) < 4 * rows[0]["energy_se"]
    assert all(row["energy"] > 10 * rows[0]["energy_se"] for row in rows[1:])


def hand_made(logits):
    """A student whose logits (M, V) are a function of xt and xi."""
    torch.manual_seed(0)
    student = gd.GumbelStudent(tiny_config(), V)
    student.forward = logits
    return student


@pytest.mark.quick
def test_the_probe_tells_own_noise_from_the_noise_of_others(teacher):
    blind = judge.probe(hand_made(lambda xt, xi: 0 * xi), teacher, 50)
    assert abs(blind["gain"]) < 1e-5 and abs(blind["cross_gain"]) < 1e-5
    own = judge.probe(hand_made(lambda xt, xi: 0.5 * xi), teacher, 400)
    assert abs(own["cross_gain"]) < 1e-5 and own["gain"] > 5 * own["gain_se"]

    def know_all(xt, xi):  # it writes what the teacher would
        return 5.0 * F.one_hot(teacher.write(xt, xi.view(*xt.shape, V)).flatten(), V)
    every = judge.probe(hand_made(know_all), teacher, 400)
    assert every["gain"] > every["cross_gain"] > 5 * every["cross_gain_se"]
    one = judge.probe(hand_made(know_all), teacher, 400, n_fresh=1)        # no average
    assert one["gain"] > every["gain"] + 5 * every["gain_se"]


@pytest.mark.quick
def test_the_probe_masks_a_share_of_each_text_of_the_teacher(teacher):
    for share, n_masked in ((1.0, 6), (0.5, 3), (0.01, 1)):
        seen = []
        judge.probe(hand_made(lambda xt, xi: seen.append(xt) or 0 * xi), teacher, 16, share)
        x0, xt = gd.generate(teacher, 16, T), seen[0]
        assert ((xt == V).sum(dim=1) == n_masked).all() and ((xt == x0) | (xt == V)).all()


@pytest.mark.parametrize("name", ["gumbel-draft", "linear", "one-uniform", "bd3lm-gumbel"])
def test_the_probe_takes_every_student_that_reads_noise(teacher, name):
    torch.manual_seed(0)
    student = sharpened(MODELS[name](SimpleNamespace(**vars(tiny_config()), block_size=2), V))
    lengths = set()                                             # blocks see the text before them
    student.net.register_forward_pre_hook(lambda net, args: lengths.add(args[0].size(1)))
    gains = judge.probe(student, teacher, 20, 0.5)
    assert np.isfinite(list(gains.values())).all() and gains["gain_se"] > 0
    assert lengths == {2 * T if "bd3lm" in name else T}


@pytest.fixture
def judged(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "mauve", lambda p, q: (0.5, 0.1))       # the slow part

    def call(*words):
        status, out, err = cli(judge.main, "--judge", "teacher", "--device", "cpu", "-n", 40,
                               "--out-dir", tmp_path, "--ckpt", *words)
        assert status == 0, err
        return out + err, json.loads((tmp_path / "judged.json").read_text())
    return call


def test_the_table_has_real_text_floors_the_teacher_and_each_student_in_each_setting(judged):
    _, rows = judged(MAZE / "mdlm.pt", MAZE / "gumbel.pt", "--nfe", 1, 3, "--tau", 0.7, 1.0,
                     "--floors")
    assert [row["model"].split(":")[0] for row in rows[:5]] == [
        "other real text", "teacher", "floor", "floor", "floor"]
    assert [(row["nfe"], row["tau"], row["temperature"]) for row in rows[5:]] == [
        (1, 1, 1), (3, 1, 1), (1, 0.7, 0), (1, 1, 0), (3, 0.7, 0), (3, 1, 0)]
    teacher, student = (load_model(MAZE / f"{name}.pt")[0] for name in ("teacher", "gumbel"))
    x, written = gd.generate(student, 40, 10, nfe=3), gd.generate(teacher, 40, 10)
    assert rows[-1]["valid"] == gd.Maze().judge(x)["valid"]
    assert rows[-1]["agree_token"] == pytest.approx((x == written).double().mean().item())
    assert all(("nelbo" in row) == ("gain" not in row) for row in rows[5:])


def test_what_a_checkpoint_was_made_from_is_compared_with_what_is_at_hand(judged, tmp_path):
    saved = torch.load(MAZE / "gumbel.pt", weights_only=True)
    torch.save(torch.load(MAZE / "teacher.pt", weights_only=True), tmp_path / "teacher.pt")
    student = tmp_path / "gumbel.pt"
    for change, said in ((dict(), None), (dict(data="x"), "another text"),
                         (dict(teacher="x"), "another teacher"), (dict(n_steps=9999), "half way")):
        torch.save({**saved, "about": {**saved["about"], **change}}, student)
        output, rows = judged(student)
        assert ("note" in output) == bool(said) and (said or "") in output
        assert ("agree_seq" in rows[-1]) == ("teacher" not in change)
    torch.save({**saved, "tokenizer": dict(words=list("v" * 36), sep=" ")}, student)
    with pytest.raises(AssertionError, match="other tokens"):   # the refusal: status is 1
        judged(student)


def test_an_interrupted_run_leaves_what_a_longer_one_has_written(judged, tmp_path, monkeypatch):
    _, before = judged(MAZE / "mdlm.pt", "--nfe", 1, 3)

    def stop(rows, f, **_):
        f.write("[")
        raise KeyboardInterrupt
    monkeypatch.setattr(judge.json, "dump", stop)
    with pytest.raises(KeyboardInterrupt):
        judged(MAZE / "mdlm.pt")
    assert json.loads((tmp_path / "judged.json").read_text()) == before
