"""What the README names exists, its commands run.   python -m pytest tests/test_readme.py"""

import re
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ablation
import gumbel_distill as gd
import sample
import train_teacher
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"gumbel_distill.py": gd.main, "train_teacher.py": train_teacher.main,
           "sample.py": sample.main}
SMALL = ("--n-layer 1 --n-head 2 --n-embd 16 --max-steps 4 --eval-every 4 --warmup 1 "
         "--n-samples 20").split()


def test_everything_the_readme_names_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    code = "".join((ROOT / f"{name}.py").read_text()
                   for name in ("gumbel_distill", "sample", "ablation"))
    for name in re.findall(r"`(tests/[\w.]+|\w+\.py)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name
    rows = README[README.index("## The paper and the code"):README.index("**The drafts.**")]
    for row in re.findall(r"^\|(.*)\|$", rows, re.M)[2:]:
        for name in re.findall(r"`(\w+)`", row.split("|")[1]):
            assert re.search(rf"^(def|class) {name}\b", code, re.M), name
    for name in re.findall(r"\]\((?!http)([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name
    flags = {gd.flag(name) for name in gd.Config.__dataclass_fields__}
    for script in ("sample.py", "notebooks/classroom.py", "tests/bench.py"):
        flags |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text()))
    flags |= {"--help", "--standalone", "--nproc_per_node"}
    own = re.sub(r"pip install.*", "", README)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", own)) <= flags


COMMANDS = re.findall(r"(?:python|torchrun [^`\n]*?) "
                      r"((?:gumbel_distill|train_teacher|sample)\.py[^`\n]*)", README)


def run_commands(commands, cli):
    for command in commands:
        # S and MAP stand for a seed and a noise map
        words = shlex.split(re.sub(r"\bMAP\b", "softmax", re.sub(r"\bS\b", "0", command)))
        small = [] if words[0] == "sample.py" else SMALL
        status, _, err = cli(SCRIPTS[words[0]], *words[1:], *small)
        assert status == 0, (command, err)


def test_the_ten_lines_of_the_readme_are_the_loss_and_the_sampler(tiny, monkeypatch):
    _, teacher, student = tiny
    names = dict(vars(gd), T=6, V=7, teacher=teacher.float(), student=student.float(),
                 x0=torch.randint(7, (4, 6), generator=gd.rng(1)), t=torch.full((4, 1), 0.7))
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len([line for line in code.splitlines() if not line.startswith("#")]) == 10
    exec(code.replace("xi = sample_gumbel", "posterior = xi; xi = sample_gumbel"), names)
    monkeypatch.setattr(gd, "q_sample", lambda *_: names["xt"])
    loss = gd.student_loss(student, None, names["x0"], names["t"], (0,),
                           names["posterior"].__getitem__)
    assert names["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    u = torch.zeros(1, 2, 6, dtype=torch.float64)
    assert names["text"].equal(gd.sample(student, names["xi"][None], u, 1)[0])


def test_every_command_of_the_readme_runs(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "ABLATION", ablation.ABLATION[:1])
    monkeypatch.chdir(tmp_path)
    for name in ("input.txt", "tinyshakespeare.txt"):
        (tmp_path / name).write_text("to be or not to be, that is the question.\n" * 40)
    commands = [c for c in COMMANDS if "lm1b" not in c and "owt" not in c]
    assert len(commands) >= 7
    run_commands(commands, cli)


def test_every_command_on_real_text_runs(cli, tmp_path, monkeypatch, real_data):
    """What comes from the hub is read from a local file of the same format."""
    import datasets
    real = datasets.load_dataset
    pq.write_table(pa.table({"text": ["To be , or not to be ."] * 200}), tmp_path / "hub.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: real(
        "parquet", data_files=str(tmp_path / "hub.parquet"), split="train", streaming=streaming))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm1b").mkdir()
    for i in (0, 1, 4, 5):
        (tmp_path / "lm1b" / f"news.en.heldout-0000{i}-of-00050").write_text("It 's so .\n" * 200)
    tiny = " --tokenizer gpt2-1024 --seq-len 16 --batch-size 4 --grad-accum 1 --nfe 2 --out-dir "
    commands = [c for c in COMMANDS if "lm1b" in c or "owt" in c]
    assert len(commands) >= 5
    run_commands([f"{c}{tiny}run-{i}" for i, c in enumerate(commands)], cli)


def test_the_test_command_is_what_ci_runs():
    assert 'pip install -e ".[dev]" && python -m pytest' in README
    assert 'pip install -e ".[dev]" && python -m pytest' in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_name_only_commands_that_parse(script, cli):
    for command in re.findall(r"    python (\w+\.py)([^#\n]*)", (ROOT / script).read_text()):
        status, said, err = cli(SCRIPTS[command[0]], *shlex.split(command[1]), "--help")
        assert status == 0 and "--seed" in said, err


# The reading path: a named item of the paper, and the docstring that explains it.
ITEMS = [
    ("Gumbel-Max", "sample_gumbel"), ("Serial extraction", "serial_extraction"),
    ("parallel extraction (Theorem 4.1)", "posterior_gumbel"),
    ("Noise injection", "NoiseEmbedding"), ("MDLM objective", "block_losses"),
    ("BD3-LM\n    objective", "block_losses"), ("Forward process", "q_sample"),
    ("token-level KD", "block_losses"), ("sequence-level KD", "teacher_data"),
    ("adaptive parallel decoding (APD)", "draft_and_verify"), ("exact mode", "draft_and_verify"),
    ("clipped schedule", "clipped_schedule"), ("ancestral", "sample"), ("BD3-LM", "Student"),
    ("gaussian", "change_noise"), ("entropy", "token_entropy"),
    ("agree_token", "compare_with_teacher"), ("NELBO", "validation_loss"),
]


@pytest.mark.parametrize("item, name", ITEMS)
def test_a_named_item_of_the_paper_is_found_where_it_is_computed(item, name):
    assert item in getattr(gd, name).__doc__
