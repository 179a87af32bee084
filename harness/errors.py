"""What can go wrong: bad input, and figures that would be wrong; and what the user can do about it."""


class HarnessError(Exception):
    """Bad input; the message says where, what, what is allowed and the remedy. The command exits with 2."""


class StudyError(HarnessError):
    """A study file that cannot be used."""


class ModelError(HarnessError):
    """An unknown model, or a depth that the family does not have."""


class DataError(HarnessError):
    """A data set that is unknown, missing or damaged."""


class StoreError(HarnessError):
    """A run directory that cannot be used."""


class RecordError(StoreError):
    """A record that this version cannot read."""


class ResourceError(HarnessError):
    """A trial asks for more than the machine or the cluster has."""


class PredictionError(HarnessError):
    """The memory of a trial cannot be told without running it."""


class MeasurementError(Exception):
    """A figure that would be wrong. The trial ends as failed, rather than with that figure; no fault of the input."""
