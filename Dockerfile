# The image of every service of Starfish; what a container runs, its command says. Two kinds:
#
#   docker build --target cpu  -t starfish-moe:latest .
#   docker build --target cuda -t starfish-moe:cuda .
#
# Its user can change nothing in it: root may be read-only, and any uid may run it.
#
# A tag can be pointed elsewhere, a digest cannot: for production, build with
# --build-arg BASE_IMAGE=python@sha256:…
ARG BASE_IMAGE=python:3.11-slim-bookworm

# What every container needs at run time: the libraries that Mooncake loads, the user, its folders.
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS runtime

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libcurl4 libibverbs1 libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 starfish \
    && install -d -o starfish -g starfish /models /run/starfish /var/lib/starfish \
    && for name in authority etcd control-plane gateway rank; do \
         install -d -m 0700 -o starfish -g starfish "/run/starfish/$name"; done
WORKDIR /opt/starfish
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# Nothing of this stage is in an image but what is copied out of it. The compiler is for the shim
# that confines Mooncake's listeners.
FROM runtime AS build

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# The list of what an image holds is written by a tool that the image does not hold.
COPY requirements/sbom.lock requirements/install_locked.sh requirements/
RUN python -m venv /opt/venv && python -m venv /opt/sbom \
    && PATH=/opt/sbom/bin:$PATH requirements/install_locked.sh requirements/sbom.lock

# Dependencies in layers of their own, that changes of ours leave alone. torch's build for CPUs is
# in an index of its own: --build-arg TORCH_INDEX=… names it, if pip's default index is another. The
# shim and numba's compiled kernels, minutes of work, lie beside their source, and in a layer that
# changes of other services leave alone.
FROM build AS build-cpu

ARG TORCH_INDEX=
COPY requirements/torch-cpu.lock requirements/
RUN requirements/install_locked.sh requirements/torch-cpu.lock ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
COPY requirements/cpu.lock requirements/
RUN requirements/install_locked.sh requirements/cpu.lock
COPY shared shared
COPY gpu_worker gpu_worker
RUN python -m shared.confinement && python -m gpu_worker.model_tools warm-up
COPY . .
RUN requirements/install_project.sh torch/include torch/test \
      'torch/bin/*Test' 'torch/bin/protoc*' 'torch/bin/test_*' torch/bin/upgrader_models \
      mooncake/mooncake_client mooncake/mooncake_master mooncake/transfer_engine_bench

FROM runtime AS cpu

COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=build-cpu /opt/starfish /opt/starfish
USER 1000:1000
CMD ["starfish", "--help"]

FROM build AS build-cuda

COPY requirements/cuda.lock requirements/
RUN requirements/install_locked.sh requirements/cuda.lock
COPY shared shared
COPY gpu_worker gpu_worker
RUN python -m shared.confinement && python -m gpu_worker.model_tools warm-up
COPY . .
RUN requirements/install_project.sh torch/include torch/test \
      'torch/bin/*Test' 'torch/bin/protoc*' 'torch/bin/test_*' torch/bin/upgrader_models \
      mooncake/mooncake_client mooncake/mooncake_master mooncake/transfer_engine_bench \
      triton/_C/libproton.so triton/backends/nvidia/lib/cupti \
      'nvidia/cu13/lib/libcusolverMg.*' 'nvidia/cu13/lib/libcufftw.*' 'nvidia/cu13/lib/libnvblas.*'

# Mooncake's kernels depend on the card and on the model's sizes, Triton's on the card: both are
# compiled when a rank first needs them, and kept in the volume /var/lib/starfish. So this image,
# unlike the other one, has a compiler: nvcc as a Python package, and the host's.
FROM runtime AS cuda

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
         g++ ibverbs-providers libc6-dev libibverbs-dev librdmacm1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/venv /opt/venv
COPY --from=build-cuda /opt/starfish /opt/starfish
ENV CUDA_HOME=/opt/venv/lib/python3.11/site-packages/nvidia/cu13
ENV LD_LIBRARY_PATH=$CUDA_HOME/lib \
    MOONCAKE_EP_JIT_NVCC=$CUDA_HOME/bin/nvcc \
    MOONCAKE_EP_JIT_CACHE_DIR=/var/lib/starfish/mooncake \
    TRITON_CACHE_DIR=/var/lib/starfish/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
VOLUME /var/lib/starfish
CMD ["starfish", "--help"]
