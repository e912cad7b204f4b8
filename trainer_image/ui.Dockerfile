# The image of the web page, for the chart's `ui`: no torch. Build from the repository's root, after the libraries of the page were
# put beside it, for the builder has no npm (make image-ui does both):
#
#   python nemo_rl/ui/libraries.py nemo_rl/ui/vendor
#   docker build -f trainer_image/ui.Dockerfile -t nemo-rl-ui:0.1.0 .
#
#   BASE          image with Python >= 3.11 and pip
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS wheel
RUN python -m pip install --no-cache-dir hatchling==1.27.0
COPY pyproject.toml README.md LICENSE /src/
COPY nemo_rl /src/nemo_rl
COPY operator /src/operator
RUN NEMO_RL_UI_LIBRARIES=required python -m pip wheel --no-deps --no-build-isolation --no-index --wheel-dir /wheel /src

FROM ${BASE}
COPY constraints.txt trainer_image/ui-requirements.txt /usr/share/nemo-rl/
RUN python -m pip install --no-cache-dir -c /usr/share/nemo-rl/constraints.txt -r /usr/share/nemo-rl/ui-requirements.txt
ENV HOME=/tmp PYTHONUNBUFFERED=1
RUN echo "nemo-rl:x:1000:1000::/tmp:/usr/sbin/nologin" >> /etc/passwd
# Copied, not mounted: buildah's cache would not see that a mounted wheel has changed.
COPY --from=wheel /wheel /usr/share/nemo-rl
RUN python -m pip install --no-cache-dir --no-deps --no-index /usr/share/nemo-rl/*.whl
USER 1000:1000
CMD ["python", "-m", "nemo_rl.cli.main", "ui", "--viewer-tokens", "--host", "0.0.0.0"]
