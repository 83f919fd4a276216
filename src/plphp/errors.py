"""The exceptions that plphp raises on purpose. Each message says what to do about it."""


class PlphpError(Exception):
    """Base of every error raised on purpose."""


class UnsupportedModelError(PlphpError):
    """This model cannot be pruned: its vision tokens or its attention layers cannot be used."""


class UnsupportedModeError(PlphpError):
    """This way of running the model cannot be combined with pruning."""


class UnsupportedTransformersError(PlphpError):
    """The installed transformers lacks a seam that plphp attaches to."""


class UnsupportedVllmError(PlphpError):
    """The installed vLLM is not the version that the plugin was written for."""


class InputError(PlphpError, ValueError):
    """What was given cannot be used: a file, a prompt, an option."""


class InputTypeError(InputError, TypeError):
    """What was given is of a type that cannot be used."""
