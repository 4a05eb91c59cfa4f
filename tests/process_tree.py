"""Who a process started and who is left of them, as Linux tells it (`/proc`)."""

import subprocess
from pathlib import Path

HAS_PROC = Path("/proc/self/task").exists()


def children(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
