"""Render chat templates, which come from strangers, in processes with limits of time, memory and length."""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from gguflora.errors import EngineError, RequestError
from gguflora.files.strict_json import to_json
from gguflora.system.pipes import PipeReader
from gguflora.system.processes import call_in_forks

_SCRIPT: Final = Path(__file__).with_name("template_process.py")
_START_SECONDS: Final = 60.0
_PATIENCE: Final = 4
"""How many times as long as its time of computing a process may take, since it may wait for a core."""
_DEFAULTS: Final = {"functions": None, "function_call": None, "tools": None, "tool_choice": None}
"""Variables that templates of llama-cpp-python may ask for."""


class _Renderer:
    """One process, and the pipes to it."""

    def __init__(self, memory: int) -> None:
        self._process = subprocess.Popen(  # noqa: S603  (a file of this package)
            [sys.executable, "-I", "-S", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        assert self._process.stdout is not None
        self._answers = PipeReader(self._process.stdout)
        self._is_ready = False
        self._write({"path": sys.path, "memory": memory})

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            TimeoutError: if there is none in time.
            EOFError: if the process has died.
            EngineError: if it could not start.
        """
        if not self._is_ready:
            started = self._read(_START_SECONDS)
            if "error" in started:
                raise EngineError(f"chat templates cannot be rendered: {started['error']}")
            self._is_ready = True
        self._write({**request, "seconds": seconds})
        return self._read(_PATIENCE * seconds + 1)

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        content = to_json(message).encode()
        rest = memoryview(len(content).to_bytes(4, "big") + content)
        try:
            while rest:
                rest = rest[self._process.stdin.write(rest) :]
        except OSError as error:
            raise EOFError from error

    def _read(self, seconds: float) -> dict[str, Any]:
        end, received = time.monotonic() + seconds, bytearray()
        while len(received) < 4 or len(received) < 4 + int.from_bytes(received[:4], "big"):
            part = self._answers.read(end - time.monotonic())
            if not part:
                raise EOFError
            received += part
        answer: dict[str, Any] = json.loads(received[4:])
        return answer

    def kill(self) -> int:
        """End the process; return its status, the negative number of the signal that ended it."""
        self._process.kill()
        status = self._process.wait()
        self._answers.close()
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        return status


class TemplateRenderer:
    """Renders templates in a few processes, which are started when they are needed and used again. Thread-safe.

    Args:
        seconds: largest time of computing of one rendering; it may take four times as long on a busy machine.
        memory: largest number of bytes that one rendering may take.
        max_chars: largest length of a text.
        processes: largest number of processes.
    """

    def __init__(
        self, *, seconds: float = 2.0, memory: int = 256 << 20, max_chars: int = 1 << 22, processes: int = 4
    ) -> None:
        self.seconds, self.memory, self.max_chars = seconds, memory, max_chars
        self._processes = processes
        self.forget()

    def forget(self) -> None:
        """Use no process of before: after a fork they belong to the other process."""
        self._lock = threading.Lock()
        self._free = threading.Semaphore(self._processes)
        self._idle: list[_Renderer] = []

    def warm(self) -> None:
        """Start a process, without waiting for it."""
        with self._lock:
            if not self._idle:
                self._idle.append(_Renderer(self.memory))

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Return the text that a Jinja template makes of variables.

        Raises:
            RequestError: if the template refuses the variables or exceeds a limit, or a variable is not JSON.
            EngineError: if no process can be started.
        """
        request = {"template": template, "variables": {**_DEFAULTS, **variables}, "max_chars": self.max_chars}
        with self._free:
            with self._lock:
                renderer = self._idle.pop() if self._idle else None
            answer, renderer = self._ask(renderer or _Renderer(self.memory), request)
            if renderer is not None:
                with self._lock:
                    self._idle.append(renderer)
        if "error" in answer:
            raise RequestError(f"the model's chat template refuses these messages: {answer['error']}")
        return str(answer["text"])

    def _ask(self, renderer: _Renderer, request: Mapping[str, Any]) -> tuple[dict[str, Any], _Renderer | None]:
        """Return the answer, and the process if it can be used again."""
        try:
            answer = renderer.ask(request, self.seconds)
        except (TypeError, ValueError, RecursionError) as error:
            renderer.kill()
            return {"error": f"a value cannot be told to it: {error}"}, None
        except (TimeoutError, EOFError) as error:
            status = renderer.kill()
            if isinstance(error, TimeoutError) or status == -getattr(signal, "SIGPROF", 0):
                return {"error": f"it takes longer than {self.seconds:g} s"}, None
            return {"error": f"it needs more than {self.memory >> 20} MB of memory"}, None
        except BaseException:
            renderer.kill()
            raise
        if "is_spent" in answer:
            renderer.kill()
            return answer, None
        return answer, renderer

    def close(self) -> None:
        """End all idle processes."""
        with self._lock:
            idle, self._idle = self._idle, []
        for renderer in idle:
            renderer.kill()


RENDERER: Final = TemplateRenderer()
"""The renderer of this process."""

atexit.register(RENDERER.close)
call_in_forks(RENDERER.forget)
