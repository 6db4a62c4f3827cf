"""The commands, from the shell's side.   python -m pytest tests/test_cli.py"""

import json
import os
import re
import subprocess
import sys

import pytest

import ablation
import gumbel_distill as gd
import sample
import train_teacher
from conftest import ROOT

TINY = ("--n-layer 1 --n-head 2 --n-embd 16 --batch-size 8 --max-steps 4 --eval-every 2 --warmup 1 "
        "--n-samples 20").split()


def text_file(folder, text="to be or not to be\n" * 40):
    path = folder / "text.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("script", ["gumbel_distill.py", "train_teacher.py", "sample.py"])
def test_help_answers_without_the_slow_imports(script):
    code = (f"import sys, runpy; sys.argv = [{script!r}, '--help']\n"
            f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
            "except SystemExit: pass\n"
            "slow = {'datasets', 'tiktoken', 'mauve', 'transformers', 'matplotlib'}\n"
            "print('SLOW', sorted(slow & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "--seed" in done.stdout and "SLOW []" in done.stdout


def test_every_flag_means_the_same_in_every_script(cli, monkeypatch):
    """A flag's block of the help text, up to the next flag, is the same but for the default."""
    monkeypatch.setenv("COLUMNS", "100")
    blocks = {}
    for main in (gd.main, train_teacher.main, sample.main):
        for block in re.split(r"\n  (?=-)", cli(main, "--help")[1])[1:]:
            block = re.sub(r" \([^()]*\)$", "", " ".join(block.split()))
            blocks.setdefault(block.split()[0], []).append(block)
    shared = {flag: texts for flag, texts in blocks.items() if len(texts) > 1}
    assert len(shared) > 20 and all(len(set(texts)) == 1 for texts in shared.values())


@pytest.mark.parametrize("args, said", [
    (["--dataset", "mazes"], "--dataset mazes: choose from maze, cities, text"),
    (["--noise", "none,pink"], "--noise none,pink: choose from none, gumbel"),
    (["--nfe", "0"], "--nfe 0"), (["--nfe", "1,x"], "--nfe 1,x"),
    (["--tau", "-1"], "--tau -1: give numbers from 0"), (["--temperature", "0,x"], "0,x: give"),
    (["--nfe", "1.5"], "whole numbers"), (["--top-p", "2"], "--top-p 2.0"),
    (["--n-samples", "0"], "--n-samples 0"), (["--batch-size", "0"], "--batch-size 0"),
    (["--batch-size", "10", "--grad-accum", "4"], "--grad-accum 4"),
    (["--n-embd", "30"], "multiple of 4"), (["--order", "right"], "--order right"),
    (["--order", "left,random"], "--order left,random"), (["--lr", "nan"], "--lr nan"),
    (["--train-files", "x"], "--train-files goes with --dataset text"),
    (["--dataset", "text"], "--dataset text needs --train-files"),
    (["--dataset", "text", "--train-files", "no/such/*.txt"], "no/such/*.txt: no file matches"),
    (["--teacher", "no/such.pt"], "no/such.pt: no such checkpoint"),
    (["--out-dir", "/proc/nowhere"], "--out-dir /proc/nowhere: cannot be written"),
])
def test_bad_arguments_get_one_clear_line(args, said, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = cli(gd.main, *args)
    assert status == 1 and said in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.skipif(gd.torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_a_gpu_that_is_not_there_is_named(cli):
    status, _, err = cli(gd.main, "--device", "cuda")
    assert status == 1 and "--device cuda" in err and "--device cpu" in err


@pytest.mark.parametrize("text, said", [
    ("", "too few"), ("  \n", "too few"), (b"\xff\xfe\x00b", "utf-8"), (b"ab\0cd", "binary"),
    ("short", "tokens, too few")])
def test_unusable_text_is_refused_by_name(text, said, cli, tmp_path):
    path = text_file(tmp_path, text)
    status, _, err = cli(gd.main, "--dataset", "text", "--train-files", path, "--out-dir",
                         tmp_path / "run")
    assert status == 1 and said in err
    assert "too few" in said or str(path) in err
    assert not (tmp_path / "run").exists()


def test_a_validation_character_outside_the_vocabulary_is_named(cli, tmp_path):
    val = tmp_path / "val.txt"
    val.write_text("to be Ω" * 100)
    status, _, err = cli(gd.main, "--dataset", "text", "--train-files", text_file(tmp_path),
                         "--val-files", val)
    assert status == 1 and "'Ω'" in err and "--val-files" in err


def test_gpt2_tokens_without_a_network_say_what_to_do(cli, tmp_path, monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    status, _, err = cli(gd.main, "--dataset", "text", "--train-files", text_file(tmp_path),
                         "--tokenizer", "gpt2")
    assert status == 1 and "TIKTOKEN_CACHE_DIR" in err and "--tokenizer char" in err


def test_out_of_memory_names_the_flags(cli):
    def greedy():
        gd.torch.empty(2**60, dtype=gd.torch.uint8)
    status, _, err = cli(greedy)
    assert status == 1 and "--batch-size" in err and "--grad-accum" in err


def test_a_programming_error_keeps_its_traceback(cli):
    def broken():
        raise RuntimeError("shapes disagree")
    with pytest.raises(RuntimeError):
        cli(broken)


def test_text_end_to_end_in_a_few_steps(cli, tmp_path):
    out = tmp_path / "run"
    common = ["--dataset", "text", "--train-files", text_file(tmp_path), "--seq-len", 8,
              "--out-dir", out, *TINY]
    status, said, _ = cli(train_teacher.main, *common)
    assert status == 0 and "20 samples: val_loss" in said
    noises = "none,gumbel,gaussian,uniform,independent"
    status, said, err = cli(gd.main, *common, "--noise", noises, "--nfe", "1,2")
    assert status == 0, err
    rows = json.loads((out / "results.json").read_text())
    models = {r["model"] for r in rows}
    assert {"teacher", "mdlm", "gumbel", "gaussian", "uniform", "independent", "best constant text",
            "exact, gumbel", "exact, no student"} <= models
    gumbel = next(r for r in rows if r["model"] == "gumbel")
    assert {"nfe", "temperature", "tau", "agree_token", "agree_seq", "accept", "teacher_nll",
            "entropy", "val_loss", "seconds"} < gumbel.keys()
    assert gumbel["val_kind"] == "conditional"
    assert next(r for r in rows if r["model"] == "mdlm")["val_kind"] == "NELBO"
    exact = next(r for r in rows if r["model"] == "exact, gumbel")
    assert exact["equal"] == 1 and 1 <= exact["rounds"] <= 8

    ckpt = out / "student-gumbel.pt"
    call = ["--ckpt", ckpt, "-n", 3, "--nfe", 2, "--prompt", "to b"]
    status, said, _ = cli(sample.main, *call)
    assert status == 0 and said.count("to b") == 3
    assert cli(sample.main, *call)[1] == said
    assert cli(sample.main, *call, "--seed", 1, "--temperature", 1)[1] != said
    for args, text in ((["--prompt", "xyz"], "'x'"), (["--prompt", "to be or not"], "12 tokens"),
                       (["-n", 0], "--n-samples 0"), (["--nfe", 0], "--nfe 0"),
                       (["--exact", "--tau", 0.5], "--tau 1"),
                       (["--exact", "--ckpt", out / "teacher.pt"], "holds a teacher"),
                       (["--exact", "--prompt", "to_b"], "cannot fill a gap"),
                       (["--prompt", "to" + 7 * "_"], "9 tokens"), (["--tau", "0,1"], "--tau 0,1"),
                       (["--ckpt", ckpt, ckpt], "one checkpoint"),
                       (["--exact", "--teacher", ckpt], "holds a student")):
        status, _, err = cli(sample.main, "--ckpt", ckpt, *args)
        assert status == 1 and text in err and err.count("\n") == 1
    status, said, _ = cli(sample.main, "--ckpt", ckpt, "--exact", "-n", 30)
    assert status == 0 and "equal to serial 30 of 30" in said and "rounds per text" in said

    apart = ["--out-dir", tmp_path / "apart", "--teacher", out / "teacher.pt", "--noise", "gumbel"]
    assert cli(gd.main, *common, *apart, "--nfe", 1)[0] == 0
    ckpt = tmp_path / "apart" / "student-gumbel.pt"
    status, said, _ = cli(sample.main, "--ckpt", ckpt, "--exact")
    assert status == 0 and "equal to serial 4 of 4" in said

    (tmp_path / "cut.pt").write_bytes(ckpt.read_bytes()[:1000])
    status, _, err = cli(sample.main, "--ckpt", tmp_path / "cut.pt")
    assert status == 1 and "cut off" in err


def test_teachers_of_other_data_or_vocabulary_or_length_are_refused(cli, tmp_path):
    def call(main, text, name, *args):
        path = tmp_path / f"{name}.txt"
        path.write_text(text)
        return cli(main, "--dataset", "text", "--train-files", path, *TINY, *args)
    out = ["--out-dir", tmp_path / "run"]
    text = "to be or not to be\n" * 40
    assert call(train_teacher.main, text, "a", "--seq-len", 8, *out)[0] == 0
    for name, other, length, said in (("b", text[::-1], 8, "other data"),
                                      ("c", text, 6, "--seq-len"),
                                      ("d", text + "xyz", 8, "vocabulary")):
        status, _, err = call(gd.main, other, name, "--seq-len", length, *out)
        assert status == 1 and said in err and "teacher.pt" in err


def test_sample_without_any_student_says_what_to_do(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = cli(sample.main)
    assert status == 1 and "python gumbel_distill.py" in err


def test_sample_takes_the_newest_student(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--dataset", "text", "--train-files", text_file(tmp_path), "--seq-len", 8, *TINY]
    for folder in ("out/a", "out/b"):
        assert cli(gd.main, *common, "--out-dir", folder, "--noise", "gumbel", "--nfe", 1)[0] == 0
    os.utime("out/a/student-gumbel.pt")
    assert "out/a/student-gumbel.pt: gumbel" in cli(sample.main)[1]


def test_the_ablation_refuses_what_its_rows_decide(cli, tmp_path):
    for args in (("--noise", "none"), ("--tau", "0.8,1"), ("--dataset", "cities"), ("--clip",)):
        status, _, err = cli(gd.main, "--ablate", *args, "--out-dir", tmp_path / "a")
        assert status == 1 and args[0] in err and "leave it out" in err, err
    assert not (tmp_path / "a").exists()


def test_the_ablation_trains_what_is_missing_and_is_a_table_of_means(
        cli, tmp_path, monkeypatch, capsys):
    """Three rows of it; what the command prints is what it writes."""
    monkeypatch.setattr(ablation, "ABLATION", [
        ("MDLM", dict(noise="none"), 2), ("Gumbel Distillation", dict(), 1),
        ("blocks", dict(noise="none", block_size=5), 1)])
    call = (gd.main, "--ablate", *TINY, "--out-dir", tmp_path)
    status, said, err = cli(*call)
    assert status == 0, err
    table = json.loads((tmp_path / "ablation.json").read_text())
    names = [(r["model"], r["map"], r["seeds"], r["nfe"]) for r in table if "APD" not in r["model"]]
    assert names == [("MDLM", "", 2, 1), ("MDLM", "", 2, 3),
                     *[("Gumbel Distillation", m, 1, n) for m in ("softmax", "draft")
                       for n in (1, 3)], ("blocks", "", 1, 2), ("blocks", "", 1, 6)]
    assert sum("APD" in r["model"] for r in table) == 3
    seeds = [json.loads((tmp_path / str(i) / "MDLM" / "results.json").read_text()) for i in (0, 1)]
    losses = [next(r["val_loss"] for r in rows if r["model"] == "mdlm") for rows in seeds]
    assert table[0]["val_loss"] == pytest.approx(sum(losses) / 2)
    assert table[0]["val_loss_sd"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert said.count(" done, ") == 5 and "Gumbel Distillation + APD" in said
    checkpoint = tmp_path / "1" / "MDLM" / "student-none.pt"
    before = checkpoint.stat().st_mtime_ns
    (tmp_path / "0" / "blocks" / "student-none.pt").unlink()
    assert cli(*call)[0] == 0
    assert json.loads((tmp_path / "ablation.json").read_text()) == table
    assert checkpoint.stat().st_mtime_ns == before
    log = (tmp_path / "0" / "blocks" / "log.txt").read_text()
    assert "bd3lm: device cpu" in log and "finished, reused" not in log
