"""The rules of the rooms: who may import whom (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import assay

PACKAGE = Path(assay.__file__).parent
#: room -> rooms of assay it must never import. A room is a file or folder of python/assay.
FORBIDDEN = {
    "cost": {
        "importers",
        "ops",
        "measure",
        "engine",
        "machine",
        "formats",
        "catalog",
        "_ffi",
        "jit",
        "report",
        "commands",
    },
    "model": {"ops", "measure", "cost", "formats", "catalog", "_ffi", "report", "commands", "profile"},
    "profile": {"ops", "measure", "cost", "formats", "_ffi", "report", "commands"},
    "formats": {"ops", "measure", "cost", "_ffi", "report", "commands", "profile"},
    "tables": {"ops", "measure", "cost", "formats", "_ffi", "report", "commands", "profile", "importers"},
    "importers": {"ops", "measure", "cost", "formats", "_ffi", "report", "commands", "catalog"},
    "report": {"ops", "measure", "cost", "formats", "_ffi", "commands"},
    "speculation": {"measure", "cost", "report", "commands", "profile", "engine", "_ffi", "jit"},
    "engine": {"measure", "cost", "report", "commands", "profile", "_ffi", "jit"},
    "ops": {"speculation", "engine", "measure", "cost", "formats", "report", "commands", "profile"},
    "reference": {"ops", "_ffi", "jit", "cost", "speculation", "engine"},
    "quantize": {"ops", "_ffi", "jit", "cost", "measure", "formats", "report", "commands"},
    "jit": {"ops", "_ffi", "measure", "cost"},
    "cuda": {"ops", "measure", "cost", "formats", "report", "commands", "profile", "engine", "speculation"},
}
#: Modules whose import alone costs a tenth of a second or more: only inside functions.
SLOW = {"numba", "llvmlite", "scipy", "matplotlib", "torch", "pandas", "gguf", "pyarrow", "sklearn", "sqlite3"}


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports; those of assay as 'assay.x'."""
    tree = ast.parse(path.read_text())
    package = ["assay", *path.relative_to(PACKAGE).with_suffix("").parts][:-1]
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def files(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.exists() else sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_room_imports(room):
    assert files(room), f"no such room: {room}"
    for path in files(room):
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("assay.")}
        assert not rooms & FORBIDDEN[room], f"{path.name} imports {rooms & FORBIDDEN[room]}"


def test_only_ffi_touches_the_compiled_module():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "_ffi.py":
            assert "assay._assay" not in imports(path), path


def test_only_ops_and_cuda_call_ffi():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name not in {"ops", "cuda"} and path.name != "_ffi.py":
            assert "assay._ffi" not in imports(path), path


def test_cost_is_pure():
    """No clock, file, environment or unseeded randomness in cost."""
    for path in files("cost"):
        assert not imports(path) & {"time", "os", "pathlib", "random", "datetime", "tempfile"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"open", "print", "input"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "default_rng":
                assert node.args, f"{path}: unseeded default_rng()"


def test_slow_modules_are_imported_inside_functions():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "jit":  # itself imported inside functions only
            assert not {name.split(".")[0] for name in imports(path, top_level=True)} & SLOW, path
            assert "assay.jit" not in imports(path, top_level=True), path


def test_commands_import_only_the_standard_library_at_the_top():
    for path in files("commands"):
        roots = {name.split(".")[0] for name in imports(path, top_level=True) if not name.startswith("assay.commands")}
        assert roots <= sys.stdlib_module_names, path


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["doctor"],
        ["calibrate"],
        ["predict"],
        ["inspect"],
        ["convert"],
        ["profile"],
        ["validate"],
        ["plan"],
        ["video"],
        ["techniques"],
        ["claims"],
    ],
)
def test_help_loads_no_numpy(command):
    code = (
        "import sys\nfrom assay.cli import main\n"
        f"try:\n    main({[*command, '--help']!r})\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert 'numpy' not in sys.modules, 'numpy was loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout


def test_every_file_of_a_kernel_is_listed():
    """csrc/variants.inc is the only list: no file without a line, no line without a file."""
    csrc = Path(__file__).parent.parent / "csrc"
    lines = {tuple(line[8 : line.index(")")].split(", ")) for line in (csrc / "variants.inc").read_text().splitlines()
             if line.startswith("VARIANT(")}  # fmt: skip
    there = {(path.parent.name, path.stem) for path in (csrc / "cpu").glob("*/*.c")}
    assert lines == there
