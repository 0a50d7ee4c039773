"""What can be imported, what importing costs, and what the code never does."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import holdfast

PACKAGE = Path(holdfast.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
UNDER_TEST = {
    "sites", "families", "subject", "hooks", "replay", "batch", "features", "edits", "saes", "spans"
}  # fmt: skip
SEARCHED = {
    "problem", "subspace", "jacobian", "interventions", "behaviors", "discovery", "constraints",
    "attacks", "recovery", "verify", "controls", "trial", "study", "store", "executor", "report",
}  # fmt: skip
HEAVY = ("torch", "transformers", "sae_lens", "sklearn", "scipy", "plotly", "pyarrow")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after `code`."""
    printed = run(f"import sys\n{code}\nprint('loaded:', *({set(HEAVY)!r} & sys.modules.keys()))")
    return set(printed.rpartition("loaded:")[2].split())


@pytest.mark.parametrize("name", holdfast.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(holdfast, name) is not None
    assert name in dir(holdfast)


@pytest.mark.parametrize("name", holdfast.__all__)
def test_a_public_name_is_no_module(name: str) -> None:
    """Importing a submodule binds it to the package: of that name, it would hide the export."""
    assert not (PACKAGE / f"{name}.py").exists() and not (PACKAGE / name).is_dir()
    first, second = getattr(holdfast, name), getattr(holdfast, name)
    assert first is second and not isinstance(second, ModuleType)


def test_public_names_are_listed_once_and_sorted() -> None:
    assert list(holdfast.__all__) == sorted(set(holdfast.__all__))
    scope: dict[str, object] = {}
    exec("from holdfast import *", scope)
    assert set(holdfast.__all__) <= scope.keys()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'recovr'"):
        _ = holdfast.recovr
    assert not hasattr(holdfast, "recovr")


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert loaded_after("import holdfast") == set()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "from holdfast.cli import main\n"
        "sys.argv = ['holdfast', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code"
    )
    assert loaded_after(code) == set()
    assert loaded_after(code.replace("'--help'", "'run', '--help'")) == set()


def test_every_kind_can_be_imported_first() -> None:
    """Kinds are imported by name: none may rely on another module having been imported before."""
    kinds = (
        "behaviors",
        "constraints",
        "controls",
        "datasets",
        "discovery",
        "interventions",
        "judges",
        "objectives",
        "saes",
    )
    names = [
        ".".join(("holdfast", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in MODULES
        if path.parent.name in kinds and path.stem != "__init__"
    ]
    assert len(names) >= 12
    run(
        "import importlib, sys\n"
        "import torch\n"
        f"for name in {names!r}:\n"
        "    for known in [m for m in sys.modules if m.split('.')[0] == 'holdfast']:\n"
        "        del sys.modules[known]\n"
        "    importlib.import_module(name)\n"
    )


def part_of(path: Path) -> str:
    """The module or folder of the package that a file is, or is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", [p for p in MODULES if part_of(p) in UNDER_TEST], ids=lambda p: p.stem
)
def test_the_thing_under_test_knows_of_no_search(path: Path) -> None:
    """What is known of a model and its SAEs rests on nothing that is done with them."""
    imported = {
        node.module.split(".")[1]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("holdfast.")
    }
    assert not imported & SEARCHED


# --- What the code never does ---------------------------------------------------------------------

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}


def called(node: ast.Call) -> str:
    """The dotted name of what is called, as far as it is written out."""
    return ast.unparse(node.func)


def offences(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # The error that torch's weights-only loading raises can be named, nothing more.
            harmless = {alias.name for alias in node.names} == {"UnpicklingError"}
            names = [] if harmless else [node.module or ""]
        found += [f"imports {name}" for name in names if name.split(".")[0] in PICKLES]
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if keywords.get("trust_remote_code", "False") != "False":
            found.append(f"{name} trusts remote code")
        if keywords.get("shell", "False") != "False" or name in ("os.system", "os.popen"):
            found.append(f"{name} runs a shell")
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
            found.append("numpy unpickles")
        if name in RUNS_TEXT or name.endswith((".read_pickle", ".to_pickle")):
            found.append(f"calls {name}")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import load",
        "M.from_pretrained(x, trust_remote_code=True)",
        "M.from_pretrained(x, trust_remote_code=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_scan_sees_what_it_is_for(code: str) -> None:
    assert offences(ast.parse(code))


def test_the_scan_leaves_innocent_code_alone() -> None:
    innocent = "model.eval()\nre.compile(x)\ntorch.load(p, weights_only=True)\nshell = True"
    innocent += "\nfrom pickle import UnpicklingError"
    assert offences(ast.parse(innocent)) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_module_unpickles_or_runs_text(path: Path) -> None:
    assert offences(ast.parse(path.read_text())) == []
