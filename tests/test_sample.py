"""sample.py: prompts, samplers, judges, the table.   python -m pytest tests/test_sample.py"""

import json
import sys

import numpy as np
import pytest
import torch

import gumbel_distill as gd
import sample
import text as text_module
from conftest import tiny_config

V, T = 7, 6


def fill(model, order, **given):
    xi, u = gd.sequence_noise(0, torch.arange(9), T, model)
    steps = []
    x = gd.sample(model, xi, u, order=order, on_step=steps.append, **given)
    return x, steps


def test_first_hitting_unmasks_one_token_a_step_in_random_order(tiny):
    _, _, student = tiny
    x, steps = fill(student, "first-hitting", nfe=T)
    masked = [(s == V).sum(1) for s in steps]
    assert [m.tolist() for m in masked] == [[T - k] * 9 for k in range(1, T + 1)]
    first = torch.stack([(s != V).long().argmax(1) for s in steps[:1]])
    assert len(first.unique()) > 2
    assert x.equal(fill(student, "first-hitting", nfe=T + 5)[0])  # more steps than tokens


def test_first_hitting_fills_in_the_order_of_the_ancestral_sampler(tiny):
    """Step by step the same tokens as an ancestral sampler of very many steps."""
    _, _, student = tiny
    one, _ = fill(student, "first-hitting", nfe=T, temperature=1.0)
    many, _ = fill(student, "random", nfe=100_000, temperature=1.0)
    assert one.equal(many)


@pytest.mark.parametrize("order", ["random", "first-hitting", "confidence", "left"])
def test_texts_do_not_depend_on_the_batch(order, tiny):
    _, teacher, student = tiny
    given = dict(nfe=4, order=order, temperature=1.0)
    whole = gd.generate(student, 11, T, 3, **given)
    assert whole.equal(gd.generate(student, 11, T, 3, batch_size=1, **given))
    assert whole[:5].equal(gd.generate(student, 5, T, 3, batch_size=4, **given))
    assert gd.generate(teacher, 11, T, 3).equal(gd.generate(teacher, 11, T, 3, batch_size=2))


@pytest.mark.parametrize("order", ["random", "first-hitting", "confidence", "left"])
def test_tokens_of_the_prompt_stay_and_gaps_are_filled(order, tiny):
    _, _, student = tiny
    letters = gd.Tokenizer(list("abcdefg"))
    known = sample.prompt_ids("ab__c", letters, T)
    assert known.tolist() == [0, 1, V, V, 2, V]
    for nfe in (1, 2, 50):
        x = gd.generate(student, 20, T, 0, known, order=order, nfe=nfe, temperature=1.0)
        assert (x[:, known < V] == known[known < V]).all() and (x < V).all()
        assert len(x[:, 2:4].unique(dim=0)) > 5


def test_a_gap_in_gpt2_tokens_takes_the_space_before_it(real_data):
    bpe = gd.Tokenizer()
    known = sample.prompt_ids("The ____ sat", bpe, 8).tolist()
    assert known == [*bpe.encode("The"), *[50257] * 4, *bpe.encode(" sat"), *[50257] * 2]
    assert sample.prompt_ids("", bpe, 3).tolist() == [50257] * 3


def direct_nll(model, ids):
    with torch.no_grad():
        logp = model(ids[None]).logits[0].log_softmax(-1)
    return -logp[:-1].gather(-1, ids[1:, None])[:, 0]


def test_generative_perplexity_equals_a_direct_computation(gpt2_folder):
    model, words = text_module.load_transformers(str(gpt2_folder), "--judge", "")
    texts = ["The cat sat.", "To be, or not<|endoftext|>to be."]
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor(words.encode(text))
        nll = direct_nll(model, ids)
        is_scored = ids[1:] != 50256
        assert is_scored.all() == ("endoftext" not in text)
        total, count = total + nll[is_scored].sum().item(), count + is_scored.sum().item()
    ours = sample.hf_nll(texts, model, words)
    assert ours[1] == count and ours[0] == pytest.approx(total, rel=1e-5)


