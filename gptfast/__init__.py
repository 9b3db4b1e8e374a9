"""The library behind the recipes in train/: model, data, optimizers, parallelism, the loop.

Nothing is executed at import but one check: that `kernels` is the folder next to this one, and not
the package of the same name on PyPI, which would be imported instead in silence.
"""

from pathlib import Path

import kernels

_found = Path(kernels.__file__ or "").resolve().parent
_ours = Path(__file__).resolve().parent.parent / "kernels"
if _found != _ours:
    raise ImportError(
        f"`import kernels` found {_found}, not {_ours}: another package named kernels is "
        "installed; remove it (pip uninstall kernels) or put this checkout first on PYTHONPATH"
    )
