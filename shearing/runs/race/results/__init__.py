"""What a race says: its figures, its tables and its picture."""
