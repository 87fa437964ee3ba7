# SPDX-License-Identifier: Apache-2.0
"""What importing costs and touches, and that imports run one way: methods -> nn -> ops -> kernels."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cofire import native

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "pyextensions" / "cofire", ROOT / "kernels" / "cofire_kernels"]
HEADER = "SPDX-License-Identifier: Apache-2.0"
#: Imported by the functions that need them, never by ``import cofire``.
LAZY = (
    "triton",
    "cupy",
    "typer",
    "rich",
    "matplotlib",
    "sklearn",
    "PIL",
    "cofire_kernels",
    "torch._inductor",
    "transformers",
)

PROBE = """
import json, sys
import cofire, torch
import torch._C
mapped = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(json.dumps({
    "modules": sorted(sys.modules),
    "driver": "libcuda.so" in mapped or "libnvidia" in mapped,
    "initialized": torch.cuda.is_initialized(),
    "variant": cofire.native.STATUS.variant,
    "reason": cofire.native.STATUS.reason,
    "compact": [x.tolist() for x in cofire.ops.compact(torch.tensor([[False, True]]))],
}))
"""


def probe(code: str = PROBE, **environment: str) -> dict[str, object]:
    """Import cofire in a process of its own, and say what that process looks like afterwards."""
    paths = os.pathsep.join([*(str(s.parent) for s in SOURCES), os.environ.get("PYTHONPATH", "")])
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "COFIRE_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("backend", ["", "reference"])
def test_import_is_light(backend: str) -> None:
    found = probe(COFIRE_BACKEND=backend)
    modules = found["modules"]
    assert isinstance(modules, list)
    assert [m for m in modules if any(m == name or m.startswith(name + ".") for name in LAZY)] == []
    assert not found["initialized"], "importing cofire initialised CUDA"
    assert not found["driver"], "importing cofire loaded the driver"
    assert found["compact"] == [[[1, -1]], [1]]
    if backend:
        assert found["variant"] is None
        assert found["reason"] == "COFIRE_BACKEND=reference"


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        probe(COFIRE_CPU="sse")
    assert "ValueError: COFIRE_CPU must be one of default, avx2, avx512, got 'sse'" in caught.value.stderr


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        probe(COFIRE_BACKEND="refrence")
    assert "ValueError: COFIRE_BACKEND must be reference, or not set, got 'refrence'" in caught.value.stderr


@pytest.mark.skipif(native.STATUS.variant is None, reason=f"no compiled kernels: {native.STATUS.reason}")
def test_a_chosen_variant_is_not_called_the_best() -> None:
    variant = str(native.STATUS.variant)
    assert probe(COFIRE_CPU=variant)["reason"] == f"chosen by COFIRE_CPU={variant}"


def test_without_triton_no_launcher_is_attached() -> None:
    """Otherwise the first call on a GPU would fail where the reference could serve."""
    missing = "import sys\nsys.modules['triton'] = None\n" + PROBE.replace(
        '"reason"',
        '"attached": torch._C._dispatch_has_kernel_for_dispatch_key("cofire::compact", "CUDA"),\n    "reason"',
    )
    assert probe(missing)["attached"] is False
    if importlib.util.find_spec("triton") is not None:
        assert probe(missing.replace("sys.modules['triton'] = None", ""))["attached"] is True


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("COFIRE_CPU", "cofire: COFIRE_CPU must be one of default, avx2, avx512, got 'foo'\n"),
        ("COFIRE_BACKEND", "cofire: COFIRE_BACKEND must be reference, or not set, got 'foo'\n"),
    ],
)
def test_the_command_answers_with_the_sentence_alone(variable: str, sentence: str) -> None:
    command = "import sys\nsys.argv = ['/usr/bin/cofire', 'info']\nfrom cofire.cli import main\nmain()"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        probe(command, **{variable: "foo"})
    assert (caught.value.returncode, caught.value.stderr) == (2, sentence)


# ---------------------------------------------------------------------------------------------- the source tree


def python_files(*roots: Path) -> list[Path]:
    return sorted(p for root in roots for p in root.rglob("*.py"))


@pytest.mark.parametrize(
    "path", python_files(*SOURCES, ROOT / "tests", ROOT / "benchmarks"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_python_has_a_licence_header(path: Path) -> None:
    assert HEADER in "\n".join(path.read_text(encoding="utf-8").splitlines()[:3])


@pytest.mark.parametrize(
    "path",
    [p for ext in ("cpp", "h", "cu") for p in sorted((ROOT / "csrc").rglob(f"*.{ext}"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_csrc_has_a_licence_header(path: Path) -> None:
    assert HEADER in path.read_text(encoding="utf-8").splitlines()[0]


def module_name(path: Path) -> str:
    root = next(s.parent for s in SOURCES if s in path.parents)
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


#: Each layer may import those below it, and itself.
LAYERS = ("cofire_kernels", "cofire.registry", "cofire.ops", "cofire.nn", "cofire.methods")


def layer(module: str) -> int | None:
    return next((i for i, name in enumerate(LAYERS) if module == name or module.startswith(name + ".")), None)


@pytest.mark.parametrize("path", python_files(*SOURCES), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    own = layer(module_name(path))
    if own is None:
        return
    upward = {m for m in imports(path) if (other := layer(m)) is not None and other > own}
    assert not upward, f"{path} imports {sorted(upward)}, which lie above it"


@pytest.mark.parametrize("path", python_files(SOURCES[1]), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_never_import_cofire(path: Path) -> None:
    assert not {m for m in imports(path) if m.split(".")[0] == "cofire"}


def test_the_import_graph_has_no_cycle() -> None:
    """Among the modules of cofire, at import: what functions import lazily does not count."""
    files = {module_name(p): p for p in python_files(SOURCES[0])}

    def at_import(path: Path) -> set[str]:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        named = [n for n in body if isinstance(n, ast.ImportFrom) and n.module]
        found = {
            f"{n.module}.{a.name}" if f"{n.module}.{a.name}" in files else str(n.module) for n in named for a in n.names
        }
        return found & set(files)

    graph = {m: at_import(p) for m, p in files.items()}
    # A package's __init__ re-exports what lies below it; that is not a dependency of those files.
    graph = {m: {d for d in found if not m.startswith(d + ".")} for m, found in graph.items()}
    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in finished:
            for dependency in sorted(graph[module]):
                visit(dependency, (*above, module))
            finished.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_version_of_torch_is_supported() -> None:
    assert tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11)
