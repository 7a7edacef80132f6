"""The engine: one base model in memory, and any set of adapters for each request."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, TypeAlias

import numpy as np

from gguflora.architectures.base_model import read_whole_base
from gguflora.engine.adapter_folder import AdapterFolder
from gguflora.engine.adapter_loader import AdapterFiles, AdapterLoader, Order
from gguflora.engine.adapter_sets import AdapterSet, canonical_set, parse_set
from gguflora.engine.adapter_templates import AdapterTemplates
from gguflora.engine.context import Context
from gguflora.engine.embedding import RANKING_HEAD, Embedder
from gguflora.engine.job import GenerationJob
from gguflora.engine.many import submit_all
from gguflora.engine.model import Model
from gguflora.engine.options import check_kv_bytes, context_options, expect
from gguflora.engine.registry import AdapterRegistry, Embeddings, LoadedAdapter, ResolvedSet
from gguflora.engine.requests import Generation, GenerationSink, Request, Sampling, check_tokens
from gguflora.engine.scheduler import Scheduler
from gguflora.engine.stats import EngineStats, collect_stats
from gguflora.engine.texts import ModelTexts, check_length
from gguflora.errors import AdapterNameError, RequestError
from gguflora.files.remote import remote_inputs
from gguflora.quants.arrays import Float32Array
from gguflora.runtime.adapter_files import AdapterReading
from gguflora.runtime.chat_template import ChosenTemplate
from gguflora.runtime.concatenated_adapters import ConcatenatedAdapters
from gguflora.runtime.mixed_adapters import MixedAdapters

_LOG: Final = logging.getLogger(__name__)
AdapterPath: TypeAlias = str | os.PathLike[str]


class Engine(ModelTexts):
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
        chat_template: ``base``, ``adapter`` (the template in the directories of a request's adapters), or a template in
            Jinja. By default the adapter's, if one adapter is given here and its template differs, and for requests
            whose adapters all have the same one; this is logged. See `template_of`.
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
        options = context_options(n_ctx, n_parallel, n_batch, threads, kv_type)
        expect("max_contexts", max_contexts, 1, 1024)
        expect("queue_size", queue_size, 0, 1 << 20)
        self._description = read_whole_base(Path(base))
        files = AdapterFiles(self._description, AdapterReading(text_only, trust_names))
        path = self._description.path  # for a split model, its first file, even if another was given
        self.model_name = path.stem
        self._registry = AdapterRegistry()
        self._folder: AdapterFolder | None = None
        if adapter_dir is not None:
            self._folder = AdapterFolder(Path(adapter_dir), adapter_memory, self, self._registry.users)
        super().__init__(Model(path, verbose=verbose, gpu_layers=gpu_layers), n_ctx)
        try:
            architecture = self._description.architecture
            concatenated = ConcatenatedAdapters(self._model.pointer, architecture, files.lora_file)
            self._mixed = MixedAdapters(self._model.pointer, architecture, can_rewind=self._model.rewinds)
            context = Context(self._model, options, concatenated, self._mixed)
            check_kv_bytes(context, max_kv_bytes)
        except BaseException:
            self._model.free()
            raise
        self._options = options
        self._embedder = Embedder(
            self._model,
            options,
            concatenated,
            is_encoder=context.is_encoder,
            has_head=RANKING_HEAD in self._description.shapes,
        )
        self._scheduler = Scheduler(context, self._mixed, queue_size, lambda job: self._loader.release(job.adapters))
        self._loader = AdapterLoader(
            self._model, options, files, self._registry, self._scheduler, self._mixed, concatenated, self._embedder
        )
        atexit.register(self.close)  # Python would crash if it ended while a thread is still in llama.cpp
        self._templates = AdapterTemplates(chat_template, self.n_vocab)
        try:
            self._load_first(adapters or {}, tasks or {}, chat_template_file)
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
        reading = self._loader.files.reading.changed(text_only, trust_names)
        number, load_id = self._registry.reserve(name, replace)
        try:
            registered = self._loader.load(Order(location, number, name, load_id, scale, task, reading))
            replaced = self._registry.add(registered)
        except BaseException:
            self._registry.give_up(name)
            raise
        if replaced is not None:
            self._loader.forget(replaced)
        return registered.adapter

    def _load_first(
        self,
        adapters: Mapping[str, AdapterPath | tuple[AdapterPath, float]],
        tasks: Mapping[str, int],
        template_file: str | os.PathLike[str] | None,
    ) -> None:
        unknown_names = sorted(tasks.keys() - adapters.keys())
        if unknown_names:
            raise AdapterNameError(f"a task is given for {unknown_names[0]!r:.80}, but no adapter has this name")
        for name, item in adapters.items():
            location, scale = item if isinstance(item, tuple) else (item, 1.0)
            self.load(location, name, scale=scale or 1.0, task=tasks.get(name))  # 0 is off, not what its name means
        paths = [adapter.path for adapter in self.adapters()]
        may_come = self._folder is not None
        chosen = self._templates.choose_first(template_file, paths, self._model.template, may_come=may_come)
        if chosen is not None:
            self._model.use_template(chosen)
        self._loader.prepare()
        if self._mixed.reason is not None and adapters:
            _LOG.warning("requests of different adapters take turns: %s", self._mixed.reason)

    def unload(self, name: str) -> None:
        """Remove an adapter. Requests that use it finish with it; its memory is freed after the last of them.

        Raises:
            AdapterNameError: if no adapter of this name is loaded.
        """
        self._check_open()
        self._loader.forget(self._registry.remove(name))

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

    def template_of(self, adapters: AdapterSet) -> ChosenTemplate | None:
        """Return the chat template that the directories of a set's adapters bring; None for `chat_template`.

        A template that differs from the engine's is used if all adapters of the set have it; with
        ``chat_template="adapter"`` it is enough that no other one has a different template. Adapters of
        ``adapter_dir`` need not be loaded yet.

        Raises:
            RequestError: if a template cannot be read, or ``chat_template="adapter"`` and the set has several.
        """
        loaded = {registered.adapter.name: registered.adapter.path for registered in self._registry.all()}
        folder = self._folder
        paths = {name: loaded.get(name) or (folder.find(name) if folder else None) for name, _ in adapters}
        return self._templates.of({name: path for name, path in paths.items() if path is not None})

    @property
    def n_parallel(self) -> int:
        """Largest number of requests that are decoded together."""
        return self._options.n_parallel

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
            check_length(n_prompt, self.n_ctx)
            with self._open():
                job = GenerationJob(request, taken, GenerationSink.from_generation(generation), self._model, self.n_ctx)
                self._scheduler.submit(job)
        except BaseException:
            self._loader.give_back(taken)
            raise
        return generation

    def _take(self, adapters: AdapterSet, prefix: Embeddings | None = None) -> ResolvedSet:
        """Resolve an adapter set, loading what is not loaded, and use it until `AdapterLoader.give_back`."""
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
            self._loader.give_back(taken)
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
        return submit_all(self.submit, requests)

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken now: the engine is open and its queue has room."""
        return self._scheduler.has_room

    def stats(self) -> EngineStats:
        """Return the engine's statistics."""
        self._check_open()
        return self._scheduler.call(lambda: collect_stats(self._scheduler, len(self._registry.all())))

    def close(self) -> None:
        """Cancel all requests, then free contexts, adapters and weights. Idempotent."""
        if not self._begin_closing():
            return
        atexit.unregister(self.close)
        self._scheduler.close()
        self._wait_until_unused()
        self._loader.close()
        self._model.free()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked_prefix(self, request: Request) -> Embeddings | None:
        if request.prefix is None:
            return None
        rows = np.ascontiguousarray(request.prefix, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self._model.n_embd or not len(rows) or not np.isfinite(rows).all():
            raise RequestError(
                f"prefix has shape {rows.shape}, expected finite embeddings (n, {self._model.n_embd}) of this model"
            )
        return rows
