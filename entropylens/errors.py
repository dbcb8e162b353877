"""The public exceptions: one class a cause, each message one line with its remedy."""

__all__ = [
    "AllocationError",
    "AnalysisFilesError",
    "DatasetError",
    "DecompositionError",
    "DemoModelError",
    "EntropyLensError",
    "EvaluationFilesError",
    "ModelAccessError",
    "ModelNotFoundError",
    "NonFiniteStatesError",
    "NotADecoderError",
    "OutputDirectoryError",
    "ResponsesError",
    "SettingError",
    "TrainingFilesError",
    "UnknownArchitectureError",
    "WeightsError",
]


class EntropyLensError(Exception):
    """Base of all errors that a user can mend.

    Args:
        cause: what is wrong, naming the input.
        remedy: what to do about it.
        details: further lines for whoever has to look closer (a module tree), or "".
    """

    def __init__(self, cause: str, remedy: str, details: str = "") -> None:
        self.cause = " ".join(cause.split())
        self.remedy = " ".join(remedy.split())
        self.details = details
        super().__init__(self.cause, self.remedy, self.details)

    @property
    def line(self) -> str:
        """Cause and remedy in one line."""
        return f"{self.cause.removesuffix('.')}: {self.remedy}"

    def __str__(self) -> str:
        return f"{self.line}\n{self.details}" if self.details else self.line


class ModelNotFoundError(EntropyLensError):
    """No model has this name or lies at this path."""


class ModelAccessError(EntropyLensError):
    """The model exists but this user may not download it."""


class WeightsError(EntropyLensError):
    """Weights are missing, incomplete, corrupt, or in a format that could run code."""


class NotADecoderError(EntropyLensError):
    """The model is no decoder-only language model."""


class UnknownArchitectureError(EntropyLensError):
    """No registered family describes this model."""


class DecompositionError(EntropyLensError):
    """The captured states do not add up to what the model computes."""


class ResponsesError(EntropyLensError):
    """A responses file or list cannot be used."""


class DatasetError(EntropyLensError):
    """A dataset cannot be found or read."""


class DemoModelError(EntropyLensError):
    """The bundled default model cannot be fetched or is not the one expected."""


class SettingError(EntropyLensError):
    """A setting has a value that cannot be used."""


class OutputDirectoryError(EntropyLensError):
    """The output directory holds something else, or cannot be written."""


class AnalysisFilesError(EntropyLensError):
    """A directory holds no readable analysis, or one of a newer version."""


class EvaluationFilesError(EntropyLensError):
    """A directory holds no readable evaluation, or one of a newer version."""


class NonFiniteStatesError(EntropyLensError):
    """A state of the model is NaN or infinite."""


class TrainingFilesError(EntropyLensError):
    """A directory holds no training run, or one that lacks what is asked for."""


class AllocationError(EntropyLensError):
    """The machine has not enough memory for this setting."""
