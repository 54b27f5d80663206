"""From an FP32 graph and windows to a Q/DQ graph for a target."""
