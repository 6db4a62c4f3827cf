"""sample.py: prompts, samplers, judges, the table.   python -m pytest tests/test_sample.py"""

import json
import math
import sys

import numpy as np
import pytest
import torch

import data
import gumbel_distill as gd
import sample
from conftest import CPU, LETTERS, tiny_config

V, T = 7, 6
OWN = ["--judge", "teacher", "--featurizer", "teacher"]


def fill(model, order, **given):
    """Nine texts of `model`, and the same after each step."""
    xi, u = gd.sequence_noise(0, torch.arange(9), T, model)
    steps = []
    x = gd.sample(model, xi, u, order=order, on_step=steps.append, **given)
    return x, steps


def test_first_hitting_unmasks_one_token_a_step_in_random_order(tiny):
    _, _, student = tiny
    x, steps = fill(student, "first-hitting", nfe=T)
    assert [(s == V).sum(1).tolist() for s in steps] == [[T - k] * 9 for k in range(1, T + 1)]
    assert len((steps[0] != V).long().argmax(1).unique()) > 2
    assert x.equal(fill(student, "first-hitting", nfe=T + 5)[0])        # more steps than tokens


def test_first_hitting_fills_in_the_order_of_the_ancestral_sampler(tiny):
    """Step by step the same tokens as an ancestral sampler of very many steps."""
    _, _, student = tiny
    one, _ = fill(student, "first-hitting", nfe=T, temperature=1.0)
    many, _ = fill(student, "random", nfe=20_000, temperature=1.0)
    assert one.equal(many)


@pytest.mark.parametrize("order", gd.ORDERS)
def test_texts_do_not_depend_on_the_batch(order, tiny):
    _, teacher, student = tiny
    given = dict(nfe=4, order=order, temperature=1.0)
    whole = gd.generate(student, 11, T, 3, **given)
    assert whole.equal(gd.generate(student, 11, T, 3, batch_size=1, **given))
    assert whole[:5].equal(gd.generate(student, 5, T, 3, batch_size=4, **given))
    assert gd.generate(teacher, 11, T, 3).equal(gd.generate(teacher, 11, T, 3, batch_size=2))


@pytest.mark.parametrize("order", gd.ORDERS)
def test_tokens_of_the_prompt_stay_and_gaps_are_filled(order, tiny):
    _, _, student = tiny
    known = sample.prompt_ids("ab__c", LETTERS, T)
    assert known.tolist() == [0, 1, V, V, 2, V]
    for nfe in (1, 2, 50):
        x = gd.generate(student, 20, T, 0, known, order=order, nfe=nfe, temperature=1.0)
        assert (x[:, known < V] == known[known < V]).all() and (x < V).all()
        assert len(x[:, 2:4].unique(dim=0)) > 5


def test_a_space_before_a_gap_belongs_to_what_fills_it(real_data):
    bpe = gd.Tokenizer()
    gap = bpe.vocab_size
    known = sample.prompt_ids("The ____ sat", bpe, 8).tolist()
    assert known == [*bpe.encode("The"), *[gap] * 4, *bpe.encode(" sat"), *[gap] * 2]
    assert sample.prompt_ids("", bpe, 3).tolist() == [gap] * 3
    for spaces in (" ", "   "):
        with_space = sample.prompt_ids("The cat" + spaces, bpe, 8)
        assert with_space.equal(sample.prompt_ids("The cat", bpe, 8))
    letters = gd.Tokenizer(list("abc "))                        # there a space is a token
    assert sample.prompt_ids("ab ", letters, 4).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("prompt", ["abcabc", "abc_abc", "_______"])
def test_prompts_that_leave_nothing_to_fill_in_or_too_long_are_refused(prompt):
    with pytest.raises(gd.UserError, match="--prompt"):
        sample.prompt_ids(prompt, LETTERS, T)


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
    ours = sample.hf_nll(texts, model, words)
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
    ours = sample.hf_nll([text], model, words)
    assert ours[0].item() == pytest.approx(expected.sum().item(), rel=1e-5)
    assert ours[1].item() == len(ids) - 1


def test_texts_of_one_token_or_none_are_judged_as_nothing(gpt2_folder):
    model, words = data.load_transformers(str(gpt2_folder), "--judge", "")
    totals, counts = sample.hf_nll(["", "The"], model, words)
    assert totals.tolist() == counts.tolist() == [0, 0]


