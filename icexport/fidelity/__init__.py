"""How faithfully pictures, and the readings of a probe, follow the control map."""
