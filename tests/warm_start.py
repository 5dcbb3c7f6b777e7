"""The command line without the wait for its libraries: a process that has loaded torch and transformers forks one for a call.

``WarmStart(...).command`` is a program to be called in the place of ``preftune``. Each call of it is a process of its own that
runs ``preftune.cli.main.main``, as the installed script does, with the caller's arguments, folder, environment, umask and open
files; signals reach it, and the way it ends is the way the caller sees the program end. What it spares is loading the libraries:
three seconds of processor time a call.

A fork cannot have what only the start of an interpreter gives. So the program starts the installed script in the ordinary way
where a call differs from the process that forks in an environment variable that is not read late, or in a limit of resources;
where libraries would run several threads (OMP_NUM_THREADS is not 1) or a GPU is there; where WARM_START=off; and for the first
call of each verb in a run of the suite. Tests that measure time or memory, that kill, or that ask what is loaded call the
installed script themselves.
"""

# ruff: noqa: PTH109, PTH110, PTH118, PTH120, PTH208
# the program loads as little as it can, and pathlib is half of what it would load
from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# what nothing reads while it is loaded, or, as what preftune itself sets when it trains, nothing that has one thread
READ_LATE = {"PATH", "PWD", "OLDPWD", "SHLVL", "_", "COLUMNS", "LINES", "WARM_START", "TOKENIZERS_PARALLELISM", "GOMP_SPINCOUNT"}
READ_LATE_BEGIN = ("PREFTUNE_", "PYTEST_")
LIMITS = ("AS", "DATA", "FSIZE", "NOFILE", "STACK", "CPU")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
HEAVY = ("torch", "peft", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "scipy.stats")
ROOMS = ("cli", "app", "training", "modeling", "maths", "data", "evaluation", "statistics", "judging", "curation")
DIED = 70  # the exit code of a call whose process could not be made: sysexits' EX_SOFTWARE


def environment_early() -> dict[str, str]:
    """What of the environment may be read while libraries are loaded; an empty PYTHONPATH is none."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in READ_LATE and not name.startswith(READ_LATE_BEGIN) and (name, value) != ("PYTHONPATH", "")
    }


def limits() -> list[list[int]]:
    """The limits of resources of this process."""
    return [list(resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))) for name in LIMITS]


class WarmStart:
    """Keeps the process that forks, until ``stop``, and the program that asks it.

    Parameters
        folder: a new one for the socket and the program. script: the installed ``preftune``.
        started: a folder with a file for each verb that was started in the ordinary way.
    """

    def __init__(self, folder: Path, started: Path, script: Path) -> None:
        import subprocess

        self.command = folder / "bin" / "preftune"
        self.command.parent.mkdir(parents=True)
        started.mkdir(exist_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "socket"))
        listener.listen(64)  # who calls while the libraries are being loaded waits
        offline = {"HF_HUB_OFFLINE": "1"}  # as all tests of the command line have it
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno()), str(script)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[listener.fileno()],
                env={**environment_early(), **offline, "PATH": os.environ["PATH"]},
            )  # fmt: skip
        listener.close()
        told = {
            "socket": str(folder / "socket"), "script": str(script), "started": str(started), "log": str(folder / "log"),
            "environment": {**environment_early(), **offline}, "limits": limits(),
        }  # fmt: skip
        lines = [
            "import sys",
            f"sys.path.insert(0, {os.path.dirname(__file__)!r})",
            "import warm_start",
            f"warm_start.call({told!r})",
        ]
        # the standard library only, whatever the environment says: the program starts in 20 ms
        self.command.write_text(f"#!{sys.executable} -IS\n" + "\n".join(lines) + "\n", encoding="utf-8")
        self.command.chmod(0o755)

    def stop(self) -> None:
        """End the process that forks; calls that still run are killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


# the program: asks for a fork and stands for it


