"""What is held of processes of ours."""

import os
import select
import signal
import subprocess

PATIENCE = 60  # seconds for what takes one or two on an idle machine


def check_ends_with_parent(command: list[str], stopped: bool) -> None:
    """A parent that prints its child's process id is killed; the child has to end, also where it was stopped."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            if stopped:
                signal.pidfd_send_signal(child, signal.SIGSTOP)
            parent.kill()
            ended, _, _ = select.select([child], [], [], PATIENCE)
            if not ended:
                signal.pidfd_send_signal(child, signal.SIGKILL)
            assert ended, "the child went on without its parent"
        finally:
            os.close(child)
