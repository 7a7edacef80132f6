"""What a model computes on a text: importance matrices, and the second moments behind calibrated merges."""
