# gguflora serve in a container:
#   docker build -t gguflora .
#   docker run --read-only --tmpfs /tmp -p 8080:8080 -v /srv/models:/models:ro -e GGUFLORA_API_KEY=secret gguflora /models/model.gguf
# For another architecture: docker buildx build --platform linux/arm64 .
ARG PYTHON=3.12-slim-bookworm

FROM python:${PYTHON} AS build
# Debian keeps only the newest version of a package, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ make && rm -rf /var/lib/apt/lists/*
# A processor-neutral llama.cpp: the image runs on other machines than the one that built it.
ENV CMAKE_ARGS="-DGGML_NATIVE=OFF"
RUN python -m venv /opt/gguflora
COPY . /source
RUN /opt/gguflora/bin/pip install --no-cache-dir '/source[server,remote]'

FROM python:${PYTHON}
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin gguflora
COPY --from=build /opt/gguflora /opt/gguflora
ENV PATH=/opt/gguflora/bin:$PATH PYTHONDONTWRITEBYTECODE=1 GGUFLORA_CACHE=/tmp/gguflora HOME=/tmp
USER 10001
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["gguflora", "serve", "--host", "0.0.0.0", "--port", "8080"]
CMD ["--help"]
