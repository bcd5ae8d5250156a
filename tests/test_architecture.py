"""The house rules of docs/architecture.md, read from the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import luthier
from luthier.recipe import registry
from luthier.recipe.shipped import names
from luthier.recipe.text import read

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "luthier"
FILES = sorted(PACKAGE.rglob("*.py"))
OPTIONAL = {"peft", "datasets", "pyarrow", "tensorboard", "wandb", "mlflow", "trackio", "optuna", "ray", "submitit"}


def modules(tree: ast.AST, *, everywhere: bool = True) -> Iterator[str]:
    """Modules that a file imports; TYPE_CHECKING blocks do not count."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for inner in ast.walk(node)}
        if not everywhere and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    return set(modules(ast.parse(path.read_text(encoding="utf-8")), everywhere=everywhere))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floors() -> dict[str, int]:
    """name -> floor, from the document: 1 is the top."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Floors")[1].split("\n## ")[0]
    found = {}
    for line in text.splitlines():
        match = re.match(r"(\d+)\. (.*)", line)
        if match:
            for name in re.findall(r"`([\w/]+)`", match[2]):
                found[name.rstrip("/")] = int(match[1])
    return found


def floor_of(module: str) -> int | None:
    known = floors()
    parts = module.split(".")[1:]
    return known.get(parts[0]) if parts else None


def test_every_file_has_a_floor_in_the_document():
    homeless = {dotted(path) for path in FILES if dotted(path) != "luthier" and floor_of(dotted(path)) is None}
    assert homeless == set()


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_go_down_or_along(path):
    here = dotted(path)
    if here == "luthier":
        return
    mine = floor_of(here)
    for module in imports(path):
        other = floor_of(module) if module.startswith("luthier.") else None
        assert other is None or other >= mine, f"{here} (floor {mine}) imports {module} (floor {other})"


INGREDIENTS = [path for path in FILES if "ingredients" in path.parts and path.name != "__init__.py"]


@pytest.mark.parametrize("path", INGREDIENTS, ids=dotted)
def test_an_ingredient_imports_only_the_grammar_and_the_errors(path):
    ours = {module for module in imports(path) if module.startswith("luthier")}
    assert all(module.startswith(("luthier.core", "luthier.errors")) for module in ours), ours


def test_the_spine_imports_no_ingredient():
    spine = [path for path in FILES if "ingredients" not in path.parts and path.name != "__init__.py"]
    for path in spine:
        assert not [module for module in imports(path) if module.startswith("luthier.ingredients")], path


def test_transformers_is_imported_only_where_models_come_from():
    allowed = ("luthier.hosts", "luthier.sources", "luthier.testing")
    for path in FILES:
        if not dotted(path).startswith(allowed):
            assert not [module for module in imports(path) if module.split(".")[0] == "transformers"], path


def test_optional_packages_are_imported_inside_functions_only():
    for path in FILES:
        top = {module.split(".")[0] for module in imports(path, everywhere=False)}
        assert not top & OPTIONAL, path


def test_no_public_function_takes_named_arguments_it_does_not_name():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.args.kwarg:
                # a transformers callback's signature is transformers'; a replaced forward's or function's is the one it replaces
                assert node.name.startswith("on_") or node.name in ("through", "forward", "addmm"), (
                    f"{path}:{node.lineno} {node.name}"
                )


def test_nothing_is_registered_or_drawn_by_importing():
    """Module level holds definitions, constants and imports; a call there may only make a constant."""
    allowed = {
        "TypeVar",
        "compile",
        "logspace",
        "tuple",
        "float",
        "frozenset",
        "resources.files",
        "files",
        "getLogger",
        "Path",
    }
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                said = ast.unparse(node.value)
                assert said.startswith(("app.", "_Loader.add_")), f"{path}:{node.lineno} {said}"
    assert allowed


def test_ingredients_are_frozen_and_draw_from_no_global_generator():
    forbidden = ("torch.manual_seed", "random.seed", "np.random.seed", "torch.seed(")
    for path in INGREDIENTS:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text], path
    for name in registry.INGREDIENTS:
        part = registry.find(name)()
        with pytest.raises((AttributeError, TypeError)):
            part.anything = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(registry.INGREDIENTS))
def test_every_ingredient_has_file_test_card_and_name(name):
    kind = registry.find(name)
    assert kind.name() == name
    assert getattr(luthier, kind.__name__) is kind
    family = registry.family(name)
    assert (ROOT / "tests" / "ingredients" / family / f"test_{name}.py").is_file()
    card = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {name} — ")
    for heading in ("What it does", "The equation", "In a recipe", "When it helps", "When it hurts", "Claims"):
        assert f"## {heading}" in card, heading
    assert "## Source, and how ours differs" in card
    assert "[memory]" not in card


def test_no_public_name_is_also_a_files():
    """Importing ``luthier.x`` would put the file in the place of the name ``luthier.x``."""
    files = {
        path.stem if path.name != "__init__.py" else path.parent.name
        for path in PACKAGE.iterdir()
        if path.suffix == ".py"
    }
    assert not files & set(luthier.__all__)


def test_every_public_name_resolves():
    assert all(getattr(luthier, name) is not None for name in luthier.__all__)
    assert set(luthier._WHERE) == set(luthier.__all__)


def test_shipped_recipes_are_sound():
    assert names() == [
        "chang", "eh-ft", "ft", "gradual", "llrd", "llrd-grouped", "lora", "lp", "lp-ft", "lp-ft-chang", "lp-ft-llrd-swa", "lp-lora", "mosbach", "ulmfit", "zhang",
    ]  # fmt: skip
    for name in names():
        assert read(name).name == name
        assert read(name).description


LIGHT = """
import sys
{work}
heavy = sorted(set(sys.modules) & {{"torch", "transformers", "pandas", "matplotlib", "sklearn", "accelerate", "numpy"}})
print("heavy:", heavy)
"""


@pytest.mark.parametrize(
    "work",
    [
        "import luthier",
        "import luthier.cli\nsys.argv = ['luthier', '--help']\ntry:\n    luthier.cli.main()\nexcept SystemExit:\n    pass",
        "import luthier.cli\nsys.argv = ['luthier', 'methods']\ntry:\n    luthier.cli.main()\nexcept SystemExit:\n    pass",
        "from luthier.report import Report",
    ],
    ids=["import", "--help", "methods", "report"],
)
def test_light_things_load_nothing_heavy(work):
    done = subprocess.run([sys.executable, "-c", LIGHT.format(work=work)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("heavy: []"), done.stdout[-300:] + done.stderr[-300:]


def test_the_tree_names_no_machine():
    told = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    for name in told:
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".toml", ".yaml", ".txt", ".j2", ".json")
            and name != "tests/test_architecture.py"
        ):
            text = path.read_text(encoding="utf-8")
            assert "/work/" not in text, name
            assert "/root/" not in text, name


def test_type_checkers_see_the_names_that_importing_finds():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == luthier._WHERE
