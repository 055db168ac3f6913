"""The server that forks children: what it is, what it reports, and that no process outlives its parent."""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from core.fork_server import Child, ForkServer
from core.processes import can_fork
from core.server_process import receive_message, send_message

HERE = str(Path(__file__).parent)
SOURCE = str(Path(__file__).resolve().parents[1] / "src")


# What children do


def exits(payload: bytes, descriptors: Sequence[int]) -> int:
    return int(payload)


def fails(payload: bytes, descriptors: Sequence[int]) -> None:
    raise ValueError("on purpose")


def sleeps(payload: bytes, descriptors: Sequence[int]) -> None:
    time.sleep(600)


def runs(payload: bytes, descriptors: Sequence[int]) -> None:
    """Send what the statements in the payload leave in `result`."""
    names: dict[str, str] = {}
    exec(payload.decode(), names)
    with socket.socket(fileno=descriptors[0]) as line:
        send_message(line, str(names["result"]).encode())


def told(server: ForkServer, program: str) -> str:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = server.start("test_fork_server.runs", program.encode(), [theirs.fileno()])
        theirs.close()
        message = receive_message(ours)
        child.end()
    assert message is not None
    return message[0].decode()


def is_alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def gone(processes: Sequence[int], *, within: float = 5) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(map(is_alive, processes)):
            return True
        time.sleep(0.01)
    return False


def ended(child: Child) -> int | None:
    code = child.exit_code(10)
    child.end()
    return code


@pytest.fixture(params=["executed", "forked"])
def server(request, monkeypatch) -> Iterator[ForkServer]:
    """Both ways in which a server starts. (The forked one has one thread, whatever this process has.)"""
    monkeypatch.setattr("core.fork_server.can_fork", lambda: request.param == "forked")
    made = ForkServer(["test_fork_server"])
    yield made
    made.close()


def test_the_server_has_one_thread_and_children_that_start_at_once(server):
    children = [server.start("test_fork_server.sleeps", b"") for _ in range(3)]
    assert len({child.pid for child in children}) == 3 and server.pid is not None
    assert len(list(Path(f"/proc/{server.pid}/task").iterdir())) == 1
    for child in children:
        assert Path(f"/proc/{child.pid}/exe").samefile(sys.executable)
        assert f"PPid:\t{server.pid}\n" in Path(f"/proc/{child.pid}/status").read_text()
        child.end()
        assert not is_alive(child.pid or 0) and child.exit_code(0) == -signal.SIGKILL
    assert ended(server.start("test_fork_server.exits", b"0")) == 0


def test_exit_codes_are_reported(server, capfd):
    for code in (0, 7):
        assert ended(server.start("test_fork_server.exits", str(code).encode())) == code
    for number in (signal.SIGKILL, signal.SIGSEGV):
        child = server.start("test_fork_server.sleeps", b"")
        os.kill(child.pid or 0, number)
        assert ended(child) == -number
    assert ended(server.start("test_fork_server.fails", b"")) == 1
    assert "ValueError: on purpose" in capfd.readouterr().err
    running = server.start("test_fork_server.sleeps", b"")
    assert running.exit_code(0.05) is None and is_alive(running.pid or 0)
    running.end()


def test_stop_signals_are_blocked_in_the_server_and_its_children(server):
    child = server.start("test_fork_server.sleeps", b"")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for process in (server.pid, child.pid):
            os.kill(process, number)
    time.sleep(0.1)
    assert is_alive(child.pid) and server.is_alive()
    child.end()
    # In this process they are as before.
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def test_the_server_keeps_no_descriptor_of_its_parent_but_those_that_are_passed(server, tmp_path):
    with (tmp_path / "lock").open("w") as lock, (tmp_path / "passed").open("w") as passed:
        server.pass_fds = (passed.fileno(),)
        listed = told(
            server,
            "import os\nresult = [os.readlink(f'/proc/self/fd/{d}') for d in os.listdir('/proc/self/fd')"
            "\n          if os.path.exists(f'/proc/self/fd/{d}')]",
        )
        assert str(tmp_path / "passed") in listed and lock.name not in listed


