"""Everything the documentation shows runs: docstring examples and README's."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from scipy import stats

import attnmarkov

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(attnmarkov.__path__, "attnmarkov.")
    if not m.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_public_names_have_docstrings_and_exist():
    for name in [*attnmarkov.__all__, *attnmarkov._LAZY]:
        assert getattr(attnmarkov, name).__doc__, f"attnmarkov.{name} has no docstring"


def test_readme_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "every logit" in printed
    risk = float(
        printed.splitlines()[-2].split()[-1]
    )  # 2 n risk is about chi-squared with 12 degrees of freedom
    assert stats.chi2.isf(1 - 1e-6, 12) < 2 * 5000 * risk < 1.2 * stats.chi2.isf(1e-6, 12)
    assert (tmp_path / "frequencies.png").stat().st_size > 10_000
    for block in blocks[1:]:  # they go on from the first
        exec(compile(block, "README.md", "exec"), names)
    assert "64 absorbed in one token" in capsys.readouterr().out


def test_readme_links_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