def test_long_text_is_judged_in_windows_each_token_once(gpt2_folder):
    model, words = text_module.load_transformers(str(gpt2_folder), "--judge", "")
    text = " ".join(f"word{i}" for i in range(20))
    ids = torch.tensor(words.encode(text))
    assert len(ids) >= 40                                       # the model reads 16
    expected = [direct_nll(model, ids[:16])]
    for start in range(8, len(ids) - 8, 8):
        expected.append(direct_nll(model, ids[start:start + 16])[7:])
    expected = torch.cat(expected)
    assert len(expected) == len(ids) - 1
    ours = sample.hf_nll([text], model, words)
    assert ours == (pytest.approx(expected.sum().item(), rel=1e-5), len(ids) - 1)


def test_perplexity_under_our_teacher_skips_the_first_token_and_the_end_of_text(tiny):
    _, teacher, _ = tiny
    x = torch.randint(V, (9, T), generator=gd.rng(1))
    nll = -teacher(x).gather(-1, x[..., None])[..., 0]
    assert sample.teacher_nll(x, teacher) == (pytest.approx(nll[:, 1:].sum().item()), 9 * (T - 1))
    teacher.bos_id = 3
    nll = -teacher(x).gather(-1, x[..., None])[..., 0][:, 1:]
    kept = nll[x[:, 1:] != 3]
    assert sample.teacher_nll(x, teacher) == (pytest.approx(kept.sum().item()), len(kept))


def test_mauve_tells_real_paths_from_shuffled_ones(maze_run):
    folder, _ = maze_run
    teacher, _, _ = sample.load_model(str(folder / "teacher.pt"), "cpu")
    rows = gd.load_data(gd.resolve(gd.Config())).val_rows(1000)
    a, b = (sample.teacher_features(x, teacher) for x in rows.split(500))
    order = torch.rand(500, 10, generator=gd.rng(0)).argsort(1)
    shuffled = sample.teacher_features(rows[:500].gather(1, order), teacher)
    same, spread = sample.mauve(a, b)
    assert same > 0.9 and 0 < spread < 0.1
    assert sample.mauve(shuffled, b)[0] < 0.5


def test_degenerate_features_get_no_mauve():
    rng = np.random.default_rng(0)
    fine = rng.normal(size=(100, 8))
    for bad in (np.ones((100, 8)), np.repeat(fine[:3], 40, 0), np.full((100, 8), np.nan)):
        with pytest.raises(ValueError, match="features are distinct"):
            sample.mauve(bad, fine)
        with pytest.raises(ValueError, match="features are distinct"):
            sample.mauve(fine, bad)


def test_distinct_n_counts_different_n_grams():
    x = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 2]])
    assert sample.distinct_n(x, 1) == 3 / 8 and sample.distinct_n(x, 2) == 4 / 6


def evaluated(cli, folder, out, *args):
    status, said, err = cli(sample.main, "--ckpt", folder / "student-gumbel.pt",
                            folder / "student-none.pt", "--eval", "--judge", "teacher",
                            "--featurizer", "teacher", "-n", 100, "--out-dir", out, *args)
    assert status == 0, err
    return said, err, json.loads((out / "results.json").read_text())


def test_the_table_compares_students_and_is_resumed(maze_run, cli, tmp_path, monkeypatch):
    folder, _ = maze_run
    said, err, rows = evaluated(cli, folder, tmp_path, "--nfe", "1,3")
    assert [r["model"] for r in rows] == ["real text (ceiling)", "teacher"] + [
        f"{folder.name}/{m}" for m in ("gumbel", "gumbel", "mdlm", "mdlm")]
    by = {(r["model"].split("/")[-1], r.get("nfe")): r for r in rows}
    assert by["gumbel", 3]["gen_ppl"] < by["mdlm", 3]["gen_ppl"]
    assert by["gumbel", 3]["mauve"] > by["mdlm", 3]["mauve"]
    assert by["teacher", 10]["gen_ppl"] < by["gumbel", 1]["gen_ppl"]
    assert "nelbo" in by["mdlm", 1] and "nelbo" not in by["gumbel", 1]
    assert "agree_token" in by["gumbel", 1] and "agree_token" not in by["mdlm", 1]
    assert all(r["samples_s"] > 0 and 0 < r["distinct_2"] <= 1 for r in rows[1:])
    assert (tmp_path / "quality_vs_nfe.png").stat().st_size > 5000
    assert "few for MAUVE" in err

    made, real = [], sample.generate

    def generate(*args, **given):
        made.append(given.get("nfe", 2))
        return real(*args, **given)
    monkeypatch.setattr(sample, "generate", generate)
    again = evaluated(cli, folder, tmp_path, "--nfe", "1,3")[2]
    assert not made and again == rows
    assert len(evaluated(cli, folder, tmp_path, "--nfe", "1,2,3")[2]) == 8 and set(made) == {2}

    def other_text(cfg):
        data = gd.load_data(cfg)
        data.val = np.roll(data.val, 70)
        return data
    monkeypatch.setattr(sample, "load_data", other_text)
    other = evaluated(cli, folder, tmp_path, "--nfe", 1)[2]
    ceilings = [r["mauve"] for r in other if r["model"] == "real text (ceiling)"]
    assert len(other) == 8 + 4 and len(set(ceilings)) == 2

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "no picture: matplotlib is not installed" in evaluated(
        cli, folder, tmp_path, "--nfe", "1,3")[0]


