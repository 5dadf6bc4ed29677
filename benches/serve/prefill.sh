#!/usr/bin/env bash
# Prompts of 512 tokens alone: tokens/s to the first token, in bf16 and in 8 bits, with and without an adapter of rank 16 on
# all linears, and how much of the machine's peak their products alone are. Usage: [ROUNDS=5] prefill.sh BINARY; needs
# python3, cargo and a quiet machine.
set -euo pipefail
cd "$(dirname "$0")/../.."

binary=${1:?usage: prefill.sh BINARY}
work=target/bench-serve
made=$work/adapters-all-16
mkdir -p "$work"
[ -f "$made/a1/adapter_config.json" ] || python3 benches/make_adapters.py --out "$made" --count 1 --rank 16
ceilings=$(cargo bench -q -p polylora-kernels --bench ops -- nothing | grep ceilings)

servers=()
contenders=()
trap 'kill "${servers[@]}" 2> /dev/null; wait 2> /dev/null || true' EXIT
port=18080
for dtype in bf16 q8; do
  url=http://127.0.0.1:$port
  "$binary" serve --model smollm2-135m-instruct --dtype "$dtype" --port "$port" --data-dir "$work/data-$dtype" \
    --adapter "a1=$made/a1" > "$work/serve-$dtype.log" 2>&1 &
  servers+=($!)
  "$binary" health --url "$url" --wait 300
  contenders+=(--contender "$dtype=$url,model=smollm2-135m-instruct" --contender "$dtype+adapter=$url,model=a1")
  port=$((port + 1))
done

"$binary" bench --rounds "${ROUNDS:-5}" --requests 12 --concurrency 1 --max-tokens 1 --prompt-tokens 512 --warmup 2 \
  --endpoint completions --json "$work/prefill.json" "${contenders[@]}"
python3 - "$work/prefill.json" "$ceilings" <<'END'
import json
import re
import statistics
import sys

report, ceilings = json.load(open(sys.argv[1])), sys.argv[2]
print(ceilings)
LINEARS = 106_168_320  # weights of the demo model's linears but the head
for c in report["contenders"]:
    rates = [r["prompt_tokens_mean"] / r["time_to_first_token_seconds"]["p50"] for r in c["rounds"]]
    peak = float(re.search(("int8" if c["name"].startswith("q8") else "bf16") + r" (\d+)", ceilings).group(1))
    rate = statistics.median(rates)
    print(f"{c['name']:13} {rate:6.0f} tokens/s ({min(rates):.0f}-{max(rates):.0f}), {200 * LINEARS * rate / peak / 1e9:.0f}% of peak")
END
