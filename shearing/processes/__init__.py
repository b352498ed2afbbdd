"""The processes of a run: what they do together, and who notices when one is gone."""
