"""`python -m benchmarks [PART ...]`: measures, prints tables and writes `benchmarks/results/<device>.csv`."""

import os
import sys

# glibc gives blocks of more than 32 MiB back to the system when they are freed, unless told not to before the process
# starts: then the time of a large tensor is that of its page faults.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
if sys.platform == "linux" and not MALLOC.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], {**os.environ, **MALLOC})

from benchmarks.cli import app  # noqa: E402

app()