def call(told: dict[str, Any]) -> None:
    """Be the process of one call: send everything to the process that forks, pass on signals, and end as the fork ends."""
    if must_start(told):
        os.execv(told["script"], [told["script"], *sys.argv[1:]])
    asked = {
        "arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd(), "umask": os.umask(0o77),
        "ignored": [int(number) for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN],
    }  # fmt: skip
    body = json.dumps(asked).encode()
    line = socket.socket(socket.AF_UNIX)
    line.connect(told["socket"])
    files = array.array("i", (0, 1, 2))
    line.sendmsg([len(body).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    line.sendall(body)
    process = int.from_bytes(line.recv(4, socket.MSG_WAITALL), "big")
    if process:
        for number in FORWARDED:
            if number not in asked["ignored"]:
                signal.signal(number, lambda number, _: os.kill(process, number))
    said = line.recv(4, socket.MSG_WAITALL)
    if len(said) < 4:
        os.write(2, f"warm_start: the process that forks is gone; see {told['log']}\n".encode())
        os._exit(DIED)
    status = int.from_bytes(said, "big")
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def must_start(told: dict[str, Any]) -> bool:
    """Whether this call needs an interpreter of its own: see the module."""
    environment = environment_early()
    if os.environ.get("WARM_START") == "off" or environment != told["environment"] or limits() != told["limits"]:
        return True
    if environment.get("OMP_NUM_THREADS") != "1" or os.path.exists("/dev/nvidiactl"):
        return True
    verb = next((one for one in sys.argv[1:] if not one.startswith("-")), "none")
    try:
        os.close(os.open(os.path.join(told["started"], verb.replace("/", "-")[:80]), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


# the process that forks


def load() -> None:
    """Import what the verbs import, and see that no thread was started: a fork has only the thread that asks for it."""
    import gc
    import importlib
    import pkgutil

    gc.disable()
    for name in HEAVY:
        importlib.import_module(name)
    for room in ROOMS:
        package = importlib.import_module(f"preftune.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"preftune.{room}."):
            importlib.import_module(module.name)
    gc.freeze()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads after loading"


def serve(listener: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each call until standard input ends (None); the fork returns what it was asked."""
    import selectors

    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    calls: dict[int, tuple[int, socket.socket, int]] = {}  # by descriptor: of a process, or of who called
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                line, _ = listener.accept()
                head, ancillary, _, _ = line.recvmsg(4, socket.CMSG_SPACE(3 * 4))
                files = array.array("i", ancillary[0][2])
                asked = json.loads(received(line, int.from_bytes(head, "big")))
                process = os.fork()
                if process == 0:
                    selector.close()
                    listener.close()
                    for _, other, descriptor in {one[0]: one for one in calls.values()}.values():
                        other.close()
                        os.close(descriptor)
                    line.close()
                    return {**asked, "files": list(files)}
                for one in files:
                    os.close(one)
                line.sendall(process.to_bytes(4, "big"))
                watched = os.pidfd_open(process)
                calls[watched] = calls[line.fileno()] = (process, line, watched)
                selector.register(watched, selectors.EVENT_READ)
                selector.register(line, selectors.EVENT_READ)
            elif key.fd == 0:
                for process in {one[0] for one in calls.values()}:
                    os.kill(process, signal.SIGKILL)
                return None
            elif key.fd in calls:
                process, line, watched = calls[key.fd]
                if key.fd != watched:  # who called was killed
                    os.kill(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
                for one in (watched, line.fileno()):
                    del calls[one]
                    selector.unregister(one)
                with contextlib.suppress(BrokenPipeError):
                    line.sendall(status.to_bytes(4, "big"))
                line.close()
                os.close(watched)


def received(line: socket.socket, size: int) -> bytes:
    """So many bytes."""
    return line.recv(size, socket.MSG_WAITALL)


def become(asked: dict[str, Any], script: str) -> None:
    """Make this fork the process that was asked for."""
    import ctypes
    import gc

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the process that forked it
    os.setsid()
    for number, file in enumerate(asked["files"]):
        os.dup2(file, number)
        os.close(file)
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN if number in asked["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in asked["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    os.umask(asked["umask"])
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    sys.argv[:] = [script, *asked["arguments"]]
    gc.enable()


def leave(main: Callable[[], None]) -> NoReturn:
    """Run and end as an interpreter does, but for taking apart its modules, which for those of torch takes .4 s."""
    import atexit
    import threading
    import traceback

    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException as error:  # noqa: BLE001  # the interpreter would print it, too
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


if __name__ == "__main__":
    sys.path[0] = os.path.dirname(sys.argv[2])  # where the installed script has its own folder
    load()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        become(request, sys.argv[2])
        from preftune.cli.main import main

        leave(main)
