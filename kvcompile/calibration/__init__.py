"""What is found in a text, or in the weights, before layers are rewritten."""
