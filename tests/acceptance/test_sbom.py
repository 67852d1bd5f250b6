"""`make sbom` lists what is locked, for whoever has to know what Holdfast consists of: nothing less, nothing else."""

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK_FILE = (ROOT / "requirements.txt").read_text()


@pytest.fixture(scope="module")
def sbom(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("sbom") / "new" / "list.cdx.json"
    made = subprocess.run(["make", "sbom", f"SBOM={file}"], cwd=ROOT, capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, ""), made.stdout + made.stderr
    return json.loads(file.read_text())


def test_it_is_about_this_version_of_holdfast(sbom: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    described = sbom["metadata"]["component"]
    assert (described["name"], described["version"]) == (project["name"], project["version"])


def test_each_line_of_the_lock_file_is_one_component(sbom: Any) -> None:
    lines = re.findall(r"^(\w.*) \\$", LOCK_FILE, re.MULTILINE)
    assert len(lines) > 50
    locked = [
        (canonicalize_name(line.name), str(line.specifier).removeprefix("==")) for line in map(Requirement, lines)
    ]
    components = [(found["name"], found["version"], found["purl"]) for found in sbom["components"]]
    assert sorted(components) == sorted((name, version, f"pkg:pypi/{name}@{version}") for name, version in locked)


def test_each_hash_of_the_lock_file_is_told(sbom: Any) -> None:
    references = [reference for found in sbom["components"] for reference in found["externalReferences"]]
    told = {digest["content"] for reference in references for digest in reference["hashes"]}
    assert told == set(re.findall(r"--hash=sha256:([0-9a-f]{64})", LOCK_FILE))


def test_the_page_about_security_names_the_file_and_audits_what_is_locked() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    [file] = re.findall(r"^SBOM := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"`make sbom` writes `{file}`" in page
    [audit] = re.findall(r"^pip-audit .*$", page, re.MULTILINE)
    assert "--requirement requirements.txt --require-hashes" in audit
