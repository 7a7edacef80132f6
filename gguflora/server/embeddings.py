"""OpenAI's ``/v1/embeddings`` and the ``/v1/rerank`` of Jina, llama-server and vLLM, under adapters."""

from __future__ import annotations

import base64
from typing import Any, Final, Literal

import numpy as np
from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from gguflora.quants.arrays import Float32Array
from gguflora.server.errors import Failure
from gguflora.server.fields import Body, take_alias
from gguflora.server.schemas import LoraScale
from gguflora.server.service import Service, ServiceDep

router = APIRouter()

_MAX_TEXTS: Final = 2048


class _ModelBody(Body):
    """The fields that name adapters."""

    model: str | None = Field(None, max_length=1024)
    lora: list[LoraScale] | None = Field(None, max_length=256)
    harmless = frozenset({"user", "priority", "request_id", "cache_prompt"})


class EmbeddingsBody(_ModelBody):
    """Body of POST /v1/embeddings; ``embd_normalize`` is llama-server's: 2 for length 1, -1 for none."""

    input: str | list[int] | list[str] | list[list[int]] = Field(max_length=1 << 20)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    embd_normalize: int | None = Field(None, ge=-1, le=64)

    @classmethod
    def rename(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Read llama-server's name of ``input``, too."""
        return super().rename(take_alias(body, "content", "input"))

    def texts(self) -> list[str | list[int]]:
        """Return all texts, each as text or as tokens."""
        given: Any = self.input
        several = isinstance(given, list) and not (given and isinstance(given[0], int))
        return list(given) if several else [given]


class RerankBody(_ModelBody):
    """Body of POST /v1/rerank."""

    query: str = Field(max_length=1 << 20)
    documents: list[str] = Field(min_length=1, max_length=_MAX_TEXTS)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = None


@router.post("/v1/embeddings")
async def embed(body: EmbeddingsBody, service: ServiceDep) -> dict[str, Any]:
    """Embed texts, with the pooling that the model's file names or else the mean of the last hidden states."""
    model, vectors, n_tokens = await run_in_threadpool(_embed, service, body)
    encode = _as_base64 if body.encoding_format == "base64" else _as_list
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }


def _embed(service: Service, body: EmbeddingsBody) -> tuple[str, Float32Array, int]:
    """Return the name of the adapter set, a vector for each text, and the number of tokens."""
    adapters = service.adapter_set(body.model, body.lora)
    given = body.texts()
    if not 0 < len(given) <= _MAX_TEXTS:
        raise Failure(400, f"input has {len(given)} texts, expected 1 to {_MAX_TEXTS}", "invalid_value", "input")
    texts = [service.engine.tokenize(text, as_prompt=True) if isinstance(text, str) else text for text in given]
    vectors = service.engine.embed(texts, adapters)
    if body.dimensions is not None:
        if body.dimensions > vectors.shape[1]:
            raise Failure(
                400,
                f"dimensions is {body.dimensions}, but the model's embeddings have {vectors.shape[1]} numbers",
                "invalid_value",
                "dimensions",
            )
        vectors = vectors[:, : body.dimensions]
    vectors = _normalized(vectors, 2 if body.embd_normalize is None else body.embd_normalize)
    return service.names.of(body.model, adapters), vectors, sum(map(len, texts))


def _normalized(vectors: Float32Array, order: int) -> Float32Array:
    """Divide by a norm as llama.cpp's ``common_embd_normalize``: the p-norm; 0 makes 32760 the maximum, -1 none."""
    if order < 0:
        return vectors
    values = vectors.astype(np.float64)
    if order == 0:
        norms = np.abs(values).max(axis=1, keepdims=True) / 32760
    else:
        norms = np.linalg.norm(values, order, axis=1, keepdims=True)
    return (values / np.where(norms > 0, norms, 1)).astype(np.float32)


def _as_list(vector: Float32Array) -> list[float]:
    return [float(value) for value in vector]


def _as_base64(vector: Float32Array) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


async def rerank(body: RerankBody, service: ServiceDep) -> dict[str, Any]:
    """Rank documents for a query with a model that has a head for it; the best comes first."""
    model, scores, n_tokens = await run_in_threadpool(_rank, service, body)
    best = np.argsort(-scores, kind="stable")[: body.top_n or len(scores)]
    results: list[dict[str, Any]] = [{"index": int(index), "relevance_score": float(scores[index])} for index in best]
    if body.return_documents:
        results = [{**each, "document": {"text": body.documents[int(each["index"])]}} for each in results]
    return {
        "object": "list",
        "model": model,
        "results": results,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }


def _rank(service: Service, body: RerankBody) -> tuple[str, Float32Array, int]:
    """Return the name of the adapter set, a score for each document, and the number of tokens."""
    adapters = service.adapter_set(body.model, body.lora)
    scores, n_tokens = service.engine.rank(body.query, body.documents, adapters)
    return service.names.of(body.model, adapters), scores, n_tokens


for _path in ("/v1/rerank", "/v1/reranking"):
    router.add_api_route(_path, rerank, methods=["POST"])
