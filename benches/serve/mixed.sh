#!/usr/bin/env bash
# The price of mixing: base only, one adapter, and several distinct adapters, in turns against one server, and beside
# them what it costs at least to read those adapters. Usage: mixed.sh BINARY [more options of `polylora bench`]; needs
# python3, cargo and a quiet machine. By variables: COUNT adapters (8) of RANK (16) on TARGETS (all, or as in
# q_proj,v_proj), STREAMS (16) at once, DTYPE of the base (bf16), ADAPTER_DTYPE (auto), ROUNDS (7).
set -euo pipefail
cd "$(dirname "$0")/../.."

binary=${1:?usage: mixed.sh BINARY [bench options]}
shift
count=${COUNT:-8} rank=${RANK:-16} targets=${TARGETS:-all} streams=${STREAMS:-16}
work=target/bench-serve
made=$work/adapters-${targets//,/-}-$rank
url=http://127.0.0.1:18080

mkdir -p "$work"
if [ ! -f "$made/a$count/adapter_config.json" ]; then
  python3 benches/make_adapters.py --out "$made" --count "$count" --rank "$rank" --targets "$targets"
fi
read_ceiling=$(cargo bench -q -p polylora-kernels --bench ops -- nothing | grep ceilings)

adapters=()
mixed="mixed=$url"
for i in $(seq "$count"); do
  adapters+=(--adapter "a$i=$made/a$i")
  mixed+=",model=a$i"
done

"$binary" serve --model smollm2-135m-instruct --dtype "${DTYPE:-bf16}" --adapter-dtype "${ADAPTER_DTYPE:-auto}" \
  --port "${url##*:}" --data-dir "$work/data" --resident-max "$count" --adapter-bytes-max 8GiB \
  "${adapters[@]}" > "$work/serve.log" 2>&1 &
server=$!
trap 'kill "$server" 2> /dev/null; wait "$server" 2> /dev/null || true' EXIT

if ! "$binary" health --url "$url" --wait 300; then
  tail -n 5 "$work/serve.log" >&2
  exit 1
fi

"$binary" bench --rounds "${ROUNDS:-7}" --requests $((4 * streams)) --concurrency "$streams" --max-tokens 64 --prompt-tokens 8 \
  --ignore-eos --warmup "$streams" --endpoint completions --json "$work/report.json" \
  --contender "base=$url,model=smollm2-135m-instruct" \
  --contender "one=$url,model=a1" \
  --contender "$mixed" \
  "$@"
python3 benches/serve/formula.py "$work/report.json" "$made" "$count" "$streams" "${ADAPTER_DTYPE:-auto}" "$read_ceiling"
