"""OpenAI's client for node and Vercel's ai-sdk: text, streams, objects and tools, by packages from npm.

``npm install`` brings them once, into a cache folder (GGUFLORA_NODE_CLIENTS names another one).
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gguflora.server.settings import Settings
from support import serving

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm: apt-get install npm"),
]
SCRIPT = Path(__file__).with_name("node_clients.mjs")
PACKAGES = ("openai@6", "ai@6", "@ai-sdk/openai-compatible@2", "@ai-sdk/openai@3", "zod@4")


@pytest.fixture(scope="module")
def folder():
    """A folder with the packages and the script, which finds them beside itself."""
    cache = Path(os.environ.get("GGUFLORA_NODE_CLIENTS") or Path.home() / ".cache/gguflora/node-clients")
    cache.mkdir(parents=True, exist_ok=True)
    if not all((cache / "node_modules" / package.rpartition("@")[0]).is_dir() for package in PACKAGES):
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(cache), *PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"packages from npm cannot be had: {done.stderr.strip()[-200:]}")
    return cache


def test_clients_for_node(folder):
    shutil.copy(SCRIPT, folder / "clients.mjs")
    with serving.serving(Settings(max_tokens=4096), n_ctx=2048, threads=1) as http:
        command = ["node", "clients.mjs", str(http.base_url.join("/v1"))]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["openai", "gguflora.chat", "openai.chat", "openai.responses"]