def test_perplexity_under_our_teacher_skips_the_first_token_and_the_end_of_text(tiny):
    _, teacher, _ = tiny
    x = torch.randint(V, (9, T), generator=gd.rng(1))
    for bos_id in (7, 3):                                       # 7 stands in no text, 3 in some
        teacher.bos_id = bos_id
        nll = -teacher(x).gather(-1, x[..., None])[..., 0][:, 1:]
        is_scored = x[:, 1:] != bos_id
        totals, counts = sample.teacher_nll(x, teacher)
        assert counts.equal(is_scored.sum(dim=1))
        assert torch.allclose(totals, (nll * is_scored).sum(dim=1))


def test_mauve_tells_real_paths_from_shuffled_ones(maze_run):
    folder, _ = maze_run
    teacher, _, _ = gd.load_model(str(folder / "teacher.pt"), "cpu")
    rows = gd.load_data(gd.resolve(gd.Config())).val_rows(1000)
    a, b = (sample.teacher_features(x, teacher) for x in rows.split(500))
    order = torch.rand(500, 10, generator=gd.rng(0)).argsort(1)
    shuffled = sample.teacher_features(rows[:500].gather(1, order), teacher)
    same, spread = sample.mauve(a, b)
    assert same > 0.9 and 0 < spread < 0.1
    assert sample.mauve(shuffled, b)[0] < 0.5


def test_features_tell_the_halves_of_a_text_apart():
    """The mean over the whole text would hardly see that the halves have changed places."""
    torch.manual_seed(0)
    cfg = tiny_config(seq_len=20)
    teacher = gd.Teacher(cfg, gd.Tokenizer([str(i) for i in range(36)])).eval()
    x = torch.randint(18, (500, 20), generator=gd.rng(0))
    x[:, 10:] += 18
    swapped = torch.cat([x[:250, 10:], x[:250, :10]], dim=1)
    a, b, other = (sample.teacher_features(t, teacher) for t in (x[:250], x[250:], swapped))
    assert a.shape == (250, 2 * cfg.n_embd)
    same, error = sample.energy_distance(a, b)
    halves, _ = sample.energy_distance(other, b)
    whole, _ = sample.energy_distance(*(f.reshape(250, 2, -1).mean(axis=1) for f in (other, b)))
    assert abs(same) < 4 * error and halves > 10 * max(whole, error)


def test_degenerate_features_get_no_mauve():
    rng = np.random.default_rng(0)
    fine = rng.normal(size=(100, 8))
    for bad in (np.ones((100, 8)), np.repeat(fine[:3], 40, 0), np.full((100, 8), np.nan)):
        with pytest.raises(ValueError, match="generated features"):
            sample.mauve(bad, fine)
        with pytest.raises(ValueError, match="reference features"):
            sample.mauve(fine, bad)


def test_rep_n_is_the_share_of_n_grams_that_were_there_before():
    x = torch.tensor([[0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]])
    assert sample.rep_n(x, 2).tolist() == pytest.approx([3 / 5, 0, 4 / 5])
    assert sample.rep_n(x, 4).tolist() == pytest.approx([1 / 3, 0, 2 / 3])


def test_the_energy_distance_is_unbiased_grows_with_a_shift_and_knows_its_error():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(400, 3))
    shifted = {}
    for shift in (0.0, 0.5, 1.0):
        draws = [sample.energy_distance(rng.normal(size=(40, 3)) + shift, reference)
                 for _ in range(100)]
        distances, errors = np.array(draws).T
        shifted[shift] = distances.mean()
        assert 0.7 < errors.mean() / distances.std() < 1.6
    many = sample.energy_distance(rng.normal(size=(4000, 3)), reference)[0]
    assert abs(shifted[0.0] - many) < 0.02                      # few texts: no bias
    assert shifted[0.0] + 0.1 < shifted[0.5] < shifted[1.0] - 0.1
    with pytest.raises(ValueError, match="only 5"):
        sample.energy_distance(reference[:5], reference)


