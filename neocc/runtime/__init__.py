"""What the commands do: compile a model, and train it."""

from neocc.runtime.compilation import Compared, Compilation, Remedy, Timing, compile_model

__all__ = ["Compared", "Compilation", "Remedy", "Timing", "compile_model"]
