# One image for every service of Starfish; docker-compose.yml says which one a container runs.
FROM python:3.11-slim-bookworm

# Mooncake needs the libraries; the shim that confines its listeners, the compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libcurl4 libibverbs1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 starfish \
    && install -d -o starfish -g starfish /models /run/starfish /var/lib/starfish
WORKDIR /opt/starfish

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# The largest dependency in a layer of its own, that changes of ours leave alone.
RUN pip install torch==2.13.0

COPY pyproject.toml README.md ./
COPY shared shared
COPY control_plane control_plane
COPY gateway gateway
COPY gpu_worker gpu_worker
COPY node_agent node_agent
COPY cli cli
COPY benchmarks benchmarks
COPY models models
# In place, and owned by the user: numba keeps its compiled kernels beside their source.
RUN pip install -e . && chown -R starfish:starfish /opt/starfish

USER 1000:1000
RUN python -m gpu_worker.model_tools warm-up

CMD ["starfish", "--help"]
