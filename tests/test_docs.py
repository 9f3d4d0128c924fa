"""Documentation: commands parse, examples run, links and names exist, generated pages are current.

Every command line of a `bash` block is parsed by its program, and every `python` block is executed. A marker in the
line before a block changes this: `<!-- test: smoke -->` also runs its commands, with tiny data and models,
`<!-- test: slow -->` does this in the slow tests, `<!-- test: skip REASON -->` skips the block.
"""

import argparse
import contextlib
import importlib
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import methods
import options
import programs
from tools import option_table, smoke_data

PROJECT = Path(__file__).resolve().parent.parent
PAGES = [PROJECT / "README.md", *sorted(PROJECT.glob("docs/*.md"))]
for optional in ("CONTRIBUTING.md", "SECURITY.md"):
    PAGES += [PROJECT / optional] if (PROJECT / optional).exists() else []
README_BYTES = 14 * 1024

PROGRAMS = {f"main_{name}.py": name for name in ("pretrain", "finetune", "segment")} | {"main_linprobe.py": "probe"}
SHELL = {"source", "git", "mkdocs", "pip", "cd"}  # commands of other programs, which are not checked


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    marker: str
    text: str

    @property
    def name(self):
        return f"{self.page.stem}-{self.line}"


def read_blocks(page):
    """Yield the fenced code blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    opened, marker = None, ""
    for number, line in enumerate(lines, 1):
        if line.startswith("```") and opened is None:
            opened, language = number, line[3:].strip()
        elif line.startswith("```"):
            yield Block(page, opened, language, marker, "\n".join(lines[opened : number - 1]))
            opened, marker = None, ""
        elif opened is None and line.strip():
            found = re.fullmatch(r"<!-- test: (.+) -->", line.strip())
            marker = found[1] if found else ""
    assert opened is None, f"{page.name}: the block at line {opened} is not closed"


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def split_commands(text):
    """Yield (environment variables, words) of each command of a shell script; `$name` is replaced by its value."""
    values = {"s": "0"}

    def expand(line):
        return re.sub(r"\$(\w+)", lambda found: values.get(found[1], found[0]), line)

    for line in map(expand, text.replace("\\\n", " ").splitlines()):
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            variables = {}
            while words and re.match(r"\w+=", words[0]):
                name, _, value = words.pop(0).partition("=")
                variables[name] = value
            if words:
                yield variables, words
            else:
                values |= variables


COMMANDS = [
    pytest.param(variables, words, id=f"{block.name}-{number}")
    for block in BLOCKS
    if block.language == "bash" and not block.marker.startswith("skip")
    for number, (variables, words) in enumerate(split_commands(block.text))
]


class Parsed(Exception):
    """Raised instead of running a program whose command line was parsed."""


def parse_with(module, argv, monkeypatch):
    """Run only the parser of the module."""
    original = argparse.ArgumentParser.parse_known_args

    def parse(self, args=None, namespace=None):
        found, extra = original(self, args, namespace)
        if extra and module != "tools.doctor":
            self.error(f"unrecognized arguments: {' '.join(extra)}")
        raise Parsed(extra)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(module).main(argv)
    monkeypatch.undo()
    return parsed.value.args[0]


def parse_program(script, argv):
    """Parse options without reading checkpoints."""
    name = PROGRAMS[script]
    if name == "pretrain":
        return programs.parse_options(name, argv)
    return options.parse(programs.PROGRAMS[name], argv)


@pytest.mark.parametrize(("variables", "words"), COMMANDS)
def test_every_command_is_accepted_by_its_program(variables, words, monkeypatch):
    monkeypatch.chdir(PROJECT)
    if words[0] in SHELL or words[:3] == ["python", "-m", "pip"] or words[:3] == ["python", "-m", "venv"]:
        for file in re.findall(r"requirements\S*\.txt", " ".join(words)):
            assert (PROJECT / file).exists()
    elif words[0] in ("bash", "sbatch"):
        script = next(word for word in words if word.startswith("scripts/"))
        text = (PROJECT / script).read_text() + (PROJECT / "scripts/table.sh").read_text()
        assert not [name for name in variables if not re.search(rf"\b{name}\b", text)]
        if "main_pretrain.py" in text:
            assert parse_program("main_pretrain.py", words[words.index(script) + 1 :])
    elif words[0] == "torchrun":
        script = next(word for word in words if word in PROGRAMS)
        assert parse_program(script, words[words.index(script) + 1 :])
    elif words[0] == "nor-mae":
        assert words[1] == "pretrain" and parse_program("main_pretrain.py", words[2:])
    elif words[0] == "python" and words[1] in PROGRAMS:
        assert parse_program(words[1], words[2:])
    elif words[:2] == ["python", "-m"]:
        extra = parse_with(words[2], words[3:], monkeypatch)
        if words[2] == "tools.doctor":
            assert parse_program("main_pretrain.py", extra)
    elif words[:2] == ["python", "-c"]:
        compile(words[2], "command", "exec")
    else:
        pytest.fail(f"unknown command {words[0]!r}: add a check for it here")


@pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in BLOCKS if b.language == "yaml"])
def test_every_yaml_block_is_a_valid_recipe(block, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block.text)
    assert programs.parse_options("pretrain", ["-c", str(recipe)])
    assert yaml.safe_load(block.text)


def test_every_block_has_a_known_language_and_marker():
    for block in BLOCKS:
        assert block.language in ("bash", "python", "yaml", "bibtex", "text"), block.name
        assert re.match(r"$|smoke$|slow$|skip \w+", block.marker), block.name


# ---- examples that run ----------------------------------------------------------------------------------------------

ENCODER = "--input_size 64 --embed_dim 24 --depth 2 --num_heads 2"
SHORT = "--total_batch_size 4 --epochs 1 --warmup_epochs 0 --num_workers 0 --device cpu"
TINY = {  # appended to the commands of the documentation, so that they take about a second
    "main_pretrain.py": f"{ENCODER} --decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2 {SHORT}",
    "main_finetune.py": SHORT,
    "main_linprobe.py": SHORT,
    "main_segment.py": f"{SHORT} --warmup_steps 0 --lr 1e-3 --window whole --total_batch_size 2",
}


def save_folder(root, pictures, suffix):
    """Write images as `root/train/CLASS/*` and `root/val/CLASS/*`."""
    for number, group in enumerate(pictures):
        for index, picture in enumerate(group):
            path = root / ("train" if index < 4 else "val") / f"class{number}" / f"{index}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Create a folder with the files that the examples use: images, masks, and trained runs in `output`."""
    folder = tmp_path_factory.mktemp("workspace")
    pictures = [group[:6] for group in smoke_data.pictures()[:3]]
    save_folder(folder / "IMAGENET", pictures, ".JPEG")
    save_folder(folder / "MY_CLASSES", pictures, ".jpg")
    for name in ("MY_IMAGES", "PHOTOS"):
        (folder / name).mkdir()
        for number, picture in enumerate(picture for group in pictures for picture in group):
            picture.save(folder / name / f"{number}.jpg")
    shutil.copy(folder / "PHOTOS/0.jpg", folder / "a.jpg")
    shutil.copy(folder / "PHOTOS/1.jpg", folder / "b.jpg")
    for split in ("train", "val"):
        for index in range(4):
            for kind in ("images", "masks"):
                (folder / "MY_MASKS" / kind / split).mkdir(parents=True, exist_ok=True)
            pictures[0][index].save(folder / f"MY_MASKS/images/{split}/{index}.png")
            mask = (np.asarray(pictures[0][index].convert("L")) > 100).astype(np.uint8)
            Image.fromarray(mask).save(folder / f"MY_MASKS/masks/{split}/{index}.png")
    (folder / "MY_MASKS/classes.txt").write_text("ground\nink\n")
    (folder / "configs").symlink_to(PROJECT / "configs")
    (folder / "CHECKOUT").symlink_to(PROJECT)
    with contextlib.chdir(folder):
        pretrain = f"--method mae --data_path IMAGENET --output_dir output/tiny {TINY['main_pretrain.py']}"
        run_program("main_pretrain", pretrain.split())
        for name in ("mae", "nor", "mine"):
            shutil.copytree("output/tiny", f"output/{name}")
        finetune = f"--init_from output/tiny/checkpoints/last.pth --data_path IMAGENET {SHORT} --batch_size 2"
        run_program("main_finetune", [*finetune.split(), "--output_dir", "output/finetune"])
        import tools.embed

        assert tools.embed.main(["output/nor", "PHOTOS"]) == 0
    return folder


