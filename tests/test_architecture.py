"""The layering of the packages, checked on their source and on what their processes really load."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "control_plane", "gateway", "gpu_worker", "node_agent", "cli")
MAY_IMPORT = {
    "shared": set[str](),
    "control_plane": {"shared"},
    "gateway": {"shared"},
    "gpu_worker": {"shared"},
    "node_agent": {"shared"},
    # The command starts the services as processes; of their code it uses the pure planner only.
    "cli": {"shared", "control_plane.placement"},
}
MAY_IMPORT_WITHIN: dict[str, dict[str, set[str]]] = {
    # Bottom to top. A layer is a folder or a module of the package; "*" is all its other modules.
    "gpu_worker": {
        "exchange": set(),
        "checkpoint": set(),
        "config": {"exchange"},
        "identity": {"config"},
        "engine": {"exchange"},
        "startup_timer": set(),
        "membership": {"engine"},
        "attempt_reports": {"engine"},
        "control_server": {"attempt_reports", "engine", "membership"},
        "kv_replication": {"config", "exchange", "engine"},
        "rank": {
            *("attempt_reports", "config", "exchange", "membership"),
            *("engine", "control_server", "kv_replication"),
        },
        "rejoin": {"rank"},
        "cpu": {"config", "exchange", "checkpoint", "engine", "kv_replication", "rank"},
        "cuda": {"config", "exchange", "checkpoint", "engine", "kv_replication", "rank"},
        "model_tools": {"exchange", "checkpoint", "engine", "cpu"},
        "device_choice": {"config", "cuda"},
        "step_sizes": {"config"},
        "__main__": {
            *("config", "identity", "exchange", "engine", "kv_replication", "rank"),
            *("rejoin", "cpu", "cuda", "device_choice", "startup_timer", "step_sizes"),
        },
        "fork_server": {"__main__", "config", "cpu", "cuda", "device_choice"},
    },
    "gateway": {
        "parsers": set(),
        "*": {"parsers"},
        "api": {"*", "parsers"},
        "service": {"*", "api"},
        "__main__": {"*", "service"},
        "standby": {"*", "service", "__main__"},
    },
    "cli": {
        "*": set(),
        "admin": {"*"},
        "observe": {"*"},
        "up": {"*", "observe"},
        "bench": {"*", "admin", "observe", "up"},
        "evaluate": {"*", "observe", "bench"},
        "plan": {"*"},
        "support": {"*", "observe"},
        "checkpoint": {"*", "up"},
        "__main__": {
            *("*", "admin", "observe", "up", "bench", "evaluate", "plan", "checkpoint", "support")
        },
    },
}
LAYERS = [(package, layer) for package, layers in MAY_IMPORT_WITHIN.items() for layer in layers]
OWNERS = {
    "msgpack": {"shared/codec.py"},
    "etcd3": {"shared/etcd_client.py", "shared/etcd_watch.py"},
    "llguidance": {"shared/grammars/"},
    "grpc": {"shared/etcd_client.py", "shared/etcd_watch.py", "shared/etcd_login.py"},
    "cryptography": {"shared/etcd_certificates.py", "gpu_worker/kv_replication/block_tags.py"},
    "typer": {"cli/"},
    "rich": {"cli/"},
    "torch": {"gpu_worker/"},
    "numba": {"gpu_worker/"},
    "triton": {"gpu_worker/cuda/"},
    "opentelemetry": {"shared/tracing.py"},
    "mooncake": {"gpu_worker/exchange/", "gpu_worker/cuda/"},
    "transformers": set[str](),
}
WITHOUT_TORCH = (
    "shared",
    "control_plane",
    "gateway",
    "cli",
    "node_agent",
    "gpu_worker/exchange",
)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


ALL_SOURCES = [path for package in PACKAGES for path in sources(package)]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache  # more than a thousand tests ask for the same few hundred files
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """All of the file, the module itself first."""
    return tuple(ast.walk(ast.parse(path.read_text())))


@cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Absolute names of all imported modules, those inside functions included."""
    names: list[str] = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            assert node.module is not None
            names.append(node.module)
    return tuple(names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("package", PACKAGES)
def test_services_import_shared_and_never_each_other(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in sources(package)
        for module in imports_of(path)
        if any(within(module, other) for other in (*PACKAGES, "tests", "benchmarks"))
        and not any(within(module, name) for name in allowed)
    ]
    assert wrong == []


def layer_of(module: str, package: str) -> str | None:
    """None for a module of another package, and for the package itself."""
    if not module.startswith(package + "."):
        return None
    name = module.split(".")[1]
    layers = MAY_IMPORT_WITHIN[package]
    assert name in layers or "*" in layers, f"{module} belongs to no layer of {package}"
    return name if name in layers else "*"


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


@pytest.mark.parametrize(("package", "layer"), LAYERS)
def test_a_layer_imports_only_layers_that_the_drawing_allows(package: str, layer: str) -> None:
    allowed = MAY_IMPORT_WITHIN[package][layer] | {layer}
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in sources(package)
        if path != ROOT / package / "__init__.py" and layer_of(module_of(path), package) == layer
        for module in imports_of(path)
        if (target := layer_of(module, package)) is not None and target not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize(("package", "layer"), LAYERS)
def test_the_drawing_has_no_arrow_upwards(package: str, layer: str) -> None:
    layers = list(MAY_IMPORT_WITHIN[package])
    below = set(layers[: layers.index(layer)])
    assert MAY_IMPORT_WITHIN[package][layer] <= below


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_only_by_its_owners(library: str) -> None:
    wrong = [
        name_of(path)
        for path in ALL_SOURCES
        if any(within(module, library) for module in imports_of(path))
        and not any(name_of(path).startswith(owner) for owner in OWNERS[library])
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", WITHOUT_TORCH)
def test_torch_stays_out_of(folder: str) -> None:
    wrong = [
        name_of(path)
        for path in sources(folder)
        if any(within(module, "torch") for module in imports_of(path))
    ]
    assert wrong == []


def test_only_keys_spells_an_etcd_key() -> None:
    """A probe for "is etcd there" may name the root of all instances."""
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in ALL_SOURCES
        for node in nodes_of(path)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("/starfish/")
        and node.value != "/starfish/"
        and name_of(path) != "shared/keys.py"
    ]
    assert wrong == []


def test_only_one_helper_enters_a_cuda_stream() -> None:
    """A bare `torch.cuda.stream` on a new thread ends by switching to card 0."""
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in [*ALL_SOURCES, *sources("benchmarks")]
        for node in nodes_of(path)
        if isinstance(node, ast.Attribute)
        and node.attr in ("stream", "StreamContext")
        and ast.unparse(node) in ("torch.cuda.stream", "torch.cuda.StreamContext")
        and name_of(path) != "gpu_worker/cuda/streams.py"
    ]
    assert wrong == []


