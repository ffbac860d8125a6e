# syntax=docker/dockerfile:1
#
#   docker build --target cpu  -t llmserve:cpu  .
#   docker build --target cuda -t llmserve:cuda .
#
#   docker run --rm -p 8000:8000 -v "$PWD/checkpoints:/models" -v llmserve-cache:/home/llmserve/.cache \
#     llmserve:cpu serve /models/demo-engine --host 0.0.0.0
#   docker run --rm --gpus all --ipc host ... llmserve:cuda serve /models/demo-engine --host 0.0.0.0
#
# --host 0.0.0.0: the default, 127.0.0.1, is the container's own and no port leads there. What is
# mounted at /models must be readable by user 1000, and writable for `convert`, `build` and `batch`.

# Any CPU. python:3.11 because constraints.txt was tested with it.
FROM python:3.11-slim AS cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
# First and from PyTorch's own index: the build on PyPI brings gigabytes of CUDA libraries along.
RUN pip install --constraint constraints.txt --index-url https://download.pytorch.org/whl/cpu torch
COPY pyproject.toml README.md LICENSE ./
COPY llmserve ./llmserve
RUN pip install --constraint constraints.txt .
# The cache directory is made here so that a volume mounted over it belongs to the user, too.
RUN useradd --create-home --uid 1000 llmserve \
    && install --directory --owner=llmserve --group=llmserve /home/llmserve/.cache /models
USER llmserve
WORKDIR /models
EXPOSE 8000
# For `serve`, on its default port; other commands are run with --no-healthcheck.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["llmserve"]
CMD ["--help"]

# NVIDIA GPUs, with TensorRT-LLM 1.2.1: the last release that builds engines. CI does not build this
# target: the base image is far too large for that, and its engines can only be built beside a GPU.
FROM nvcr.io/nvidia/tensorrt-llm/release:1.2.1 AS cuda
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY llmserve ./llmserve
# The image's own torch, transformers and tensorrt_llm belong together and stay as they are; only
# what is missing is added, which is why constraints.txt (with another torch) is not used here.
RUN python3 -m pip freeze | grep -iE '^(torch|transformers|tensorrt|numpy|pydantic)[^@]*==' > /tmp/image.txt \
    && python3 -m pip install --constraint /tmp/image.txt . \
    && rm /tmp/image.txt
# Some base images have a user 1000 already; its name does not matter.
RUN (id 1000 >/dev/null 2>&1 || useradd --uid 1000 llmserve) \
    && install --directory --owner=1000 --group=1000 /home/llmserve /home/llmserve/.cache /models
USER 1000
ENV HOME=/home/llmserve
WORKDIR /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["llmserve"]
CMD ["--help"]