def test_hashed_n_grams_see_order_and_need_no_model():
    x = torch.randint(50, (400, 32), generator=gd.rng(0)).sort(dim=1).values
    a, b = (sample.ngram_features(half) for half in x.split(200))
    mixed = x[:200].gather(1, torch.rand(200, 32, generator=gd.rng(1)).argsort(dim=1))
    same, error = sample.energy_distance(a, b)
    other, _ = sample.energy_distance(sample.ngram_features(mixed), b)
    assert abs(same) < 4 * error and other > 10 * error


def test_floors_are_training_text_or_its_tokens_and_no_model(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 40)
    data = gd.load_data(gd.resolve(gd.Config(dataset="text", train_files=str(text), seq_len=9)))
    unigram, periodic, mirror = sample.floors(data, 30, seed=0).values()
    assert periodic.shape == mirror.shape == unigram.shape == (30, 9)
    for row in range(30):
        start = data.tokenizer.decode(periodic[row, :5])
        assert start in text.read_text() and start == data.tokenizer.decode(mirror[row, :5])
        assert periodic[row, 5:].equal(periodic[row, :4])
        assert mirror[row, 5:].equal(mirror[row, :5].flip(0)[:4])
    assert len(unigram.unique()) == 9 and len(periodic.unique(dim=0)) > 5
    every = sample.floors(data, data.n_train, seed=0)["floor: periodic, 5 tokens"]
    starts = data.train[np.arange(data.n_train)[:, None] + np.arange(5)]
    assert sorted(every[:, :5].tolist()) == sorted(starts.tolist())     # each of them once
    assert len(sample.floors(data, data.n_train + 1, seed=0)) == 1
    assert f"{data.n_train + 1} different training texts, and there are {data.n_train}" in (
        capsys.readouterr().err)


def test_a_column_in_which_a_floor_beats_real_text_is_named(capsys):
    error = dict(gen_ppl_se=1.0, mauve_se=0.1, energy_se=0.01)
    real = dict(error, model="real text (ceiling)", gen_ppl=20.0, mauve=0.9, energy=0.001)
    floor = dict(error, model="floor: periodic", gen_ppl=12.0, mauve=1.0, energy=0.5)
    student = dict(model="mdlm", gen_ppl=1.0, mauve=1.0, energy=0.0)
    sample.print_fooled([real, floor, student])
    said = capsys.readouterr().out
    assert said.count("fooled") == 1 and "gen_ppl is 12" in said and "periodic" in said


def test_models_are_compared_at_the_entropy_that_both_reach(capsys):
    def rows(model, *points, nfe=4):
        return [dict(model=model, nfe=nfe, tau=1, temperature=1, entropy=h, energy=energy,
                     energy_se=0.03, gen_ppl=math.exp(nll), gen_ppl_se=0.4 * math.exp(nll))
                for h, nll, energy in points]
    table = rows("a", (3.0, 5.0, 0.4), (2.0, 4.0, 0.2))
    table += rows("b", (1.5, 3.0, 0.0), (2.5, 7.0, 0.1))
    table += rows("one setting", (9.0, 1.0, 0.0)) + [dict(model="real text", entropy=1.0)]
    table += rows("other steps", (2.0, 4.0, 0.2), (3.0, 5.0, 0.4), nfe=9)
    at, = sample.at_equal_entropy(table)
    for row in table[:2]:  # a student with noise, drawn at temperature 1, varies tau
        row["tau"] = row["entropy"]
    assert sample.at_equal_entropy(table) == [at]
    assert (at["model"], at["against"], at["nfe"], at["entropy"]) == ("a", "b", 4, 2.5)
    assert math.log(at["gen_ppl_1"]) == pytest.approx(4.5) and at["energy_1"] == pytest.approx(0.3)
    assert math.log(at["gen_ppl_2"]) == pytest.approx(7.0) and "mauve_z" not in at
    assert at["gen_ppl_z"] == pytest.approx(2.5 / math.hypot(0.4, 0.4))
    assert at["energy_z"] == pytest.approx(-0.2 / math.hypot(0.03, 0.03))
    sample.print_equal_entropy([at])
    assert f"90.02, {math.exp(7):.2f} (+4.4)" in capsys.readouterr().out
    lively = rows("lively", (4.0, 5.0, 0.4), (5.0, 4.0, 0.2))
    assert sample.at_equal_entropy(table + lively) == [at]
    assert "nfe 4: a and lively have no entropy in common" in capsys.readouterr().out
    assert sample.at_equal_entropy(table[4:6]) == []


