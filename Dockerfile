# docker build -t tora_jax:tpu --build-arg EXTRA=tpu .
FROM python:3.12.8-slim-bookworm
# cuda13, cuda (CUDA 12) or tpu
ARG EXTRA=cuda13
WORKDIR /tora_jax
COPY . .
RUN pip install --no-cache-dir ".[train,cloud,${EXTRA}]"
