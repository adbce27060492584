"""Vision-Language-Vision auto-encoder (arXiv 2507.07104): a captioner distilled from a text-to-image model.

    from vlv import Autoencoder, Captioner, load_config

The names are loaded when they are first used, so that `import vlv` is instant and imports no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlv.api import Autoencoder, Captioner, load_config

__version__ = "0.1.0"
__all__ = ["Autoencoder", "Captioner", "__version__", "load_config"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlv import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
