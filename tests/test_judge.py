"""judge.py: scores and their table.   python -m pytest tests/test_judge.py"""

import json
import os

import numpy as np
import pytest
import torch

import data
import gumbel_distill as gd
import judge
from conftest import CPU, tiny_config

V, T = 7, 6
OWN = ["--judge", "teacher", "--featurizer", "teacher"]


def direct_nll(model, ids):
    with torch.no_grad():
        logp = model(ids[None]).logits[0].log_softmax(-1)
    return -logp[:-1].gather(-1, ids[1:, None])[:, 0]


def test_generative_perplexity_equals_a_direct_computation(gpt2_folder):
    model, words = data.load_transformers(str(gpt2_folder), "--judge", "")
    texts = ["The cat sat.", "To be, or not<|endoftext|>to be."]
    totals, counts = [], []
    for text in texts:
        ids = torch.tensor(words.encode(text))
        nll = direct_nll(model, ids)
        is_scored = ids[1:] != 50256
        assert is_scored.all() == ("endoftext" not in text)
        totals.append(nll[is_scored].sum())
        counts.append(is_scored.sum())
    ours = judge.hf_nll(texts, model, words)
    assert ours[1].equal(torch.stack(counts).float())
    assert torch.allclose(ours[0], torch.stack(totals), rtol=1e-5)


def test_long_text_is_judged_in_windows_each_token_once(gpt2_folder):
    model, words = data.load_transformers(str(gpt2_folder), "--judge", "")
    text = " ".join(f"word{i}" for i in range(20))
    ids = torch.tensor(words.encode(text))
    assert len(ids) >= 40                                       # the model reads 16
    expected = [direct_nll(model, ids[:16])]
    for start in range(8, len(ids) - 8, 8):
        expected.append(direct_nll(model, ids[start:start + 16])[7:])
    expected = torch.cat(expected)
    assert len(expected) == len(ids) - 1
    ours = judge.hf_nll([text], model, words)
    assert ours[0].item() == pytest.approx(expected.sum().item(), rel=1e-5)
    assert ours[1].item() == len(ids) - 1


def test_texts_of_one_token_or_none_are_judged_as_nothing(gpt2_folder):
    model, words = data.load_transformers(str(gpt2_folder), "--judge", "")
    totals, counts = judge.hf_nll(["", "The"], model, words)
    assert totals.tolist() == counts.tolist() == [0, 0]


def test_perplexity_under_our_teacher_skips_the_first_token_and_the_end_of_text(tiny):
    _, teacher, _ = tiny
    x = torch.randint(V, (9, T), generator=gd.rng(1))
    for bos_id in (7, 3):                                       # 7 stands in no text, 3 in some
        teacher.bos_id = bos_id
        nll = -teacher(x).gather(-1, x[..., None])[..., 0][:, 1:]
        is_scored = x[:, 1:] != bos_id
        totals, counts = judge.teacher_nll(x, teacher)
        assert counts.equal(is_scored.sum(dim=1))
        assert torch.allclose(totals, (nll * is_scored).sum(dim=1))


def test_mauve_tells_real_paths_from_shuffled_ones(maze_run):
    folder, _ = maze_run
    teacher, _, _ = gd.load_model(str(folder / "teacher.pt"), "cpu")
    rows = gd.load_data(gd.resolve(gd.Config())).val_rows(1000)
    a, b = (judge.teacher_features(x, teacher) for x in rows.split(500))
    order = torch.rand(500, 10, generator=gd.rng(0)).argsort(1)
    shuffled = judge.teacher_features(rows[:500].gather(1, order), teacher)
    same, spread = judge.mauve(a, b)
    assert same > 0.9 and 0 < spread < 0.1
    assert judge.mauve(shuffled, b)[0] < 0.5


