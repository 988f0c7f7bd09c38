"""Quality, memory and speed of a recipe, beside Hugging Face's own cache."""
