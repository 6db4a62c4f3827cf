"""sample.py: prompts, samplers, films, exact mode.   python -m pytest tests/test_sample.py"""

import json
import re
import subprocess
import sys

import pytest
import torch

import gumbel_distill as gd
import sample
from conftest import CPU, LETTERS, ROOT

V, T = 7, 6


def test_texts_do_not_depend_on_the_batch(tiny):
    _, teacher, student = tiny
    given = dict(nfe=4, temperature=1.0)
    whole = gd.generate(student, 11, T, 3, **given)
    assert whole.equal(gd.generate(student, 11, T, 3, batch_size=1, **given))
    assert whole[:5].equal(gd.generate(student, 5, T, 3, batch_size=4, **given))
    assert gd.generate(teacher, 11, T, 3).equal(gd.generate(teacher, 11, T, 3, batch_size=2))


def test_tokens_of_the_prompt_stay_and_gaps_are_filled(tiny):
    _, _, student = tiny
    known = sample.prompt_ids("ab__c", LETTERS, T)
    assert known.tolist() == [0, 1, V, V, 2, V]
    for nfe in (1, 2, 50):
        x = gd.generate(student, 20, T, 0, known, nfe=nfe, temperature=1.0)
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


def test_texts_that_cannot_be_are_refused(maze_run, cli):
    folder, _ = maze_run
    given = ["--ckpt", folder / "gumbel.pt"]
    for args, said in ((["--prompt", "b1 " * 10], "--prompt"),
                       (["--prompt", "b1 " * 10, "--exact"], "--prompt"),
                       (["--nfe", 1, 2], "--nfe"), (["--eval"], "--eval"),
                       (["--animate", "--exact"], "--animate"),
                       (["--animate", "--out", "x"], "--animate"),
                       (["--ckpt", folder / "mdlm.pt", folder / "mdlm.pt"], "one name")):
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
        settings = {name: r[name] for name in ("nfe", "tau", "temperature", "top_p")}
        assert gd.generate(model, 7, 10, r["seed"], **settings)[r["index"]].tolist() == r["ids"]


def test_a_text_is_shown_as_it_unmasks(maze_run, cli, tmp_path):
    """Frame by frame: known tokens stand from the start, none goes, the last frame is the text."""
    folder, _ = maze_run
    for name in ("mdlm", "gumbel", "teacher"):
        model, tokenizer, _ = gd.load_model(str(folder / f"{name}.pt"), "cpu")
        known = sample.prompt_ids("b1 __ e1", tokenizer, 10)
        settings = {"tau": 1.0}
        if name != "teacher":
            settings.update(nfe=3, temperature=float(name == "mdlm"))
        film = sample.film(model, 4, 0, known, **settings)
        assert film[0].equal(known) and len(film) == (11 if name == "teacher" else 4)
        for before, after in zip(film, film[1:]):
            assert (before == 36).sum() >= (after == 36).sum()
            assert after[before != 36].equal(before[before != 36])
        assert film[-1].equal(gd.generate(model, 5, 10, 0, known, **settings)[4])
    status, said, err = cli(sample.main, "--ckpt", folder / "mdlm.pt", folder / "gumbel.pt",
                            "--nfe", 3, "--animate", "--prompt", "b1 __ e1", "-n", 1)
    n = said.count("/mdlm, step")                               # a step may fill nothing
    assert status == 0 and n == said.count("/gumbel, step") and 2 <= n <= 4, err
    assert [said.count(f", step {k}") for k in range(n)] == [2] * n
    frames = said.split("/mdlm, step ")[1:]
    # the start, b1 and e1 of both
    cells = [len(re.findall(" [ox] ", frame)) for frame in frames]
    assert cells[0] == 6 and cells == sorted(cells) and 20 <= cells[-1] <= 22