def test_placement_is_pure() -> None:
    io = {"asyncio", "socket", "subprocess", "time", "structlog", "aiohttp", "os"}
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in sources("control_plane/placement")
        for module in imports_of(path)
        if module.partition(".")[0] in io
    ]
    assert wrong == []


@pytest.mark.parametrize("path", ALL_SOURCES, ids=name_of)
def test_a_file_opens_by_saying_what_it_owns(path: Path) -> None:
    module = nodes_of(path)[0]
    assert isinstance(module, ast.Module)
    assert ast.get_docstring(module)


@pytest.mark.parametrize("path", ALL_SOURCES, ids=name_of)
def test_only_the_clock_and_tools_of_measurement_read_the_time(path: Path) -> None:
    """Everyone else takes it from the injected Clock."""
    if name_of(path) in ("shared/clock.py",):
        return
    calls = [
        f"{name_of(path)}:{node.lineno}"
        for node in nodes_of(path)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) == ("time", "time")
    ]
    assert calls == []


@pytest.mark.parametrize(
    "module",
    ["control_plane.__main__", "gateway.__main__", "node_agent.__main__", "cli.__main__"],
)
def test_a_process_without_a_model_loads_no_torch(module: str) -> None:
    program = (
        f"import sys, {module}; "
        "print(*sorted({'torch', 'numba', 'mooncake', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
