"""A report in the forms people and programs read: a table for the terminal, JSON, Markdown, CSV, HTML."""
