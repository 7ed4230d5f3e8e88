"""The lab: networks, data and training on top of convkit's kernels.

``models``     registry of networks, each a plain builder function
``data``       data sets in splits of uint8 tensors, batched and shuffled reproducibly
``originals``  published data sets, found or fetched, and decoded
``folder``     folders of JPEG and PNG files, streamed
``augment``    batches of pictures changed at random, on the device
``recipes``    frozen dataclasses with every hyper-parameter of a training run, its source and the number to expect
``objectives`` what a network is trained to do with a batch, and how its answers are scored
``train``      the training loop
``runs``       the run folder that it writes and goes on from
``distributed`` several processes on one run
``probe``      weights from elsewhere, frozen trunks and new heads
``experiment`` from a recipe to a run
``evaluate``   what finished runs reach on the test pictures, and beside each other
``sweeps``     one recipe with several values of one field
``reproduce``  what is claimed, tried again, with a verdict
``plots``      the pictures
``demo``       what ``convkit demo`` does; ``data_command``, ``convkit data``; ``commands``, the commands on runs

It needs the packages of the ``lab`` extra; the kernels in :mod:`convkit` never import it.
"""

from __future__ import annotations

import importlib.util

__all__ = ["DataError", "LabError", "require"]


class LabError(Exception):
    """Something that the person at the keyboard can put right; the ``convkit`` command prints it as one line.

    ``exit_code`` is the status with which the command ends: 2 for wrong options, data or installations, 1 for a
    training run that failed, 130 for one that was interrupted.
    """

    exit_code = 2


class DataError(LabError):
    """A data set that is missing, corrupt or something else than its name says."""


def require(*packages: str) -> None:
    """Raises :class:`LabError` naming those of ``packages`` that are not installed, and what to type."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        names = ", ".join(missing)
        verb = "is" if len(missing) == 1 else "are"
        raise LabError(
            f"{names} {verb} not installed: type  pip install --no-build-isolation 'convkit[lab]'  "
            "(or  pip install --no-build-isolation -e '.[lab]'  in a checkout)"
        )
