"""Training of the base model, the probes and the ControlNets. Nothing but ``icexport.cli`` imports it, lazily."""
