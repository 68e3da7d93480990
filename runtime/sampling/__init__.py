"""From logits to a token: sampling options, the filters they stand for, the draw, and log-probabilities."""
