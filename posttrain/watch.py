"""Ends what a process started once that process is gone: vLLM's engine outlives a parent that was killed and keeps its GPU memory, so that
the same command could not go on (https://github.com/vllm-project/vllm/issues/55510, open in vLLM 0.33).

Run as a file, with the process's id; standard input is a pipe whose other end that process alone holds, so its end is seen at once.
"""

import os
import select
import subprocess
import sys
from contextlib import suppress

import psutil


def begin() -> subprocess.Popen:
    """A watch over this process, at work. It ends with this process, or when it is killed."""
    watcher = subprocess.Popen([sys.executable, "-P", __file__, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               start_new_session=True)  # of its own: an interruption from the keyboard is not for it
    watcher.stdout.readline()  # it watches
    return watcher


def watch(pid: int) -> None:
    started: dict[int, psutil.Process] = {}
    print("watching", flush=True)
    while not select.select([sys.stdin], [], [], 0.5)[0]:
        with suppress(psutil.Error):
            started |= {p.pid: p for p in psutil.Process(pid).children(recursive=True)}
    for process in started.values():
        if process.pid != os.getpid():
            with suppress(psutil.Error):  # ended already; psutil knows a number that was given anew
                process.kill()


if __name__ == "__main__":
    watch(int(sys.argv[1]))