def test_features_tell_the_halves_of_a_text_apart():
    """The mean over the whole text would hardly see that the halves have changed places."""
    torch.manual_seed(0)
    cfg = tiny_config(seq_len=20)
    teacher = gd.Teacher(cfg, gd.Tokenizer([str(i) for i in range(36)])).eval()
    x = torch.randint(18, (500, 20), generator=gd.rng(0))
    x[:, 10:] += 18
    swapped = torch.cat([x[:250, 10:], x[:250, :10]], dim=1)
    a, b, other = (judge.teacher_features(t, teacher) for t in (x[:250], x[250:], swapped))
    assert a.shape == (250, 2 * cfg.n_embd)
    same, error = judge.energy_distance(a, b)
    halves, _ = judge.energy_distance(other, b)
    whole, _ = judge.energy_distance(*(f.reshape(250, 2, -1).mean(axis=1) for f in (other, b)))
    assert abs(same) < 4 * error and halves > 10 * max(whole, error)


def test_degenerate_features_get_no_mauve():
    rng = np.random.default_rng(0)
    fine = rng.normal(size=(100, 8))
    for bad in (np.ones((100, 8)), np.repeat(fine[:3], 40, 0), np.full((100, 8), np.nan)):
        with pytest.raises(ValueError, match="generated features"):
            judge.mauve(bad, fine)
        with pytest.raises(ValueError, match="reference features"):
            judge.mauve(fine, bad)


def test_rep_n_is_the_share_of_n_grams_that_were_there_before():
    x = torch.tensor([[0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]])
    assert judge.rep_n(x, 2).tolist() == pytest.approx([3 / 5, 0, 4 / 5])
    assert judge.rep_n(x, 4).tolist() == pytest.approx([1 / 3, 0, 2 / 3])


def test_the_energy_distance_is_unbiased_grows_with_a_shift_and_knows_its_error():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(400, 3))
    shifted = {}
    for shift in (0.0, 0.5, 1.0):
        draws = [judge.energy_distance(rng.normal(size=(40, 3)) + shift, reference)
                 for _ in range(100)]
        distances, errors = np.array(draws).T
        shifted[shift] = distances.mean()
        assert 0.7 < errors.mean() / distances.std() < 1.6
    many = judge.energy_distance(rng.normal(size=(4000, 3)), reference)[0]
    assert abs(shifted[0.0] - many) < 0.02                      # few texts: no bias
    assert shifted[0.0] + 0.1 < shifted[0.5] < shifted[1.0] - 0.1
    with pytest.raises(ValueError, match="only 5"):
        judge.energy_distance(reference[:5], reference)


def test_floors_are_training_text_or_its_tokens_and_no_model(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 40)
    data = gd.load_data(gd.resolve(gd.Config(dataset="text", train_files=str(text), seq_len=9)))
    unigram, periodic, mirror = judge.floors(data, 30, seed=0).values()
    assert periodic.shape == mirror.shape == unigram.shape == (30, 9)
    for row in range(30):
        start = data.tokenizer.decode(periodic[row, :5])
        assert start in text.read_text() and start == data.tokenizer.decode(mirror[row, :5])
        assert periodic[row, 5:].equal(periodic[row, :4])
        assert mirror[row, 5:].equal(mirror[row, :5].flip(0)[:4])
    assert len(unigram.unique()) == 9 and len(periodic.unique(dim=0)) > 5


def test_a_column_in_which_a_floor_beats_real_text_is_named(capsys):
    error = dict(gen_ppl_se=1.0, mauve_se=0.1, energy_se=0.01)
    real = dict(error, model="real text (ceiling)", gen_ppl=20.0, mauve=0.9, energy=0.001)
    floor = dict(error, model="floor: periodic", gen_ppl=12.0, mauve=1.0, energy=0.5)
    student = dict(model="mdlm", gen_ppl=1.0, mauve=1.0, energy=0.0)
    judge.print_fooled([real, floor, student])
    said = capsys.readouterr().out
    assert said.count("fooled") == 1 and "gen_ppl" in said and "periodic" in said


def evaluated(cli, folder, out, *args):
    status, said, err = cli(judge.main, "--ckpt", folder / "gumbel-draft.pt", folder / "mdlm.pt",
                            *OWN, "-n", 100, "--out-dir", out, *args)
    assert status == 0, err
    return said, err, json.loads((out / "judged.json").read_text())


