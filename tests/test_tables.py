"""docs/tables.py.   python -m pytest tests/test_tables.py"""

from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import ROOT
from sample import MODELS


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import tables
    return tables


def test_scores_are_read_between_two_temperatures_and_not_beyond(tables):
    rows = [dict(entropy=entropy, judge_nll=nll, energy=1.0)
            for entropy, nll in ((4.0, 20.0), (3.0, 10.0), (5.0, 100.0))]
    assert tables.at_entropy(rows, 3.25) == dict(judge_nll=12.5, energy=1)
    assert tables.at_entropy(rows, 2.9) is tables.at_entropy(rows, 5.1) is None
    other = [dict(row, judge_nll=row["judge_nll"] + 2) for row in rows]
    line = tables.line_of("gumbel", [rows, other], 3.0)
    assert line["judge_nll"] == "11.000 ± 1.414" and line["words"] == ""


def test_a_run_is_named_once_and_a_step_has_as_many_tokens_at_every_length(tables):
    args = Namespace(out_dir="out", train_files="", val_files="", max_steps=2)
    for name, (shared, _) in tables.TABLES.items():
        jobs = tables.jobs_of(name, args).values()
        assert {job["student"] for job in jobs} <= {"real", *MODELS}
        assert {job["max_steps"] for job in jobs} == {job["judge_steps"] for job in jobs} == {2}
        assert ({job["batch_size"] * job["seq_len"] for job in jobs}
                == {shared["batch_size"] * shared["seq_len"]})


def test_a_table_has_all_students_at_the_same_draws(tables, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)                                 # the token cache is made here
    (tmp_path / "text.txt").write_text("the little girl saw a big dog and it ran home. " * 60)
    small = dict(tables.STORIES, dataset="text", seq_len=16, batch_size=4, n_layer=1, n_head=2,
                 n_embd=8, device="cpu", nfe=[1, 4], block_size=4)
    runs = [dict(student=["mdlm", "bd3lm-gumbel"], labels=["teacher"], seed=[0])]
    monkeypatch.setitem(tables.TABLES, "letters", (small, runs))
    monkeypatch.setattr(tables, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    for _ in range(2):                                          # the second finds all done
        status, out, err = cli(tables.main, "letters", "--train-files", "text.txt", "-n", 12,
                               "--max-steps", 2)
        rows = tables.read_rows("out/tables/letters.jsonl")
        assert status == 0 and "failed" not in out, out + err
        assert len(rows) == 5 + 2 * 7 + 2 * 9                   # real; MDLM, one tau; the others
        assert all(("gain" in row) == ("gumbel" in row.get("student", "")) for row in rows)
    assert out.count("seq_len 16") == 2 and not list(tmp_path.glob("out/**/mdlm.pt"))
