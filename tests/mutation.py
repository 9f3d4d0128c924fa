"""Mutation testing: put small faults into a module, one at a time, and count those that its tests notice.

    bash scripts/mutation.sh                                  all modules, each for at most 10 minutes
    bash scripts/mutation.sh models_nor_mae util/stepper      these modules
    bash scripts/mutation.sh --minutes 60 models_mae          a longer limit; --seed draws another order
    bash scripts/mutation.sh --sample 40                      at most 40 mutants of each module

cosmic-ray makes the mutants. They are tried here, because its own runner starts a new interpreter for each, which
imports torch for several seconds: this one imports the libraries once and forks. The tests run on a copy of the
project. Mutants are tried in a random order, so that the share of those tried in a limited time estimates the share of
all. Every mutant that survives is printed as a difference.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from parso.python.tree import Keyword

PROJECT = Path(__file__).resolve().parent.parent

TESTS: dict[str, str] = {
    "util/stepper": "test_stepper",
    "models_nor_mae": "test_models_nor_mae test_fraction",
    "models_mae": "test_models_mae test_models_nor_mae test_models_u_mae test_distillation test_models_moco_v3",
    "models_simmim": "test_models_simmim test_models_maskfeat test_models_beit test_block_masks",
    "models_targets": "test_models_targets test_models_mae test_models_simmim test_models_beit",
    "models_cross_mae": "test_models_cross_mae",
    "models_sup_mae": "test_models_sup_mae",
    "models_u_mae": "test_models_u_mae",
    "models_teacher": "test_models_teacher test_distillation",
    "models_moco_v3": "test_models_moco_v3",
    "models_dino": "test_models_dino",
    "models_maskfeat": "test_models_maskfeat test_block_masks",
    "models_beit": "test_models_beit test_block_masks",
    "models_tokenizer": "test_models_tokenizer test_tokenizer_tool test_models_beit",
    "models_cluster_mim": "test_models_beit",
    "models_upernet": "test_models_upernet",
    "models_classifier": "test_models_classifier test_finetune test_linprobe test_distillation_token test_patch_stem",
    "models_vit": "test_models_vit test_models_mae test_models_nor_mae test_models_dino test_models_moco_v3 "
    "test_models_teacher test_patch_stem",
    "methods": "test_methods test_distillation",
    "engine_pretrain": "test_engine_pretrain",
    "engine_finetune": "test_finetune test_class_weights test_distillation_token",
    "engine_segment": "test_segment test_class_weights",
    "util/optim": "test_optim test_linprobe test_models_simmim",
    "util/meters": "test_meters",
    "util/knn": "test_knn",
    "util/checkpoint": "test_checkpoint",
    "data/masks": "test_masks test_segment_augment",
}
"""The test files that each module is tried against."""

WITHOUT_RUNS = "NOR_MAE_TESTS_WITHOUT_RUNS"  # as in tests/runs.py, which cannot be imported here
LEFT_OUT = "compile or graph or two_processes or ranks or published"
"""Slow tests: those that compile, and those of several processes. Tests that start programs are skipped, too."""

OPERATORS = [
    *(
        f"ReplaceBinaryOperator_{pair}"
        for pair in "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul".split()
    ),
    *(f"ReplaceBinaryOperator_{pair}" for pair in "BitAnd_BitOr BitOr_BitAnd".split()),
    *(
        f"ReplaceComparisonOperator_{pair}"
        for pair in "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Is_IsNot IsNot_Is".split()
    ),
    *(f"ReplaceUnaryOperator_Delete_{sign}" for sign in "USub Not Invert".split()),
    *"AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd".split(),
    *"ReplaceBreakWithContinue ReplaceContinueWithBreak NumberReplacer ZeroIterationForLoop".split(),
]
COMPOUND = ("if_stmt", "while_stmt", "for_stmt", "with_stmt", "try_stmt", "funcdef", "classdef", "suite")
LIBRARIES = (
    "numpy torch torch.distributed torch._dynamo torchvision.transforms.v2 timm timm.optim timm.scheduler PIL.Image"
)


class DeleteStatement(Operator):
    """Replace by `pass` a call, a raise, and an assignment to an attribute or an element or with an operator."""

    def mutation_positions(self, node: Any) -> Iterator[tuple]:
        if node.type == "simple_stmt" and self._counts(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        statement = node.children[0]
        node.children[0] = Keyword("pass", statement.start_pos, prefix=statement.get_first_leaf().prefix)
        return node

    def _counts(self, statement: Any) -> bool:
        if statement.type in ("atom_expr", "power"):
            return statement.children[-1].type == "trailer"
        if statement.type == "expr_stmt":
            target, sign = statement.children[:2]
            if sign.type == "annassign" and len(sign.children) == 2:  # without a value
                return False
            return target.type in ("atom_expr", "power") or sign.type == "operator" and sign.value != "="
        return statement.type == "raise_stmt"

    @classmethod
    def examples(cls) -> tuple:
        return ()


@dataclass(frozen=True)
class Mutant:
    """One fault: the operator that makes it, and where."""

    operator: Operator
    occurrence: int
    lines: range
    """Those of its statement."""

    def apply(self, source: str) -> str:
        """Return the source with the fault in it."""
        changed = mutate_code(source, self.operator, self.occurrence)
        assert changed is not None
        return changed


def find_mutants(source: str) -> list[Mutant]:
    """List the faults that can be put into a module.

    Annotations, messages (what is raised or logged), assertions and `strict` of `zip` are left out: a fault there
    changes no result.
    """
    found = []
    nodes = list(ast_nodes(get_ast(source)))
    for operator in [*(plugins.get_operator(f"core/{name}")() for name in OPERATORS), DeleteStatement()]:
        occurrence = 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                if not _is_left_out(node, start, isinstance(operator, DeleteStatement)):
                    found.append(Mutant(operator, occurrence, _lines_of_statement(node)))
                occurrence += 1
    return found


def _lines_of_statement(node: Any) -> range:
    """Return the lines of the simple statement that holds a node, or else those of the node or its head."""
    if node.type in COMPOUND:
        colon = next(child for child in node.children if child.type == "operator" and child.value == ":")
        return range(node.start_pos[0], colon.end_pos[0] + 1)
    outer = node
    while outer is not None and outer.type not in COMPOUND:
        if outer.type == "simple_stmt":
            return range(outer.start_pos[0], outer.children[0].end_pos[0] + 1)
        outer = outer.parent
    return range(node.start_pos[0], node.end_pos[0] + 1)


def _is_left_out(node: Any, start: tuple[int, int], whole_statement: bool) -> bool:
    if whole_statement:
        return node.get_code().strip().startswith(("log.", "warnings."))
    if node.type == "operator" and node.value == "*" and node.parent.type != "term":
        return True  # of a signature or a call
    inner, outer = node, node.parent
    while outer is not None:
        if outer.type in ("raise_stmt", "assert_stmt", "decorator"):
            return True
        if outer.type == "argument" and outer.children[0].get_code().strip() == "strict":
            return True
        if outer.type == "annassign" and start < outer.children[1].end_pos:
            return True
        if outer.type == "tfpdef" or outer.type == "funcdef" and inner is outer.annotation:
            return True
        if outer.type == "atom_expr" and outer.get_code().strip().startswith(("log.", "warnings.")):
            return True
        inner, outer = outer, outer.parent
    return False


def copy_project(folder: Path) -> None:
    """Copy the files that git knows, and those that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=PROJECT, check=True, capture_output=True, text=True
    )
    for name in filter(lambda name: (PROJECT / name).is_file(), listed.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, folder / name)


