"""The package's import rules, read from the code; and what a plain import must not need."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dsasr"
MODULES = sorted(PACKAGE.rglob("*.py"))
# From the lowest up. A package (a folder, or a module at the top level) imports from the layers
# below its own only: from none of the same layer, under `TYPE_CHECKING` neither.
LAYERS = (
    ("utils",),
    ("launch", "config", "kernels", "data"),
    ("stages", "model", "entropy_allocation"),
    ("schedule",),
    ("evaluation", "checkpoint", "demo"),
    ("engine",),
    ("tracking",),
    ("recipe",),
    ("build",),
    ("training", "inference", "planning"),
    ("train", "analysis", "reporting", "doctor", "setup", "server"),
    ("cli", "testing"),
)
LAYER_OF = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}
# The files that read a wall clock, and how.
DATED = {
    ("checkpoint", "manager.py", "time.time"),
    ("reporting", "run_state.py", "time.time"),
    ("doctor", "machine.py", "time.time"),
    ("utils", "environment.py", "datetime.now"),
}
TOP_LEVEL = {"__init__", "train", "config", "recipe", "stages", "schedule", "build"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, whether at the module's top level) of all that ``path`` imports."""
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.append((child.module, top))
                found.extend((f"{child.module}.{alias.name}", top) for alias in child.names)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            visit(child, top and not inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def is_of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def package_of(path: Path) -> str:
    inner = path.relative_to(PACKAGE)
    return inner.parts[0] if len(inner.parts) > 1 else inner.stem


def packages_imported(path: Path) -> set[str]:
    """The packages of this package that ``path`` imports from."""
    names = [name for name, _ in imports(path) if name.startswith("dsasr.")]
    at_top = {"__version__", "Recognizer", "StreamingRecognizer"}
    return {name.split(".")[1] for name in names} - at_top


def test_every_module_is_in_a_package():
    top_level = {path.stem for path in PACKAGE.glob("*.py")}
    assert top_level == TOP_LEVEL
    packages = {package_of(path) for path in MODULES} - {"__init__"}
    assert packages == set(LAYER_OF)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    package = package_of(path)
    if package == "__init__":  # hands on what a user imports from the top
        return
    for other in packages_imported(path) - {package}:
        assert LAYER_OF[other] < LAYER_OF[package], f"{path.relative_to(PACKAGE)} imports {other}"


def test_modules_import_each_other_in_no_circle():
    names = {}
    for path in MODULES:
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names[dotted.removesuffix(".__init__")] = path
    del names["dsasr"]  # its imports wait until they are asked for
    graph = {
        name: {other for other, _ in imports(path) if other in names and other != name}
        for name, path in names.items()
    }
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names them


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_library_is_imported_in_its_package(path):
    inner = path.relative_to(PACKAGE)
    for name, top in imports(path):
        if is_of(name, "deepspeed"):
            assert inner.parts[0] == "engine", f"{inner} imports deepspeed"
            assert not top, f"{inner}: deepspeed is imported where it is used"
        if is_of(name, "triton"):
            assert inner.parts[0] == "kernels", f"{inner} imports triton"
            # A module of Triton kernels may import it at its top if only functions import it.
            assert not top or "triton" in inner.name, f"{inner} imports triton at its top"
        if is_of(name, "peft"):
            assert str(inner) == "model/lora.py" and not top, f"{inner} imports peft"
        assert not is_of(name, "tools"), f"{inner} imports from tools"
        # Between a run's own processes pickle is what multiprocessing itself uses.
        own = str(inner) == "data/dataloader/workers.py"
        assert own or not is_of(name, "pickle"), f"{inner}: pickle"


def test_triton_modules_are_imported_inside_functions_only():
    for path in MODULES:
        for name, top in imports(path):
            if top and "triton" not in path.name:
                assert "kernels.triton" not in name, f"{path.name} imports {name} at its top"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_eval_no_shell_no_unsafe_yaml(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load")
            # A wall clock may jump; what is decided by time goes by the monotonic one.
            # (Checkpoints are dated: those of other days are kept by the hours between them. How
            # long ago another machine has written a file, and how far two clocks are apart, no
            # other clock tells. A report says when it was made.)
            dated = (*path.parts[-2:], called) in DATED
            clocks = ("time.time", "datetime.now", "datetime.datetime.now")
            assert dated or called not in clocks, path
            for keyword in node.keywords:
                shell = keyword.arg == "shell" and ast.unparse(keyword.value) == "True"
                # pipe: URLs, behind data.dataloader.source.allow_pipe.
                assert not shell or path.name == "storage.py", f"{path}: a shell"
                unsafe = keyword.arg == "weights_only" and ast.unparse(keyword.value) == "False"
                assert not unsafe, f"{path}: weights_only=False"


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    settings = {**os.environ, "DS_ACCELERATOR": "cpu", **env}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=settings, cwd=ROOT)


def test_the_package_imports_without_triton_espeak_or_a_gpu():
    code = (
        "import sys\n"
        "names = 'triton espeakng_loader deepspeed liger_kernel lhotse peft'\n"
        "for name in names.split():\n"
        "    sys.modules[name] = None\n"
        "import dsasr, dsasr.training.trainer, dsasr.planning.timeline, dsasr.kernels.dispatch\n"
        "import dsasr.data.dataloader.dataloader\n"
        "import dsasr.model.speech_llm, dsasr.evaluation, dsasr.entropy_allocation\n"
        "print('fine')"
    )
    done = run(code, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.strip().endswith("fine"), done.stderr[-2000:]


def test_as_a_script_train_does_not_put_our_kernels_on_the_path():
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(PACKAGE)!r})\n"  # what python does for a script
        "sys.argv = ['train.py']\n"
        "try:\n"
        f"    runpy.run_path({str(PACKAGE / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "import importlib.util\n"
        "print('found' if importlib.util.find_spec('kernels') else 'nothing')\n"
        "import dsasr; print(dsasr.__file__)"
    )
    done = run(code)
    assert "nothing" in done.stdout and str(PACKAGE) in done.stdout, done.stdout + done.stderr