def test_a_server_that_was_killed_is_replaced_and_its_children_die(server):
    child = server.start("test_fork_server.sleeps", b"")
    before, pid = server.pid, child.pid
    assert before is not None and pid is not None
    os.kill(before, signal.SIGKILL)
    assert gone([pid])
    assert child.exit_code(5) is None  # with the server that would have told
    child.end()
    assert ended(server.start("test_fork_server.exits", b"3")) == 3
    assert server.pid != before and not is_alive(before)


def test_close_and_garbage_collection_end_everything(server):
    for end in ("close", "finish", "collect"):
        mine = ForkServer(["test_fork_server"])
        child = mine.start("test_fork_server.sleeps", b"")
        pids = [child.pid or 0, mine.pid or 0]
        if end == "close":
            mine.close()
        elif end == "finish":
            mine.finish()
            time.sleep(0.1)
            assert all(map(is_alive, pids))  # it ends with its last child
            child.kill()
        else:
            del mine
            gc.collect()
        assert gone(pids), end
        child.end()


def test_no_server_is_shared_by_a_fork_of_this_process(server):
    kept = server.start("test_fork_server.sleeps", b"")
    here, there = os.pipe()
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            assert server.pid is None
            code = ended(server.start("test_fork_server.exits", b"5"))
            os.write(there, f"{server.pid} {code}".encode())
            server.close()
            kept.end()
        os._exit(0)
    os.waitpid(process, 0)
    other, code = os.read(here, 100).split()
    assert int(other) != server.pid and int(code) == 5
    assert is_alive(kept.pid or 0) and server.is_alive()  # the fork has not touched them
    kept.end()
    os.close(here), os.close(there)


PARENT = """
import os, signal, sys
sys.path[:0] = {path!r}
from core.fork_server import ForkServer
server = ForkServer(["test_fork_server"])
children = [server.start("test_fork_server.sleeps", b"") for _ in range(2)]
print(server.pid, *(child.pid for child in children), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["SIGKILL", "the end of its program", "an exception"])
def test_all_processes_end_with_the_parent(how):
    program = PARENT.format(path=[HERE, SOURCE]) + ("1 / 0\n" if how == "an exception" else "")
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3 and all(map(is_alive, pids))
        if how == "SIGKILL":
            parent.kill()
        else:
            parent.stdin.close()
        parent.wait()
        assert gone(pids, within=2)


def test_an_executed_server_never_imports_from_the_working_directory(tmp_path, monkeypatch):
    for name in ("yaml", "models", "torch", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as `python -c` and notebooks have it
    monkeypatch.setattr("core.fork_server.can_fork", lambda: False)
    with contextlib.closing(ForkServer(["yaml", "models"])) as server:
        program = (
            "import json, os, sys, yaml, models\nresult = yaml.__file__, models.__file__, os.getcwd(), '' in sys.path"
        )
        found = told(server, program)
    assert f"{tmp_path}/" not in found and repr(str(tmp_path)) in found and found.endswith("False)")


def test_a_process_with_threads_executes_its_server(monkeypatch):
    """Such a server has one thread still, and another process may start children after it."""
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        assert not can_fork()
        forks: list[int] = []
        monkeypatch.setattr(ForkServer, "_fork", lambda *_: forks.append(1))
        with contextlib.closing(ForkServer(["torch", "test_fork_server"])) as server:
            seen = told(server, "import os, sys\nresult = len(os.listdir('/proc/self/task')), 'torch' in sys.modules")
            assert seen == "(1, True)"
            with contextlib.closing(ForkServer(["test_fork_server"])) as second:
                assert ended(second.start("test_fork_server.exits", b"4")) == 4
        assert not forks
    finally:
        release.set()
        thread.join()


def test_a_server_with_threads_refuses_to_fork(tmp_path, monkeypatch):
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    errors = tmp_path / "errors.txt"
    with contextlib.closing(ForkServer(["threaded"], errors=errors)) as server:
        child = server.start("test_fork_server.exits", b"0")
        assert child.pid is None and child.exit_code(5) is None
        child.end()
    assert "a process with threads or CUDA cannot be forked safely" in errors.read_text()


def test_a_server_that_cannot_start_is_an_error(tmp_path):
    errors = tmp_path / "errors.txt"
    with contextlib.closing(ForkServer(["no_such_module"], errors=errors)) as server:
        child = server.start("test_fork_server.exits", b"0")
        assert child.pid is None
        child.end()
    assert "No module named 'no_such_module'" in errors.read_text()
