"""Re-fit the kept weights, block after block: the sweep, one block, one matrix, the block's output."""
