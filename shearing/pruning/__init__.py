"""What goes: units (`structured`) or single weights (`sparse`); both look at `calibration` text."""
