"""The one family of errors, split by who has to act.

    SkiplaneError
    ├── ConfigError    exit 2: change a setting
    ├── DataError      exit 3: repair the data
    ├── ClusterError   exit 4: look at the cluster or the tracking server; trying again may help
    └── TrainingError  exit 5: look at the run

A message is one sentence a user can act on: which setting, what it was, what is allowed, what to do.
It lives in the lowest layer, so that every layer can raise it.
"""


class SkiplaneError(Exception):
    """Base of all errors that are meant for a user; printed without a traceback."""

    exit_code = 1


class ConfigError(SkiplaneError):
    """A setting that cannot be met."""

    exit_code = 2


class DataError(SkiplaneError):
    """Data that is there and broken."""

    exit_code = 3


class ClusterError(SkiplaneError):
    """A cluster too small or gone, or a tracking server that does not answer."""

    exit_code = 4


class TrainingError(SkiplaneError):
    """Training that failed: diverged, or died more often than allowed."""

    exit_code = 5
