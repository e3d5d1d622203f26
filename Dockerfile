# One image for every service of Starfish; docker-compose.yml says which one a container runs. Its
# user can change nothing in it: root may be read-only, and any uid may run it.
#
# A tag can be pointed elsewhere, a digest cannot: for production, build with
# --build-arg BASE_IMAGE=python@sha256:…
ARG BASE_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS build

# The compiler is for the shim that confines Mooncake's listeners; the others are Mooncake's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libcurl4 libibverbs1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/venv/bin:$PATH
WORKDIR /opt/starfish
RUN python -m venv /opt/venv

# Dependencies in layers of their own, that changes of ours leave alone. torch has a build for each
# kind of card, so its version is pinned and not its hash; all others are pinned by hash.
COPY requirements.lock ./
RUN grep '^setuptools==' requirements.lock >/tmp/build.lock \
    && pip install --require-hashes --no-deps -r /tmp/build.lock \
    && pip install --require-hashes --no-deps --no-build-isolation -r requirements.lock \
    && pip install torch==2.13.0

COPY pyproject.toml README.md ./
COPY shared shared
COPY control_plane control_plane
COPY gateway gateway
COPY gpu_worker gpu_worker
COPY node_agent node_agent
COPY cli cli
COPY benchmarks benchmarks
COPY models models
# In place: the shim and numba's compiled kernels lie beside their source.
RUN pip install --no-deps --no-build-isolation -e . \
    && python -m shared.confinement \
    && python -m gpu_worker.model_tools warm-up \
    && chmod -R go-w /opt/starfish /opt/venv

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libcurl4 libibverbs1 libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 starfish \
    && install -d -o starfish -g starfish /models /run/starfish /var/lib/starfish \
    && for name in authority etcd control-plane gateway rank; do \
         install -d -m 0700 -o starfish -g starfish "/run/starfish/$name"; done
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/starfish /opt/starfish

WORKDIR /opt/starfish
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 1000:1000

CMD ["starfish", "--help"]
