"""How long servers take from their start to their first healthy answer, in turns, and their peak memory.

Owns the rounds and the table. Never builds or fetches anything. The thing to know: the files are read once beforehand, so
they lie in the page cache; --touch does the same for free memory, which a virtual machine may have to get from its host
first, at less than a gigabyte a second (all who take memory wait for it then, and who comes first waits most); a contender is a name and a command that says {port} where the port goes.

    python3 benches/loading.py --rounds 5 --warm model.gguf \\
        --contender polylora "./polylora serve --model model.gguf --port {port}" \\
        --contender llama.cpp "./llama-server -m model.gguf --port {port}"

Columns: seconds (median, least and most), CPU seconds, peak resident memory (VmHWM) and how much of it was the process's
own and not the file's (RssAnon, when it was ready).
"""
import argparse
import http.client
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

PATIENCE = 200


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def healthy(port):
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def status(pid):
    """Fields of /proc's status, in MiB."""
    fields = {}
    with open(f"/proc/{pid}/status") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if rest.endswith("kB\n"):
                fields[name] = int(rest.split()[0]) / 1024
    return fields


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(command):
    """Seconds to the first healthy answer, CPU seconds till then, peak memory, own memory."""
    port = free_port()
    with tempfile.TemporaryDirectory() as data, open(os.path.join(data, "log"), "w+") as log:
        words = shlex.split(command.format(port=port, data=data))
        begun = time.monotonic()
        server = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while not healthy(port):
                if server.poll() is not None or time.monotonic() - begun > PATIENCE:
                    log.seek(0)
                    sys.exit(f"{command}: not ready\n{log.read()[-2000:]}")
                time.sleep(0.005)
            seconds = time.monotonic() - begun
            fields = status(server.pid)
            return seconds, cpu_seconds(server.pid), fields["VmHWM"], fields["RssAnon"]
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait()


def touch(gib):
    """Takes and writes memory in another process, which gives it back."""
    code = f"b = bytearray(int({gib} * 2**30))\nfor i in range(0, len(b), 4096): b[i] = 1"
    subprocess.run([sys.executable, "-c", code], check=True)


def warm(path):
    """Reads a file, or the files of a directory."""
    paths = [path] if os.path.isfile(path) else [os.path.join(path, name) for name in os.listdir(path)]
    for path in paths:
        with open(path, "rb") as f:
            while f.read(1 << 22):
                pass


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--warm", action="append", default=[])
    words.add_argument("--touch", type=float, default=0, metavar="GIB")
    words.add_argument("--contender", nargs=2, action="append", required=True, metavar=("NAME", "COMMAND"))
    words = words.parse_args()
    for path in words.warm:
        warm(path)
    seen = {name: [] for name, _ in words.contender}
    for turn in range(words.rounds):
        for name, command in words.contender:
            touch(words.touch)
            seen[name].append(start(command))
            seconds, cpu, peak, own = seen[name][-1]
            print(f"round {turn + 1}  {name:<18} {seconds:7.2f} s  {cpu:6.1f} CPU s  peak {peak:7.0f} MiB  own {own:7.0f} MiB",
                  flush=True)
    print(f"\n{'':<18} {'median s':>9} {'least':>7} {'most':>7} {'CPU s':>7} {'peak MiB':>9} {'own MiB':>9}")
    for name, rows in seen.items():
        seconds, cpu, peak, own = zip(*rows)
        print(f"{name:<18} {statistics.median(seconds):9.2f} {min(seconds):7.2f} {max(seconds):7.2f} "
              f"{statistics.median(cpu):7.1f} {max(peak):9.0f} {max(own):9.0f}")


if __name__ == "__main__":
    main()
