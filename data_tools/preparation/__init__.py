"""From raw text to tokenised domains: `shear data prepare`."""
