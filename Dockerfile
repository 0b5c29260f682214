# TuckA runtime. For the CPU:   docker build -t tucka .
# For NVIDIA GPUs:              docker build -t tucka:cuda --build-arg DEVICE=cuda .   (run with --gpus all)
# docs/deploy.md says how to run it, and how this file was tried.

FROM debian:12.12-slim AS build
ARG DEVICE=cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/tucka
# The "+cpu" makes it torch's CPU build or none; the plain one brings the CUDA libraries along.
WORKDIR /src
COPY deploy/torch.txt ./
RUN torch=$(cat torch.txt) \
    && if [ "$DEVICE" = cuda ]; then \
        /opt/tucka/bin/pip install --no-cache-dir "$torch"; \
    else \
        /opt/tucka/bin/pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "$torch+cpu"; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY tucka_runtime ./tucka_runtime
COPY kernels ./kernels
COPY server ./server
COPY loadtest ./loadtest
RUN /opt/tucka/bin/pip install --no-cache-dir ".[gguf,otel]"
# Away from the sources, which must not be taken for the installed package.
WORKDIR /
RUN if [ "$DEVICE" = cpu ]; then /opt/tucka/bin/python -m tucka_runtime.kernels.native.build --all; fi

FROM debian:12.12-slim
ARG DEVICE=cpu
# Triton compiles a launcher for every kernel when it first runs one: on a GPU that needs a C compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && if [ "$DEVICE" = cuda ]; then apt-get install -y --no-install-recommends gcc libc6-dev python3-dev; fi \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --user-group --home-dir /tmp --no-create-home tucka \
    && mkdir -p /models /adapters /state \
    && chown tucka:tucka /state
COPY --from=build /opt/tucka /opt/tucka
# The root file system may be read-only: what is written goes to /state and /tmp.
ENV PATH=/opt/tucka/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TUCKA_HOST=0.0.0.0 \
    TUCKA_PORT=8000 \
    TUCKA_ADAPTER_ROOT=/adapters \
    TUCKA_STATE_DIR=/state \
    TUCKA_LOG_FORMAT=json
USER tucka
WORKDIR /tmp
EXPOSE 8000
VOLUME ["/models", "/adapters", "/state"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-m", "tucka_runtime.cli.healthcheck"]
# It listens on all of the container's addresses, so it starts with keys (TUCKA_API_KEY_FILE, TUCKA_API_KEY) or, where what
# publishes its port keeps strangers out, with TUCKA_INSECURE=true.
ENTRYPOINT ["tucka"]
CMD ["serve"]
