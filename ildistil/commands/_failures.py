"""Translate what torch raises where another process, or memory, is gone."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ildistil.errors import IldistilError, ProcessError

__all__ = ["process_errors"]

_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out|socket|heartbeat|nccl|gloo|peer", re.IGNORECASE
)
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed|exited unexpectedly)[^.]*")
_MEMORY = re.compile(r"(can't|cannot|not enough|out of) (allocate )?memory|std::bad_alloc", re.IGNORECASE)


@contextmanager
def process_errors() -> Iterator[None]:
    """Raise as a `ProcessError` what torch raises where another process of the run is gone, or memory.

    Raises:
        ProcessError: one of these happened.
    """
    try:
        yield
    except IldistilError:
        raise
    except (RuntimeError, MemoryError, OSError) as error:
        said = str(error)
        if worker := _WORKER.search(said):
            raise ProcessError(
                f"A worker process of the data is gone ({worker[0]}); often for want of memory. Use fewer workers "
                "(--data.num_workers=0), and go on with --resume."
            ) from error
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _MEMORY.search(said):
            raise ProcessError(
                f"There is no memory left ({_short(said) or 'MemoryError'}). Use smaller "
                "batches with accumulate_grad_batches, shorter rows (max_length), or bf16-mixed; and go on with "
                "--resume."
            ) from error
        if torch.distributed.is_initialized() and _PEER.search(said):
            raise ProcessError(
                f"Another process of this run is gone, or can't be reached ({_short(said)}). Its own output says why. "
                "What was saved last can be gone on from: --resume."
            ) from error
        raise


def _short(said: str) -> str:
    """Return the first sentence, without places in torch's sources."""
    return re.split(r"\. |\n", re.sub(r"\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", said))[0][:200]
