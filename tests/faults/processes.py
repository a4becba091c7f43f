"""Run functions in processes of their own, forked from one that has imported everything: they start at once."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

Code = int


def start(function: Callable[[], None], log: Path, rank: int = 0, ranks: int = 1, port: int = 0) -> int:
    """Start a function, as one rank of several; return its process."""
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
        if ranks > 1:
            os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        function()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    """Return a port that is free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def wait(children: list[int], seconds: float = 120) -> list[Code]:
    """Return the exit codes, negative for signals; processes that don't end are killed, and told as -999."""
    codes: dict[int, Code] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(children) and time.monotonic() < end:
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for child in children:
        if child not in codes:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            codes[child] = -999
    return [codes[child] for child in children]


def together(functions: list[Callable[[], None]], log: Path, seconds: float = 120) -> list[Code]:
    """Run functions as the ranks of one training."""
    port = free_port()
    return wait([start(f, log, rank, len(functions), port) for rank, f in enumerate(functions)], seconds)
