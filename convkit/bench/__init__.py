"""Problems, and what is measured on them.

``problems``  one description of a problem, its text form, the tests' table
``suites``    the layers and networks that speed claims are made on
``timing``    calls of several candidates in turns, memory beyond the caches, the machine and who else uses it
``peers``     convkit and what it is compared with, as calls on the same tensors
``roofline``  what the machine can do at best, measured, and the floor of a problem that follows
``results``   what a run measured: the file format, ratios and means
``run``       what ``convkit bench`` does

``problems``, ``timing`` and ``results`` need nothing but torch; the rest, what they say.
"""

__all__ = ["BenchError"]


class BenchError(Exception):
    """Something that the person at the keyboard can put right; the ``convkit`` command prints it as one line.

    ``exit_code`` is the status with which the command ends.
    """

    exit_code = 2
