"""What the scripts beside it ask a running polylora."""
import json
import urllib.request
from pathlib import Path


def ask(url, route, body=None):
    """POST of a body, else GET."""
    request = urllib.request.Request(url + route, body and json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def examples(url, path, count):
    """(tokens, length of the prompt) of each conversation of a file, one JSON object with `messages` a line."""
    out = []
    for line in Path(path).read_text().splitlines()[:count]:
        messages = json.loads(line)["messages"]
        prompt = {"messages": messages[:-1], "add_generation_prompt": True}
        whole = {"messages": messages, "add_generation_prompt": False}
        prompt, whole = (ask(url, "/tokenize", b)["tokens"] for b in (prompt, whole))
        assert whole[:len(prompt)] == prompt
        out.append((whole[:-1], len(prompt)))  # the template ends with a line break
    return out