def evaluated(cli, folder, out, *args):
    status, said, err = cli(sample.main, "--ckpt", folder / "gumbel-draft.pt", folder / "mdlm.pt",
                            "--eval", *OWN, "-n", 100, "--out-dir", out, *args)
    assert status == 0, err
    return said, err, json.loads((out / "results.json").read_text())


def test_the_table_compares_students(maze_run, cli, tmp_path):
    folder, _ = maze_run
    said, err, rows = evaluated(cli, folder, tmp_path, "--nfe", 1, 3)
    names = [f"{folder.name}/{name}" for name in ("gumbel-draft", "mdlm")]
    assert [r["model"] for r in rows] == ["real text (ceiling)", "teacher"] + [
        name for name in names for _ in (1, 3)]
    assert all(r["model"] in said for r in rows)
    by = {(r["model"].split("/")[-1], r.get("nfe")): r for r in rows}
    assert by["gumbel-draft", 3]["gen_ppl"] < by["mdlm", 1]["gen_ppl"]
    assert by["gumbel-draft", 3]["energy_ngrams"] < by["mdlm", 1]["energy_ngrams"]
    assert all(row[name + "_se"] >= 0 for row in rows for name in ("gen_ppl", "entropy", "energy",
                                                                   "energy_ngrams", "rep_4"))
    assert " ± " in said
    assert by["teacher", 10]["gen_ppl"] < by["gumbel-draft", 1]["gen_ppl"]
    assert "nelbo" in by["mdlm", 1] and "nelbo" not in by["gumbel-draft", 1]
    assert "agree_token" in by["gumbel-draft", 1] and "agree_token" not in by["mdlm", 1]
    assert all(r["samples_s"] > 0 for r in rows[2:])
    assert all(0 <= r["rep_4"] < 1 and r["valid"] <= 1 for r in rows)
    assert by["real text (ceiling)", None]["valid"] == 1
    assert "MAUVE" in err                                       # 100 texts are few


def test_floors_are_judged_beside_the_models(maze_run, cli, tmp_path):
    folder, _ = maze_run
    _, err, rows = evaluated(cli, folder, tmp_path, "--nfe", 3, "--floors")
    names = [row["model"] for row in rows]
    assert [name.split(":")[0] for name in names[1:4]] == ["floor"] * 3
    worst_model = max(row["energy_ngrams"] for row in rows[4:])
    assert all(row["energy_ngrams"] > worst_model for row in rows[1:4])


def test_rows_are_those_of_every_setting_and_agree_with_the_run(maze_run, cli, tmp_path,
                                                                monkeypatch):
    folder, run = maze_run
    monkeypatch.setattr(sample, "mauve", lambda p, q: (0.5, 0.1))       # the slow parts
    monkeypatch.setattr(sample, "teacher_features", lambda x, teacher: x)
    status, _, err = cli(sample.main, "--ckpt", folder / "gumbel.pt", "--eval", *OWN, "--nfe", 1, 3,
                         "--tau", 0.5, 1, "-n", 1000, "--out-dir", tmp_path)
    assert status == 0, err
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(r["tau"], r["temperature"], r["nfe"]) for r in rows[2:]] == [
        (tau, 0, nfe) for tau in (0.5, 1) for nfe in (1, 3)]
    there = [r for r in run if r["model"] == "gumbel"]
    here = [r for r in rows[2:] if r["tau"] == 1]
    for column in ("valid", "tv", "distinct", "agree_seq", "accept", "entropy"):
        assert [r[column] for r in here] == pytest.approx([r[column] for r in there])
    assert all(("agree_token" in r) == (r in here) for r in rows)


def test_one_command_varies_tau_with_noise_and_temperature_without(maze_run, cli, tmp_path,
                                                                  monkeypatch):
    folder, _ = maze_run
    monkeypatch.setattr(sample, "mauve", lambda p, q: (0.5, 0.1))       # the slow part
    _, _, rows = evaluated(cli, folder, tmp_path, "--nfe", 3, "--tau", 0.5, 1, "--temperature",
                           0.6, 0.8, 1)
    assert [(r["tau"], r["temperature"]) for r in rows[2:]] == [(0.5, 0), (1, 0), (1, 0.6),
                                                               (1, 0.8), (1, 1)]
    student = gd.Student(tiny_config(tau=[1.0], temperature=[0.5, 1.0]), "gumbel", V)
    assert gd.scales(student, tiny_config(tau=[1.0], temperature=[0.5, 1.0])) == [(1, 0.5), (1, 1)]


