import signal

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # the tests run side by side
hypothesis.settings.register_profile("shared machine", deadline=None)  # a busy one is no fault of the example's
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """Nothing is kept in, or found in, the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def control_c():
    """Also where the tests run in the background of a shell, which has its children ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def no_page(request):
    """Runs draw no page where no test looks at one: it would take longer than many of them."""
    if "report" in request.module.__name__ or request.module.__name__.endswith(("test_examples", "test_cli")):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("horizon.report.record.write_report_of", lambda folder: folder / "report.html")
        yield


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
