"""Rows, tokenizer, encoding, chat."""
