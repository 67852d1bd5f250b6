"""What holds the structure of the code: which module may import which, and how long a function may be."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packages import what_runs

ROOT = Path(__file__).parents[2]
OF_THE_CLIENT = ("holdfast_client.broker_urls", "holdfast_client.messages", "holdfast_client.results")
"""What the ledger and the client share."""
PURE = (*OF_THE_CLIENT, "ledger.periods", "ledger.rules", "ledger.state")
PACKAGES = ("holdfast_client", "ledger", "worker", "api_stub")
TIERS = ("acceptance", "integration", "nemesis", "property", "unit")
"""The folders of tests. What two of them share is in `tests` itself."""


def path_of(name: str) -> str:
    """Where a module or a package of this name is, below ROOT."""
    path = name.replace(".", "/")
    return f"client/{path}" if path.startswith("holdfast_client") else path


def package_of(path: Path) -> str:
    """The package of the module at `path`, below ROOT."""
    return ".".join(path.parts[:-1]).removeprefix("client.")


def where(module: str) -> str:
    """The sources of `module`, below ROOT: of a package, those of all its modules."""
    path = path_of(module)
    return f"{path}/**/*.py" if (ROOT / path).is_dir() else f"{path}.py"


# In the sources of …, nothing but … may be imported of …
Rule = tuple[str, tuple[str, ...], tuple[str, ...]]
RULES: list[Rule] = [
    (
        "ledger/**/*.py",
        OF_THE_CLIENT,
        (
            *("celery", "kombu", "redis", "valkey", "amqp", "holdfast_client", "worker", "api_stub"),
            *("http", "urllib.request", "urllib3", "requests", "httpx", "aiohttp"),
            *("flask", "fastapi", "starlette", "uvicorn", "werkzeug", "jinja2"),
        ),
    ),
    *(
        (
            where(module),
            PURE,
            (
                *("holdfast_client", "ledger", "sqlalchemy", "psycopg"),
                *("random", "secrets", "uuid", "os", "time", "pathlib", "socket"),
            ),
        )
        for module in PURE
    ),
    ("client/**/*.py", (), ("ledger", "worker", "api_stub", "celery", "sqlalchemy")),
    ("worker/*.py", (), ("api_stub", "worker.cli", "worker.local", "typer", "rich")),
    ("worker/local/**/*.py", (), ("api_stub", "worker.cli", "typer", "rich")),
    ("api_stub/**/*.py", ("worker.replaying",), ("worker",)),
    *((f"{path_of(package)}/**/*.py", (), ("tests", "bench", "hypothesis", "pytest")) for package in PACKAGES),
    *((f"tests/{tier}/**/*.py", (), tuple(f"tests.{other}" for other in TIERS if other != tier)) for tier in TIERS),
    ("tests/*.py", (), tuple(f"tests.{tier}" for tier in TIERS)),
]
CLOCKS = ("now", "utcnow", "today")


@cache
def imports(source: str, package: str, *, at_once: bool = False) -> frozenset[str]:
    """The full name of everything that a module of `package` imports. `at_once`: not what its functions import."""
    names: set[str] = set()
    tree = ast.parse(source)
    for node in outside_functions(tree) if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(names)


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        is_for_type_checkers = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not is_for_type_checkers:
            yield child
            yield from outside_functions(child)


def brought_along(root: Path, module: str) -> set[str]:
    """The first name of everything that is not ours and is imported with `module`, however indirectly."""
    seen: set[str] = set()
    foreign: set[str] = set()
    names = [module]
    while names:
        name = names.pop()
        if name.partition(".")[0] not in PACKAGES:
            foreign.add(name.partition(".")[0])
            continue
        if name in seen:
            continue
        seen.add(name)
        names += [name.rpartition(".")[0]] * ("." in name)  # its package; what is no module is a name within one
        path = root / path_of(name)
        for file, package in ((path.with_suffix(".py"), name.rpartition(".")[0]), (path / "__init__.py", name)):
            if file.is_file():
                names += imports(file.read_text(), package, at_once=True)
    return foreign - sys.stdlib_module_names


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def violations(root: Path, rule: Rule) -> list[str]:
    sources, allowed, forbidden = rule
    return [
        f"{path.relative_to(root)} imports {name}"
        for path in sorted(root.glob(sources))
        for name in sorted(imports(path.read_text(), package_of(path.relative_to(root))))
        if within(name, forbidden) and not within(name, allowed)
    ]


def clocks_read(source: str) -> set[str]:
    """Every clock that is read, as written."""
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in CLOCKS
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]} not {rule[2][0]}")
def test_no_module_imports_what_it_may_not(rule: Rule) -> None:
    assert violations(ROOT, rule) == []


@pytest.mark.parametrize("module", PURE)
def test_the_pure_core_reads_no_clock(module: str) -> None:
    sources = list(ROOT.glob(where(module)))
    assert sources
    assert set().union(*(clocks_read(path.read_text()) for path in sources)) == set()


def test_the_rules_are_about_sources_that_exist() -> None:
    for sources, _, _ in RULES:
        assert list(ROOT.glob(sources)), sources
    assert sorted(each.name for each in (ROOT / "tests").iterdir() if (each / "__init__.py").exists()) == list(TIERS)


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("ledger/deep/x.py", "import celery.result", "celery.result"),
        ("ledger/x.py", "def f():\n    from urllib.request import urlopen", "urllib.request.urlopen"),
        ("ledger/x.py", "from worker import replaying", "worker.replaying"),
        ("ledger/x.py", "from holdfast_client import Client", "holdfast_client.Client"),
        ("client/holdfast_client/x.py", "from ledger import store", "ledger.store"),
        ("client/holdfast_client/x.py", "import celery", "celery"),
        ("client/holdfast_client/messages.py", "from .client import Client", "holdfast_client.client.Client"),
        ("ledger/state.py", "from . import store", "ledger.store"),
        ("ledger/periods.py", "from .store import apply_batch", "ledger.store.apply_batch"),
        ("ledger/rules/__init__.py", "from ledger import store", "ledger.store"),
        ("ledger/rules/x.py", "from ..store import apply_batch", "ledger.store.apply_batch"),
        ("ledger/rules/deep/x.py", "import random", "random"),
        ("ledger/state.py", "import os.path", "os.path"),
        ("worker/x.py", "from tests.support import delivery", "tests.support.delivery"),
        ("worker/x.py", "from api_stub.auth import sign", "api_stub.auth.sign"),
        ("worker/x.py", "from worker.cli.terminal import say", "worker.cli.terminal.say"),
        ("worker/local/x.py", "from worker.cli.terminal import say", "worker.cli.terminal.say"),
        ("api_stub/x.py", "import worker", "worker"),
        ("api_stub/deep/x.py", "from worker.replayings import y", "worker.replayings.y"),
        ("tests/unit/x.py", "from tests.property.model import Model", "tests.property.model.Model"),
        ("tests/integration/deep/x.py", "from tests import acceptance", "tests.acceptance"),
        ("tests/x.py", "from tests.unit.x import y", "tests.unit.x.y"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, path: str, source: str, found: str) -> None:
    planted = tmp_path / path
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    assert f"{path} imports {found}" in [violation for rule in RULES for violation in violations(tmp_path, rule)]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "api_stub/x.py",
            "from worker import replaying\nfrom worker.replaying import x\nimport worker.replaying",
        ),
        ("client/holdfast_client/client.py", "from holdfast_client import messages\nimport kombu, redis"),
        ("worker/x.py", "from ledger.store import apply_batch\nimport celery"),
        ("ledger/periods.py", "from datetime import datetime\nfrom .state import Wallet\nimport timeit"),
        ("client/holdfast_client/messages.py", "from .results import ErrorCode\nimport pydantic"),
        ("ledger/x.py", "from holdfast_client.messages import parse\nfrom holdfast_client import results"),
        (
            "ledger/rules/x.py",
            "from ledger.rules.posting import post\nfrom . import ending\nfrom ..state import Wallet",
        ),
        ("ledger/deep/x.py", "from ..state import Wallet\nfrom . import sibling"),
        ("worker/cli/x.py", "from api_stub.auth import sign\nfrom worker.local.system import System"),
        ("tests/unit/x.py", "from tests.support import eventually\nfrom tests.unit.y import z"),
    ],
)
def test_an_allowed_import_is_not_found(tmp_path: Path, path: str, source: str) -> None:
    planted = tmp_path / path
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    assert [violation for rule in RULES for violation in violations(tmp_path, rule)] == []


def test_the_client_needs_the_packages_that_it_requires_and_no_others() -> None:
    dependencies = tomllib.loads((ROOT / "client/pyproject.toml").read_text())["project"]["dependencies"]
    provided = packages_distributions()
    needed = {canonicalize_name(provided[name][0]) for name in brought_along(ROOT, "holdfast_client.async_client")}
    assert needed <= what_runs(dependencies)
    assert needed >= {canonicalize_name(Requirement(line).name) for line in dependencies}


@pytest.mark.parametrize("module", OF_THE_CLIENT)
def test_what_the_ledger_takes_of_the_client_needs_no_library_of_a_broker(module: str) -> None:
    assert brought_along(ROOT, module) <= {"pydantic", "pydantic_core"}


def test_holdfast_requires_the_client_of_its_own_version() -> None:
    ours, client = (tomllib.loads((ROOT / path / "pyproject.toml").read_text())["project"] for path in (".", "client"))
    assert ours["version"] == client["version"]
    assert f"{client['name']}=={client['version']}" in ours["dependencies"]


def test_what_an_import_brings_along_is_found(tmp_path: Path) -> None:
    for path, source in (
        ("worker/__init__.py", "from ledger import extras\ndef f():\n    import sqlalchemy"),
        ("worker/x.py", "import json\nfrom holdfast_client import messages\nif True:\n    import kombu.message"),
        ("ledger/__init__.py", ""),
        ("ledger/extras.py", "import rich"),
        ("client/holdfast_client/messages.py", "from . import results\nclass A:\n    import pydantic"),
        ("client/holdfast_client/results.py", "with a:\n    from alembic.op import x"),
        ("client/holdfast_client/__init__.py", "if TYPE_CHECKING:\n    from .client import Client"),
        ("client/holdfast_client/client.py", "import redis"),
        ("ledger/store.py", "import psycopg"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    assert brought_along(tmp_path, "worker.x") == {"kombu", "pydantic", "alembic", "rich"}


def test_a_clock_that_is_read_is_found() -> None:
    source = "a = datetime.now(UTC)\nb = dt.datetime.utcnow\nc = date.today()\nd = now\n"
    assert clocks_read(source) == {"datetime.now", "dt.datetime.utcnow", "date.today"}


MOST_LINES = 60


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {function.name} has {lines} lines"
        for package in (*PACKAGES, "bench", "docs", "tests")
        for path in (ROOT / path_of(package)).rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (function.end_lineno or 0) - function.lineno + 1) > MOST_LINES
    ]
    assert long == []
