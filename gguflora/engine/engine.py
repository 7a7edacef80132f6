"""The engine: one base model in memory, and any set of adapters for each request."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeAlias

import numpy as np

from gguflora.adapters.soft_prompt import is_soft_prompt, read_soft_prompt
from gguflora.architectures.base_model import read_whole_base
from gguflora.engine.adapter_folder import AdapterFolder
from gguflora.engine.adapter_sets import AdapterSet, canonical_set, parse_set
from gguflora.engine.chat_template import choose_template
from gguflora.engine.context import KV_TYPES, Context, ContextOptions
from gguflora.engine.embedding import RANKING_HEAD, Embedder
from gguflora.engine.job import GenerationJob
from gguflora.engine.model import Model
from gguflora.engine.registry import (
    AdapterRegistry,
    Embeddings,
    LoadedAdapter,
    RegisteredAdapter,
    ResolvedSet,
)
from gguflora.engine.requests import Generation, GenerationSink, Request, Sampling, check_tokens
from gguflora.engine.scheduler import Scheduler
from gguflora.engine.stats import EngineStats, collect_stats
from gguflora.errors import (
    AdapterNameError,
    EngineClosedError,
    EngineError,
    HotSwapError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
)
from gguflora.files.remote import remote_inputs
from gguflora.placement.prefix import Prefix, fit_prefix
from gguflora.quants.arrays import Float32Array
from gguflora.runtime.adapter_files import AdapterReading, AdapterSource
from gguflora.runtime.bindings import Pointer, free_lora, invocation_of, load_lora, put_prefix
from gguflora.runtime.concatenated_adapters import ConcatenatedAdapters
from gguflora.runtime.mixed_adapters import MixedAdapters
from gguflora.system.cpus import usable_cpus

_LOG: Final = logging.getLogger(__name__)
_LONG_TEXT: Final = 1 << 16
"""Characters of a text whose tokens are worth a guess before it is split."""
AdapterPath: TypeAlias = str | os.PathLike[str]


class Engine:
    """Answers requests on one GGUF model, each with its own set of adapters. Thread-safe.

    All requests share the weights and one context. Requests of different adapter sets are decoded in one batch, in
    which each token is computed by its own adapters only; where that is impossible, sets take turns. As a context
    manager it closes itself on exit.

    Args:
        base: GGUF file of the model.
        adapters: adapters to load at the start, by name: GGUF LoRA files or PEFT directories, each alone or in a tuple
            with its scale in adapter sets that do not give one.
        tasks: task number of each MULTITASK_PROMPT_TUNING adapter in ``adapters``, by name.
        adapter_dir: directory whose adapters, subdirectories and GGUF files, requests can name; each is loaded when a
            request first names it, and again when its files have changed.
        adapter_memory: largest number of bytes of the adapters loaded from ``adapter_dir``. The least recently used
            ones leave memory for others, but never under a request. None sets no limit.
        chat_template: ``base``, ``adapter`` (the template in the directory of the adapters given here), or a template
            in Jinja. By default the adapter's, if one adapter is given and its template differs; this is logged.
        chat_template_file: file with a template.
        n_ctx: size of the context in tokens. It limits the prompt and answer of one request, and of all requests that
            are computed at the same time.
        n_parallel: largest number of requests that are decoded together.
        max_contexts: has no effect any more, since all adapter sets share one context.
        max_kv_bytes: largest size of the KV cache in bytes.
        queue_size: largest number of requests that wait to start.
        n_batch: largest number of tokens decoded in one step. Above 128, prompts get no faster, but contexts get larger
            and other requests wait longer.
        threads: number of threads that compute; by default one less than the usable processors, because llama.cpp's
            threads wait for each other and are slow if one of them shares a processor.
        kv_type: type of the numbers in the KV cache: F16, F32 or Q8_0. With F32, which is slower, attention adds in
            an order that does not depend on other requests; on a quantized base, llama.cpp's matrix products still
            round differently in batches of other sizes.
        text_only: default of `load` for this option.
        trust_names: default of `load` for this option.
        verbose: let llama.cpp print its log.
        gpu_layers: number of layers that llama.cpp computes on a GPU, -1 for all; by default llama.cpp's own choice.

    Raises:
        GgufError: if the base is damaged.
        EngineError: if llama.cpp cannot load the base, or a number is out of range.
        HotSwapError, AdapterError, MismatchError: if an adapter cannot be loaded; see `load`.
    """

    def __init__(
        self,
        base: str | os.PathLike[str],
        *,
        adapters: Mapping[str, AdapterPath | tuple[AdapterPath, float]] | None = None,
        tasks: Mapping[str, int] | None = None,
        adapter_dir: str | os.PathLike[str] | None = None,
        adapter_memory: int | None = None,
        chat_template: str | None = None,
        chat_template_file: str | os.PathLike[str] | None = None,
        n_ctx: int = 4096,
        n_parallel: int = 4,
        max_contexts: int = 2,
        max_kv_bytes: int | None = None,
        queue_size: int = 64,
        n_batch: int = 128,
        threads: int | None = None,
        kv_type: str = "F16",
        text_only: bool = False,
        trust_names: bool = False,
        verbose: bool = False,
        gpu_layers: int | None = None,
    ) -> None:
        options = _options(n_ctx, n_parallel, n_batch, threads, kv_type)
        _expect("max_contexts", max_contexts, 1, 1024)
        _expect("queue_size", queue_size, 0, 1 << 20)
        self.n_ctx = n_ctx
        self._description = read_whole_base(Path(base))
        self._reading = AdapterReading(text_only, trust_names)
        self._readings: dict[Path, AdapterReading] = {}
        path = self._description.path  # for a split model, its first file, even if another was given
        self.model_name = path.stem
        self._lock = threading.Lock()
        self._unused = threading.Condition(self._lock)
        self._users = 0  # threads that are in `_open`
        self._closed = False
        self._registry = AdapterRegistry()
        self._folder: AdapterFolder | None = None
        if adapter_dir is not None:
            self._folder = AdapterFolder(Path(adapter_dir), adapter_memory, self, self._registry.users)
        self._model = Model(path, verbose=verbose, gpu_layers=gpu_layers)
        self.n_vocab = self._model.n_vocab
        try:
            architecture = self._description.architecture
            self._concatenated = ConcatenatedAdapters(self._model.pointer, architecture, self._lora_file)
            self._mixed = MixedAdapters(self._model.pointer, architecture, can_rewind=self._model.rewinds)
            context = Context(self._model, options, self._concatenated, self._mixed)
            _check_kv_bytes(context, max_kv_bytes)
        except BaseException:
            self._model.free()
            raise
        self._options = options
        self._embedder = Embedder(
            self._model,
            options,
            self._concatenated,
            is_encoder=context.is_encoder,
            has_head=RANKING_HEAD in self._description.shapes,
        )
        self._has_first = False  # whether the adapters to load at the start are loaded
        self._scheduler = Scheduler(context, self._mixed, queue_size, self._finished)
        atexit.register(self.close)  # Python would crash if it ended while a thread is still in llama.cpp
        try:
            self._load_first(adapters or {}, tasks or {}, chat_template, chat_template_file)
        except BaseException:
            self.close()
            raise

    @remote_inputs(path="adapter")
    def load(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        scale: float = 1.0,
        task: int | None = None,
        replace: bool = False,
        text_only: bool | None = None,
        trust_names: bool | None = None,
    ) -> LoadedAdapter:
        """Load an adapter, so that requests can name it.

        Args:
            path: a GGUF LoRA file, or a PEFT directory: a soft prompt is read, any other adapter is converted first.
            name: name of the adapter; by default the file's stem.
            scale: scale in adapter sets that do not give one.
            task: number of the task of a MULTITASK_PROMPT_TUNING adapter; optional if it has only one.
            replace: replace a loaded adapter of the same name. If the new one cannot be loaded, the old one stays.
                Requests that already use the old one finish with it.
            text_only: take only the part of a multimodal model's adapter that changes the language model; the
                adapter's ``warnings`` name what is left out. By default as the engine was told.
            trust_names: apply the adapter by name and shape where the order of a tensor's rows is not known; by
                default as the engine was told.

        Raises:
            AdapterNameError: if the name is taken or malformed.
            HotSwapError: if the adapter does not fit the base, or llama.cpp refuses it or would abort.
            GgufError, AdapterError, ArchitectureError, MismatchError: if the file or directory cannot be used.
        """
        location = Path(path)
        name = location.stem if name is None else name
        self._check_open()
        self._readings[location] = self._reading.changed(text_only, trust_names)
        number, load_id = self._registry.reserve(name, replace)
        try:
            if location.is_dir() and is_soft_prompt(location):
                registered = self._load_soft_prompt(location, (number, name, load_id, scale), task)
            else:
                registered = self._load_lora(location, (number, name, load_id, scale), task)
            replaced = self._registry.add(registered)
        except BaseException:
            self._registry.give_up(name)
            raise
        if replaced is not None:
            self._forget(replaced)
        return registered.adapter

    def _load_first(
        self,
        adapters: Mapping[str, AdapterPath | tuple[AdapterPath, float]],
        tasks: Mapping[str, int],
        template: str | None,
        template_file: str | os.PathLike[str] | None,
    ) -> None:
        unknown_names = sorted(tasks.keys() - adapters.keys())
        if unknown_names:
            raise AdapterNameError(f"a task is given for {unknown_names[0]!r:.80}, but no adapter has this name")
        for name, item in adapters.items():
            location, scale = item if isinstance(item, tuple) else (item, 1.0)
            self.load(location, name, scale=scale or 1.0, task=tasks.get(name))  # 0 is off, not what its name means
        self._has_first = True
        paths = [adapter.path for adapter in self.adapters()]
        chosen = choose_template(template, template_file, paths, self._model.template)
        if chosen is not None:
            self._model.use_template(chosen)
        self._scheduler.call(lambda: self._mixed.prepare(self._options.n_parallel))
        if self._mixed.reason is not None and adapters:
            _LOG.warning("requests of different adapters take turns: %s", self._mixed.reason)

    def _load_lora(self, location: Path, entry: tuple[int, str, int, float], task: int | None) -> RegisteredAdapter:
        """Load a LoRA into llama.cpp; ``entry`` is its id, name, load id and scale."""
        if task is not None:
            raise HotSwapError(f"{location}: is not a soft prompt, so it has no task {task}")
        number, name, load_id, scale = entry
        source = self._open_adapter(location)
        pointer = self._scheduler.call(lambda: self._load_pointer(source.file))
        adapter = LoadedAdapter(
            number, name, location, source.sha256, source.size, source.method, load_id, scale, source.warnings
        )
        return RegisteredAdapter(adapter, pointer, invocation=invocation_of(pointer))

    def _load_pointer(self, file: Path) -> Pointer:
        """Load a LoRA, and prepare to mix it with those loaded already. In the scheduler's thread."""
        pointer = load_lora(self._model.pointer, file)
        if self._mixed.add(pointer, file) and self._has_first:
            self._mixed.prepare(self._options.n_parallel)
        return pointer

    def _lora_file(self, location: Path) -> Path:
        return self._open_adapter(location).file

    def _open_adapter(self, location: Path) -> AdapterSource:
        return self._readings.get(location, self._reading).open(location, self._description)

    def _load_soft_prompt(
        self, location: Path, entry: tuple[int, str, int, float], task: int | None
    ) -> RegisteredAdapter:
        """Read a soft prompt and check that it fits; ``entry`` is its id, name, load id and scale."""
        number, name, load_id, scale = entry
        prompt = read_soft_prompt(location, task)
        prefix = fit_prefix(prompt, self._description)
        self._check_length(prefix.n_tokens)
        if prefix.embeddings is None:
            self._scheduler.call(lambda: self._try_prefix(prefix))
        size = prompt.path.stat().st_size
        adapter = LoadedAdapter(number, name, location, prompt.sha256, size, prompt.method, load_id, scale)
        return RegisteredAdapter(adapter, None, prefix)

    def _try_prefix(self, prefix: Prefix) -> None:
        """Raise unless the keys and values of a soft prompt can be written to a context's cache."""
        context = Context(self._model, self._options, self._concatenated)
        try:
            put_prefix(context.pointer, prefix)
        finally:
            context.free()

    def unload(self, name: str) -> None:
        """Remove an adapter. Requests that use it finish with it; its memory is freed after the last of them.

        Raises:
            AdapterNameError: if no adapter of this name is loaded.
        """
        self._check_open()
        self._forget(self._registry.remove(name))

    def _forget(self, registered: RegisteredAdapter) -> None:
        """Free an adapter that has been removed, unless requests still use it: the last of them will free it."""
        self._scheduler.call(lambda: None if registered.users else self._free(registered))

    def adapters(self) -> tuple[LoadedAdapter, ...]:
        """Return the loaded adapters, sorted by id."""
        return tuple(registered.adapter for registered in self._registry.all())

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of all loaded adapters, each with the adapter's name in front."""
        return tuple(f"{adapter.name}: {text}" for adapter in self.adapters() for text in adapter.warnings)

    def adapter_names(self) -> list[str]:
        """Return the names of adapters that requests can give: of loaded ones, then of those in ``adapter_dir``."""
        loaded = [registered.adapter.name for registered in self._registry.all()]
        return list(dict.fromkeys([*loaded, *(self._folder.names() if self._folder else ())]))

    def knows(self, name: str) -> bool:
        """Return whether requests can name an adapter so."""
        is_loaded = self._registry.users(name) is not None
        return is_loaded or (self._folder is not None and self._folder.find(name) is not None)

    def adapter_set(self, adapters: str | Iterable[tuple[str, float]]) -> AdapterSet:
        """Return an adapter set; adapters of ``adapter_dir`` need not be loaded yet.

        Args:
            adapters: text such as ``legal@0.5+tone`` or ``base``, or names and scales.

        Raises:
            AdapterNameError: if no adapter of a name is loaded.
            RequestError: if a scale is not a finite number, or a loaded soft prompt cannot have its scale.
        """
        if isinstance(adapters, str):
            if adapters == self.model_name and not self.knows(adapters):
                return ()
            names = self._canonical(parse_set(adapters))
        else:
            names = self._canonical(list(adapters))
        self._registry.check(names)
        return names

    def _canonical(self, pairs: Sequence[tuple[str, float | None]]) -> AdapterSet:
        scales = self._registry.scales()
        if self._folder is not None:
            missing = [name for name, _ in pairs if name not in scales]
            found = [name for name in missing if self._folder.find(name) is not None]
            scales |= dict.fromkeys(found if len(found) == len(missing) else self._folder.names(), 1.0)
        return canonical_set(pairs, scales)

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = True, as_prompt: bool = False) -> list[int]:
        """Split text into tokens.

        Args:
            text: the text.
            add_bos: put the model's begin-of-text token in front, if the model uses one.
            special: read the spelling of a control token as that token.
            as_prompt: refuse a text that cannot fit into the context without splitting it, which is costly.

        Raises:
            PromptTooLongError: if ``as_prompt`` and the text has certainly too many tokens.
        """
        with self._open():
            if as_prompt:
                self._check_text(text)
            return self._model.tokenize(text, add_bos=add_bos, special=special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        """Return the bytes of ``tokens``; control tokens have none, unless ``special`` asks for their spelling.

        Raises:
            RequestError: if the vocabulary has no such token.
        """
        check_tokens(tokens, self.n_vocab)
        with self._open():
            return self._model.detokenize(tokens, special=special)

    @property
    def chat_template(self) -> str:
        """The chat template, in Jinja."""
        with self._open():
            return self._model.template

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template; otherwise `chat_template` is one of plain text."""
        with self._open():
            return self._model.has_template

    @property
    def special_texts(self) -> dict[str, str]:
        """The texts of the tokens that begin and end a text: ``bos_token`` and ``eos_token``."""
        with self._open():
            return self._model.special_texts

    @property
    def n_parallel(self) -> int:
        """Largest number of requests that are decoded together."""
        return self._options.n_parallel

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **template_kwargs: Any) -> str:  # noqa: ANN401
        """Return the text that the chat template makes of a chat; `render_chat` returns its tokens.

        Raises:
            RequestError: if the template refuses the messages.
        """
        with self._open():
            return self._model.chat_text(messages, **template_kwargs)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **template_kwargs: Any) -> list[int]:  # noqa: ANN401
        """Turn a chat into tokens with the model's own template, up to where its answer begins.

        Args:
            messages: messages with a ``role`` and ``content``, as in OpenAI's API.
            **template_kwargs: further variables of the template.

        Raises:
            RequestError: if the template refuses the messages.
        """
        with self._open():
            return self._model.render_chat(messages, check=self._check_text, **template_kwargs)

    def submit(self, request: Request, notify: Callable[[bool], None] | None = None) -> Generation:
        """Put a request into the queue and return at once.

        Args:
            request: the prompt, adapters and sampling parameters.
            notify: called when something arrives, for callers that cannot wait in a thread; see `Generation`.

        Returns:
            The answer, piece by piece.

        Raises:
            QueueFullError: if too many requests are waiting.
            PromptTooLongError: if the prompt does not fit into the context.
            RequestError: if a parameter is out of range.
            AdapterNameError: if an adapter of the set is not loaded.
        """
        self._check_open()
        request.check(self.n_vocab)
        prefix = self._checked_prefix(request)
        if self._scheduler.context.is_encoder:
            raise RequestError(f"{self.model_name} embeds texts and cannot generate any; ask for embeddings")
        taken = self._take(request.adapters, prefix)
        n_prompt = len(request.tokens) + taken.n_before
        generation = Generation(notify, n_prompt)
        try:
            self._check_length(n_prompt)
            with self._open():
                job = GenerationJob(request, taken, GenerationSink.from_generation(generation), self._model, self.n_ctx)
                self._scheduler.submit(job)
        except BaseException:
            self._give_back(taken)
            raise
        return generation

    def _take(self, adapters: AdapterSet, prefix: Embeddings | None = None) -> ResolvedSet:
        """Resolve an adapter set, loading what is not loaded, and use it until `_give_back`."""
        names = self._canonical(adapters)
        with self._folder.hold([name for name, _ in names]) if self._folder else nullcontext():
            return self._registry.take(names, prefix)

    @property
    def can_generate(self) -> bool:
        """Whether the model continues texts; an encoder such as BERT only embeds them."""
        return not self._scheduler.context.is_encoder

    @property
    def can_rank(self) -> bool:
        """Whether the model is one that ranks documents; see `rank`."""
        return self._embedder.can_rank

    def embed(self, texts: Sequence[Sequence[int]], adapters: AdapterSet = ()) -> Float32Array:
        """Return the embeddings of texts, pooled as the model's file says, or else by the mean.

        Args:
            texts: the tokens of each text, from `tokenize`.
            adapters: adapter set that computes them, from `adapter_set`.

        Returns:
            Embeddings (n_texts, n_embd), not normalized.

        Raises:
            PromptTooLongError: if a text does not fit.
            RequestError: if the set has a soft prompt or an activated LoRA, or the model ranks documents.
            GenerationError: if llama.cpp fails, or an embedding is not finite.
        """
        if self.can_rank:
            raise RequestError(f"{self.model_name} ranks documents and does not embed texts; use rank")
        return self._pooled(texts, adapters)

    def rank(self, query: str, documents: Sequence[str], adapters: AdapterSet = ()) -> tuple[Float32Array, int]:
        """Return how well each document answers a query, by a model with a head for it.

        Returns:
            Scores (n_documents,), larger for better ones, and the number of tokens of all pairs together.

        Raises:
            PromptTooLongError: if a pair does not fit.
            RequestError: if the model cannot rank, or the set has a soft prompt or an activated LoRA.
            GenerationError: if llama.cpp fails, or a score is not finite.
        """
        if not self.can_rank:
            raise RequestError(f"{self.model_name} has no head that ranks documents; use a model made for reranking")
        with self._open():
            pairs = [self._model.pair(query, document) for document in documents]
        return self._pooled(pairs, adapters)[:, 0], sum(map(len, pairs))

    def _pooled(self, texts: Sequence[Sequence[int]], adapters: AdapterSet) -> Float32Array:
        self._check_open()
        for tokens in texts:
            self._embedder.check_length(len(tokens))
            check_tokens(tokens, self.n_vocab)
        taken = self._take(adapters)
        try:
            if taken.n_before or taken.invocations:
                raise RequestError("texts cannot be embedded with a soft prompt or an activated LoRA")
            phase = taken.base_phase
            # one call for each text, so that running answers go on in between
            rows = [
                self._scheduler.call(partial(self._embedder.compute, [int(token) for token in tokens], phase))
                for tokens in texts
            ]
        finally:
            self._give_back(taken)
        return np.stack(rows)

    def generate_many(
        self,
        pairs: Iterable[tuple[str | Sequence[int], str | AdapterSet]],
        sampling: Sampling | None = None,
        *,
        max_tokens: int = 256,
    ) -> list[Generation]:
        """Answer many prompts, each under its own adapters, in as few batches as possible.

        Args:
            pairs: a prompt, text or tokens, and an adapter set, as text such as ``legal@0.5+tone`` or from
                `adapter_set`. The same prompt may come with many sets, and the same set with many prompts.
            sampling: how tokens are chosen, by default as in `Request`.
            max_tokens: largest number of tokens of each answer.

        Returns:
            The answers in the order of the pairs; the last of them may not have ended yet.

        Raises:
            PromptTooLongError, RequestError, AdapterNameError: as `submit`; then no answer goes on.
        """
        requests = [
            Request(
                self.tokenize(prompt) if isinstance(prompt, str) else prompt,
                self.adapter_set(adapters),
                max_tokens=max_tokens,
                sampling=sampling or Sampling(),
            )
            for prompt, adapters in pairs
        ]
        ended = threading.Semaphore(0)
        generations: list[Generation] = []
        n_ended = 0
        for request in requests:
            while True:
                try:
                    generations.append(self.submit(request, lambda is_end: ended.release() if is_end else None))
                    break
                except QueueFullError:
                    if n_ended == len(generations):  # others fill the queue
                        raise
                    ended.acquire()
                    n_ended += 1
        return generations

    def stats(self) -> EngineStats:
        """Return the engine's statistics."""
        self._check_open()
        return self._scheduler.call(lambda: collect_stats(self._scheduler, len(self._registry.all())))

    def close(self) -> None:
        """Cancel all requests, then free contexts, adapters and weights. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        self._scheduler.close()
        with self._lock:
            self._unused.wait_for(lambda: not self._users)
        self._scheduler.context.free()
        self._embedder.free()
        self._mixed.close()
        self._concatenated.free()
        for registered in self._registry.all():
            free_lora(self._registry.remove(registered.adapter.name).pointer)
        self._model.free()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed")

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Keep the model from being freed while the block runs; several threads can be inside."""
        with self._lock:
            self._check_open()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                self._unused.notify_all()

    def _check_length(self, n_prompt: int) -> None:
        if n_prompt >= self.n_ctx:
            raise PromptTooLongError(
                f"the prompt has {n_prompt} tokens, but this model's maximum context length is {self.n_ctx} tokens: "
                "the context holds the prompt and the answer"
            )

    def _check_text(self, text: str) -> None:
        if len(text) > _LONG_TEXT and (fewest := self._model.fewest_tokens(text)) >= self.n_ctx:
            raise PromptTooLongError(
                f"the prompt has at least {fewest} tokens, but this model's maximum context length is {self.n_ctx} "
                "tokens: the context holds the prompt and the answer"
            )

    def _checked_prefix(self, request: Request) -> Embeddings | None:
        if request.prefix is None:
            return None
        rows = np.ascontiguousarray(request.prefix, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self._model.n_embd or not len(rows) or not np.isfinite(rows).all():
            raise RequestError(
                f"prefix has shape {rows.shape}, expected finite embeddings (n, {self._model.n_embd}) of this model"
            )
        return rows

    def _finished(self, job: GenerationJob) -> None:
        self._release(job.adapters)

    def _give_back(self, taken: ResolvedSet) -> None:
        """Call `_release` in the scheduler's thread."""
        with suppress(EngineClosedError):  # closing frees everything anyway
            self._scheduler.call(lambda: self._release(taken))

    def _release(self, taken: ResolvedSet) -> None:
        for registered in self._registry.give_back(taken):
            self._free(registered)

    def _free(self, registered: RegisteredAdapter) -> None:
        """Free an adapter that no request uses. Must run in the scheduler's thread, as all calls into llama.cpp do."""
        self._scheduler.context.drop(registered.adapter.load_id)
        self._embedder.forget_adapters()
        self._mixed.drop(registered.pointer)
        self._concatenated.drop(registered.adapter.sha256)
        free_lora(registered.pointer)


def _check_kv_bytes(context: Context, limit: int | None) -> None:
    if limit is None or context.kv_bytes == 0:
        return
    if context.kv_bytes is None:
        context.free()
        raise EngineError("this llama.cpp does not report the size of a KV cache, so max_kv_bytes cannot be enforced")
    if context.kv_bytes > limit:
        context.free()
        raise EngineError(
            f"the context needs {context.kv_bytes} bytes of KV cache, more than the {limit} allowed; lower n_ctx"
        )


def _options(n_ctx: int, n_parallel: int, n_batch: int, threads: int | None, kv_type: str) -> ContextOptions:
    _expect("n_ctx", n_ctx, 1, 1 << 24)
    _expect("n_parallel", n_parallel, 1, 256)
    _expect("n_batch", n_batch, 1, 1 << 16)
    if threads is not None:
        _expect("threads", threads, 1, 1024)
    if kv_type not in KV_TYPES:
        raise EngineError(f"kv_type is {kv_type!r:.80}, expected one of {', '.join(KV_TYPES)}")
    spare_one = max(usable_cpus() - 1, 1)
    return ContextOptions(n_ctx, n_parallel, max(n_batch, n_parallel), threads or spare_one, kv_type)


def _expect(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise EngineError(f"{name} is {value!r:.80}, expected a whole number from {low} to {high}")
