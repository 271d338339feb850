"""What a model is worth: held-out figures and fine-tuned scores."""
