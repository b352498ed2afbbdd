"""What is asked of a recipe before anything expensive, a file for each thing that it is asked about."""
