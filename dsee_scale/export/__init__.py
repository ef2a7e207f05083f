"""Plain Hugging Face folders from live engines and from files."""
