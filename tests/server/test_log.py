import json
import subprocess
import sys

CODE = """
import logging, structlog
from server.log import configure_logging
configure_logging("info", worker="w1")
structlog.contextvars.bind_contextvars(request="r1")
log = structlog.get_logger("x")
log.debug("hidden")
log.info("hello", job="j")
logging.getLogger("library").warning("careful %s", 1)
try:
    1 / 0
except ZeroDivisionError:
    log.exception("bad")
"""


def test_every_line_is_json_with_its_ids():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    hello, careful, bad = (json.loads(line) for line in done.stderr.splitlines())
    assert (hello["event"], hello["job"], hello["worker"], hello["level"]) == (
        "hello", "j", "w1", "info",
    )  # fmt: skip
    assert hello["request"] == "r1"
    assert (careful["event"], careful["level"]) == ("careful 1", "warning")
    assert "ZeroDivisionError" in bad["exception"]
    assert done.stdout == ""
