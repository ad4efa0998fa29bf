"""The shape of the package: layers, budgets, names, what is shipped, and how long it takes to say hello."""

import ast
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxsi"

# From the top down. A module imports from its own room and from those below it. A room is a folder of the package, or
# the one module `lm`.
ROOMS = (
    "cli", "perf", "report", "toyworld", "checkedworld", "evals", "methods", "stages", "training", "sampling", "lm",
    "hf", "model", "text", "runs",
)  # fmt: skip
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
MODULE_LINES, METHOD_LINES, FUNCTION_STATEMENTS, CONFIG_FIELDS = 500, 300, 60, 16


def dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """jaxsi.toyworld.seed -> toyworld; "" for jaxsi and jaxsi.__main__, which lead into the rooms."""
    return module.split(".")[1] if module not in ("jaxsi", "jaxsi.__main__") else ""


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """The modules of the package that a module imports, anywhere in it."""
    known = {dotted(module) for module in MODULES}
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= below & known or {node.module or ""}
    return {name for name in found if name.split(".")[0] == "jaxsi"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_imports(path):
    if path.name != "__main__.py":
        importlib.import_module(dotted(path))


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other."""
    names = sorted(set(arrows).union(*arrows.values()))
    matrix = np.asarray([[b in arrows.get(a, ()) for b in names] for a in names])
    count, labels = connected_components(matrix, connection="strong")
    groups = [[name for name, label in zip(names, labels, strict=True) if label == n] for n in range(count)]
    return [group for group in groups if len(group) > 1]


def test_imports_go_down_from_room_to_room():
    """Counts rooms, imports that go up, and circles of rooms and of modules; `pytest -s` shows the counts."""
    arrows = {dotted(path): imported(path) - {"jaxsi"} for path in MODULES if room(dotted(path))}
    rooms = {room(module) for module in arrows}
    assert rooms <= set(ROOMS), "a new folder needs its place in ROOMS"
    upward = [
        f"{module} -> {other}"
        for module, others in arrows.items()
        for other in others
        if ROOMS.index(room(other)) < ROOMS.index(room(module))
    ]
    of_rooms = {name: set[str]() for name in rooms}
    for module, others in arrows.items():
        of_rooms[room(module)] |= {room(other) for other in others} - {room(module)}
    found = circles(of_rooms), circles(arrows)
    print(f"\n{len(rooms)} rooms, {len(arrows)} modules; imports upward: {len(upward)}; circles: {found}")
    assert upward == []
    assert found == ([], [])


# Modules of `methods` that are not methods.
AROUND_METHODS = {"__init__", "lifecycle", "preflight", "seeded", "single", "start"}
SHARED_BY_METHODS = {"jaxsi.methods.lifecycle", "jaxsi.methods.seeded"}
METHODS = [path for path in MODULES if path.parts[1] == "methods" and path.stem not in AROUND_METHODS]


def test_method_imports_no_other_method():
    for path in METHODS:
        others = {name for name in imported(path) if name.startswith("jaxsi.methods.")} - SHARED_BY_METHODS
        assert not others, f"{path} imports {others}; what two methods share moves down"


@pytest.mark.parametrize("path", METHODS, ids=str)
def test_method_holds_what_the_paper_does_and_nothing_else(path):
    """Memory, files, completeness and stage factories have their homes elsewhere."""
    leaks = r"\.release\(|\bdel |checkpoint|is_complete|_and_counts|\blambda\b|cache_clear|'status'"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not re.findall(leaks, "\n".join(map(ast.unparse, body))), f"{path}: {node.name}"
        if isinstance(node, ast.ClassDef):
            assert "ClassVar" not in ast.unparse(node), f"{path}: {node.name} has settings of the project"
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            assert not ast.unparse(node.returns).startswith("Callable"), f"{path}: {node.name} makes a stage"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("orbax", {"jaxsi/runs/checkpoint.py"}),
        ("flax", {"jaxsi/model/decoder.py"}),
        ("grain", {"jaxsi/training/batches.py"}),
        ("datasets", {"jaxsi/stages/datasets.py", "jaxsi/stages/rows.py", "jaxsi/stages/summaries.py"}),
        ("transformers", {"jaxsi/text/tokenizer.py", "jaxsi/text/sentencepiece_model.py"}),
        ("safetensors", {"jaxsi/hf/weights.py", "jaxsi/hf/export.py", "jaxsi/hf/gguf.py"}),
    ],
)
def test_library_is_imported_only_in_its_home(library, homes):
    users = set()
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == library for name in names):
                users.add(path.as_posix())
    assert users == homes


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_length_budgets(path):
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    limit = METHOD_LINES if path.parts[1] == "methods" else MODULE_LINES
    assert lines < limit, f"{path} has {lines} lines, the budget is {limit}"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            statements = sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1
            assert statements < FUNCTION_STATEMENTS, f"{path}:{node.lineno}: {node.name} has {statements} statements"
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            fields = [
                item for item in node.body if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item)
            ]
            # ModelConfig is what an architecture is, not what a user sets.
            assert len(fields) <= CONFIG_FIELDS or node.name == "ModelConfig", (
                f"{path}: {node.name}, {len(fields)} fields"
            )


@pytest.mark.xdist_group("together")
def test_tests_of_a_group_stay_together(request):
    """The scheduler knows a group by the end of the id; without it every worker would make what the group shares."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("groups are for --dist=loadgroup, with several workers")
    assert request.node.nodeid.endswith("@together")


def test_module_names_are_nouns():
    for path in MODULES:
        assert not {"utils", "common", "misc", "helpers"} & {path.stem, *path.parts}, path


def test_every_module_has_a_docstring_and_no_leftovers():
    for path in MODULES:
        assert ast.get_docstring(parsed(path)), f"{path} does not say what it is"
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not re.search(r"\b(?:TODO|FIXME|XXX)\b", text), path


def child(code: str) -> dict:
    """What a fresh interpreter prints, as JSON; without pytest's settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "TF_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# CPU time, not wall time: other processes of the machine do not change it.
TIMED = """
import json, sys, time, contextlib, io
muted = contextlib.redirect_stdout(io.StringIO())
start = time.process_time()
{statement}
heavy = {{"jax", "jaxlib", "tensorflow", "transformers", "datasets", "torch", "orbax", "grain", "flax"}}
heavy &= set(sys.modules)
print(json.dumps({{"seconds": time.process_time() - start, "heavy": sorted(heavy)}}))
"""


@pytest.mark.parametrize(
    ("statement", "limit"),
    [
        ("import jaxsi", 0.3),
        ("from jaxsi.cli.main import main\nwith muted: main(['--help'])", 1.0),
        (
            "from jaxsi.cli.main import main\nwith muted: main(['generate', '--help'])",
            2.0,
        ),
        (
            "from jaxsi.cli.main import main\nwith muted: main(['run', '--help'])",
            1.0,
        ),
        ("from jaxsi.cli.status import status", 2.0),
    ],
    ids=["import", "--help", "generate --help", "run --help", "status"],
)
def test_start_imports_no_heavy_library(statement, limit):
    result = child(TIMED.format(statement=statement))
    assert result["heavy"] == []
    assert result["seconds"] < limit


def test_tensorflow_is_imported_only_when_used():
    result = child(TIMED.format(statement="import jaxsi\njaxsi.load, jaxsi.generate, jaxsi.score"))
    assert not {"tensorflow", "torch", "datasets"} & set(result["heavy"])


def test_wheel_contains_data_files(tmp_path):
    pytest.importorskip("hatchling", reason="pip install 'jaxsi[test]'")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    shipped = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    shipped = {name for name in shipped if "__pycache__" not in name}
    assert {
        "jaxsi/stages/prompts/self_rewarding_judge.txt",
        "jaxsi/text/plain_chat.jinja",
        "jaxsi/toyworld/judge.txt",
    } <= inside
    assert shipped <= inside
    assert not [name for name in inside if name.startswith(("tests/", "configs/"))]
    seed = [name for name in shipped if name.startswith("jaxsi/toyworld/seed_model/")]
    assert sum((ROOT / name).stat().st_size for name in seed) <= 8 * 2**20


def test_imported_packages_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^A-Za-z0-9_-]", text)[0].lower().replace("-", "_") for text in project["dependencies"]}
    declared |= {"orbax", "tensorflow", "google"}  # of orbax-checkpoint, tensorflow-text and protobuf
    declared |= {
        "gguf",
        "langdetect",
        "lm_eval",
        "matplotlib",
        "nltk",
        "openai",
    }  # extras, imported where they are used
    used = set()
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                used.add(node.module.split(".")[0])
    assert used - set(sys.stdlib_module_names) - {"jaxsi"} <= declared


def documented_commands() -> list[list[str]]:
    """The `jaxsi …` commands of the code blocks in README.md and docs/, arguments split as a shell does."""
    commands: dict[str, list[str]] = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        shell = [block for language, block in blocks if language in ("", "bash", "sh", "console", "shell")]
        lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
        parts = [part.strip() for line in lines for part in re.split(r"&&|;|\|", line.partition(" #")[0])]
        for part in parts:
            command = re.sub(r"^(?:\S*/)?(?:python3? -m )?jaxsi ", "jaxsi ", part)
            if command.startswith("jaxsi "):
                commands[command] = shlex.split(command)[1:]
    return list(commands.values())


def documented_file(name: Path, folder: Path) -> Path | None:
    """The Python file that docs/add_a_method.md says to save under this name, in ``folder``."""
    page = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    if f"Save this as `{name}`" not in page:
        return None
    code = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1]
    (folder / name).write_text(code, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("command", documented_commands(), ids=" ".join)
def test_documented_commands_parse(command, tmp_path):
    from jaxsi.cli.main import COMMANDS

    name = next((name for name in COMMANDS if command[: len(name.split())] == name.split()), None)
    assert name, f"there is no command {command[:2]}"
    rest = [word for word in command[len(name.split()) :] if word not in ("--json", "--debug", "--help")]
    if name == "launch local":
        rest, launched = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
        test_documented_commands_parse(launched, tmp_path)
    if name == "run":
        from jaxsi.cli.distributed import take_options
        from jaxsi.cli.run import _split, configure, prompt_fields

        config, options, overrides = _split(take_options(rest)[1])
        path = documented_file(config, tmp_path) or ROOT / config
        assert path.is_file(), f"{config} is not a config of this repository"
        configure(path, overrides, **prompt_fields(options))
    elif name == "plan":
        from jaxsi.perf.topologies import topology

        assert (ROOT / rest[0]).is_file(), f"{rest[0]} is not a config of this repository"
        topology(rest[rest.index("--topology") + 1])
    elif "--help" not in command:
        import tyro

        module = importlib.import_module(COMMANDS[name][0])
        options = COMMANDS[name][1].capitalize()  # `Report` is what commands return
        tyro.cli(getattr(module, "ReportOptions" if options == "Report" else options), args=rest)


LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)#?([^)\s]*)\)")


PAGES = ["README.md", "launch/README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_work(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in LINK.findall(text):
        if target.startswith("https://"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} links to {target}, which does not exist"
        if anchor:
            other = path.read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.*)$", other, re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in known | set(re.findall(r'id="([^"]+)"', other)), f"{page}: {target} has no part {anchor}"
