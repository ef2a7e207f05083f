"""Classification and regression with encoders by the flags of the paper's own GLUE programs."""