def test_the_table_compares_students(maze_run, cli, tmp_path):
    folder, _ = maze_run
    said, err, rows = evaluated(cli, folder, tmp_path, "--nfe", 1, 3)
    names = [f"{folder.name}/{name}" for name in ("gumbel-draft", "mdlm")]
    assert [r["model"] for r in rows] == ["real text (ceiling)", "teacher"] + [
        name for name in names for _ in range(4)]
    assert [(r["temperature"], r["nfe"]) for r in rows[2:6]] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert max(map(len, said.splitlines()[:-1])) <= 100 + len(folder.name)
    rows = [r for r in rows if r.get("temperature") != float("gumbel" in r["model"])]
    assert all(r["model"] in said for r in rows)
    by = {(r["model"].split("/")[-1], r.get("nfe")): r for r in rows}
    assert by["gumbel-draft", 3]["gen_ppl"] < by["mdlm", 1]["gen_ppl"]
    assert all(row[name + "_se"] >= 0 for row in rows for name in ("gen_ppl", "entropy", "rep_4"))
    assert by["teacher", 10]["gen_ppl"] < by["gumbel-draft", 1]["gen_ppl"]
    assert "nelbo" in by["mdlm", 1] and "nelbo" not in by["gumbel-draft", 1]
    assert "agree_token" in by["gumbel-draft", 1] and "words" not in by["mdlm", 1]
    assert all(0 <= r["rep_4"] < 1 and r["valid"] <= 1 for r in rows)
    assert by["real text (ceiling)", None]["valid"] == 1
    assert "MAUVE" in err                                       # 100 texts are few


def test_floors_are_judged_beside_the_models(maze_run, cli, tmp_path):
    folder, _ = maze_run
    _, err, rows = evaluated(cli, folder, tmp_path, "--nfe", 3, "--floors")
    names = [row["model"] for row in rows]
    assert [name.split(":")[0] for name in names[1:4]] == ["floor"] * 3
    worst_model = max(row["energy"] for row in rows[4:])
    assert all(row["energy"] > worst_model for row in rows[1:4])


def test_rows_are_those_of_every_setting_and_agree_with_the_run(maze_run, cli, tmp_path,
                                                                monkeypatch):
    folder, run = maze_run
    monkeypatch.setattr(judge, "mauve", lambda p, q: (0.5, 0.1))       # the slow parts
    monkeypatch.setattr(judge, "teacher_features", lambda x, teacher: x)
    status, _, err = cli(judge.main, "--ckpt", folder / "gumbel.pt", *OWN, "--nfe", 1, 3,
                         "--tau", 0.5, 1, "--temperature", 0, "-n", 1000, "--out-dir", tmp_path)
    assert status == 0, err
    rows = json.loads((tmp_path / "judged.json").read_text())
    assert [(r["tau"], r["temperature"], r["nfe"]) for r in rows[2:]] == [
        (tau, 0, nfe) for tau in (0.5, 1) for nfe in (1, 3)]
    there = [r for r in run if r["model"] == "gumbel" and r["temperature"] == 0]
    here = [r for r in rows[2:] if r["tau"] == 1]
    for column in ("valid", "tv", "distinct", "agree_seq", "entropy"):
        assert [r[column] for r in here] == pytest.approx([r[column] for r in there])


def test_an_interrupted_evaluation_leaves_the_rows_done_so_far(maze_run, cli, tmp_path,
                                                               monkeypatch):
    folder, _ = maze_run
    real = judge.generate

    def generate(*args, **given):
        if given.get("nfe") == 3:
            raise KeyboardInterrupt
        return real(*args, **given)
    monkeypatch.setattr(judge, "generate", generate)
    status, _, _ = cli(judge.main, "--ckpt", folder / "gumbel.pt", *OWN, "-n", 100,
                       "--nfe", 1, 3, "--out-dir", tmp_path)
    rows = json.loads((tmp_path / "judged.json").read_text())
    assert status == 130 and [r.get("nfe") for r in rows] == [None, 10, 1]


def test_judges_from_a_folder(maze_run, gpt2_folder, cli, tmp_path):
    folder, _ = maze_run
    status, said, err = cli(judge.main, "--ckpt", folder / "gumbel.pt", "--nfe", 1, "-n",
                            20, "--judge", gpt2_folder, "--featurizer", gpt2_folder, "--out-dir",
                            tmp_path / "judge")
    assert status == 0, err
    rows = json.loads((tmp_path / "judge" / "judged.json").read_text())
    assert all(1 < r["gen_ppl"] < 1e9 and 0 < r["mauve"] <= 1 for r in rows)


