"""The programs in docs that make its tables.   python -m pytest tests/test_tables.py"""

import argparse
import json
from pydoc_data import topics

import pytest

from conftest import ROOT


@pytest.fixture
def tables(monkeypatch):
    """The module docs/tables.py, with models of a moment."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import tables
    shared, _ = tables.TABLES["letters"]
    small = dict(shared, n_layer=1, n_head=2, n_embd=8, seq_len=16, batch_size=4, nfe=[1, 4],
                 device="cpu")
    monkeypatch.setitem(tables.TABLES, "letters", (small, [dict(init_from=["teacher"], seed=[0])]))
    return tables


def test_a_table_on_text_has_all_students_at_the_same_draws(tables, tmp_path, cli):
    text = "\n".join(topics.topics.values())[:50_000]
    (tmp_path / "text.txt").write_text(text.encode("ascii", "ignore").decode())
    args = argparse.Namespace(max_steps=2, train_files=f"{tmp_path}/text.txt", val_files=None,
                              jobs=1, n=12, out_dir=str(tmp_path), entropy=None)
    real, mdlm, paper, ours = jobs = tables.jobs_of("letters", args)
    assert [job["student"] for job in jobs] == ["real", "mdlm", "gumbel", "gumbel-draft"]
    assert {job["max_steps"] for job in jobs} == {2}
    keys = [job["key"] for job in tables.jobs_of("news", args)]
    assert len(keys) == len(set(keys)) == 11                    # its budgets are one then
    for kind in ("teacher", "judge"):
        tables.ar_model(real, kind)
    lines = []
    for job in (real, mdlm, paper):
        rows = tables.train_and_write(job, args.n)
        assert all(0 <= row["pairs"] <= 1 and row["judge_nll"] > 0 for row in rows)
        lines += [json.dumps(dict(row, key=job["key"])) + "\n" for row in rows]
        draws = {(row["nfe"], row["tau"], row["temperature"]) for row in rows if "tau" in row}
        n_draws = {"real": 0, "mdlm": 7, "gumbel": 9}[job["student"]]      # MDLM has one tau, and
        assert len(draws) == 2 * n_draws                        # the official draw
    (tmp_path / "letters.jsonl").write_text("".join(lines))
    assert not list(tmp_path.glob("letters/student*/*.pt"))     # only the rows are kept
    status, said, err = cli(tables.main, "letters", "--show", "--out-dir", tmp_path)
    assert status == 0 and "floor: periodic" in said, err
    assert said.count("seq_len 16, max_steps 2, 1 steps") == 1 and "mdlm, teacher" in said
    status, _, err = cli(tables.main, "letters", "--out-dir", tmp_path)
    assert status == 1 and "name the text with --train-files" in err


def test_a_text_without_words_has_no_known_words(tables):
    assert tables.share([], {"a"}) == 0 and tables.share(["a", "b", "a", "a"], {"a"}) == 0.75


def test_scores_are_read_between_two_temperatures_and_not_beyond(tables):
    rows = [dict.fromkeys(tables.SCORES, value) | dict(entropy=entropy, val=1.0)
            for value, entropy in ((10.0, 3.0), (20.0, 4.0))]
    assert tables.at_entropy(rows, 3.25) == [12.5] * len(tables.SCORES)
    assert tables.at_entropy(rows, 2.9) is None and tables.at_entropy(rows, 4.1) is None
    other = [dict(row, judge_nll=row["judge_nll"] + 2) for row in rows]
    line = tables.mean_rows([rows, other], 3.0)
    assert line["judge_nll"] == 11 and line["seeds"] == 2
    assert line["judge_nll_se"] == pytest.approx(2**0.5) and line["words_se"] == 0
