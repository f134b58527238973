"""How far a reading is from the control map: sums of errors, without the resized map."""