def run_program(script, argv):
    assert importlib.import_module(script.removesuffix(".py")).main(argv) == 0


SMOKE = [
    pytest.param(block, id=block.name, marks=[pytest.mark.slow] if block.marker == "slow" else [])
    for block in BLOCKS
    if block.language == "bash" and block.marker in ("smoke", "slow")
]


@pytest.mark.parametrize("block", SMOKE)
def test_the_smoke_examples_run(block, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    for _, words in split_commands(block.text):
        if words[0] == "torchrun":
            words = ["python", *words[next(i for i, word in enumerate(words) if word in PROGRAMS) :]]
        if words[:3] == ["python", "-m", "pip"]:
            continue
        if words[1] == "-m":
            assert importlib.import_module(words[2]).main(words[3:]) in (0, None)
            continue
        argv = words[2:]
        if "--output_dir" in argv:
            shutil.rmtree(argv[argv.index("--output_dir") + 1], ignore_errors=True)
        if "--eval" in argv:
            checkpoint = Path(argv[argv.index("--resume") + 1])
            if not checkpoint.exists():
                shutil.copytree("output/finetune", checkpoint.parent.parent)
            argv += ["--device", "cpu", "--num_workers", "0"]
        else:
            argv += TINY[words[1]].split()
            argv += ["--label_share", "0.02"] if "configs/segment/quickstart.yaml" in argv else []
        run_program(words[1], argv)


PYTHON = {page: [b for b in BLOCKS if b.page == page and b.language == "python"] for page in PAGES}


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES if PYTHON[page]])
def test_the_python_examples_run(page, workspace, monkeypatch):
    """Blocks of one page run in order and share their variables."""
    monkeypatch.chdir(workspace)
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    torch.manual_seed(0)
    namespace: dict = {"__name__": "example"}
    for block in PYTHON[page]:
        if not block.marker.startswith("skip"):
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, namespace)


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len((PROJECT / "README.md").read_bytes()) <= README_BYTES


