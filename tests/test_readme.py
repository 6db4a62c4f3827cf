"""What README and docs name exists, their commands run.   python -m pytest tests/test_readme.py"""

import re
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ablation
import config
import data
import gumbel_distill as gd
import judge
import sample
import train_teacher
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
# What was measured at an older commit names that commit's flags.
TODAY = README + "".join(text.split("## Measured before")[0] for text in DOCS.values())
MODULES = {"gumbel_distill.py": gd, "train_teacher.py": train_teacher, "sample.py": sample,
           "judge.py": judge, "ablation.py": ablation, "data.py": data}
SMALL = ("--n-layer 1 --n-head 2 --n-embd 16 --max-steps 4 --eval-every 4 --warmup 1 "
         "--n-samples 20").split()


def test_everything_that_is_named_exists():
    for path, text in {ROOT / "README.md": README, **DOCS}.items():
        for name in re.findall(r"\]\((?!http)([\w./-]+)", text):
            assert (path.parent / name).exists(), name
        for name in re.findall(r"`((?:tests|notebooks|docs)/[\w./]+|\w+\.py)`", text):
            assert (ROOT / name).exists(), name
    rows = README[README.index("## Paper and code"):README.index("## Differences")]
    for row in re.findall(r"^\|(.*)\|$", rows, re.M)[2:]:
        for name in re.findall(r"`(\w+)`", row.split("|")[1]):
            assert any(hasattr(module, name) for module in MODULES.values()) or hasattr(
                gd.Student, name), name


def test_every_flag_that_is_named_exists():
    flags = {config.flag(name) for name in gd.Config.__dataclass_fields__}
    for script in ("sample.py", "judge.py", "notebooks/classroom.py", "tests/bench.py",
                   "tests/gpu.py", "docs/tables.py"):
        flags |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text()))
    flags |= {"--help", "--standalone", "--nproc_per_node"}
    own = re.sub(r"pip install.*", "", TODAY)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", own)) <= flags


COMMANDS = sorted(set(re.findall(
    r"(?:python|torchrun [^`\n]*?) "
    r"((?:gumbel_distill|train_teacher|sample|judge|ablation)\.py[^`\n#]*)", TODAY)))


def run_commands(commands, cli):
    for command in commands:
        words = shlex.split(re.sub(r"\bS\b", "0", command))     # S stands for a seed
        small = SMALL
        if words[0] == "sample.py":
            small = []
        if words[0] == "judge.py":
            small = ["-n", "50", "--nfe", "1"]
        if {"gpt2", "gpt2-large", "tinystories", "out/long/mdlm.pt"} & {*words}:
            # only parsed: needs the hub, or runs before it
            small = ["--help"]
        status, _, err = cli(MODULES[words[0]].main, *words[1:], *small)
        assert status == 0, (command, err)


def test_the_ten_lines_of_the_readme_are_the_loss_and_the_sampler(tiny, monkeypatch):
    _, teacher, student = tiny
    names = dict(vars(gd), T=6, V=7, teacher=teacher.float(), student=student.float(),
                 x0=torch.randint(7, (4, 6), generator=gd.rng(1)), t=torch.full((4, 1), 0.7))
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len([line for line in code.splitlines() if not line.startswith("#")]) == 10
    exec(code.replace("xi = sample_gumbel", "posterior = xi; xi = sample_gumbel"), names)
    monkeypatch.setattr(gd, "q_sample", lambda *_: names["xt"])
    loss = gd.student_loss(student, None, names["x0"], names["t"], gd.rng(0), names["posterior"])
    assert names["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    u = torch.zeros(1, 2, 6, dtype=torch.float64)
    assert names["text"].equal(gd.sample(student, names["xi"][None], u, 1)[0])


def test_every_command_runs(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RUNS", {"default": ({}, 1)})
    monkeypatch.setattr(ablation.os, "cpu_count", lambda: 1)    # the other cores are at work
    monkeypatch.chdir(tmp_path)
    for name in ("input.txt", "tinyshakespeare.txt"):
        (tmp_path / name).write_text("to be or not to be, that is the question.\n" * 400)
    commands = [c for c in COMMANDS if "lm1b" not in c and "owt" not in c]
    assert len(commands) >= 7
    commands.sort(key=lambda c: (c.startswith(("sample", "judge")),
                                 not c.startswith("train_teacher"),
                                 c.strip() != "gumbel_distill.py"))
    run_commands(commands, cli)


def test_every_command_on_real_text_runs(cli, tmp_path, monkeypatch, real_data):
    """What comes from the hub is read from a local file of the same format."""
    import datasets
    real = datasets.load_dataset
    pq.write_table(pa.table({"text": ["To be , or not to be ."] * 200}), tmp_path / "hub.parquet")

    def local(name, **how):
        if "data_files" in how:
            return real(name, **how)
        return real("parquet", data_files=str(tmp_path / "hub.parquet"), split="train",
                    streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm1b").mkdir()
    for i in (0, 1, 4, 5):
        (tmp_path / "lm1b" / f"news.en.heldout-0000{i}-of-00050").write_text("It 's so .\n" * 200)
    tiny = " --tokenizer gpt2-1024 --seq-len 16 --batch-size 4 --grad-accum 1 --nfe 2 --out-dir "
    commands = [c for c in COMMANDS if "lm1b" in c or "owt" in c]
    assert len(commands) >= 2
    run_commands([f"{c}{tiny}run-{i}" for i, c in enumerate(commands)], cli)


def test_the_test_command_is_what_ci_runs():
    assert 'pip install -e ".[dev]" && python -m pytest' in README
    assert 'pip install -e ".[dev]" && python -m pytest' in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("script", ["gumbel_distill.py", "train_teacher.py", "sample.py",
                                    "judge.py"])
def test_the_scripts_name_only_commands_that_parse(script, cli):
    for name, flags in re.findall(r"    python (\w+\.py)([^#\n]*)", (ROOT / script).read_text()):
        status, said, err = cli(MODULES[name].main, *shlex.split(flags), "--help")
        assert status == 0 and "--seed" in said, err


# The reading path: a named item of the paper, and the docstring that explains it.
ITEMS = [
    ("Gumbel-Max", gd.sample_gumbel), ("Serial extraction", gd.serial_extraction),
    ("parallel extraction (Theorem 4.1)", gd.posterior_gumbel), ("noise injection", gd.Student),
    ("bd3lm", gd.BlockStudent), ("MDLM objective", gd.student_loss),
    ("BD3-LM objective", gd.student_loss), ("NELBO", gd.student_loss),
    ("oken-level knowledge distillation", ablation.kd_loss), ("Forward process", gd.q_sample),
    ("sequence-level KD", gd.teacher_data), ("ancestral", gd.fill_steps),
    ("gaussian", ablation.change_noise), ("agree_token", gd.compare_with_teacher),
    ("entropy", data.token_entropy), ("exact mode", sample.draft_and_verify),
    ("adaptive parallel decoding (APD)", sample.draft_and_verify),
]


@pytest.mark.parametrize("item, where", ITEMS, ids=lambda x: getattr(x, "__name__", x))
def test_a_named_item_of_the_paper_is_found_where_it_is_computed(item, where):
    assert item in where.__doc__
