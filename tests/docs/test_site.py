"""The site builds without a warning, has the whole public API, and loads nothing from elsewhere."""

import re
import subprocess
import sys

import pytest
import yaml

import gguflora
from gguflora import engine, errors
from support import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_public_name_is_described(site):
    ids = {name for page in site.glob("api/*.html") for name in re.findall(r'id="([\w.]+)"', page.read_text())}
    public = {f"gguflora.{name}" for name in gguflora.__all__} - {"gguflora.__version__", "gguflora.GgufloraError"}
    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    public |= {f"gguflora.engine.{name}" for name in engine.__all__} | {f"gguflora.errors.{name}" for name in kinds}
    public |= {"gguflora.quants.quantize", "gguflora.quants.dequantize"}
    assert public <= ids


def test_docstrings_are_markdown(site):
    """No marks of reStructuredText are left over."""
    for page in site.glob("api/*.html"):
        assert not re.findall(r"<p>::</p>|:(?:class|func|meth):`|\.\. \w+::", page.read_text()), page.name


def test_it_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]*)"', page.read_text())
        loaded += re.findall(r'<link[^>]* rel="(?:stylesheet|preconnect|icon)"[^>]* href="([^"]*)"', page.read_text())
        assert not [address for address in loaded if re.match(r"\w+:|//", address)], page.name


def test_pages_of_the_repository_are_there(site):
    """The README in front, and the files that pages link to."""
    assert "<h1" in (site / "index.html").read_text()
    for name in ("CONTRIBUTING.html", "CHANGELOG.html", "examples/Makefile", "examples/train_and_serve.py"):
        assert (site / name).exists(), name
    assert 'href="rounding.html"' in (site / "index.html").read_text()


def test_a_broken_link_is_an_error(site, tmp_path):
    """The configuration of the site does not let one pass."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# Start\n\n[nowhere](nowhere.md)\n")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    kept = {key: settings[key] for key in ("site_name", "docs_dir", "validation")}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(kept))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nowhere.md" in done.stdout + done.stderr
