"""A real Chromium at a real service with the bundled checkpoint.

Fixtures live as long as this package's tests: playwright keeps an event loop in the thread, in
which others could not run theirs.
"""

import pytest
from playwright.sync_api import sync_playwright

from tests.playground.helpers import DEMO, FLAGS, Visit, find_chromium
from tests.server.embedded.test_service import Service


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(DEMO.parents[1] / "tests" / "playground"):
            item.add_marker(pytest.mark.very_slow)
            item.add_marker(pytest.mark.timeout(400))


@pytest.fixture(scope="package")
def browser():
    """Skips loudly where there is no Chromium; `.ci/run` installs one."""
    path = find_chromium()
    if path is None:
        pytest.skip("NO CHROMIUM: the playground is not tested (install the package chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def service(tmp_path_factory):
    """`lumina serve` whose worker holds one job at a time, so that others visibly wait."""
    running = Service(DEMO, tmp_path_factory.mktemp("playground") / "data", max_running=1)
    running.wait_ready()
    yield running
    running.process.terminate()
    running.process.wait(40)
    running.end()


@pytest.fixture
def visit(browser, service):
    """Opens the page as often as asked; afterwards nothing may have gone wrong unseen."""
    visits = []

    def open_page(**options):
        visits.append(Visit(browser, service, **options))
        return visits[-1]

    yield open_page
    for one in visits:
        one.context.close()
    for one in visits:
        assert one.complaints == []
        assert one.foreign == []


@pytest.fixture
def page(visit):
    """The page in a fresh browser profile."""
    return visit().page
