"""The commands, from the shell's side.   python -m pytest tests/test_cli.py"""

import argparse
import errno
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import ablation
import gumbel_distill as gd
import judge
import sample
import train_teacher
from conftest import ROOT

TINY = ("--n-layer 1 --n-head 2 --n-embd 16 --batch-size 8 --max-steps 4 --eval-every 2 --warmup 1 "
        "--n-samples 20").split()
CPU = ["--device", "cpu", "--dtype", "float32", "--no-compile"]
TO_BE = "to be or not to be\n" * 40


def text_file(folder, text=TO_BE):
    path = folder / "text.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def assert_refused(answer, *said):
    """One line of error; it contains all of `said`."""
    status, _, err = answer
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(str(part) in err for part in said), err


HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        pass
slow = {"datasets", "tiktoken", "mauve", "transformers", "matplotlib"}
print("SLOW", sorted(slow & set(sys.modules)))
"""


def test_help_answers_without_the_slow_imports():
    scripts = [path.name for path in ROOT.glob("*.py") if path.stem not in ("config", "data")]
    done = subprocess.run([sys.executable, "-c", HELP, *scripts], capture_output=True, text=True,
                          cwd=ROOT)
    assert len(scripts) == done.stdout.count("usage: ") == 5, done.stderr
    assert all(f"usage: {script}" in done.stdout for script in scripts)
    assert "SLOW []" in done.stdout, done.stdout[-200:]


def test_every_flag_means_the_same_in_every_script(cli, monkeypatch):
    """A flag's block of the help text, up to the next, is the same but for the default."""
    monkeypatch.setenv("COLUMNS", "100")
    blocks = {}
    for main in (gd.main, train_teacher.main, sample.main, judge.main, ablation.main):
        for block in re.split(r"\n  (?=-)|\n\n", cli(main, "--help")[1])[1:]:
            if not block.lstrip().startswith("--"):             # a title, or what stands below
                continue
            block = re.sub(r" \([^()]*\)$", "", " ".join(block.split()))
            blocks.setdefault(block.split()[0], []).append(block)
    shared = {flag: texts for flag, texts in blocks.items() if len(texts) > 1}
    assert len(shared) > 20
    for texts in shared.values():
        assert len(set(texts)) == 1, texts


