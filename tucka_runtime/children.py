"""How every Python child of this project is started, and how it ends with its parent. Standard library only."""

import ctypes
import os
import signal
import socket
import subprocess
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def python(*arguments: str) -> list[str]:
    """The command line of a Python child. -P: files of the working directory, which are anybody's, must not stand for
    installed modules; without it `-m` and `-c` look there first."""
    return [sys.executable, "-P", *arguments]


def with_channel(module: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts a module with the descriptor of its end of a socket and our process id as arguments. The child and our
    end of the socket. Raises OSError if there can be no process."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            child = subprocess.Popen(
                python("-m", module, str(theirs.fileno()), str(os.getpid())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        except BaseException:
            ours.close()
            raise
    return child, ours


def end_with_parent(parent: int) -> None:
    """Is called in a child: from now on the kernel kills it when `parent`, the process that started it, ends, also
    where the child is stopped or hangs. Ends it at once if that has happened already.

    What counts for the kernel is the thread that started the child: it has to live as long as the process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
