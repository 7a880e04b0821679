"""Signals and output of commands."""

import io
import os
import signal
import sys
import threading

import pytest

from diffmem import cli
from diffmem.cli.terminal import Output, TerminatedError, output, signals


def stream(encoding="utf-8"):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def test_output_shows_what_would_hide_and_what_the_encoding_lacks():
    under = stream("ascii")
    out = Output(under)
    out.write("σ exe\u202egnp\x1b[31m \udcff\nnext\tline\r")
    out.flush()
    assert under.buffer.getvalue() == b"\\u03c3 exe\\u202egnp\\x1b[31m \\xff\nnext\tline\\r"
    out.detach()


def test_colors_reach_terminals(monkeypatch):
    under = stream()
    out = Output(under)
    monkeypatch.setattr(out, "isatty", lambda: True)
    out.write("\x1b[1;31mError\x1b[0m \x1b[2J\x1b]0;title\x07")
    out.flush()
    assert under.buffer.getvalue() == b"\x1b[1;31mError\x1b[0m \\x1b[2J\\x1b]0;title\\x07"
    out.detach()


def test_a_reader_that_goes_away_ends_nothing():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as under:
        out = Output(under)
        for _ in range(3):
            out.write("x" * 10_000)
            out.flush()
        out.detach()


def test_the_streams_come_back(capsys):
    with output():
        print("a\x1bb")
    print("c")
    assert capsys.readouterr().out == "a\\x1bb\nc\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_once(number):
    before = signal.getsignal(number)
    with signals() as ending:
        with pytest.raises(TerminatedError):
            signal.raise_signal(number)
        signal.raise_signal(number)  # from another sender, while the first is obeyed
        assert ending.number == number
        ending.asked -= 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGTERM)

    def ask():
        with signals():
            assert signal.getsignal(signal.SIGTERM) is before

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()


def test_what_an_import_makes_of_a_signal_is_an_interrupt_too(monkeypatch, capfd):
    def swallowed(**_):
        try:
            signal.raise_signal(signal.SIGTERM)
        except TerminatedError:
            raise RecursionError from None

    monkeypatch.setattr(cli.cli, "main", swallowed)
    with signals() as ending:
        assert cli._run([], ending) == cli.INTERRUPTED
    assert "interrupted" in capfd.readouterr().err
    monkeypatch.setattr(cli.cli, "main", lambda **_: 1 // 0)
    with signals() as ending:
        assert cli._run([], ending) == cli.FAILURE


@pytest.mark.parametrize("bindings", [True, False])
def test_nothing_is_reported_as_a_leak_at_exit(bindings, monkeypatch):
    """What is frozen is not collected, and Triton's bindings write lines about it at exit."""
    frozen = []
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(True))
    monkeypatch.setattr("sys.argv", ["diffmem", "--version"])
    if bindings:
        monkeypatch.setitem(sys.modules, "triton", sys)
    else:
        monkeypatch.delitem(sys.modules, "triton", raising=False)
    with pytest.raises(SystemExit):
        cli.main()
    assert bool(frozen) is not bindings
