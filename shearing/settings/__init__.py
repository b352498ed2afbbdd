"""How keys are declared, read from YAML and the command line, and explained."""
