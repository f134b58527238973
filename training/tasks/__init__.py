"""What is trained, and on which losses."""