def test_an_interrupted_evaluation_leaves_the_rows_done_so_far(maze_run, cli, tmp_path,
                                                               monkeypatch):
    folder, _ = maze_run
    real = sample.generate

    def generate(*args, **given):
        if given.get("nfe") == 3:
            raise KeyboardInterrupt
        return real(*args, **given)
    monkeypatch.setattr(sample, "generate", generate)
    status, _, _ = cli(sample.main, "--ckpt", folder / "gumbel.pt", "--eval", *OWN, "-n", 100,
                       "--nfe", 1, 3, "--out-dir", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert status == 130 and [r.get("nfe") for r in rows] == [None, 10, 1]


def test_judges_from_a_folder(maze_run, gpt2_folder, cli, tmp_path):
    folder, _ = maze_run
    status, said, err = cli(sample.main, "--ckpt", folder / "gumbel.pt", "--eval", "--nfe", 1, "-n",
                            20, "--judge", gpt2_folder, "--featurizer", gpt2_folder, "--out-dir",
                            tmp_path / "eval")
    assert status == 0, err
    rows = json.loads((tmp_path / "eval" / "results.json").read_text())
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
        status, _, err = cli(sample.main, "--eval", "--out-dir", tmp_path / "e", *args)
        line = err.splitlines()[-1]
        assert status == 1 and line.startswith("error: "), err
        assert all(str(part) in line for part in said), err
    status, _, err = cli(sample.main, "--ckpt", ckpt, "--floors")
    assert status == 1 and "--floors" in err and "add --eval" in err
    status, _, err = cli(sample.main, "--ckpt", ckpt, ckpt, "--eval", *OWN)
    assert status == 1 and "one name" in err and f"{folder.name}/gumbel" in err
    status, _, err = cli(sample.main, "--ckpt", ckpt, "--gif", "film.mp4")
    assert status == 1 and "--gif film.mp4: must end in .gif" in err


def test_texts_that_cannot_be_are_refused(maze_run, cli):
    folder, _ = maze_run
    given = ["--ckpt", folder / "gumbel.pt"]
    for args, said in ((["--prompt", "b1 " * 10], "--prompt"),
                       (["--prompt", "b1 " * 10, "--exact"], "--prompt"),
                       (["--length", 20], "--length 20"),
                       (["--length", 20, "--exact"], "--length")):
        status, _, err = cli(sample.main, *given, *args)
        assert status == 1 and said in err and err.count("\n") == 1, err


def test_texts_are_written_as_json_lines(maze_run, cli, tmp_path):
    folder, _ = maze_run
    given = ["--ckpt", folder / "gumbel.pt", "--nfe", 3]
    status, said, _ = cli(sample.main, *given, "-n", 7, "--out", tmp_path / "texts.jsonl",
                          "--batch-size", 2)
    rows = [json.loads(line) for line in open(tmp_path / "texts.jsonl")]
    assert status == 0 and [r["index"] for r in rows] == list(range(7))
    assert all(len(r["ids"]) == 10 and len(r["text"].split()) == 10 for r in rows)
    model, _, _ = gd.load_model(str(folder / "gumbel.pt"), "cpu")
    for r in rows[2:4]:  # a line says how its text is made again
        settings = {name: r[name] for name in ("nfe", "tau", "temperature", "top_p", "order")}
        assert gd.generate(model, 7, 10, r["seed"], **settings)[r["index"]].tolist() == r["ids"]


def test_a_text_is_shown_as_it_unmasks(maze_run, cli, tmp_path):
    """Frame by frame: known tokens stand from the start, none goes, the last frame is the text."""
    folder, _ = maze_run
    for name in ("mdlm", "gumbel", "teacher"):
        model, tokenizer, _ = gd.load_model(str(folder / f"{name}.pt"), "cpu")
        known = sample.prompt_ids("b1 __ e1", tokenizer, 10)
        settings = {"tau": 1.0}
        if name != "teacher":
            settings.update(nfe=3, order="first-hitting", temperature=float(name == "mdlm"))
        film = sample.film(model, 4, 0, known, **settings)
        assert film[0].equal(known) and len(film) == (11 if name == "teacher" else 4)
        for before, after in zip(film, film[1:]):
            assert (before == 36).sum() >= (after == 36).sum()
            assert after[before != 36].equal(before[before != 36])
        assert film[-1].equal(gd.generate(model, 5, 10, 0, known, **settings)[4])
    status, said, err = cli(sample.main, "--ckpt", folder / "mdlm.pt", folder / "gumbel.pt",
                            "--nfe", 3, "--order", "left", "--animate", "--prompt", "b1 __ e1", "-n",
                            1)
    assert status == 0 and said.count("MDLM, step") == said.count("paper's map, step") == 4, err
    assert [said.count(f", step {k}") for k in (0, 1, 2, 3)] == [2] * 4
    frames = said.split("MDLM, step ")[1:]
    cells = [frame.count("o") for frame in frames]              # the start, b1 and e1 of both
    assert cells[0] == 6 and cells == sorted(cells) and 20 <= cells[-1] <= 22


def test_running_text_is_wrapped_and_what_is_new_is_marked(monkeypatch, capsys):
    words = gd.Tokenizer(list("abc\n"))
    frame, before = torch.tensor([0, 1, 3, 4, 2]), torch.tensor([0, 4, 3, 4, 4])
    lines = sample.lines_of(frame, before, words, width=3)
    assert lines == [[("a", "old"), ("b", "new"), ("\u21b5", "old")],
                     [("_", "masked"), ("c", "new")]]
    monkeypatch.setattr(sample.sys.stdout, "isatty", lambda: True, raising=False)
    films = [[torch.full((5,), 4), frame], [torch.full((5,), 4), frame, frame]]
    sample.play(films, ["mdlm", "gumbel"], words, is_maze=False, pause=0)
    said = capsys.readouterr().out
    assert said.count("\033[6A\033[J") == 2                     # two frames overwrite the last one
    assert said.count("\033[32mc\033[0m") == 3                  # green where it is new


def test_a_moving_picture_has_the_frames_of_the_film(maze_run, cli, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    folder, _ = maze_run
    given = ["--ckpt", folder / "mdlm.pt", folder / "gumbel.pt", "--nfe", 3, "--order", "left"]
    status, said, err = cli(sample.main, *given, "-n", 2, "--gif", tmp_path / "a.gif")
    assert status == 0 and "a.gif" in said, err
    picture = image.open(tmp_path / "a.gif")
    assert picture.n_frames >= 2 * 4 and picture.info["loop"] == 0
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    status, _, err = cli(sample.main, *given, "--gif", tmp_path / "a.gif")
    assert status == 1 and "pip install matplotlib" in err and err.count("\n") == 1
    words = gd.Tokenizer(["$$", "a"])                           # no formula of matplotlib
    monkeypatch.undo()
    films = [[torch.full((60,), 2), torch.zeros(60, dtype=torch.long)]]
    sample.write_gif([films], ["mdlm"], words, False, str(tmp_path / "text.gif"))
    picture = image.open(tmp_path / "text.gif")
    milliseconds = 0
    for number in range(picture.n_frames):
        picture.seek(number)
        milliseconds += picture.info["duration"]
    assert milliseconds == 2800                                 # the last of two frames stays
    for args in (["--exact"], ["--eval", *OWN], ["--out", "x.jsonl"]):
        status, _, err = cli(sample.main, *given[:2], "--animate", *args)
        assert status == 1 and "--animate" in err and err.count("\n") == 1


def test_the_teacher_writes_too(maze_run, cli):
    folder, _ = maze_run
    status, said, _ = cli(sample.main, "--ckpt", folder / "teacher.pt", "-n", 2)
    assert status == 0 and said.count("o") >= 22


@pytest.fixture(scope="module")
def block_run(tmp_path_factory):
    """Blocks of two tokens, hardly trained."""
    folder = tmp_path_factory.mktemp("blocks")
    gd.run(gd.Config(**CPU, max_steps=4, eval_every=4, n_samples=20, nfe=[1], n_layer=1, n_embd=8,
                     block_size=2, students=["gumbel"], out_dir=str(folder)))
    return folder / "gumbel.pt"


def test_students_in_blocks_write_texts_of_other_lengths(block_run, cli, tmp_path):
    out = tmp_path / "texts.jsonl"
    for length in (4, 26):
        status, _, err = cli(sample.main, "--ckpt", block_run, "--length", length, "--nfe", 2,
                             "-n", 3, "--prompt", "b1 c1 d1", "--out", out)
        assert status == 0, err
        rows = [json.loads(line)["ids"] for line in out.read_text().splitlines()]
        assert [len(row) for row in rows] == [length] * 3
        assert all(row[:3] == [1, 2, 3] for row in rows)
    for args, said in ((["--prompt", "b1 _ c1"], "b1 _ c1"), (["--length", 15], "--length 15")):
        status, _, err = cli(sample.main, "--ckpt", block_run, *args)
        assert status == 1 and said in err and err.count("\n") == 1, err


def test_calls_of_all_blocks_are_counted(block_run, cli, tmp_path):
    status, said, err = cli(sample.main, "--ckpt", block_run, "--eval", *OWN, "-n", 50, "--nfe", 1,
                            2, 3, "--out-dir", tmp_path)
    assert status == 0, err
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [r["nfe"] for r in rows[2:]] == [5, 10, 10]          # two tokens take two calls at most


@pytest.mark.parametrize("name", ["mdlm", "gumbel", "gumbel-draft"])
def test_exact_mode_is_apd_at_0_and_the_student_alone_is_apd_at_1(name, maze_run, cli, tmp_path):
    """At 1 all tokens of the first draft agree with the student, whatever the teacher says."""
    folder, _ = maze_run
    texts = {}
    for mode in ("--exact", "--apd 0", "--apd 0.5", "--apd 1"):
        status, said, err = cli(sample.main, "--ckpt", folder / f"{name}.pt", *mode.split(), "-n",
                                50, "--out", tmp_path / "texts.jsonl")
        assert status == 0 and ("50 of 50" in said or mode[-1] in "51"), err
        texts[mode] = [json.loads(line)["ids"] for line in open(tmp_path / "texts.jsonl")]
    teacher, _, _ = gd.load_model(str(folder / "teacher.pt"), "cpu")
    assert texts["--exact"] == texts["--apd 0"] == gd.generate(teacher, 50, 10).tolist()
    model, _, _ = gd.load_model(str(folder / f"{name}.pt"), "cpu")
    if model.noise:
        assert texts["--apd 1"] == gd.generate(model, 50, 10, nfe=1).tolist()


def test_only_students_of_whole_texts_draft(maze_run, block_run, cli):
    folder, _ = maze_run
    for mode in (["--exact"], ["--apd", 0.5]):
        for ckpt in (block_run, folder / "teacher.pt"):
            status, _, err = cli(sample.main, "--ckpt", ckpt, *mode)
            assert status == 1 and str(ckpt) in err and "--exact" in err
    status, _, err = cli(sample.main, "--ckpt", folder / "mdlm.pt", "--apd", 2)
    assert status == 1 and "--apd 2.0" in err


@pytest.mark.parametrize("block_size", [6, 2])
def test_the_bound_of_a_student_that_knows_nothing_is_the_logarithm_of_v(block_size):
    torch.manual_seed(0)
    name = "mdlm" if block_size == T else "bd3lm"
    student = gd.Student(tiny_config(block_size=block_size), name, V).eval()
    torch.nn.init.zeros_(student.net.head.weight)
    x0 = torch.randint(V, (300, T), generator=gd.rng(1))
    mean, error = sample.nelbo(student, x0, 50)
    assert abs(mean - np.log(V)) < 4 * error < 0.2


def test_the_bound_of_single_tokens_is_the_ar_likelihood():
    torch.manual_seed(0)
    student = gd.Student(tiny_config(block_size=1), "bd3lm", V).eval()
    x0 = torch.randint(V, (300, T), generator=gd.rng(1))
    mean, error = sample.nelbo(student, x0)
    with torch.no_grad():
        logits = student(torch.full_like(x0, V), x0=x0)         # all tokens are masked
    expected = torch.nn.functional.cross_entropy(logits, x0.flatten())
    assert mean == pytest.approx(expected.item(), rel=1e-5) and error < 1e-7
