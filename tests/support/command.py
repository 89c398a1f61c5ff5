"""The command line, run in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from depass_fast.cli.main import main

ATTRIBUTE = ["attribute", "--model", "demo", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost such a small model more than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(capsys, *arguments: str) -> str:
    """The stdout of a command that succeeds."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def fail(capsys, *arguments: str) -> str:
    """The one line of an error."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("depass-fast: error: ")
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err
