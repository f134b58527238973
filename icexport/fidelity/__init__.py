"""How faithfully pictures and engines follow the control."""
