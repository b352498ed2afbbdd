"""Corpora that others have tokenised, used where they lie: `shear data adopt`."""
