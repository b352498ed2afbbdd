"""Any state of a run as a Hugging Face folder: found, written, checked, described, pushed to a hub."""
