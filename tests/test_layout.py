"""The rooms of ``calib/``: imports one way and without cycles, short modules, and each name in one place."""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers import CHECKOUT

#: Each room may import those before it, and itself. The package's own module belongs to the first, as every import of
#: calib runs it; ``python -m calib`` belongs to the last.
ROOMS = (
    *("base", "models", "dataset", "activations", "analysis", "quantization"),
    *("evaluation", "runs", "stages", "cli"),
)
MOST_ENTRIES = 12
MOST_LINES = 300
#: CUDA sources, in one piece.
LONG_MODULES = ("activations/cuda_kernels.py",)
#: Where the names of a run's files are defined.
LAYOUT = "base/layout.py"
#: Where files of HDF5 are opened, as its locks are not to be met.
HDF5 = "base/hdf5.py"
#: Variables and arguments with the text of ``--help``, where such names may be spelt out.
HELP_TEXT = re.compile(r"(\w+_)?(HELP|END|DESCRIPTION|EPILOG)|help|description|epilog")


def modules_of(root: Path) -> dict[str, Path]:
    """Files of all modules in the folder ``root`` of a package named calib, by dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> list[str]:
    """Dotted names that a module imports, anywhere in it; ``from a import b`` gives both a and a.b."""
    return imported_by(path.read_text(encoding="utf-8"))


@cache
def imported_by(text: str) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"import by absolute names in\n{text}"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def imports_within(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """The modules of the package that each module imports; of a and a.b, where a.b is a module, only a.b."""
    graph = {}
    for name, path in modules.items():
        named = {target for target in imported(path) if target in modules}
        graph[name] = {a for a in named if not any(b.startswith(f"{a}.") for b in named)} - {name}
    return graph


def room_of(module: str) -> str:
    _, _, rest = module.partition(".")
    return {"": ROOMS[0], "__main__": ROOMS[-1]}.get(rest, rest.partition(".")[0])


def check_entries(root: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    yield from sorted({f"calib/{room} is no room" for room in map(room_of, modules) if room not in ROOMS})
    entries = {".".join(name.split(".")[:2]) for name in modules}
    if len(entries) > MOST_ENTRIES:
        yield f"{len(entries)} entries directly in calib/, more than {MOST_ENTRIES}"


def check_lengths(root: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for path in modules.values():
        file, lines = path.relative_to(root).as_posix(), len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES and file not in LONG_MODULES:
            yield f"{file} has {lines} lines, more than {MOST_LINES}"


def check_order(root: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for name, targets in imports_within(modules).items():
        for target in sorted(targets):
            rooms = [room_of(name), room_of(target)]
            if set(rooms) <= set(ROOMS) and ROOMS.index(rooms[0]) < ROOMS.index(rooms[1]):
                yield f"{name} imports {target}, upward"


def check_cycles(root: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    try:
        TopologicalSorter(imports_within(modules)).prepare()
    except CycleError as error:
        yield f"a cycle of imports: {' <- '.join(error.args[1])}"


def check_families(root: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for name, path in modules.items():
        for package in ("diffusionkit", "mflux", "calib.models.mmdit", "calib.models.mflux"):
            if room_of(name) != "models" and any(f"{target}.".startswith(f"{package}.") for target in imported(path)):
                yield f"{name} imports {package}, which only calib.models may"


def check_hdf5(root: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for path in modules.values():
        if path == root / HDF5:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "h5py.File":
                yield f"{path.relative_to(root).as_posix()}:{node.lineno} opens a file of HDF5, which only {HDF5} may"


def check_file_names(root: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    """Names of a run's files outside of ``base/layout.py``; those without a dot or slash are words, too, and may be."""
    names = [value for _, value in literals(root / LAYOUT) if re.search(r"\w[./]\w", value)]
    pattern = re.compile(r"(?<![\w./-])(?:" + "|".join(map(re.escape, names)) + r")(?![\w-])")
    for path in modules.values():
        if path != root / LAYOUT:
            for line, value in literals(path):
                if match := pattern.search(value):
                    yield f"{path.relative_to(root).as_posix()}:{line} spells {match[0]!r}, a name of {LAYOUT}"


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """Line and value of all strings in a module but docstrings, texts of help and names of templates."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out: set[ast.AST] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant() as value):
                left_out.add(value)
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if HELP_TEXT.fullmatch(name):
                left_out.update(ast.walk(value))
            case ast.keyword(arg=str(name), value=value) if HELP_TEXT.fullmatch(name):
                left_out.update(ast.walk(value))
            case ast.Call(func=ast.Name(id="render"), args=[value, *_]):
                left_out.add(value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in left_out:
            yield node.lineno, node.value


def faults(root: Path) -> list[str]:
    """All that is wrong with the package in ``root``, a line each."""
    modules = modules_of(root)
    checks = (check_entries, check_lengths, check_order, check_cycles, check_families, check_hdf5, check_file_names)
    return [fault for check in checks for fault in check(root, modules)]


def test_calib_has_this_layout() -> None:
    assert faults(CHECKOUT / "calib") == []


# The checks themselves, on a package of a few lines


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of this layout without a fault, with all that is allowed."""
    root = tmp_path / "calib"
    for room in ROOMS:
        write(root / room / "__init__.py", f'"""The room {room}."""')
    write(root / "__init__.py", '"""A package."""\n\nfrom calib.base import layout')
    write(root / "__main__.py", "from calib.cli.main import main")
    write(root / LAYOUT, 'STATUS, MODEL = "status.json", "quantized"\nPAGE = "images/full"')
    write(root / "base" / "files.py", '"""Writes status.json."""\n\nfrom calib.base import layout')
    write(root / "models" / "model.py", "import diffusionkit.mlx")
    write(root / "runs" / "page.py", 'page = render("status.json", label="quantized", other="my-status.json")')
    write(root / "cli" / "main.py", 'import calib\nfrom calib.models.model import x\n\nTHE_HELP = "reads status.json"')
    write(root / "activations" / "cuda_kernels.py", "x = 1\n" * 400)
    return root


