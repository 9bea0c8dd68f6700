"""One run in a run directory at a time: a lock that ends with the process that holds it.

A POSIX record lock on `.lock`: the kernel lets go of it however its holder ends, and NFS carries it to other
machines. What stands in the file is for the one who finds it taken. A run that resumes waits WAIT_S for the
one before it, which may be saving.
"""

import errno
import fcntl
import os
import socket
import time
from datetime import datetime
from pathlib import Path

LOCK = ".lock"
WAIT_S = 60.0
POLL_S = 0.5
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class InUse(ValueError):
    """Another run is in the directory."""


class RunLock:
    """The lock of a run directory, which must be there. Held from `acquire` to `close`, or to the end."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.descriptor = run_dir, -1

    def acquire(self, *, wait: bool = False) -> None:
        """InUse if another process has it, after WAIT_S if asked to `wait`; a note where locks are none."""
        path = self.run_dir / LOCK
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        end, said = time.monotonic() + (WAIT_S if wait else 0), False
        while True:
            try:
                fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in NO_LOCKS:
                    words = f"{self.run_dir} cannot be locked on its file system: another run may enter it"
                    print(f"{'note':>8}  {words}", flush=True)
                    return
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            if time.monotonic() >= end:
                holder = os.pread(self.descriptor, 200, 0).decode(errors="replace").strip()
                self.close()
                raise InUse(
                    f"run-dir: {self.run_dir} is in use by {holder or 'a run'}; stop that, or name another"
                )
            if not said:
                print(f"{'note':>8}  another run is in {self.run_dir}: waiting for it to end", flush=True)
                said = True
            time.sleep(POLL_S)
        text = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n"
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, text.encode(), 0)

    def close(self) -> None:
        """Let go; may be called again."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
