"""The command line. Importing it loads no torch: commands import what they need when they run."""