class Coverage:
    """A pytest plugin that writes, for every test, its seconds and the lines of one module that it runs."""

    def __init__(self, module: Path, output: Path):
        self.module, self.output = str(module.resolve()), output
        self.found: dict[str, tuple[float, list[int]]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        lines: set[int] = set()

        def note_line(frame: Any, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return note_line

        def enter(frame: Any, event: str, argument: Any) -> Any:
            return note_line(frame, event, argument) if frame.f_code.co_filename == self.module else None

        began = time.monotonic()
        sys.settrace(enter)
        yield
        sys.settrace(None)
        self.found[item.nodeid] = time.monotonic() - began, sorted(lines)

    def pytest_sessionfinish(self) -> None:
        self.output.write_text(json.dumps(self.found), encoding="utf-8")


def passes(tests: Sequence[str], seconds: float, plugins: Sequence[Any] = ()) -> bool | None:
    """Run tests in a fork of this process. True: all pass; False: one fails; None: they take longer than `seconds`."""
    child = os.fork()
    if not child:
        os.setsid()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        words = [*tests, "-q", "-x", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})"]
        os._exit(int(pytest.main(words, plugins=list(plugins))))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def tests_of(mutant: Mutant, covered: Mapping[str, tuple[float, Sequence[int]]]) -> list[str]:
    """List the tests that run the mutant's statement, those that take the least time first."""
    reached = [name for name, (_, lines) in covered.items() if any(line in mutant.lines for line in lines)]
    return sorted(reached, key=lambda name: covered[name][0])


def lines_in_functions(source: str) -> set[int]:
    """Return the lines of the bodies of all functions."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return {line for node in functions for line in range(node.body[0].lineno, (node.end_lineno or 0) + 1)}


def try_module(name: str, minutes: float, sample: int, seed: int) -> tuple[int, int, int]:
    """Try the mutants of a module in the current folder; return how many were caught, tried and found.

    A mutant is tried against the tests that run its line; outside of functions, where lines run when the module is
    imported, against all tests of the module. Mutants in lines of functions that only complete runs of a program reach
    are counted and not tried.
    """
    path, coverage = Path(f"{name}.py"), Path("coverage.json")
    source = path.read_text(encoding="utf-8")
    tests = [f"tests/{test}.py" for test in TESTS[name].split() if Path(f"tests/{test}.py").is_file()]
    mutants = find_mutants(source)
    random.Random(seed).shuffle(mutants)
    if not passes(tests, 900, [Coverage(path, coverage)]):
        raise ValueError(f"the tests of {name} fail without a mutation: {' '.join(tests)}")
    covered = json.loads(coverage.read_text(encoding="utf-8"))
    usual = sum(seconds for seconds, _ in covered.values())
    began = time.monotonic()
    say(f"{name}: {len(mutants)} mutants, {len(covered)} tests take {usual:.0f} s")
    caught = tried = unreached = 0
    inside = lines_in_functions(source)
    for mutant in mutants:
        if time.monotonic() - began > 60 * minutes or sample and tried >= sample:
            break
        reached = tests_of(mutant, covered)
        if not reached and mutant.lines.start in inside:
            unreached += 1
            continue
        changed = mutant.apply(source)
        path.write_text(changed, encoding="utf-8")
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()  # dated to the second, it may look as new as the source
        survived = passes(reached or tests, 3 * usual + 20)
        tried += 1
        caught += not survived
        if survived:
            say("\n".join(list(difflib.unified_diff(source.split("\n"), changed.split("\n"), name, name, n=1))[2:]))
    path.write_text(source, encoding="utf-8")
    say(f"{name}: caught {caught} of {tried} tried, {len(mutants)} in all; {unreached} not tried: reached only by runs")
    return caught, tried, len(mutants)


def interval(caught: int, tried: int, found: int) -> str:
    """Return the share caught in percent, and of a sample the 95% interval (Wilson's) of the share of all mutants."""
    share = f"{100 * caught / max(1, tried):.1f}%"
    if not 0 < tried < found:
        return share
    p, z = caught / tried, 1.96
    middle, half = p + z**2 / (2 * tried), z * math.sqrt(p * (1 - p) / tried + (z / (2 * tried)) ** 2)
    low, high = (100 * (middle + sign * half) / (1 + z**2 / tried) for sign in (-1, 1))
    return f"{share} [{low:.0f}, {high:.0f}]"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Count the small faults in a module that its tests notice.")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)} (default: all that exist)")
    parser.add_argument("--minutes", type=float, default=10, help="limit for each module")
    parser.add_argument("--sample", type=int, default=0, help="mutants of each module, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="order of the mutants")
    words = parser.parse_args(argv)
    modules = [name.removesuffix(".py") for name in words.modules] or [
        n for n in TESTS if (PROJECT / f"{n}.py").is_file()
    ]
    if unknown := [name for name in modules if name not in TESTS or not (PROJECT / f"{name}.py").is_file()]:
        parser.error(f"no module {unknown[0]}: there are {', '.join(TESTS)}")
    os.environ |= {"OMP_NUM_THREADS": "1", WITHOUT_RUNS: "1"}
    for library in LIBRARIES.split():
        __import__(library)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        os.chdir(folder)
        sys.path[:] = [
            folder,
            *(place for place in sys.path if Path(place or ".").resolve() not in (PROJECT, PROJECT / "tests")),
        ]
        for name in modules:
            rows[name] = try_module(name, words.minutes, words.sample, words.seed)
    say("| module | caught | of those tried | mutants |\n|---|---|---|---|")
    for name, (caught, tried, found) in rows.items():
        say(f"| `{name}` | {interval(caught, tried, found)} | {tried} | {found} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
