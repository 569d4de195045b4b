"""Weights between neocc's checkpoints, Hugging Face's and GPT-Neo's own."""