def test_judges_from_a_folder(maze_run, gpt2_folder, cli, tmp_path):
    folder, _ = maze_run
    status, said, err = cli(sample.main, "--ckpt", folder / "student-gumbel.pt", "--eval", "--nfe",
                            1, "-n", 20, "--judge", gpt2_folder, "--featurizer", gpt2_folder,
                            "--out-dir", tmp_path / "eval")
    assert status == 0, err
    rows = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert all(1 < r["gen_ppl"] < 1e9 and 0 < r["mauve"] <= 1 for r in rows)


def test_bad_evaluations_are_refused_by_name(maze_run, cli, tmp_path):
    folder, _ = maze_run
    ckpt = folder / "student-gumbel.pt"
    own = ["--judge", "teacher", "--featurizer", "teacher"]
    text = tmp_path / "a.txt"
    text.write_text("to be or not to be\n" * 40)
    assert cli(gd.main, "--dataset", "text", "--train-files", text, "--seq-len", 10, "--n-layer", 1,
               "--n-head", 2, "--n-embd", 16, "--max-steps", 2, "--noise", "gumbel", "--nfe", 1,
               "--n-samples", 4, "--out-dir", tmp_path / "run")[0] == 0
    other = tmp_path / "run" / "student-gumbel.pt"
    for args, said in ((["--ckpt", ckpt, other, *own], "does not compare with"),
                       (["--ckpt", ckpt, "-n", 0, *own], "--n-samples 0"),
                       (["--ckpt", ckpt, *own, "--prompt", "b1"],
                        "--prompt does not go with --eval"),
                       (["--ckpt", ckpt, *own, "--exact"], "--exact does not go with --eval"),
                       (["--ckpt", ckpt, "--judge", "no/such"],
                        "--judge no/such: cannot be loaded"),
                       (["--ckpt", ckpt, "--judge", "teacher", "--featurizer", "no/such"],
                        "--featurizer no/such: cannot be loaded")):
        status, _, err = cli(sample.main, "--eval", "--out-dir", tmp_path / "e", *args)
        assert status == 1 and said in err, err


def test_texts_that_cannot_be_are_refused(maze_run, cli):
    folder, _ = maze_run
    given = ["--ckpt", folder / "student-gumbel.pt"]
    for args, said in ((["--prompt", "b1 " * 10], "nothing is left to fill in"),
                       (["--prompt", "b1 " * 10, "--exact"], "nothing is left to fill in"),
                       (["--exact", "--apd", 0.5], "--exact is --apd 0, not --apd 0.5"),
                       (["--exact", "--show-steps"], "--show-steps shows the steps"),
                       (["--length", 20], "beyond 10 tokens, a view of two blocks or more"),
                       (["--length", 0], "--length 0: must be 1 or more")):
        status, _, err = cli(sample.main, *given, *args)
        assert status == 1 and said in err, err


def test_texts_are_written_as_json_lines_and_steps_are_shown(maze_run, cli, tmp_path):
    folder, _ = maze_run
    given = ["--ckpt", folder / "student-gumbel.pt", "--nfe", 3]
    status, said, _ = cli(sample.main, *given, "-n", 7, "--out", tmp_path / "texts.jsonl",
                          "--batch-size", 2)
    rows = [json.loads(line) for line in open(tmp_path / "texts.jsonl")]
    assert status == 0 and [r["index"] for r in rows] == list(range(7))
    assert all(len(r["ids"]) == 10 and len(r["text"].split()) == 10 for r in rows)
    status, said, _ = cli(sample.main, *given, "-n", 1, "--show-steps", "--prompt", "b1 __ e1",
                          "--order", "first-hitting")
    steps = [line.split()[2:] for line in said.splitlines() if line.startswith("step ")]
    assert status == 0 and len(steps) == 3 and all(s[0] == "b1" and s[3] == "e1" for s in steps)
    counts = [s.count("_") for s in steps]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0


