"""The embedded reference model: how it is made from nothing, and judged."""
