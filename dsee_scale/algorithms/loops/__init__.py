"""The inner loops of exact selection: in torch operators, compiled for a CPU thread, in Triton for a GPU."""

from dsee_scale.algorithms.loops.choose import choose_loops
from dsee_scale.algorithms.loops.protocol import BINS, INFINITY_DIGIT, Loops, Window
from dsee_scale.algorithms.loops.torch_loops import TorchLoops, in_key_width

__all__ = ["BINS", "INFINITY_DIGIT", "Loops", "TorchLoops", "Window", "choose_loops", "in_key_width"]
