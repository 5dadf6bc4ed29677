# The server in a small image: docker build -t polylora . && docker run -p 8080:8080 -e POLYLORA_API_KEY=secret polylora
FROM rust:1.95-slim-trixie AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY kernels kernels
COPY src src
# What tests share is a member of the workspace, so cargo wants to see it.
COPY tests/support tests/support
RUN cargo build --release --locked --bin polylora

FROM debian:trixie-slim
# Models are fetched over HTTPS at the first start.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --home-dir /data --create-home polylora
COPY --from=build /src/target/release/polylora /usr/local/bin/polylora
COPY adapters /usr/share/polylora/adapters
COPY LICENSE /usr/share/polylora/LICENSE

USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8080
# Models (XDG_CACHE_HOME, HF_HOME) and adapters (XDG_DATA_HOME) live on the volume.
ENV HOME=/data \
    XDG_CACHE_HOME=/data/cache \
    XDG_DATA_HOME=/data/share \
    HF_HOME=/data/cache/huggingface \
    POLYLORA_HOST=0.0.0.0
# Beyond loopback the server wants POLYLORA_API_KEY, or POLYLORA_ALLOW_OPEN=true behind a proxy that guards it.
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s \
  CMD polylora health --url "http://127.0.0.1:${POLYLORA_PORT:-8080}"
STOPSIGNAL SIGTERM
ENTRYPOINT ["polylora"]
CMD ["serve"]
