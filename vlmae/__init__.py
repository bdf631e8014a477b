"""vlmae: masked, sparse and memory-lean video-language pre-training in JAX (SMAUG and MuLTI).

    import vlmae
    model = vlmae.load("runs/quickstart")

Names are imported at first use, so that `import vlmae` and `vlmae --help` do not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmae.runs.model import Model, load

    __version__: str

__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    if name == "__version__":
        value = _version()
    elif name in __all__:
        value = getattr(importlib.import_module("vlmae.runs.model"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    metadata = importlib.import_module("importlib.metadata")
    try:
        return metadata.version("vlmae")
    except metadata.PackageNotFoundError:  # a checkout that is on the path, but not installed
        return "0+unknown"


def __dir__() -> list[str]:
    """List what the package offers."""
    return sorted(__all__)
