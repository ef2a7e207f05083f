"""What is put into the model: the adapted layer, and the search for the layers that get one."""
