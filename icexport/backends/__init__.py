"""A bundle's graphs made ready for one backend, and opened again."""
