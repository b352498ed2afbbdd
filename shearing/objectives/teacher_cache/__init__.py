"""What a teacher says of rows, kept on disk: paid for once, read whenever these rows are trained on."""
