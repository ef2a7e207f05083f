"""The arithmetic of adapted layers, forward and backward: plain, grouped by expert, under the mask, in Triton."""
