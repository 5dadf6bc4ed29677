#!/usr/bin/env bash
# Fuzzes one target, or all one after the other: tests/fuzz/run.sh [SECONDS] [TARGET...]
# Needs a nightly toolchain and cargo-fuzz (cargo install cargo-fuzz).
set -euo pipefail
cd "$(dirname "$0")"
seconds="${1:-60}"
shift || true
if [ $# -eq 0 ]; then
  set -- safetensors config gguf template request archive
fi
cp ../../Cargo.lock Cargo.lock # the versions that the program has
POLYLORA_CORPUS="$PWD/corpus" cargo test --quiet --manifest-path ../../Cargo.toml --test attacks seeds
for target in "$@"; do
  cargo +nightly fuzz run --fuzz-dir . "$target" "corpus/$target" -- \
    -max_total_time="$seconds" -max_len=65536 -timeout=20 -rss_limit_mb=2048
done
