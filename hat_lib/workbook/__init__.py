"""Notebooks, batches of notebooks, and their environment."""

from hat_lib.config import HatError


def missing(error: ImportError) -> HatError:
    """The error for an import that failed because the packages for notebooks are not installed."""
    return HatError(f"no package {error.name}: pip install 'hat-workbook[workbook]'")