def test_running_text_is_wrapped_and_what_is_new_is_marked(monkeypatch, capsys):
    words = gd.Tokenizer(list("abc\n"))
    frame, before = torch.tensor([0, 1, 3, 4, 2]), torch.tensor([0, 4, 3, 4, 4])
    lines = sample.lines_of(frame, before, words, width=3)
    assert lines == [[("a", "old"), ("b", "new"), ("\u21b5", "old")],
                     [("_", "masked"), ("c", "new"), ("", "old")]]
    monkeypatch.setattr(sample.sys.stdout, "isatty", lambda: True, raising=False)
    films = [[torch.full((5,), 4), frame], [torch.full((5,), 4), frame, frame]]
    sample.play(films, ["mdlm", "gumbel"], words, is_maze=False, pause=0)
    said = capsys.readouterr().out
    assert said.count("\033[6A\033[J") == 2                     # two frames overwrite the last one
    assert said.count("\033[32mc\033[0m") == 3                  # green where it is new


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
    if model.reads_noise:
        assert texts["--apd 1"] == gd.generate(model, 50, 10, nfe=1).tolist()


def test_only_students_of_whole_texts_draft(maze_run, block_run, cli):
    folder, _ = maze_run
    for mode in (["--exact"], ["--apd", 0.5]):
        for ckpt in (block_run, folder / "teacher.pt"):
            status, _, err = cli(sample.main, "--ckpt", ckpt, *mode)
            assert status == 1 and str(ckpt) in err and "--exact" in err
    status, _, err = cli(sample.main, "--ckpt", folder / "mdlm.pt", "--apd", 2)
    assert status == 1 and "--apd 2.0" in err


def test_tokens_that_share_a_character_are_decoded_together(real_data):
    bpe = gd.Tokenizer(size=1024)
    text = "He said \u201cit\u2019s fine\u201d"
    ids = torch.tensor(bpe.encode(text).tolist())
    assert any("\ufffd" in bpe.decode([i]) for i in ids)        # some token is half a character

    def shown(ids):
        lines = sample.lines_of(ids, ids, bpe, width=10**6)
        return "".join(piece for line in lines for piece, _ in line)
    assert shown(ids) == text
    for k in range(len(ids)):  # a gap anywhere, also within a character
        gapped = ids.clone()
        gapped[k] = 1024
        assert "_" in shown(gapped) and "\ufffd" not in shown(gapped)


def test_control_characters_are_written_out():
    words = gd.Tokenizer(["a", "\x1b[2J", "\t", "\x07"])
    frame = torch.arange(4)
    said = "\n".join(sample.panels([(0, frame, frame)], ["x"], words, False, False))
    assert "a\\x1b[2J\\t\\x07" in said and not set("\x1b\t\x07") & set(said)
    assert sample.visible("a\nb\x1b") == "a\nb\\x1b"


def test_mixing_needs_a_student(tiny):
    _, teacher, _ = tiny
    with pytest.raises(ValueError, match="without a student"):
        sample.draft_and_verify(None, teacher, torch.zeros(1, T, V), ratio=0.5)


def test_settings_without_effect_are_named(maze_run, cli):
    folder, _ = maze_run
    given = ["--nfe", 11, "--tau", 0.5, "-n", 1]
    _, _, err = cli(sample.main, "--ckpt", folder / "mdlm.pt", *given)
    assert "--nfe 11 has no effect" in err and "--tau 0.5 has no effect" in err
    _, _, err = cli(sample.main, "--ckpt", folder / "gumbel.pt", *given)
    assert "--nfe 11 has no effect" in err and "--tau" not in err


def test_without_temperature_the_noise_decides_or_else_a_draw(maze_run, cli, tmp_path):
    folder, _ = maze_run
    for name, temperature in (("mdlm", 1.0), ("gumbel", 0.0)):
        cli(sample.main, "--ckpt", folder / f"{name}.pt", "-n", 1, "--out", tmp_path / "a.jsonl")
        assert json.loads((tmp_path / "a.jsonl").read_text())["temperature"] == temperature


def test_exact_mode_says_that_it_shows_four_texts(maze_run, cli):
    folder, _ = maze_run
    for n, is_said in ((4, False), (5, True)):
        _, said, _ = cli(sample.main, "--ckpt", folder / "gumbel.pt", "--exact", "-n", n)
        assert ("the first 4 of 5 texts" in said) == is_said
        assert said.count("\n1 |") == 4                         # drawings


def test_a_reader_that_has_enough_ends_it_without_an_error(maze_run):
    folder, _ = maze_run
    command = [sys.executable, ROOT / "sample.py", "--ckpt", folder / "gumbel.pt", "-n", "2000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        p.stdout.readline()
        p.stdout.close()
        err = p.stderr.read().decode()
    assert "rror" not in err and "Broken" not in err