def test_a_package_of_this_layout_has_no_fault(package: Path) -> None:
    assert faults(package) == []


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("helpers/__init__.py", "", "calib/helpers is no room"),
        ("stray.py", "", "13 entries directly in calib/, more than 12"),
        ("dataset/long.py", "x = 1\n" * 300, "dataset/long.py has 301 lines, more than 300"),
        ("dataset/up.py", "from calib.activations import cuda_kernels", "calib.dataset.up imports calib.activations"),
        ("base/up.py", "def f():\n    import calib.runs", "calib.base.up imports calib.runs, upward"),
        ("base/errors.py", "import calib.base.files", ""),
        (LAYOUT, "import calib.base.files", "a cycle of imports: calib.base."),
        ("stages/kit.py", "from diffusionkit.mlx import mmdit", "calib.stages.kit imports diffusionkit"),
        ("stages/dit.py", "import calib.models.mmdit.names", "calib.stages.dit imports calib.models.mmdit"),
        ("stages/kit.py", "import mflux.callbacks", "calib.stages.kit imports mflux"),
        (
            "runs/open.py",
            "import h5py\n\n\ndef f(path) -> h5py.File:\n    return h5py.File(path)",
            "runs/open.py:5 opens",
        ),
        (HDF5, "import h5py\n\nfile = h5py.File('x')", ""),
        ("runs/names.py", 'path = run / "status.json"', "runs/names.py:1 spells 'status.json'"),
        ("runs/names.py", 'raise OSError(f"{run}: no status.json")', "runs/names.py:1 spells 'status.json'"),
        ("runs/names.py", 'x = "quantized"\ny = run / "images/full/0.png"', "runs/names.py:2 spells 'images/full'"),
    ],
)
def test_each_fault_is_found(package: Path, file: str, text: str, fault: str) -> None:
    kept = (package / file).read_text(encoding="utf-8") if file == LAYOUT else ""
    write(package / file, kept + text)
    found = faults(package)
    assert any(line.startswith(fault) for line in found) if fault else not found, found
