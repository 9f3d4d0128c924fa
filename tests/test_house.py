"""The structure of the project: which module may import which, and a few rules that linters do not check."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for room in (
        "*",
        "programs/**/*",
        "options/**/*",
        "data/**/*",
        "util/**/*",
        "tools/**/*",
        "benchmarks/**/*",
        "nor_mae/*",
    )
    for path in PROJECT.glob(f"{room}.py")
)


def module_name(path):
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}

# What the modules of each group ("room") may import from this project. The first pattern that matches a module's name
# is its group.
BELOW = r"(util|data|options)(\.\w+)?"
ROOMS = [
    (r"nor_mae(\.\w+)?", r"nor_mae(\.\w+)?"),
    (r"setup", r"nothing"),
    (r"main_\w+", r"programs|options"),
    (r"programs", rf"programs\.plan|methods|{BELOW}"),
    (r"programs\.\w+", rf"programs(\.\w+)?|engine_\w+|methods|models_\w+|{BELOW}"),
    (
        r"tools\.(figures\.figure9|segmenter|export_segmenter)",
        rf"tools(\.\w+)*|engine_segment|models_upernet|{BELOW}",
    ),  # predicts
    (r"tools\.given", rf"methods|models_vit|{BELOW}"),
    (r"tools\.figures(\.\w+)?", rf"tools(\.\w+)*|methods|models_(mae|nor_mae|vit)|{BELOW}"),  # shows their maths
    (r"tools\.tokenizer", rf"tools\.command|methods|models_(tokenizer|vit)|{BELOW}"),  # fits k-means
    (r"tools\.encoder", rf"tools(\.given)?|methods|models_(classifier|vit)|{BELOW}"),  # takes models apart
    (r"tools\.(doctor|replay)", rf"programs(\.\w+)?|tools(\.\w+)*|engine_\w+|methods|{BELOW}"),  # like it
    (r"tools(\.\w+)?", rf"tools(\.\w+)*|engine_\w+|methods|{BELOW}"),
    (r"hubconf", r"tools\.encoder|methods"),
    (r"benchmarks(\.\w+)?", r".*"),
    (r"engine_\w+", BELOW),
    (r"methods", rf"models_\w+|{BELOW}"),
    (r"models_vit", r"options(\.\w+)?"),
    (r"models_targets", r"models_vit"),
    (r"models_upernet", r"models_classifier|models_vit"),  # segments with the encoder that classifies
    (r"models_mae", r"models_(targets|vit)|options(\.\w+)?"),
    # One paper a file: methods and terms do not import each other, but for the base of replaced patches.
    (r"models_cluster_mim", r"models_(beit|mae|targets|tokenizer|vit)|options(\.\w+)?"),  # as BEiT predicts tokens
    (r"models_beit", r"models_(mae|simmim|targets|tokenizer|vit)|options(\.\w+)?"),
    (r"models_\w+", r"models_(mae|simmim|targets|vit)|options(\.\w+)?"),
    (r"options(\.\w+)?", r"options(\.\w+)?"),
    (r"data(\.\w+)?", r"(data|options)(\.\w+)?"),
    (r"util(\.\w+)?", BELOW),
]


@functools.cache
def trees():
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(tree):
    """Yield the names of all modules that a file imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: say the module's whole name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def own_imports():
    return {name: sorted(set(imported(tree)) & MODULES.keys() - {name}) for name, tree in trees().items()}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_the_rooms_below(name):
    room = next((allowed for pattern, allowed in ROOMS if re.fullmatch(pattern, name)), None)
    assert room is not None, f"{name}.py belongs to no room of the plan"
    wrong = [other for other in own_imports()[name] if not re.fullmatch(room, other)]
    assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_nothing_imports_in_a_circle():
    imports = own_imports()
    finished: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in finished:
            for other in imports[name]:
                visit(other, [*path, name])
            finished.add(name)

    for name in imports:
        visit(name, [])


def test_the_plan_would_notice_a_wrong_import():
    tree = ast.parse("def f():\n    from models_mae import Term\n")
    assert "models_mae" in set(imported(tree))
    engine = next(allowed for pattern, allowed in ROOMS if re.fullmatch(pattern, "engine_pretrain"))
    assert not re.fullmatch(engine, "models_mae")


def test_every_module_opens_with_what_it_is_for():
    everywhere = {**MODULES, **{str(path): path for path in sorted((PROJECT / "tests").rglob("*.py"))}}
    texts = {name: path.read_text(encoding="utf-8") for name, path in everywhere.items()}
    assert not [name for name, text in texts.items() if text.strip() and not ast.get_docstring(ast.parse(text))]


def test_functions_are_named_by_verbs():
    """`compute_digest`, not `digest_of`."""
    found = re.findall(r"^ *def (\w+_of|_?of_\w+)\(", "\n".join(path.read_text() for path in SOURCES), re.MULTILINE)
    assert not found


def test_no_argument_is_hidden_in_a_context():
    assert not [name for name, tree in trees().items() if "contextvars" in set(imported(tree))]


def test_nothing_prints():
    calls = {
        f"{name}:{node.lineno}"
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert not calls


def test_everything_imported_is_in_the_requirements():
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "PyYAML", "nvidia": "nvidia-nvimgcodec-cu13"}
    lists = [
        PROJECT / name
        for name in (
            "requirements.txt",
            *(f"requirements/{extra}.txt" for extra in ("export", "region", "tiff", "wandb")),
        )
    ]
    pinned = [name for file in lists for name in re.findall(r"^([\w-]+)==\S+$", file.read_text(), re.MULTILINE)]
    used = {name.split(".")[0] for tree in trees().values() for name in imported(tree)}
    own = {name.split(".")[0] for name in MODULES}
    foreign = {names.get(name, name) for name in used - own - {"setuptools"} - set(sys.stdlib_module_names)}
    assert foreign <= set(pinned), f"not pinned in the requirements: {sorted(foreign - set(pinned))}"