@pytest.mark.parametrize("args, said", [
    ("--dataset mazes", ["--dataset", "mazes", "maze", "cities"]),
    ("--students mdlm pink", ["--students", "pink", "gumbel-draft"]),
    ("--tokenizer gpt2-77", ["--tokenizer", "gpt2-77", "gpt2-1024"]),
    ("--labels none", ["--labels", "none", "teacher"]),
    ("--dtype float16", ["--dtype", "float16", "bfloat16"]),
    ("--schedule step", ["--schedule", "step", "cosine"]),
    ("--nfe 0", ["--nfe", "0"]), ("--nfe 3 0", ["--nfe", "0"]), ("--nfe 1 x", ["--nfe", "x"]),
    ("--nfe 1.5", ["--nfe", "1.5"]), ("--tau -1", ["--tau", "-1"]),
    ("--tau nan", ["--tau", "nan"]), ("--temperature 0 x", ["--temperature", "x"]),
    ("--n-samples 0", ["--n-samples", "0"]), ("--batch-size 0", ["--batch-size", "0"]),
    ("--batch-size 10 --grad-accum 4", ["--batch-size", "10", "--grad-accum", "4"]),
    ("--grad-accum 0", ["--grad-accum", "0"]), ("--seed -1", ["--seed", "-1"]),
    ("--n-embd 30", ["--n-embd", "30", "multiple of 4"]), ("--n-head 0", ["--n-head", "0"]),
    ("--lr nan", ["--lr", "nan"]), ("--lr -1", ["--lr", "-1"]),
    ("--seq-len 12", ["--seq-len", "12", "10"]), ("--dataset cities --seq-len 5", ["--seq-len 5"]),
    ("--block-size 3", ["--block-size", "3", "10"]), ("--block-size 0", ["--block-size", "0"]),
    ("--train-files x", ["--train-files", "maze", "--dataset text"]),
    ("--val-files x", ["--val-files", "maze", "--dataset text"]),
    ("--tokenizer gpt2", ["--tokenizer", "maze", "--dataset text"]),
    ("--max-tokens 9", ["--max-tokens", "maze", "--dataset text"]),
    ("--dataset text", ["--dataset text", "--train-files"]),
    ("--dataset lm1b --val-files x", ["--train-files"]),
    ("--dataset text --train-files no/such/*.txt", ["--train-files", "no/such/*.txt"]),
    ("--teacher no/such.pt", ["no/such.pt"]), ("--out-dir /proc/nowhere", ["/proc/nowhere"]),
])
def test_bad_arguments_get_one_clear_line(args, said, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(cli(gd.main, *TINY, *args.split()), *said)


@pytest.mark.parametrize("args", ["--top-p 2", "--dropout 2", "--ema 2"])
def test_shares_beyond_one_are_refused(args, cli, tmp_path):
    name, value = args.split()
    out = ["--out-dir", tmp_path, *TINY]
    assert_refused(cli(gd.main, *out, name, value), name, value)


def test_a_start_from_what_is_no_checkpoint_is_refused(cli, tmp_path):
    out = ["--out-dir", tmp_path, "--init-from", "no/such.pt", *TINY]
    assert_refused(cli(gd.main, *out, "--students", "mdlm"), "no/such.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
@pytest.mark.parametrize("main", [gd.main, train_teacher.main])
def test_a_gpu_that_is_not_there_is_named(main, cli):
    assert_refused(cli(main, "--device", "cuda"), "--device cuda", "--device cpu")


@pytest.mark.parametrize("text, said", [
    ("", "0 tokens"), ("  \n", "0 tokens"), (b"\xff\xfe\x00b", "utf-8"),
    (b"ab\0cd", "binary"), ("short", "--seq-len")])
def test_unusable_text_is_refused_by_name(text, said, cli, tmp_path):
    path = text_file(tmp_path, text)
    given = ["--dataset", "text", "--train-files", path, "--out-dir", tmp_path / "run"]
    assert_refused(cli(gd.main, *given), said, path if said in ("utf-8", "binary") else "")
    assert not list(tmp_path.glob("run/*"))


def test_a_validation_character_outside_the_vocabulary_is_named(cli, tmp_path):
    val = tmp_path / "val.txt"
    val.write_text("to be Ω" * 100)
    given = ["--dataset", "text", "--train-files", text_file(tmp_path), "--out-dir", tmp_path]
    assert_refused(cli(gd.main, *given, "--val-files", val), "'Ω'", "--val-files")


def test_gpt2_tokens_without_a_network_say_what_to_do(cli, tmp_path, monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    given = ["--dataset", "text", "--train-files", text_file(tmp_path), "--out-dir", tmp_path]
    assert_refused(cli(gd.main, *given, "--tokenizer", "gpt2"), "TIKTOKEN_CACHE_DIR", "char")


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error", [
    MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    torch.OutOfMemoryError("CUDA out of memory.\nSee the documentation"), MemoryError()])
def test_out_of_memory_names_the_flags(error, cli):
    assert_refused(cli(raising(error)), "out of memory", "--batch-size", "--grad-accum")


def test_out_of_memory_of_the_machine_itself_names_the_flags(cli):
    def greedy():
        torch.empty(2**60)
    assert_refused(cli(greedy), "out of memory", "--batch-size", "--grad-accum")


def test_a_full_disk_is_one_line(cli):
    full = OSError(errno.ENOSPC, "No space left on device", "out/maze/teacher.pt.tmp")
    assert_refused(cli(raising(full)), "No space left", "out/maze/teacher.pt.tmp")


@pytest.mark.parametrize("error", [
    RuntimeError("shapes disagree"), ValueError("a bug"), KeyError("a bug"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered")])
def test_a_programming_error_keeps_its_traceback(error, cli):
    with pytest.raises(type(error)) as caught:
        cli(raising(error))
    assert caught.value is error


def test_ctrl_c_ends_with_its_status_and_one_line(cli):
    status, _, err = cli(raising(KeyboardInterrupt()))
    assert status == 130 and err.count("\n") == 1


KINDS = ["mdlm", "gumbel", "gumbel-draft"]


def text_flags(folder):
    return ["--dataset", "text", "--train-files", text_file(folder), "--seq-len", 8, *CPU, *TINY]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A teacher and a student, hardly trained on text: (flags of the run, its folder)."""
    folder = tmp_path_factory.mktemp("text")
    flags = [*text_flags(folder), "--out-dir", folder / "run"]
    parser = gd.add_flags(argparse.ArgumentParser())
    gd.run(gd.Config(**vars(parser.parse_args([*map(str, flags), "--students", "gumbel"]))))
    return flags, folder / "run"


def test_text_end_to_end_in_a_few_steps(cli, tmp_path):
    out = tmp_path / "run"
    flags = [*text_flags(tmp_path), "--out-dir", out]
    status, said, err = cli(train_teacher.main, *flags)
    assert status == 0 and "20 samples: " in said, err
    assert [path.name for path in out.glob("*.pt")] == ["teacher.pt"]
    before = (out / "teacher.pt").stat().st_mtime_ns
    status, said, err = cli(gd.main, *flags, "--students", *KINDS, "--nfe", 1, 2)
    assert status == 0, err
    assert (out / "teacher.pt").stat().st_mtime_ns == before
    assert {path.stem for path in out.glob("*.pt")} == {"teacher", *KINDS}
    rows = json.loads((out / "results.json").read_text())
    assert {r["model"] for r in rows} == {"teacher", "teacher, other noise", *KINDS}
    for kind in KINDS:
        same = [r for r in rows if r["model"] == kind]
        assert {r["nfe"] for r in same} == {1, 2}
        assert {r["temperature"] for r in same} == {0, 1}
        for r in same:
            assert {"tau", "agree_token", "agree_seq", "teacher_nll", "entropy"} < {*r}
    assert all(word in said for word in ("agree_seq", *KINDS))
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    assert [(r["model"], r["step"]) for r in log] == [
        (name, step) for name in ("teacher", *KINDS) for step in (2, 4)]

    # sample.py: prompts
    call = ["--ckpt", out / "gumbel.pt", "-n", 3, "--nfe", 2, "--prompt", "to b"]
    status, said, _ = cli(sample.main, *call)
    assert status == 0 and said.count("to b") == 3
    assert cli(sample.main, *call)[1] == said
    assert cli(sample.main, *call, "--seed", 1, "--temperature", 1)[1] != said
    for kind in KINDS:
        status, said, err = cli(sample.main, "--ckpt", out / f"{kind}.pt", "--prompt", "t__be",
                                "-n", 2, "--out", tmp_path / "filled.jsonl")
        assert status == 0 and f": {kind}, step 4, text" in said, err
        texts = [json.loads(line)["text"] for line in open(tmp_path / "filled.jsonl")]
        assert len(texts) == 2 and all(re.fullmatch("t..be...", t, re.DOTALL) for t in texts)

    # exact mode and files
    for kind in KINDS:
        status, said, _ = cli(sample.main, "--ckpt", out / f"{kind}.pt", "--exact", "-n", 30)
        assert status == 0 and "30 of 30" in said and "rounds" in said
    status, said, _ = cli(sample.main, "--ckpt", out / "gumbel.pt", "--exact", "-n", 3, "--out",
                          tmp_path / "exact.jsonl")
    exact = [json.loads(line) for line in open(tmp_path / "exact.jsonl")]
    cli(sample.main, "--ckpt", out / "teacher.pt", "-n", 3, "--out", tmp_path / "serial.jsonl")
    serial = [json.loads(line) for line in open(tmp_path / "serial.jsonl")]
    assert [r["ids"] for r in exact] == [r["ids"] for r in serial]
    assert all(len(r["ids"]) == len(r["text"]) == 8 for r in exact)

    # a teacher from elsewhere
    apart = ["--out-dir", tmp_path / "apart", "--teacher", out / "teacher.pt"]
    assert cli(gd.main, *flags, *apart, "--students", "gumbel", "--nfe", 1)[0] == 0
    assert not (tmp_path / "apart" / "teacher.pt").exists()
    status, said, err = cli(sample.main, "--ckpt", tmp_path / "apart" / "gumbel.pt", "--exact")
    assert status == 0 and "4 of 4" in said and not err


def test_sample_refuses_what_it_cannot_do_in_one_line(text_run, cli, tmp_path):
    _, out = text_run
    ckpt = out / "gumbel.pt"
    (tmp_path / "cut.pt").write_bytes(ckpt.read_bytes()[:1000])
    (tmp_path / "foreign.pt").write_bytes(b"some other program's file")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    for args, *said in (
            (["--prompt", "xyz"], "--prompt", "'x'"),
            (["--prompt", "to be or not"], "--prompt", "12 tokens", "8"),
            (["--prompt", "to" + 7 * "_"], "--prompt", "9 tokens"),
            (["-n", 0], "--n-samples 0"), (["-n", "x"], "-n/--n-samples"),
            (["--nfe", 0], "--nfe", "0"), (["--batch-size", 0], "--batch-size"),
            (["--nfe", 1, 2], "--nfe"), (["--tau", 0, 1], "--tau"),
            (["--temperature", 0, 1], "--temperature"), (["--eval"], "--eval"),
            (["--apd", 2], "--apd", "2"), (["--apd", "nan"], "--apd", "nan"),
            (["--exact", "--tau", 0.5], "--exact", "--tau"),
            (["--exact", "--temperature", 1], "--exact", "--temperature"),
            (["--exact", "--top-p", 0.5], "--exact", "--top-p"),
            (["--exact", "--prompt", "to_b"], "to_b"),
            (["--exact", "--ckpt", out / "teacher.pt"], "--exact", "teacher.pt"),
            (["--exact", "--teacher", ckpt], "gumbel.pt", "teacher"),
            (["--exact", "--teacher", "no/such.pt"], "no/such.pt"),
            (["--ckpt", "no/such.pt"], "no/such.pt"),
            (["--ckpt", tmp_path / "cut.pt"], "cut.pt"),
            (["--ckpt", tmp_path / "foreign.pt"], "foreign.pt"),
            (["--ckpt", tmp_path / "other.pt"], "other.pt"),
            (["--out", tmp_path / "no" / "such" / "folder.jsonl"], "folder.jsonl")):
        assert_refused(cli(sample.main, "--ckpt", ckpt, *args), *said)


def test_sample_writes_with_one_checkpoint(text_run, cli):
    """A second one would be left out in silence."""
    _, out = text_run
    assert_refused(cli(sample.main, "--ckpt", out / "gumbel.pt", out / "teacher.pt"), "--ckpt")


def test_a_note_says_that_another_teacher_verifies(text_run, cli, tmp_path):
    flags, out = text_run
    other = ["--out-dir", tmp_path, "--seed", 1]
    assert cli(train_teacher.main, *flags, *other)[0] == 0
    status, said, err = cli(sample.main, "--ckpt", out / "gumbel.pt", "--exact", "--teacher",
                            tmp_path / "teacher.pt")
    assert status == 0 and "4 of 4" in said
    assert err.count("\n") == 1 and str(tmp_path / "teacher.pt") in err


def test_teachers_of_other_data_or_vocabulary_or_length_are_refused(cli, tmp_path):
    def call(main, text, name, *args):
        path = tmp_path / f"{name}.txt"
        path.write_text(text)
        return cli(main, "--dataset", "text", "--train-files", path, *TINY, *args)
    first = tmp_path / "run" / "teacher.pt"
    own = ["--out-dir", tmp_path / "run"]
    given = ["--out-dir", tmp_path / "other", "--teacher", first]
    assert call(train_teacher.main, TO_BE, "a", "--seq-len", 8, *own)[0] == 0
    for name, text, length, said in (("b", TO_BE[::-1], 8, "data"), ("c", TO_BE, 6, "seq_len"),
                                     ("d", TO_BE + "xyz", 8, "data")):
        assert_refused(call(gd.main, text, name, "--seq-len", length, *own), first, said)
    for name, text, length, said in (("c", TO_BE, 6, "seq_len"), ("d", TO_BE + "xyz", 8, "tokens")):
        assert_refused(call(gd.main, text, name, "--seq-len", length, *given), first, said)


def test_checkpoints_of_other_settings_are_refused(cli, tmp_path):
    given = ["--out-dir", tmp_path, *TINY]
    assert cli(train_teacher.main, *given)[0] == 0
    teacher = tmp_path / "teacher.pt"
    before = teacher.read_bytes()
    for flag, value in (("--lr", 0.5), ("--max-steps", 6), ("--seed", 3), ("--n-embd", 8)):
        name = flag.strip("-").replace("-", "_")
        assert_refused(cli(gd.main, *given, flag, value), teacher, name, value)
    assert teacher.read_bytes() == before


def test_sample_without_any_student_says_what_to_do(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(cli(sample.main), "python gumbel_distill.py", "--ckpt")
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "teacher.pt").touch()             # a teacher is no student
    assert_refused(cli(sample.main), "python gumbel_distill.py", "--ckpt")


def test_sample_takes_the_newest_student(cli, tmp_path, monkeypatch):
    flags = text_flags(tmp_path)
    monkeypatch.chdir(tmp_path)
    for folder in ("out/a", "out/b"):
        assert cli(gd.main, *flags, "--out-dir", folder, "--students", "gumbel", "--nfe", 1)[0] == 0
    os.utime("out/a/gumbel.pt")
    os.utime("out/b/teacher.pt")
    assert "out/a/gumbel.pt: gumbel" in cli(sample.main)[1]
