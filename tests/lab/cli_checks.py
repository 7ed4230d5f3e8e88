"""The `convkit` command, called within the tests' process."""

import pytest

from convkit import cli


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of the command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return ended.value.code, out, err
