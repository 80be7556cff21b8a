"""Import a package that only an extra of emaopt installs."""

from importlib import import_module
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import a module, or say which extra of emaopt installs what is missing.

    Args:
        module: The name of the module, as in an import statement.
        extra: The extra of emaopt that installs it, such as `tf1`.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: If it, or a module that it imports, is not installed.

    Example:
        >>> require("math", "tf1").sqrt(9.0)
        3.0
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error.name} is not installed. pip install "emaopt[{extra}]"', name=error.name
        ) from None
