"""What the machine code of every kernel says without a GPU, and what follows from it for one.

`forecast` and `forecasts` read bounds.toml; `python -m benchmarks.machine_code` compiles.
"""

from benchmarks.machine_code.forecast import CHIPS, forecast, forecasts

__all__ = ["CHIPS", "forecast", "forecasts"]
