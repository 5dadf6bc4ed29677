#!/usr/bin/env bash
# The price of mixing: base only, one adapter, and eight distinct rank-16 adapters on all linears, in turns against
# one server. Usage: [DTYPE=bf16] [ROUNDS=7] mixed.sh BINARY [more options of `polylora bench`]; needs python3 and a quiet machine.
set -euo pipefail
cd "$(dirname "$0")/../.."

binary=${1:?usage: mixed.sh BINARY [bench options]}
shift
count=8
work=target/bench-serve
url=http://127.0.0.1:18080

mkdir -p "$work"
if [ ! -f "$work/adapters/a$count/adapter_config.json" ]; then
  python3 benches/make_adapters.py --out "$work/adapters" --count "$count" --rank 16
fi

adapters=()
mixed="mixed=$url"
for i in $(seq "$count"); do
  adapters+=(--adapter "a$i=$work/adapters/a$i")
  mixed+=",model=a$i"
done

"$binary" serve --model smollm2-135m-instruct --dtype "${DTYPE:-bf16}" --port "${url##*:}" --data-dir "$work/data" \
  "${adapters[@]}" > "$work/serve.log" 2>&1 &
server=$!
trap 'kill "$server" 2> /dev/null; wait "$server" 2> /dev/null || true' EXIT

if ! "$binary" health --url "$url" --wait 300; then
  tail -n 5 "$work/serve.log" >&2
  exit 1
fi

"$binary" bench --rounds "${ROUNDS:-7}" --requests 64 --concurrency 16 --max-tokens 64 --prompt-tokens 8 \
  --ignore-eos --warmup 16 --endpoint completions --json "$work/report.json" \
  --contender "base=$url,model=smollm2-135m-instruct" \
  --contender "one=$url,model=a1" \
  --contender "$mixed" \
  "$@"
