"""sample.py: checkpoints, prompts, draws, films.   python -m pytest tests/test_sample.py"""

import json

import pytest
import torch

import blocks
import data
import gumbel_distill as gd
import sample
from conftest import TINY

NAMES = list(sample.MODELS)
V, T = 36, 10                                                   # of the maze


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a checkpoint of each model, hardly trained."""
    folder = tmp_path_factory.mktemp("run")
    students = {name: sample.MODELS[name] for name in NAMES if name != "teacher"}
    gd.main(students, blocks.BlockConfig, [*TINY, "--nfe", "2", "--out-dir", str(folder)])
    return folder


def changed(path, to, **parts):
    """Write the checkpoint at `path`, with other parts, to a file."""
    to.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**torch.load(path, weights_only=True), **parts}, to)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_averaged_weights_of_the_class_it_names(name, run):
    model, tokenizer, saved = sample.load_model(run / f"{name}.pt")
    assert type(model) is sample.MODELS[name] and not model.training
    assert tokenizer.decode([0, 1]) == "a1 b1" and saved["step"] == 4
    assert all(p.equal(saved["ema"][key]) for key, p in model.state_dict().items())
    assert any(not p.equal(saved["model"][key]) for key, p in model.state_dict().items())


def test_files_that_are_no_checkpoint_are_refused_in_one_line(run, tmp_path, cli):
    whole = (run / "mdlm.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("To be, or not to be")
    torch.save({"weights": torch.ones(3)}, tmp_path / "foreign.pt")
    changed(run / "mdlm.pt", tmp_path / "code.pt", more=gd.Maze())         # code would run
    changed(run / "mdlm.pt", tmp_path / "named.pt", name="os.system")
    changed(run / "mdlm.pt", tmp_path / "other.pt", name="gumbel")
    for name in "torn text foreign code named other missing".split():
        status, out, err = cli(sample.main, "--ckpt", tmp_path / f"{name}.pt")
        assert status == 1 and f"{name}.pt: " in err and "\n" not in err and not out
        assert ("'os.system'" in err) == (name == "named")


def test_without_a_name_the_newest_student_that_loads_writes(run, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "gumbel_distill.py" in cli(sample.main)[2]
    for name in ("mdlm", "gumbel", "teacher"):  # the teacher is the newest
        changed(run / f"{name}.pt", tmp_path / f"out/a/{name}.pt")
    changed(run / "gumbel.pt", tmp_path / "out/a/mine.pt", name="mine")
    (tmp_path / "out/b.pt").write_bytes(b"")
    _, out, err = cli(sample.main)
    assert out.startswith("out/a/gumbel.pt") and "'mine'" in err and "out/b.pt" in err


def test_a_model_that_stopped_half_way_and_models_of_other_tokens_are_told(run, tmp_path, cli):
    half, other = tmp_path / "half.pt", tmp_path / "other.pt"
    changed(run / "mdlm.pt", half, step=3)
    changed(run / "mdlm.pt", other, tokenizer=dict(gd.Maze.tokenizer, sep="-"))
    assert f"{half} is half way, at step 3 of 4" in cli(sample.main, "--ckpt", half)[2]
    status, _, err = cli(sample.main, "--ckpt", run / "mdlm.pt", other)
    assert status == 1 and str(other) in err


def test_a_prompt_has_a_gap_at_each_underscore_and_after_it():
    letters = data.Tokenizer(list("abc "))                      # there a space is a token
    assert sample.prompt_ids("ab __c", letters, 7).tolist() == [0, 1, 3, 4, 4, 2, 4]


def test_a_space_before_a_gap_belongs_to_what_fills_it_and_tokens_share_a_letter(real_data):
    bpe, text = data.Tokenizer(size=1024), "He \u201csat\u201d"
    ids = bpe.encode(text)
    right = [*ids, 1024, 1024, *bpe.encode(" sat"), 1024]
    assert sample.prompt_ids(f"{text} __ sat  ", bpe, len(right)).tolist() == right
    assert "\ufffd" in bpe.decode(ids[-1:]) and sample.show(torch.tensor([ids]), bpe, "") == text


def test_what_cannot_be_written_is_refused_with_its_value_before_any_text(run, cli, tmp_path):
    out = tmp_path / "no/such/folder.jsonl"
    for args, said in ((["--prompt", "b1 " * 10], "10 tokens"), (["--prompt", "_" * 11], "11 tok"),
                       (["--prompt", "zz"], "'zz'"), (["--out", out], str(out)), (["-n", 0], "0"),
                       (["--nfe", 0], "nfe"), (["--top-p", 2], "2"), (["--tau", "nan"], "nan")):
        status, text, err = cli(sample.main, "--ckpt", run / "mdlm.pt", *args)
        assert status == 1 and said in err and "\n" not in err and not text, (args, err)


@pytest.mark.quick
@pytest.mark.parametrize("temperature, top_p, kept", [
    (0.5, 1.0, range(5)), (2.0, 1.0, range(5)), (1.0, 0.0, [1]), (1.0, 0.3, [1]),
    (1.0, 0.5, [1, 3]), (1.0, 0.75, [1, 3, 4]), (0.5, 0.8, [1, 3])])
def test_a_draw_is_softmax_up_to_the_token_that_passes_top_p(temperature, top_p, kept):
    logits, kept = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log(), list(kept)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = sample.nucleus(logits.expand(20_000, 5), u, temperature, top_p)
    expected = torch.zeros(5)
    expected[kept] = (logits[kept] / temperature).softmax(dim=-1)
    assert torch.allclose(drawn.bincount(minlength=5) / 20_000, expected, atol=1e-4)


@pytest.mark.quick
def test_a_plain_draw_is_that_of_the_student_bit_for_bit_and_a_cold_one_the_argmax():
    logits = torch.randn(5000, 50, generator=gd.rng("draws"), dtype=torch.float64)
    u = logits.softmax(dim=-1).cumsum(dim=-1)[:, 25]            # at the edge of two tokens
    assert sample.nucleus(logits, u).equal(gd.Student.draw(None, logits, u))
    for temperature in (0.0, 5e-324, 1e-310, 1e-100, 1e-7):
        assert sample.nucleus(logits, u, temperature, top_p=0.5).equal(logits.argmax(dim=-1))


@pytest.mark.parametrize("name", NAMES)
def test_a_film_shows_the_steps_of_the_model_and_known_tokens_stay(name, run):
    """It follows from the noise alone. Here it meets what the network saw in each of its calls."""
    model, tokenizer, saved = sample.load_model(run / f"{name}.pt")
    known = sample.prompt_ids("b1 ___ e2", tokenizer, T)
    given = dict(nfe=10, tau=None, temperature=None, top_p=None)
    nfe = sample.settings_of("x", model, saved, known, given)["nfe"]
    step = sample.film_steps(model, 3, nfe, known, seed=0)[2]
    text, calls = gd.generate(model, 3, T, nfe=nfe, known=known)[2], []
    model.register_forward_pre_hook(
        lambda m, args: calls.append((getattr(m, "start", 0), args[0][0] == V)))
    xi, u = gd.sequence_noise(0, torch.tensor([2]), T, model)
    x = model.write(known[None], xi, u, nfe)[0]
    assert x.equal(text) and x[known < V].equal(known[known < V]) and (x < V).all()
    if name == "teacher":
        assert step.equal(torch.arange(1, T + 1) * (known == V))
        return
    for k in step.unique()[1:]:
        start, is_gap = calls.pop(0)
        assert is_gap.equal(step[start:start + len(is_gap)] >= k)
        if calls and not calls[0][1].any():  # a finished block is read once more
            calls.pop(0)
    assert not calls


def test_films_of_several_models_show_their_texts_filling_up(run, cli):
    paths = [run / f"{name}.pt" for name in ("mdlm", "teacher")]
    status, out, _ = cli(sample.main, "--ckpt", *paths, "--animate", "-n", 1, "--prompt", "b1 c1")
    frames = [frame.split("\n", 1)[1] for frame in out.split("text 0, step ")[1:]]
    known = torch.tensor([1, 2] + [V] * 8)
    texts = [gd.generate(sample.load_model(path)[0], 1, T, 0, 2, known)[0] for path in paths]
    assert status == 0 and len(frames) == 1 + T                 # the teacher fills one in each
    for frame, x in ((frames[0], [known, known]), (frames[-1], texts)):
        assert frame.startswith(gd.Maze().show(torch.stack(x)))


def test_texts_are_shown_whole_without_control_characters():
    words = data.Tokenizer(["a", "\x1b[2J", "\t", "\x07", "\n", " <end>"])
    assert sample.show(torch.arange(6)[None], words, "text") == "a\\x1b[2J\\t\\x07\n <end>"
    words = data.Tokenizer(["a", data.END], " ")
    x = torch.tensor([[0, 2, 0, 1]])                            # 2 is a gap
    assert [sample.show(x, words, name) for name in ("cities", "text")] == ["a _ a", "a _ a <end>"]


def test_a_line_of_json_says_how_its_text_is_written_again(run, cli, tmp_path):
    paths = [run / f"{name}.pt" for name in ("mdlm", "gumbel", "bd3lm-gumbel", "teacher")]
    given = ["--nfe", 5, "--tau", 0.5, "--top-p", 0.7, "--seed", 3, "--prompt", "b1", "-n", 3]
    assert cli(sample.main, "--ckpt", *paths, *given, "--out", tmp_path / "a")[0] == 0
    rows = [json.loads(line) for line in open(tmp_path / "a")]
    assert [row["index"] for row in rows] == [0, 1, 2] * 4
    for row in rows:
        model, tokenizer, _ = sample.load_model(row["ckpt"])
        model.draw = lambda logits, u: sample.nucleus(logits, u, row["temperature"], row["top_p"])
        known = sample.prompt_ids(row["prompt"], tokenizer, T)
        x = gd.generate(model, 3, T, row["seed"], row["nfe"], known, row["tau"])[row["index"]]
        assert row["ids"] == x.tolist() and row["text"] == tokenizer.decode(x)


def test_flags_without_effect_are_named(run, cli):
    for name, args, ignored in (
            ("teacher", "--temperature 0 --top-p .1 --nfe 2 --tau .5", ["nfe", "temp", "top_p"]),
            ("mdlm", "--tau .5 --top-p .5 --temperature .5", ["tau 0.5"]),
            ("mdlm", "--top-p .5 --temperature 1e-9", ["top_p 0.5"]),
            ("gumbel", "--top-p .5 --tau .5 --nfe 3", ["top_p 0.5"]),
            ("bd3lm", "--nfe 3", ["nfe 3"]), ("mdlm", "--nfe 11", ["nfe 11"]),
            ("bd3lm", "--prompt b1___e2", []), ("bd3lm", "--prompt ________f5", [""]),
            ("teacher", "--prompt b1_d1", [""]), ("teacher", "--prompt b1", [])):
        _, _, err = cli(sample.main, "--ckpt", run / f"{name}.pt", "-n", 1, *args.split())
        assert len(err.splitlines()) == len(ignored), err
        assert all(f"note: {said}" in err for said in ignored)
