"""The floors of the house: same rooms on each, imports point down, C++ and Python name the same things."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import itm_kernels
from itm_kernels import native
from itm_kernels.ops.options import FOCALS, RAW_FEATURE_NORMS, SIMILARITY_AGG_FUNCS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "itm_kernels"
CSRC = ROOT / "csrc"
LOWEST = ("reference", "eager", "native", "triton")
# One implementation in torch ops serves every floor: no rooms below.
WITHOUT_FLOORS = {"attention_states", "contrastive_loss", "scores_and_constraints", "swapped_fragments", "triplet_loss"}
# What ops share, and what the native floor shares among its ops.
HELPERS = {
    "ops": {
        "attention_options",
        "autograd",
        "batch_norm",
        "constraint_options",
        "dropout",
        "library",
        "options",
        "pairs",
        "parameters",
        "stage_options",
        "stages",
    },
    "native": {"packing", "devices"},
    "eager": {
        "all_constraints",
        "attention_weights",
        "blocks",
        "chosen_pairs",
        "constraint_terms",
        "norms",
        "stage_blocks",
    },
    "reference": {"common", "stages"},
}
# What a floor may take from the contracts: records, checks, and what both sides must agree on to the bit.
SHARED = (
    "layout",
    "pair_blocks",
    "ops.attention_options",
    "ops.constraint_options",
    "ops.dropout",
    "ops.options",
    "ops.pairs",
    "ops.parameters",
    "ops.stage_options",
)


def rooms(floor: str) -> set[str]:
    """Ops of a floor, by its modules."""
    names = {path.stem for path in (PACKAGE / floor).glob("*.py")} - {"__init__"}
    return names - HELPERS.get(floor, set())


def imported(path: Path) -> Iterator[str]:
    """Full names of everything of ours that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0].startswith("itm_"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("itm_"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert PACKAGE not in path.parents, f"{path}: relative import; absolute ones can be read and checked"


def modules_below(*parts: str) -> list[Path]:
    return sorted(PACKAGE.joinpath(*parts).rglob("*.py"))


def test_every_op_has_its_rooms() -> None:
    ops = rooms("ops") - WITHOUT_FLOORS
    assert ops
    for floor in ("reference", "eager"):
        assert rooms(floor) == ops, floor
    assert rooms("native") <= ops
    for op in rooms("native"):
        assert (CSRC / "cpu" / f"{op}.cpp").is_file(), op
    for op in rooms("ops"):
        assert any((ROOT / "tests" / "ops").glob(f"test_{op}*.py")), op


@pytest.mark.parametrize("floor", ["reference", "eager", "native"])
def test_a_room_offers_what_backends_ask_of_it(floor: str) -> None:
    for op in rooms(floor):
        module = importlib.import_module(f"itm_kernels.{floor}.{op}")
        assert list(inspect.signature(module.why_not).parameters) == ["device", "dtype"]
        for phase in ("forward", "backward"):
            assert "workspace_bytes" in inspect.signature(getattr(module, phase)).parameters
        reference = importlib.import_module(f"itm_kernels.reference.{op}")
        for phase in ("forward", "backward"):
            ours, its = (inspect.signature(getattr(m, phase)).parameters for m in (module, reference))
            assert list(ours) == list(its), f"{floor}.{op}.{phase}"


@pytest.mark.parametrize("floor", LOWEST)
def test_the_lowest_floors_do_not_know_each_other(floor: str) -> None:
    for path in modules_below(floor):
        for name in imported(path):
            part = name.split(".")[1]
            assert part == floor or part not in LOWEST, f"{path.name} imports {name}"


@pytest.mark.parametrize("floor", LOWEST)
def test_the_lowest_floors_take_only_shared_words_from_above(floor: str) -> None:
    allowed = (*(f"itm_kernels.{name}" for name in SHARED), f"itm_kernels.{floor}")
    for path in modules_below(floor):
        for name in imported(path):
            assert name.startswith(allowed), f"{path.name} imports {name}"


def test_ops_reach_floors_through_backends_alone() -> None:
    for path in modules_below("ops"):
        for name in imported(path):
            assert name.split(".")[1] not in (*LOWEST, "nn", "compat"), f"{path.name} imports {name}"


def test_backends_import_no_floor_before_it_is_asked() -> None:
    assert not list(imported(PACKAGE / "backends.py"))


def test_kernels_do_not_know_the_pipeline() -> None:
    for path in modules_below():
        assert not any(name.startswith("itm_pipeline") for name in imported(path)), path


def test_the_pipeline_uses_public_names() -> None:
    public = {"nn", "compat", "info", "distributed", *itm_kernels.__all__, "__version__"}
    for path in sorted((ROOT / "python" / "itm_pipeline").rglob("*.py")):
        for name in imported(path):
            if name.startswith("itm_kernels."):
                assert name.split(".")[1] in public, f"{path.relative_to(ROOT)} imports {name}"


def test_public_names_exist_and_are_documented() -> None:
    assert list(itm_kernels.__all__) == sorted(itm_kernels.__all__)
    for name in itm_kernels.__all__:
        assert inspect.getdoc(getattr(itm_kernels, name)), name


@pytest.mark.parametrize("path", modules_below(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_and_stays_small(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no docstring"
    assert len(tree.body) == 1 or "from __future__ import annotations" in text
    assert len(text.splitlines()) <= 400


def enumerators(name: str) -> list[str]:
    header = (CSRC / "common" / "options.h").read_text()
    found = re.search(rf"enum class {name} : int64_t \{{([^}}]*)\}}", header)
    assert found, name
    return [word.strip().removeprefix("k").lower() for word in found.group(1).split(",")]


def test_the_options_of_cpp_are_those_of_python() -> None:
    norms = [name.replace("_", "").removesuffix("norm") for name in RAW_FEATURE_NORMS]
    assert enumerators("FeatureNorm") == ["none" if name == "no" else name for name in norms]
    assert enumerators("Aggregation") == [name.lower() for name in SIMILARITY_AGG_FUNCS]
    assert enumerators("Focal") == list(FOCALS)


def test_the_constants_of_cpp_are_those_of_python() -> None:
    header = (CSRC / "common" / "options.h").read_text()
    numbers = dict(re.findall(r"constexpr float (k\w+) = ([\d.e-]+)f;", header))
    for floor in ("reference", "eager"):
        modules = [importlib.import_module(f"itm_kernels.{floor}.{path.stem}") for path in modules_below(floor)]
        found = [module.EPS for module in modules if hasattr(module, "EPS")]
        assert found
        assert set(found) == {float(numbers["kEps"])}
    assert float(numbers["kNegativeSlope"]) == 0.1


def sources() -> dict[str, Any]:
    listed: dict[str, Any] = json.loads((CSRC / "sources.json").read_text())
    return listed


def test_sources_json_names_every_source_once_and_nothing_else() -> None:
    listed = [path for name, paths in sources().items() if name != "cuda" for path in paths]
    assert len(listed) == len(set(listed))
    there = {
        str(path.relative_to(CSRC))
        for path in CSRC.rglob("*")
        if path.suffix in (".cpp", ".cc", ".cu", ".h", ".cuh", ".hpp")
    }
    assert set(listed) == there
    for path, settings in sources()["cuda"]["files"].items():
        assert path in sources()["_C_cuda"]
        assert path.endswith(".cu")
        assert settings.keys() <= {"architectures", "emulated", "without_tensor_cores"}


def test_every_schema_of_the_library_has_a_kernel() -> None:
    table = (CSRC / "library.cpp").read_text()
    declared = set(re.findall(r'm\.def\(\s*"(\w+)\(', table))
    assert declared
    implemented = {
        name
        for path in [*(CSRC / "cpu").glob("*.cpp"), *(CSRC / "cuda").glob("*.cu")]
        for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())
    }
    assert implemented == declared
    if native.load_error() is None:
        for name in declared:
            assert hasattr(torch.ops.itm_kernels_native, name)


@pytest.mark.parametrize(
    "path",
    [path for kind in ("h", "cpp", "cuh", "cu") for path in sorted(CSRC.rglob(f"*.{kind}"))],
    ids=lambda path: str(path.relative_to(CSRC)),
)
def test_every_source_opens_with_a_comment(path: Path) -> None:
    assert path.read_text().startswith("//")
    assert len(path.read_text().splitlines()) <= 400


def test_common_headers_know_neither_torch_nor_cuda() -> None:
    for path in (CSRC / "common").glob("*.h"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10|cuda|pybind11)", path.read_text()), path.name


def test_the_native_library_is_built() -> None:
    """A broken build must fail here, not turn every native test into a skip."""
    if os.environ.get("ITM_NATIVE") == "0":
        pytest.skip("ITM_NATIVE=0: a pure Python install is what was asked for")
    assert native.load_error() is None
    build = native.host().build_information()
    assert build["compiler"]
    assert re.fullmatch(r"\d+\.\d+", build["torch_target"])
    assert bool(build["no_cuda"]) == (native.cuda_load_error() is not None)


def test_no_test_needs_a_folder_outside_the_project() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path != Path(__file__):
            assert not re.search(r"""["'](/home|/work|/root|/Users)/""", path.read_text()), path.name
