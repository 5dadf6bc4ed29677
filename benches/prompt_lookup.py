#!/usr/bin/env python3
"""What drafts by prompt lookup would bring: the tokens that a step would yield if the tokens after the last place where
the context's last N tokens stood before were checked with it. Usage: prompt_lookup.py [--url URL]; needs a running server
with the demo model. An upper bound of the gain: it takes a step of several rows to cost what one of one row costs."""
import argparse
import json
import tempfile
from pathlib import Path

from served import examples

HELD_OUT = Path(__file__).resolve().parent.parent / "tests/golden/heldout.jsonl"
KINDS = {"sql": "SELECT ", "ticket-json": '{"category"', "blurb": "*** "}


def by_kind():
    """The held-out conversations, by what their answers begin with; the rest is the pirate's."""
    kinds = {}
    for line in HELD_OUT.read_text().splitlines():
        answer = json.loads(line)["messages"][-1]["content"]
        kind = next((kind for kind, start in KINDS.items() if answer.startswith(start)), "pirate")
        kinds.setdefault(kind, []).append(line)
    return kinds


def draft(context, least, length):
    """The tokens after the latest earlier place of the longest run of last tokens, 4 to `least`, that has one."""
    for n in range(4, least - 1, -1):
        for start in range(len(context) - n - 1, -1, -1):
            if context[start:start + n] == context[-n:]:
                return context[start + n:start + n + length]
    return []


def tokens_a_step(conversations, least, length):
    tokens = steps = 0
    for whole, prompt in conversations:
        at = prompt
        while at < len(whole):
            right = 0
            for guess, token in zip(draft(whole[:at], least, length), whole[at:]):
                if guess != token:
                    break
                right += 1
            at += right + 1
            steps += 1
        tokens += len(whole) - prompt
    return tokens / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    url = parser.parse_args().url
    print("tokens a step        " + "".join(f"N >= {n}, {k} drafts   " for n in (1, 2) for k in (2, 4, 8)))
    for kind, lines in by_kind().items():
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.write("\n".join(lines))
            file.flush()
            conversations = examples(url, file.name, len(lines))
        figures = [tokens_a_step(conversations, n, k) for n in (1, 2) for k in (2, 4, 8)]
        print(f"{kind:21}" + "".join(f"{figure:<18.2f}" for figure in figures))


if __name__ == "__main__":
    main()
