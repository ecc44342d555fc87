"""One line for the log, and a reader of the log that does not read."""

from __future__ import annotations

import os

import pytest

from edge_agent.supervisor import log


@pytest.fixture
def pipe(monkeypatch):
    """Both ends of a pipe that stands for stderr: (reading end, writing end)."""
    read_fd, write_fd = os.pipe()
    monkeypatch.setattr(log, "STDERR_FD", write_fd)
    yield read_fd, write_fd
    os.close(read_fd)
    os.close(write_fd)


def test_a_line_is_written_and_ended(pipe):
    log.log_line("state running")
    log.log_line("half a \ud800 pair")
    assert os.read(pipe[0], 1000) == b"state running\nhalf a \\ud800 pair\n"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("two\nlines\r", b"two\\nlines\\r\n"),
        ("\x1b[2J\x07\x00", b"\\x1b[2J\\x07\\x00\n"),
        ("\u2028 \x85 \u202e", b"\\u2028 \\x85 \\u202e\n"),
        ("Grüße 日本", "Grüße 日本\n".encode()),
    ],
)
def test_what_could_start_a_line_or_control_a_terminal_is_escaped(pipe, text, written):
    log.log_line(text)
    assert os.read(pipe[0], 1000) == written


def test_a_long_line_is_cut_below_the_size_that_a_pipe_takes_at_once(pipe):
    log.log_line("x" * 10_000)
    assert os.read(pipe[0], 100_000) == b"x" * 4000 + b"\n"


def test_a_reader_that_does_not_read_loses_lines_and_nothing_waits(pipe):
    for _ in range(1000):
        log.log_line("x" * 1000)
    os.set_blocking(pipe[0], False)
    assert 0 < len(os.read(pipe[0], 1 << 20)) < 1000 * 1001


def test_a_reader_that_is_gone_is_not_an_error(monkeypatch):
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    monkeypatch.setattr(log, "STDERR_FD", write_fd)
    log.log_line("nobody reads this")
    os.close(write_fd)
    log.log_line("stderr is closed")
    with pytest.raises(OSError):
        os.fstat(write_fd)
