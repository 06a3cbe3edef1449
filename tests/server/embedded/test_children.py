import os
import signal
import subprocess
import sys
import time

from server.embedded.children import Child, spawn, stop_children
from tests.fakes import wait_until

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "
    "time.sleep(60)",
]


def gone(pid):
    """Whether no process, dead or alive but for a zombie, has this id."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_child_has_a_session_of_its_own():
    process = spawn(SLEEP)
    try:
        assert os.getsid(process.pid) == process.pid
    finally:
        process.kill()
        process.wait()


def test_children_die_with_their_parent():
    code = (
        "from server.embedded.children import spawn; import time, sys;"
        "print(spawn([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True);"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.communicate()
    wait_until(lambda: gone(pid), 5, "the child's end")


def test_a_child_that_ends_is_started_again_later_each_time():
    child = Child("brief", lambda: spawn([sys.executable, "-c", "raise SystemExit(3)"]))
    child.start()
    waits = []
    for _ in range(2):
        assert wait_until(child.check, 10, "the end of the child") == 3
        ended = time.monotonic()
        wait_until(lambda: child.check() is None and child.running, 10, "the restart")
        waits.append(time.monotonic() - ended)
    stop_children([child], 5)
    assert waits[0] >= 0.5
    assert waits[1] >= 1.0


def test_stop_kills_those_that_do_not_listen():
    started = time.monotonic()
    children = [Child("polite", lambda: spawn(SLEEP)), Child("stubborn", lambda: spawn(STUBBORN))]
    for child in children:
        child.start()
    time.sleep(0.3)
    stop_children(children, 1.0)
    assert time.monotonic() - started < 5
    assert not any(child.running for child in children)


def test_a_second_signal_cuts_the_grace_short():
    child = Child("stubborn", lambda: spawn(STUBBORN))
    child.start()
    started = time.monotonic()
    stop_children([child], 30.0, impatient=lambda: True)
    assert time.monotonic() - started < 5


def test_signals_to_a_finished_child_are_dropped():
    child = Child("done", lambda: spawn([sys.executable, "-c", ""]))
    child.signal(signal.SIGTERM)
    child.start()
    wait_until(lambda: not child.running, 10)
    child.signal(signal.SIGTERM)
