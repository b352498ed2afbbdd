"""Text in files: documents out of JSON, Parquet, Arrow and plain text, chats through a template, and their tokens."""
