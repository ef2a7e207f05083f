"""Files: adapters, packed masks, resumable training state, exported models."""
