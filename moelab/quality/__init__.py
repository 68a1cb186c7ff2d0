"""What an approximation does to the model's predictions."""
