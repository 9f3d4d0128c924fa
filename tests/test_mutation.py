"""Mutation testing: which mutants are created, which are left out, and results of tests in a forked process."""

import importlib.util
import json
import sys

import pytest
from scipy.stats import binomtest

from tests import runs
from tests.test_house import PROJECT

pytest.importorskip("cosmic_ray", reason="requirements/dev.txt is not installed")


@pytest.fixture(scope="module")
def mutation():
    spec = importlib.util.spec_from_file_location("mutation", PROJECT / "tests" / "mutation.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutation"] = module
    spec.loader.exec_module(module)
    return module


def changed_lines(mutation, source):
    """Return the changed lines of each mutant."""
    found = []
    for mutant in mutation.find_mutants(source):
        lines = zip(source.split("\n"), mutant.apply(source).split("\n"), strict=True)
        (line,) = [new.strip() for old, new in lines if old != new]
        found.append(line.replace("  ", " "))
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a + b\n", {"x = a - b"}),
        ("x = 1.0 / self.n\n", {"x = 1.0 * self.n", "x = 2.0 / self.n", "x = 0.0 / self.n"}),
        ("if a < b:\n    f(x)\n", {"if a <= b:", "if not a < b:", "pass"}),
        ("self.x = y\n", {"pass"}),
        ("self.x: int\n", set()),
        ("total += y\n", {"pass"}),
        ("x = y\n", set()),
        ("if bad:\n    raise ValueError(f'{a + 1}')\n", {"if not bad:", "pass"}),
        ("log.info('%d', a + 1)\n", set()),
        ("def f(a: int | None = 3) -> int | None: ...\n", {"def f(a: int | None = 4) -> int | None: ...",
                                                         "def f(a: int | None = 2) -> int | None: ..."}),
        ('"""Docs: 1 + 1."""\n', set()),
        ("def f(*, a):\n    return g(*a, *b)\n", set()),
        ("x = dict(zip(a, b, strict=True))\n", set()),
    ],
)  # fmt: skip
def test_faults(mutation, source, expected):
    assert set(changed_lines(mutation, source)) == expected


def test_the_tests_of_a_mutant_are_those_that_run_its_statement(mutation, tmp_path, monkeypatch):
    source = "def f(a):\n    b = (a +\n         1)\n    if b > 1:\n        return b\n    return -b\n"
    (tmp_path / "target.py").write_text(source)
    (tmp_path / "test_target.py").write_text(
        "import target\ndef test_one():\n    assert target.f(3) == 4\ndef test_two():\n    assert target.f(-3) == 2\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    coverage = mutation.Coverage(tmp_path / "target.py", tmp_path / "coverage.json")
    assert mutation.passes(["test_target.py"], 60, [coverage])
    covered = json.loads((tmp_path / "coverage.json").read_text())
    reached = {}
    for mutant in mutation.find_mutants(source):
        names = {name.partition("::")[2] for name in mutation.tests_of(mutant, covered)}
        reached.setdefault(tuple(mutant.lines), names)
    assert reached == {(2, 3): {"test_one", "test_two"}, (4,): {"test_one", "test_two"}, (6,): {"test_two"}}


def test_a_fork_tells_whether_its_tests_pass(mutation, tmp_path):
    for name, line in {"good": "assert True", "bad": "assert False", "slow": "import time; time.sleep(60)"}.items():
        (tmp_path / f"test_{name}.py").write_text(f"def test_it():\n    {line}\n")
    assert mutation.passes([str(tmp_path / "test_good.py")], 60) is True
    assert mutation.passes([str(tmp_path / "test_bad.py")], 60) is False
    assert mutation.passes([str(tmp_path / "test_slow.py")], 3) is None


def test_every_module_names_tests_that_exist(mutation):
    for name, tests in mutation.TESTS.items():
        if (PROJECT / f"{name}.py").is_file():
            assert any((PROJECT / "tests" / f"{test}.py").is_file() for test in tests.split()), name


def test_the_interval_of_a_sample_is_wilsons(mutation):
    for caught in (20, 38, 40):
        low, high = (100 * limit for limit in binomtest(caught, 40).proportion_ci(method="wilson"))
        assert mutation.interval(caught, 40, 300) == f"{100 * caught / 40:.1f}% [{low:.0f}, {high:.0f}]"
    assert mutation.interval(40, 40, 40) == "100.0%"
    assert mutation.interval(0, 0, 300) == "0.0%"


def test_lines_in_functions_are_those_of_their_bodies(mutation):
    source = (
        "x = 1\n\n\ndef f(a=2):\n    if a:\n        return 3\n\n\nclass C:\n    y = 4\n\n    def g(self): return 5\n"
    )
    assert mutation.lines_in_functions(source) == {5, 6, 12}


def test_tests_that_start_programs_can_be_skipped(mutation, monkeypatch, tmp_path):
    monkeypatch.setenv(mutation.WITHOUT_RUNS, "1")
    with pytest.raises(pytest.skip.Exception):
        runs.Training(tmp_path)