def test_bad_evaluations_are_refused_by_name(maze_run, cli, tmp_path):
    folder, _ = maze_run
    ckpt = folder / "gumbel.pt"
    text, changed = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("to be or not to be\n" * 40)
    changed.write_text("to be or not to be, that\n" * 40)
    assert cli(gd.main, "--dataset", "text", "--train-files", text, "--seq-len", 10, "--n-layer", 1,
               "--n-head", 2, "--n-embd", 16, "--max-steps", 2, "--students", "gumbel", "--nfe", 1,
               "--n-samples", 4, "--out-dir", tmp_path / "run")[0] == 0
    other = tmp_path / "run" / "gumbel.pt"
    for args, *said in (
            (["--ckpt", ckpt, other, *OWN], other, ckpt),
            (["--ckpt", other, *OWN, "--train-files", changed], other, "--train-files"),
            (["--ckpt", ckpt, "-n", 0, *OWN], "0"),
            (["--ckpt", ckpt, "-n", 1, *OWN], "-n 1", "at least 2"),
            (["--ckpt", ckpt, *OWN, "--nfe", 0], "--nfe"),
            (["--ckpt", ckpt, *OWN, "--judge", "no/such"], "--judge no/such"),
            (["--ckpt", ckpt, *OWN, "--featurizer", "no/such"], "--featurizer no/such"),
            (["--ckpt", ckpt, *OWN, "--teacher", ckpt], ckpt, "teacher"),
            (["--ckpt", ckpt, *OWN, "--out-dir", "/proc/nowhere"], "/proc/nowhere")):
        status, _, err = cli(judge.main, "--out-dir", tmp_path / "e", *args)
        line = err.splitlines()[-1]
        assert status == 1 and line.startswith("error: "), err
        assert all(str(part) in line for part in said), err
    status, _, err = cli(judge.main, "--ckpt", ckpt, ckpt, *OWN)
    assert status == 1 and "one name" in err and f"{folder.name}/gumbel" in err


def test_calls_of_all_blocks_are_counted(cli, tmp_path):
    """Blocks of two tokens, hardly trained."""
    gd.run(gd.Config(**CPU, max_steps=4, eval_every=4, n_samples=20, nfe=[1], n_layer=1, n_embd=8,
                     block_size=2, students=["gumbel"], out_dir=str(tmp_path)))
    status, _, err = cli(judge.main, "--ckpt", tmp_path / "gumbel.pt", "-n", 50, "--nfe", 1, 5, 7,
                         10, 99, "--temperature", 0, "--out-dir", tmp_path)
    assert status == 0, err
    rows = json.loads((tmp_path / "judged.json").read_text())
    assert [r["nfe"] for r in rows[2:]] == [5, 10]              # one call a block, or one a token


@pytest.mark.parametrize("block_size", [6, 2])
def test_the_bound_of_a_student_that_knows_nothing_is_the_logarithm_of_v(block_size):
    torch.manual_seed(0)
    name = "mdlm" if block_size == T else "bd3lm"
    student = gd.new_student(tiny_config(block_size=block_size), name, V).eval()
    torch.nn.init.zeros_(student.net.head.weight)
    x0 = torch.randint(V, (300, T), generator=gd.rng(1))
    mean, error = judge.nelbo(student, x0, 50)
    assert abs(mean - np.log(V)) < 4 * error < 0.2


def test_the_bound_of_single_tokens_is_the_ar_likelihood():
    torch.manual_seed(0)
    student = gd.new_student(tiny_config(block_size=1), "bd3lm", V).eval()
    x0 = torch.randint(V, (300, T), generator=gd.rng(1))
    mean, error = judge.nelbo(student, x0)
    with torch.no_grad():
        logits = student(torch.full_like(x0, V), x0=x0)         # all tokens are masked
    expected = torch.nn.functional.cross_entropy(logits, x0.flatten())
    assert abs(mean - expected.item()) < 4 * error < 0.2