def test_the_teacher_writes_too(maze_run, cli):
    folder, rows = maze_run
    status, said, _ = cli(sample.main, "--ckpt", folder / "teacher.pt", "-n", 2)
    assert status == 0 and said.count("o") >= 22


@pytest.fixture(scope="module")
def block_run(tmp_path_factory):
    """Blocks of two tokens, hardly trained."""
    folder = tmp_path_factory.mktemp("blocks")
    gd.run(gd.Config(max_steps=4, eval_every=4, n_samples=20, nfe="1", n_layer=1, n_embd=8,
                     block_size=2, noise="gumbel", out_dir=str(folder)))
    return folder / "student-gumbel.pt"


def test_students_in_blocks_write_texts_of_other_lengths(block_run, cli, tmp_path):
    out = tmp_path / "texts.jsonl"
    for length in (4, 26):
        status, _, err = cli(sample.main, "--ckpt", block_run, "--length", length, "--nfe", 2,
                             "-n", 3, "--prompt", "b1 c1 d1", "--out", out)
        assert status == 0, err
        rows = [json.loads(line)["ids"] for line in out.read_text().splitlines()]
        assert [len(row) for row in rows] == [length] * 3
        assert all(row[:3] == [1, 2, 3] for row in rows)
    status, _, err = cli(sample.main, "--ckpt", block_run, "--prompt", "b1 _ c1")
    assert status == 1 and "does not see what comes after the gap" in err
    status, _, err = cli(sample.main, "--ckpt", block_run, "--length", 15)
    assert status == 1 and "--length 15: a text of 15 tokens cannot be written in blocks" in err


def test_calls_of_all_blocks_are_counted(block_run, cli, tmp_path):
    status, said, err = cli(sample.main, "--ckpt", block_run, "--eval", "--judge", "teacher",
                            "--featurizer", "teacher", "-n", 50, "--nfe", "1,2,3", "--out-dir",
                            tmp_path)
    assert status == 0, err
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [r["nfe"] for r in rows[2:]] == [5, 10, 10]          # two tokens take two calls at most


def test_apd_reports_its_rounds_and_whole_students_only_draft(maze_run, block_run, cli):
    folder, _ = maze_run
    for ratio in (0.5, 0):
        status, said, err = cli(sample.main, "--ckpt", folder / "student-none.pt", "--apd", ratio,
                                "--lookahead", 4, "-n", 50)
        assert status == 0 and "serial teacher  10 calls" in said, err
    assert "exact mode" in said and "50 of 50" in said          # R = 0
    status, said, _ = cli(sample.main, "--ckpt", folder / "student-none.pt", "--apd", 1,
                          "--lookahead", 4, "-n", 50)
    assert "APD, R = 1      3.00 rounds" in said
    for mode in (["--exact"], ["--apd", 0.5]):
        status, _, err = cli(sample.main, "--ckpt", block_run, *mode)
        assert status == 1 and f"{mode[0]}: the student must draft a whole text at once" in err
    status, _, err = cli(sample.main, "--ckpt", folder / "student-none.pt", "--apd", 2)
    assert status == 1 and "--apd 2.0: must lie between 0 and 1" in err
    status, _, err = cli(sample.main, "--ckpt", folder / "student-none.pt", "--length", 20)
    assert status == 1 and "--length 20: a text of 20 tokens cannot be written" in err


@pytest.mark.parametrize("block_size", [6, 2, 1])
def test_the_bound_is_the_mean_over_times_and_masks(block_size):
    """For a student that knows nothing it is ln V; for single tokens the AR likelihood."""
    torch.manual_seed(0)
    student = gd.Student(tiny_config(noise="none", block_size=block_size), V).eval()
    x0 = torch.randint(V, (300, T), generator=gd.rng(1))
    if block_size == 1:
        mean, error = sample.nelbo(student, x0)
        ones = torch.ones(300, T)
        assert mean == pytest.approx(gd.student_loss(student, None, x0, ones, (0,)).item())
        assert error < 1e-7
        return
    torch.nn.init.zeros_(student.net.head.weight)
    mean, error = sample.nelbo(student, x0, 50)
    assert abs(mean - np.log(V)) < 4 * error < 0.2
