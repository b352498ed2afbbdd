"""What continued pretraining is made of: what it starts from, and the sizes that it leaves."""
