"""Takes away from Python what Windows has not: Python imports this by itself where its folder is in PYTHONPATH.

The standard library is imported first, since it chooses its own code by the system. `BARE_PLATFORM`, a variable of the
environment, is what `sys.platform` then says.
"""

import builtins
import importlib
import io
import os
import pathlib
import select
import signal
import subprocess
import sys

CHOOSING = (
    "asyncio.unix_events concurrent.futures.thread ctypes.util multiprocessing shutil tempfile urllib.request uuid "
    "zipfile"
)
MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
NAMES = {
    os: (
        "O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC fchmod fchown fork forkpty getloadavg getpgid getuid "
        "killpg mkfifo nice posix_fadvise posix_fallocate posix_spawn pread preadv pwrite register_at_fork "
        "sched_getaffinity sched_setaffinity sched_setscheduler sched_yield sendfile set_blocking setpriority setsid "
        "sysconf wait4 waitid"
    ),
    signal: (
        "ITIMER_REAL SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 alarm pause "
        "pthread_kill pthread_sigmask setitimer sigwait"
    ),
    select: "epoll poll",
}
PLACES = ("/proc", "/sys")


class _Missing:
    """Finds no module of POSIX."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def _hidden(function):
    def found(path, *args, **kwargs):
        if isinstance(path, str | pathlib.Path) and str(path).startswith(PLACES):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return function(path, *args, **kwargs)

    return found


for module in CHOOSING.split():
    importlib.import_module(module)
subprocess.Popen.kill = lambda child: child.send_signal(9)
sys.meta_path.insert(0, _Missing())
for module in MODULES:
    sys.modules.pop(module, None)
for module, names in NAMES.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
builtins.open = io.open = _hidden(open)
for name in ("listdir", "lstat", "open", "scandir", "stat"):
    setattr(os, name, _hidden(getattr(os, name)))
sys.platform = os.environ.get("BARE_PLATFORM", sys.platform)
