"""From raw text to tokenised domains; the demo's model and text."""
