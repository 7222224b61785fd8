"""Who listens to a run hears of everything, in order; what fails in a callback is named."""

import pytest

import horizon
from horizon.errors import CallbackError, ConfigError
from horizon.report.callbacks import Callbacks
from tests.report.rows import CHECKPOINT, EVAL, STEP, SUMMARY


class Listener(horizon.Callback):
    def __init__(self):
        self.heard = []

    def on_step(self, row):
        self.heard.append(("step", row))

    def on_eval(self, row):
        self.heard.append(("eval", row))

    def on_checkpoint(self, row):
        self.heard.append(("checkpoint", row))

    def on_end(self, summary):
        self.heard.append(("end", summary))

    def on_failure(self, error):
        self.heard.append(("failure", error))


def test_each_record_reaches_the_method_of_its_kind():
    one, other, error = Listener(), Listener(), OSError("disk")
    callbacks = Callbacks([one, horizon.Callback(), other])
    for record in (STEP, EVAL, CHECKPOINT, SUMMARY):
        callbacks.tell(record)
    callbacks.tell_failure(error)
    expected = [("step", STEP), ("eval", EVAL), ("checkpoint", CHECKPOINT), ("end", SUMMARY), ("failure", error)]
    assert one.heard == other.heard == expected


def test_an_exception_is_raised_with_the_callbacks_name_and_cause():
    class Mine(horizon.Callback):
        def on_eval(self, row):
            raise ValueError("no such column")

    later = Listener()
    callbacks = Callbacks([Mine(), later])
    callbacks.tell(STEP)
    with pytest.raises(CallbackError, match=r"^callback Mine\.on_eval: ValueError: no such column$") as found:
        callbacks.tell(EVAL)
    assert isinstance(found.value.__cause__, ValueError)
    assert later.heard == [("step", STEP)]


def test_ctrl_c_passes_through():
    class Slow(horizon.Callback):
        def on_step(self, row):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Callbacks([Slow()]).tell(STEP)


def test_what_fails_while_a_failure_is_told_is_only_logged(caplog):
    class Bad(horizon.Callback):
        def on_failure(self, error):
            raise RuntimeError("me, too")

    last, error = Listener(), OSError("disk")
    Callbacks([Bad(), last]).tell_failure(error)
    assert last.heard == [("failure", error)]
    assert "callback Bad.on_failure failed, too" in caplog.text and "me, too" in caplog.text


def test_what_would_never_be_called_is_refused():
    class Misspelt(horizon.Callback):
        def on_stepp(self, row): ...

    with pytest.raises(ConfigError, match=r"Misspelt\.on_stepp is no event; expected on_checkpoint, on_end, on_eval"):
        Callbacks([Misspelt()])
    with pytest.raises(ConfigError, match=r"callbacks: <function .* is no horizon\.Callback"):
        Callbacks([lambda row: None])
