"""The networks that icexport adds to a diffusers UNet and ControlNet, and their checkpoints."""
