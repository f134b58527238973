"""The machine: files, pictures, installed versions."""
