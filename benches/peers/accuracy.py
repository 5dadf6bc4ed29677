#!/usr/bin/env python3
"""How far polylora and llama.cpp's server are from the weights of a file computed in f32, both from the same file.

    python3 benches/peers/accuracy.py q8_0 q4_0 q4_1

Needs what run.py needs. Owns one measure: the log-probabilities of held-out text, token by token. Never measures speed. The
thing to know: llama.cpp's server scores no prompt, so it is asked for one token after every prefix, which comes from its
cache, and for as many log-probabilities as it takes to see the text's next token.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import install
import run
import servers

sys.path.append(str(run.ROOT / "benches"))
from served import ask  # noqa: E402  (beside the folder, not in it)

TEXT = run.ROOT / "tests" / "golden" / "heldout.jsonl"
THREADS = 2


def texts(url, at_least):
    """What users and assistants say in the held-out conversations, as token ids."""
    found = []
    for line in TEXT.read_text().splitlines():
        said = "\n".join(m["content"] for m in json.loads(line)["messages"])
        found.append(ask(url, "/tokenize", {"prompt": said, "add_special_tokens": False})["tokens"])
        if sum(len(t) - 1 for t in found) >= at_least:
            break
    return found


def ours(url, text):
    """The log-probability of every token after the first."""
    body = {"model": "base", "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 0}
    return ask(url, "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"][1:]


def llama(url, text):
    vocabulary = ask(url, "/v1/models")["data"][0]["meta"]["n_vocab"]

    def next_token(i):
        for count in (100, vocabulary):  # the whole vocabulary is megabytes of JSON
            body = {"prompt": text[:i], "n_predict": 1, "temperature": -1, "n_probs": count, "cache_prompt": True}
            tops = ask(url, "/completion", body)["completion_probabilities"][0]["top_logprobs"]
            for top in tops:
                if top["id"] == text[i]:
                    return top["logprob"]
        raise RuntimeError(f"no log-probability of token {text[i]}")

    return [next_token(i) for i in range(1, len(text))]


def scored(peers, contender, score, given):
    """The log-probabilities of all texts, in one list; the texts are the first contender's."""
    try:
        servers.start(contender, peers.cache / "log" / f"serve-{contender.name}.txt")
        given = given or texts(contender.url, 1000)
        return given, [p for text in given for p in score(contender.url, text)]
    finally:
        servers.stop(contender)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", choices=run.FILES)
    p.add_argument("--binary", type=Path, default=run.ROOT / "target" / "release" / "polylora")
    p.add_argument("--model", type=Path, default=run.demo(), help="the demo model's file (`polylora serve` fetches it)")
    a = p.parse_args()
    peers = run.Peers(install.cache_dir(), a.model, ["polylora", "llama.cpp"])
    if peers.llama is None:
        raise install.Unavailable("llama.cpp is not there")
    for kind in a.files:
        file = peers.model(kind)
        with tempfile.TemporaryDirectory(prefix="peers-") as work:
            exact, packed = (servers.polylora(a.binary, file, dtype, THREADS, [], Path(work) / dtype)
                             for dtype in ("f32", "auto"))
            peer = servers.llama_cpp(peers.llama / "llama-server", file, THREADS, 1, [])
            given, want = scored(peers, exact, ours, None)
            got = {c.name: scored(peers, c, score, given)[1] for c, score in ((packed, ours), (peer, llama))}
        print(f"{kind}: {len(want)} tokens, mean log-probability in f32 {statistics.mean(want):.4f}")
        for name, have in got.items():
            each = [h - w for h, w in zip(have, want, strict=True)]
            print(f"  {name:10} {statistics.mean(have):.4f}: the mean {abs(statistics.mean(each)):.4f} apart, "
                  f"each token {statistics.mean(map(abs, each)):.4f}")
        sys.stdout.flush()


if __name__ == "__main__":
    run.guarded(main)