def test_mauve_leaves_no_file_open():
    rng = np.random.default_rng(0)
    p = rng.normal(size=(60, 4))
    judge.mauve(p, p, seeds=[1, 2])
    before = len(os.listdir("/proc/self/fd"))
    judge.mauve(p, p, seeds=[1, 2])
    assert len(os.listdir("/proc/self/fd")) == before


def test_words_are_runs_of_letters_without_the_first_and_last():
    assert judge.words_of("ut Don't stop<|endoftext|>2 caf\u00e9s 'NOW' en") == [
        "don't", "stop", "caf", "s", "now"]
    assert judge.words_of("") == judge.words_of("one") == judge.words_of("one two") == []


def test_words_of_the_training_text_are_those_of_its_pieces_but_what_their_borders_cut():
    every = [a + b + "'s" for a in "abcdefghijkl" for b in "mnopqrstuvwx"]     # each once
    text = ", ".join(every)
    tokenizer = gd.Tokenizer(sorted(set(text)))
    tokens = tokenizer.encode(text)
    text_data, inner = data.Data(tokens, tokens, 8, tokenizer), every[1:-1]
    assert judge.training_words(text_data) == (set(inner), set(zip(inner, inner[1:])))
    words, pairs = judge.training_words(text_data, piece=300)
    n_borders = len(text) // 300
    assert words < set(inner) and len(inner) - len(words) <= 2 * n_borders
    assert pairs < set(zip(inner, inner[1:])) and len(inner) - len(pairs) <= 4 * n_borders


def test_shares_of_words_and_pairs_are_those_of_the_training_text():
    known = {"a", "b"}
    share, error = judge.share_known([["a", "b", "x"], ["b"], []], known)
    assert share == pytest.approx(3 / 4) and error > 0
    assert judge.share_known([judge.pairs_of(["a", "b", "a"])], {("a", "b")})[0] == 0.5
    with pytest.raises(ValueError, match="nothing"):
        judge.share_known([[], []], known)


def test_texts_are_judged_by_their_words_whatever_the_tokens(real_data, tmp_path, cli):
    text = tmp_path / "a.txt"
    text.write_text("one day the little girl saw a big dog and it ran to the tree. " * 60)
    for tokens in ("char", "gpt2-1024"):
        out = tmp_path / tokens
        gd.run(gd.Config(**CPU, dataset="text", train_files=str(text), tokenizer=tokens, seq_len=32,
                         max_steps=2, eval_every=2, n_samples=4, nfe=[1], n_layer=1, n_head=2,
                         n_embd=16, students=["mdlm"], init_from="scratch", out_dir=str(out)))
        status, said, err = cli(judge.main, "--ckpt", out / "mdlm.pt", *OWN, "-n", 5, "--floors",
                                "--temperature", 1, "--out-dir", out)
        assert status == 0 and " words " in said and " pairs" in said, err
        rows = json.loads((out / "judged.json").read_text())
        assert rows[0]["words"] == rows[0]["pairs"] == 1
        assert rows[-1].get("words", 0) < 0.5 and "no energy of" in err     # 5 texts are too few


def test_a_text_of_one_token_has_few_scores_and_stderr_says_why(tiny, capsys):
    cfg, teacher, _ = tiny
    x = torch.randint(V, (20, 1), generator=gd.rng(1))

    class Args:
        judge = featurizer = "teacher"
    d = data.Data(np.zeros(9, np.uint16), np.zeros(9, np.uint16), 1, gd.Tokenizer(list("abcdefg")))
    row = judge.Judge(Args, gd.Config(device="cpu"), d, teacher, x).scores(x, "these")
    err = capsys.readouterr().err
    assert set(row) == {"entropy", "entropy_se"}
    assert all(f"no {name} of these" in err for name in ("gen_ppl", "rep_4", "mauve", "energy"))


def test_generated_data_is_judged_by_the_teacher(maze_run, cli, tmp_path, monkeypatch):
    folder, _ = maze_run
    monkeypatch.setattr(judge, "mauve", lambda p, q: (0.5, 0.1))        # the slow part
    status, _, err = cli(judge.main, "--ckpt", folder / "gumbel.pt", "-n", 20, "--nfe", 1,
                         "--out-dir", tmp_path)
    assert status == 0, err
