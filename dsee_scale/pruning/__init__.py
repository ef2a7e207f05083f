"""Which weights go, and how: masks, units, re-fitting, on whole and on sharded models."""
