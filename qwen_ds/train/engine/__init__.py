"""DeepSpeed: the only package that imports it."""

from __future__ import annotations

import sys


def _import_deepspeed() -> None:
    """Import it without MLflow, which its autotuner imports wherever it is installed: a second and
    110 MB in each rank, for nothing. Who wants MLflow can still import it afterwards."""
    if "mlflow" in sys.modules:
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # an import then finds none
    try:
        import deepspeed as deepspeed
    finally:
        del sys.modules["mlflow"]


_import_deepspeed()