def test_the_options_reference_is_current():
    assert option_table.PAGE.read_text(encoding="utf-8") == option_table.page(), f"run: {option_table.COMMAND}"


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and mkdocs create them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
def test_every_local_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(other), f"{page.name} links to {target}"
        inside = page.parent == PROJECT / "docs"
        assert not inside or other.is_relative_to(PROJECT / "docs"), f"{page.name}: mkdocs cannot follow {target}"


def test_the_readme_links_to_every_page_and_the_navigation_lists_it():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    navigation = (PROJECT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.name for path in PROJECT.glob("docs/*.md")}
    assert not [name for name in pages if f" {name}\n" not in navigation]
    assert not [name for name in pages - {"index.md"} if f"docs/{name})" not in readme]


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
def test_a_page_names_only_files_tests_and_methods_that_exist(page):
    text = page.read_text(encoding="utf-8")
    rooms = r"(?:configs|scripts|tools|benchmarks|tests|util|data|options|programs|requirements|examples)"
    for file in set(re.findall(rf"(?<![\w/])({rooms}/[\w./-]+\.\w+)|`(\w+\.(?:py|sh))`", text)):
        assert (PROJECT / "".join(file)).exists(), f"{page.name} names {''.join(file)}"
    tests = "\n".join(path.read_text(encoding="utf-8") for path in PROJECT.glob("tests/**/*.py"))
    for test in set(re.findall(r"`(test_\w+)`", text)) - {"test_share"}:  # an option
        assert f"def {test}(" in tests, f"{page.name} names {test}"
    for method in set(re.findall(r"--method ([a-z]\w+)", text)):
        assert method in methods.METHODS, f"{page.name} names the method {method}"
    for module in set(re.findall(r"(?:python -m |`)((?:tools|benchmarks)\.[a-z]\w+)", text)):
        assert (PROJECT / f"{module.replace('.', '/')}.py").exists(), f"{page.name} names {module}"


def test_every_method_and_recipe_kind_is_documented():
    text = (PROJECT / "docs/methods.md").read_text(encoding="utf-8")
    assert not [name for name in methods.METHODS if f"`{name}`" not in text]
    recipes = (PROJECT / "docs/recipes.md").read_text() + (PROJECT / "docs/segmentation.md").read_text()
    named = [path.stem for path in PROJECT.glob("configs/finetune/*.yaml")]
    named += [path.stem for path in PROJECT.glob("configs/segment/*.yaml")]
    assert not [name for name in named if f"`{name}`" not in recipes]


# ---- the notebook ---------------------------------------------------------------------------------------------------


def test_the_notebook_is_stored_with_its_outputs():
    path = PROJECT / "examples/own_images.ipynb"
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    pictures = [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 4 and all(cell["execution_count"] for cell in cells)
    assert path.stat().st_size < 300_000 and "/tmp/" not in text


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Run its code cells in order, with fewer images and epochs, and another output folder."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(PROJECT / "examples")
    monkeypatch.setattr("sys.path", list(sys.path))
    notebook = json.loads((PROJECT / "examples/own_images.ipynb").read_text(encoding="utf-8"))
    namespace: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            source = source.replace("COUNT, EPOCHS = 600, 40", "COUNT, EPOCHS = 64, 1").replace("--warmup_epochs 3", "")
            source = source.replace('CHECKOUT / "output" / "notebook"', f"Path({str(tmp_path)!r})")
            exec(compile(source, cell["id"], "exec"), namespace)
    assert namespace["RUN"].is_relative_to(tmp_path) and namespace["features"].shape == (64, 96)
