"""Which file may import which, and when.   python -m pytest tests/test_layers.py"""

import ast
import sys

import pytest

from conftest import ROOT

BELOW = {  # the files of this program that each file may import
    "config": set(),
    "data": {"config"},
    "gumbel_distill": {"config", "data"},
    "sample": {"config", "data", "gumbel_distill"},
    "judge": {"config", "data", "gumbel_distill", "sample"},
    "ablation": {"config", "data", "gumbel_distill", "sample"},
    "train_teacher": {"config", "data", "gumbel_distill"},
}
SLOW = {"datasets", "tiktoken", "mauve", "transformers", "matplotlib", "pyarrow"}


def packages(node):
    """The top-level names that one import statement imports; any other node imports none."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        return {node.module.split(".")[0]}
    return set()


def imports(name):
    """What a file imports: (anywhere, outside of functions)."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    everywhere = set().union(*map(packages, ast.walk(tree)))

    def at_start(node):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return set()
        return packages(node).union(*map(at_start, ast.iter_child_nodes(node)))
    return everywhere, at_start(tree)


def test_these_are_all_files():
    assert {path.stem for path in ROOT.glob("*.py")} == set(BELOW)


@pytest.mark.parametrize("name", BELOW)
def test_a_file_imports_only_files_below_it(name):
    everywhere, _ = imports(name)
    assert everywhere & set(BELOW) <= BELOW[name]


@pytest.mark.parametrize("name", BELOW)
def test_slow_packages_are_imported_only_inside_functions(name):
    _, at_start = imports(name)
    assert not at_start & SLOW
    assert at_start & {"torch", "gumbel_distill", "data"}       # the test does see imports


def test_the_installation_puts_no_module_in_the_way():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib comes with Python 3.11")
    import tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["py-modules"] == []
